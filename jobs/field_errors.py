"""What pydantic refuses, told in one sentence: the field, its value and what is allowed.

A field that may be one of several kinds gets an error for each of them. The one to tell of is of
the kind that was meant: one whose shape fits and whose value does not comes first, then the one
that got furthest into the value.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError

from jobs.openai_protocol import ApiError, UnknownField

_SHOWN = 60
_ALLOWED = {
    "string_type": "a text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "finite_number": "a finite number",
    "string_too_long": "at most {max_length} characters long",
    "too_long": "at most {max_length} long",
    "too_short": "at least {min_length} long",
    "literal_error": "one of {expected}",
}
"""By pydantic's type of the error; in braces, its context."""

Error = Mapping[str, Any]


def validation_error(error: RequestValidationError) -> ApiError:
    """A 400 that names the first wrong field (FastAPI's own answer would be a 422)."""
    place = _place(error.errors()[0])
    field = str(place[0]) if place else None
    meant = _meant([each for each in error.errors() if _place(each)[:1] == place[:1]], error.body)
    first = meant[0]
    if first["type"] == "value_error":
        cause = first["ctx"]["error"]
        if isinstance(cause, UnknownField):
            cause = cause.at(_spelled(_path(_place(first), error.body)))
        param, code = getattr(cause, "param", None), getattr(cause, "code", "invalid_value")
        return ApiError(400, str(cause), param=field or param, code=code)
    codes = {"missing": "missing_required_parameter"}
    code = codes.get(first["type"], "invalid_value")
    return ApiError(400, _sentence(meant, error.body), param=field, code=code)


def _meant(errors: Sequence[Error], body: Any) -> list[Error]:
    """Those of one place that tell best what is wrong."""
    fitting = [each for each in errors if not each["type"].endswith("_type")]
    if fitting:
        return fitting[:1]
    paths = [_path(_place(each), body) for each in errors]
    furthest = max(paths, key=len)
    return [each for each, path in zip(errors, paths, strict=True) if path == furthest]


def _sentence(errors: Sequence[Error], body: Any) -> str:
    """One sentence about errors of one place."""
    first, place = errors[0], _place(errors[0])
    if first["type"] == "missing":
        return f"`{_spelled([*_path(place[:-1], body), place[-1]])}` is missing; give it."
    name = _spelled(_path(place, body))
    told = [_allowed(each) for each in errors]
    value = json.dumps(first["input"], ensure_ascii=False, default=str)
    value = value if len(value) <= _SHOWN else f"{value[:_SHOWN]}…"
    where = f"`{name}`={value}" if name else f"The body {value}"
    return f"{where} must be {' or '.join(dict.fromkeys(told))}."


def _allowed(error: Error) -> str:
    context = {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in error.get("ctx", {}).items()
    }
    told = _ALLOWED.get(error["type"])
    if error["type"] == "literal_error" and " or " not in error["ctx"]["expected"]:
        told = "{expected}"
    return error["msg"] if told is None else told.format(**context)


def _place(error: Error) -> list[Any]:
    return [part for part in error["loc"] if part != "body"]


def _path(place: Sequence[Any], body: Any) -> list[Any]:
    """A place without pydantic's names of the kinds that it tried."""
    path = []
    for part in place:
        is_item = isinstance(body, list) and isinstance(part, int)
        if is_item or (isinstance(body, dict) and part in body):
            path.append(part)
            body = body[part]
    return path


def _spelled(path: Sequence[Any]) -> str:
    """`messages[0].role`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part[:64]}" for part in path]
    return "".join(parts).removeprefix(".")
