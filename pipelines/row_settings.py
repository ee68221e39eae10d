"""How a row is decoded: its own settings laid over those of the job, and checked alike."""

import contextlib
import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cascade_model.errors import InputError
from cascade_model.nearest import cure
from cascade_model.sampling import SamplingParams
from cascade_model.settings import check

STOP = "stop"
_NOT_WRITTEN = ("deadline_seconds", "logprobs", "report_margin")
"""They make an output that is not the same again, or one that has no column."""
NAMES = (
    *(each.name for each in dataclasses.fields(SamplingParams) if each.name not in _NOT_WRITTEN),
    STOP,
)
"""What a row may set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """The settings of one completion, or of all that have none of their own."""

    params: SamplingParams
    stop: tuple[str, ...] = ()
    """Texts that end it; they are not part of it."""


def row_seed(job_seed: int, row: int) -> int:
    """The seed (63 bits) of one row: a function of the job's seed and the row's number alone."""
    hashed = hashlib.sha256(f"cascade generate {job_seed} {row}".encode()).digest()
    return int.from_bytes(hashed[:8], "little") >> 1


def decoding_of(row: int, given: Mapping[str, Any], common: Decoding) -> Decoding:
    """The settings of a row that gives some of its own; null is not given.

    The seed is the row's own where it has one, else `row_seed`. Raises `InputError` for a name that
    is no setting and for a value that cannot be one.
    """
    own = {name: value for name, value in given.items() if value is not None}
    for name in own:
        if name not in NAMES:
            raise InputError(f"{name[:80]} is no setting of a row; {cure(name, NAMES)}")
    stop = _stops(own.pop(STOP)) if STOP in own else common.stop
    values = {name: _as_declared(name, value) for name, value in own.items()}
    seed = {"seed": row_seed(common.params.seed, row)}
    return Decoding(params=dataclasses.replace(common.params, **(seed | values)), stop=stop)


def settings_in(cell: Any) -> dict[str, Any]:
    """The settings of a cell: a mapping, or the text of a JSON object; none where it is null."""
    given: Any = cell
    if isinstance(cell, str):
        with contextlib.suppress(ValueError):  # then the text itself is refused below
            given = json.loads(cell) if cell else None
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise InputError(
            f"{repr(given)[:80]} holds no settings; give an object such as {{'temperature': 0.7}}"
        )
    return given


def _stops(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    check(
        isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts),
        f"stop={repr(value)[:80]} must be a text or a list of texts",
    )
    return tuple(texts)


def _as_declared(name: str, value: Any) -> Any:
    """A cell as the setting's type wants it: tables write whole numbers with gaps as floats, and
    have lists for tuples."""
    if isinstance(value, list):
        return tuple(value)
    kinds = (_HINTS[name], *typing.get_args(_HINTS[name]))
    is_whole = isinstance(value, float) and value.is_integer()
    return int(value) if is_whole and int in kinds and float not in kinds else value


_HINTS = typing.get_type_hints(SamplingParams)
