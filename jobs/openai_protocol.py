"""The OpenAI wire format: request bodies with their limits, and errors of four fields.

Nothing is silently dropped: every field is honoured, or harmless, or refused by name. The limits
stand in the schema, so that they hold before anything is allocated.
"""

import difflib
from typing import Annotated, Any, Literal, Self

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, model_validator

from cascade_model.sampling import SamplingParams

MAX_CHOICES = 8
MAX_PROMPTS = 64
MAX_PROMPT_CHARACTERS = 1_000_000
MAX_BODY_BYTES = 8_000_000
INT64 = 2**63

# OpenAI's fields that change the answer and that we do not honour, with their neutral values.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, False, True),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "top_logprobs": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
}
# The engine's settings that are fields of this server.
OWN = ("rule", "confidence_threshold", "steps_per_block", "max_steps", "deadline_seconds")
# Fields that do not change the answer.
HARMLESS = ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "user")


class ApiError(Exception):
    """An answer other than 200, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.body = error_body(message, type=type, param=param, code=code)


def error_body(
    message: str, *, type: str, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    """`{"error": {message, type, param, code}}`, always all four."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def overloaded() -> ApiError:
    """429 with the time to wait."""
    return ApiError(
        429,
        "The server is at its limit of running requests; try again shortly.",
        type="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": "1"},
    )


def validation_error(error: RequestValidationError) -> ApiError:
    """A 400 that names the first wrong field (FastAPI's own answer would be a 422)."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "The body is not valid JSON.", code="invalid_json")
    place = [part for part in first["loc"] if part != "body"]
    if first["type"] == "value_error":
        cause = first["ctx"]["error"]
        param = getattr(cause, "param", None)
        return ApiError(400, str(cause), param=param, code=getattr(cause, "code", "invalid_value"))
    name = str(place[0]) if place else None
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    message = f"`{name}`: {first['msg']}." if name else f"The body: {first['msg']}."
    return ApiError(400, message, param=name, code=code)


class FieldError(ValueError):
    """A field that is refused by name; carried through pydantic."""

    def __init__(self, message: str, param: str, code: str) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class Request(BaseModel):
    """What completions and chat share, with the diffusion fields of this server."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: (
        Annotated[str, Field(max_length=256)]
        | Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=4)]
        | None
    ) = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    rule: Literal["confidence_threshold", "low_confidence", "sequential"] | None = Field(
        None, description="Which masked positions a denoising step commits."
    )
    confidence_threshold: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="confidence_threshold rule: commit positions at least this probable."
    )
    steps_per_block: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None, description="Ceiling of the denoising steps of a block."
    )
    max_steps: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        None, description="Ceiling of the denoising steps of one whole choice."
    )
    deadline_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None,
        description="Seconds in which a choice should be whole, from when a sampler has it; the "
        "same seed need not give the same text then.",
    )
    stop_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=64)] | None = Field(
        None, description="Tokens that end a choice, besides the model's own."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, value in body.items():
            if name in UNSUPPORTED and name not in cls.model_fields:
                if not any(
                    value == v and type(value) in (type(v), float) for v in UNSUPPORTED[name]
                ):
                    raise FieldError(
                        f"`{name}` is not supported by this server; leave it out.",
                        name,
                        "unsupported_parameter",
                    )
            elif name not in cls.model_fields and name not in HARMLESS:
                near = difflib.get_close_matches(name, list(cls.model_fields), n=1)
                cure = f" Did you mean `{near[0]}`?" if near else " Leave it out."
                raise FieldError(f"`{name}` is not known.{cure}", name, "unknown_parameter")
        return {name: body[name] for name in body if name in cls.model_fields}

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise FieldError(
                "`stream_options` needs `stream: true`.", "stream_options", "invalid_value"
            )
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, empty ones left out."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int, seed: int) -> SamplingParams:
        """The engine's settings; a field that is null takes its default."""
        optional = {name: value for name in OWN if (value := getattr(self, name)) is not None}
        return SamplingParams(
            max_tokens=max_tokens,
            seed=seed,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            stop_ids=tuple(self.stop_ids or ()),
            **optional,
        )


Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
Tokens = Annotated[
    list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)
]


class CompletionRequest(Request):
    """Body of `POST /v1/completions`."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    suffix: Text | None = Field(
        None,
        description="What follows the completion, of every prompt; for a model that was trained on "
        "rearranged documents (infill=psm).",
    )

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(BaseModel):
    """One text part of a message; images and sound are refused by the type."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=64)]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Role and text, as chat templates want them."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Request):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise FieldError(
                f"`max_tokens`={both[0]} and `max_completion_tokens`={both[1]} differ; "
                "give `max_completion_tokens` alone.",
                "max_tokens",
                "invalid_value",
            )
        return self

    @property
    def length(self) -> int | None:
        """Tokens to generate at most; None: what the context leaves."""
        return self.max_completion_tokens or self.max_tokens
