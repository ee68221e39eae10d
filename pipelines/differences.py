"""In what a job of `generate` or `teach` differs from the one that its output folder was made by.

A folder is bound to what its bytes depend on. Some of that is known by a digest only, which
tells a person nothing: it is named by the setting that it was made of.
"""

from collections.abc import Mapping
from typing import Any

from cascade_model.settings import leaves

_MODEL = "weights_sha256"
"""Stands in the identity of a job whose rows a model here answers, and of no other."""
_ANSWERER = (_MODEL, "model_name", "fingerprint", "chat_template_sha256", "engine.")
"""How the names begin that tell of who answers."""
_MOST = 4
"""So many differences are told one by one."""


def differences(
    earlier: Mapping[str, Any], job: Mapping[str, Any], named: Mapping[str, str]
) -> list[str]:
    """Each setting that differs, with its value now and then; none where the jobs are one.

    `named` gives the words for what is known by a digest, such as `input=prompts.jsonl` for
    `input_sha256`; those for the weights name who answers.
    """
    old, new = leaves(earlier), leaves(job)
    told: list[str] = []
    if (_MODEL in old) != (_MODEL in new):
        before = "a model" if _MODEL in old else "an endpoint"
        told.append(f"{named[_MODEL]} is to answer, the folder was made by {before}")
        old, new = _without_answerer(old), _without_answerer(new)
    names = [*new, *(name for name in old if name not in new)]
    told += [_told(name, old, new, named) for name in names if _differs(name, old, new)]
    more = len(told) - _MOST
    return [*told[:_MOST], f"and {more} more"] if more > 0 else told


def _without_answerer(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if not name.startswith(_ANSWERER)}


def _differs(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """A setting that was not known yet is equal to one that is not given."""
    return old.get(name) != new.get(name)


def _told(
    name: str, old: Mapping[str, Any], new: Mapping[str, Any], named: Mapping[str, str]
) -> str:
    if name in named:
        return f"{named[name]} is not what the folder was made with"
    now = f"{name}={new[name]}" if name in new else f"no {name}"
    return f"{now}, the folder was made {f'with {old[name]}' if name in old else 'without it'}"
