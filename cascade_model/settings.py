"""What every dataclass of settings does with itself: check, become JSON, be told from another."""

import dataclasses
import functools
import hashlib
import json
import numbers
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from cascade_model.errors import InputError


def check(condition: bool, sentence: str) -> None:
    """Raise `InputError(sentence)` unless the condition holds."""
    if not condition:
        raise InputError(sentence)


def check_types(config: Any, where: str = "") -> None:
    """Raise `InputError` where a setting of a dataclass is not of its declared type: a number, a
    truth value, one of some names, or none where that is allowed. Others are not looked at."""
    for name, hint in _hints(type(config)).items():
        value, origin, kinds = getattr(config, name), typing.get_origin(hint), typing.get_args(hint)
        if origin is Literal:
            fits, wanted = value in kinds, f"one of {', '.join(kinds)}"
        else:
            may_be_none = type(None) in kinds
            kind = next((each for each in kinds if each is not type(None)), hint)
            if kind not in _PLAIN or origin not in (None, types.UnionType):
                continue
            accepted, wanted = _PLAIN[kind]
            is_truth = isinstance(value, bool)
            fits = isinstance(value, accepted) and is_truth == (kind is bool)
            fits = fits or (value is None and may_be_none)
        check(fits, f"{where}{name}={value!r} must be {wanted}")


_PLAIN: dict[Any, tuple[Any, str]] = {
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    bool: (bool, "true or false"),
}


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values, so that it equals itself read back from a file."""
    return _listed(dataclasses.asdict(config))


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value


def leaves(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their full names, such as `filters.min_words`."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        full = f"{prefix}{name}"
        found |= leaves(value, f"{full}.") if isinstance(value, Mapping) else {full: value}
    return found


_DIGEST = re.compile(r"[0-9a-f]{64}")


def shown(value: Any) -> Any:
    """A value as a sentence for people shows it: of a digest the first 12 digits, which tell it
    from any other well enough."""
    is_digest = isinstance(value, str) and _DIGEST.fullmatch(value)
    return value[:12] if is_digest else value


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value in its one canonical spelling."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
