"""A document against a JSON schema: one sentence for each mistake, with its place and its cure."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import jsonschema.validators

from cascade_model.nearest import cure

_SPOKEN = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "array": "a list",
    "object": "a group of settings",
    "null": "null",
}
_SHOWN = 60


def mistakes_by(schema: dict[str, Any], document: Any, known_to: str = "") -> list[str]:
    """Every breach of the schema, in its order; empty when there is none.

    The schema says itself which draft it follows. A missing setting that a misspelt one stands for
    is told once. `known_to` names the program, with its version, whose settings the schema has.
    """
    if found := list(_odd_keys(document, "")):
        return found  # a schema knows keys of text alone
    kind = jsonschema.validators.validator_for(schema)
    for error in kind(schema).iter_errors(document):
        found += _told(error, known_to)
    found = list(dict.fromkeys(found))
    meant = " ".join(each for each in found if "did you mean" in each)
    return [each for each in found if not (_is_missing(each) and each.split()[0] in meant)]


def _odd_keys(value: Any, prefix: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                yield f"`{prefix}{key}` is a key that is no text; write it in quotes"
            yield from _odd_keys(inner, f"{prefix}{key}.")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _odd_keys(inner, f"{prefix.removesuffix('.')}[{index}].")


def _is_missing(sentence: str) -> bool:
    return sentence.endswith(" is missing; add it")


def _told(error: Any, known_to: str) -> list[str]:
    """The sentences of a `jsonschema.ValidationError`, most of whose fields are untyped."""
    place, wanted, value = _place(error), error.validator_value, error.instance
    prefix = f"{place}." if place else ""
    if error.validator == "additionalProperties" and isinstance(wanted, bool):
        known, version = error.schema.get("properties", {}), f" in {known_to}" if known_to else ""
        return [
            f"no setting `{prefix}{key}`{version}; {cure(key, known, prefix)}"
            for key in value
            if key not in known
        ]
    if error.validator == "required":
        return [f"`{prefix}{key}` is missing; add it" for key in wanted if key not in value]
    named = f"`{place}`" if place else "the document"
    return [f"{named} is {_shown(value)}; {_rule(error)}"]


def _rule(error: Any) -> str:
    """What the value must be, in words."""
    wanted = error.validator_value
    match error.validator:
        case "type":
            kinds = [wanted] if isinstance(wanted, str) else wanted
            return f"it must be {' or '.join(_SPOKEN[kind] for kind in kinds)}"
        case "enum" | "const":
            values = [str(each) for each in (wanted if error.validator == "enum" else [wanted])]
            return f"it must be {' or '.join(values)}"
        case "minimum":
            return f"it must be at least {wanted}"
        case "maximum":
            return f"it must be at most {wanted}"
        case "minItems":
            return f"it must have {wanted} or more"
        case "anyOf" if all("type" in each for each in wanted):
            told = error.schema.get("description")
            return f"it must be {told or ' or '.join(_SPOKEN[each['type']] for each in wanted)}"
        case _:
            return f"it breaks the rule `{error.validator}: {_shown(wanted)}`"


def _place(error: Any) -> str:
    place = ""
    for part in error.absolute_path:
        place += f"[{part}]" if isinstance(part, int) else f".{part}"
    return place.removeprefix(".")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
