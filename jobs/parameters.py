"""The table of every accepted parameter, made from the request models: `PARAMETERS.md`.

`python -m jobs.parameters` prints it; a test holds the file to it, so that it cannot lie.
"""

import json
from typing import Any

from jobs.diffusion_fields import DiffusionFields
from jobs.openai_requests import NEUTRAL, ChatRequest, CompletionRequest, Request
from jobs.text_routes import DetokenizeRequest, TokenizeRequest

ROUTES: dict[str, type] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
_HEAD = """\
# Parameters of the endpoint

Made by `python -m jobs.parameters` from the models that check the requests. A parameter that is not
here is refused with a 400 that names it; null means left out.
"""


def parameter_table() -> str:
    """The document in Markdown."""
    denoising = set(DiffusionFields.model_fields)
    shared = set(Request.model_fields) - denoising - {"model"}
    parts = [
        _HEAD,
        _table("How both OpenAI routes denoise", _rows(CompletionRequest, denoising)),
        _table("What they share besides", _rows(CompletionRequest, shared)),
    ]
    for route, model in ROUTES.items():
        told_above = denoising | shared if issubclass(model, Request) else set()
        own = set(model.model_fields) - told_above
        parts.append(_table(f"`POST {route}`", _rows(model, own)))
    known = {*CompletionRequest.model_fields, *ChatRequest.model_fields}
    parts.append(
        _table(
            "OpenAI's parameters that are not supported",
            _rows(CompletionRequest, set(NEUTRAL) - known),
        )
    )
    return "\n".join(parts)


def _table(title: str, rows: list[tuple[str, str, str]]) -> str:
    lines = "\n".join(f"| `{name}` | {takes} | {does} |" for name, takes, does in rows)
    return f"## {title}\n\n| field | takes | does |\n|---|---|---|\n{lines}\n"


def _rows(model: Any, names: set[str]) -> list[tuple[str, str, str]]:
    schema = model.model_json_schema()
    required = set(schema.get("required", ()))
    found = []
    for name, field in schema["properties"].items():
        if name in names:
            takes, does = _cells(field, schema.get("$defs", {}))
            found.append((name, f"**required**: {takes}" if name in required else takes, does))
    return found


def _cells(field: dict[str, Any], parts: dict[str, Any]) -> tuple[str, str]:
    does = field.get("description", "")
    default = field.get("default")
    if default not in (None, False, ""):
        does = f"{does} Default: {json.dumps(default)}."
    return _takes(field, parts), does


def _takes(schema: dict[str, Any], parts: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "$ref" in schema:
        schema = parts[schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        told = [_takes(each, parts) for each in schema["anyOf"] if each.get("type") != "null"]
        return ", or ".join(told)
    if "enum" in schema:
        values = [each for each in schema["enum"] if each is not None]
        return ", ".join(f"`{json.dumps(each)}`" for each in values) or "`null`"
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    kind = schema.get("type")
    if kind in ("integer", "number"):
        word = "whole number" if kind == "integer" else "number"
        return f"{word} {_range(schema)}".rstrip()
    if kind == "array":
        most = f" of up to {schema['maxItems']:,}" if "maxItems" in schema else ""
        return f"list{most}: {_takes(schema['items'], parts)}"
    if kind == "string":
        most = f" of up to {schema['maxLength']:,} characters" if "maxLength" in schema else ""
        return f"text{most}"
    if kind == "object" and "properties" in schema:
        inner = (f"`{name}`: {_takes(each, parts)}" for name, each in schema["properties"].items())
        return "{" + ", ".join(inner) + "}"
    return {"boolean": "true, false", "object": "names with texts"}.get(str(kind), str(kind))


def _range(schema: dict[str, Any]) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    told = [
        f"{words} {_number(value)}"
        for words, value in (("from", low), ("above", above), ("to", high), ("below", below))
        if value is not None
    ]
    return " ".join(told)


def _number(value: float) -> str:
    power = abs(int(value)).bit_length() - 1
    if abs(value) >= 2**20 and abs(value) == 2**power:
        return f"{'-' if value < 0 else ''}2^{power}"
    return f"{value:g}"


if __name__ == "__main__":
    print(parameter_table(), end="")
