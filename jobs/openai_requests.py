"""Request bodies of the OpenAI routes, with their limits.

Nothing is silently dropped: every field is honoured, or told to have no effect, or refused by name.
The limits stand in the schema, so that they hold before anything is allocated.
"""

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    model_validator,
)

from cascade_model.chat_template import as_templates_say
from cascade_model.sampling import SamplingParams
from jobs.diffusion_fields import DiffusionFields
from jobs.openai_protocol import (
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_PROMPT_CHARACTERS,
    MAX_PROMPTS,
    MAX_REQUESTED_TOKENS,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    FieldError,
    StrictBody,
    UnknownField,
    require_known,
    require_total,
)

INT64 = 2**63
INT31 = 2**31
DEFAULT_MAX_TOKENS = 16  # OpenAI's for completions; a chat gets what `max_model_len` leaves

# OpenAI's fields that change the answer and that we do not honour, with their neutral values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "max_completion_tokens": (None,),
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
NO_EFFECT = "Taken for compatibility; changes nothing."
NOT_SUPPORTED = "Anything else is refused."

Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
Tokens = Annotated[
    list[Annotated[int, Field(ge=0, lt=INT31)]],
    Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS),
]
Stop = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]
Label = Annotated[str, Field(max_length=512)]


def _with_neutral(schema: dict[str, Any]) -> None:
    """Tell the OpenAPI document of the fields that are taken with a neutral value only."""
    for name, values in NEUTRAL.items():
        described = {"enum": list(values), "description": NOT_SUPPORTED}
        schema["properties"].setdefault(name, described)


class StreamOptions(StrictBody):
    """`stream_options`."""

    include_usage: bool = Field(False, description="End the stream with an event of usage.")


class Request(DiffusionFields):
    """What completions and chat share, with the diffusion fields of this server."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_with_neutral)
    prompt_field: ClassVar[str]
    """The field of what is answered."""
    model: str = Field(description="The served model's name.")
    stream: bool | None = Field(False, description="Answer by events, one a block.")
    stream_options: StreamOptions | None = Field(
        None, description="`include_usage`: end the stream with an event of usage."
    )
    stream_steps: bool | None = Field(
        False,
        description="With `stream`: tell each denoising step as it is made, by a piece without "
        "text that has `denoised`: `offset` (tokens of the choice before the block), `length` "
        "(tokens that the block can add), `step` (0: the block opens, all masks), and of the "
        "`places` it wrote `tokens` (null: masked again) and `confidences`. A block's own piece "
        "then has `block`: its `steps` and `passes`. Changes no token.",
    )
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        1, description="Choices of each prompt; choice i is the same for every n."
    )
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = Field(
        None,
        description="The same request and seed give the same text, whatever else is running. "
        "Left out: drawn by the server.",
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="Texts that end a choice; they are cut off."
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        1.0, description="0 takes the most probable token of a place."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        1.0, description="Draw from the smallest set of tokens that reaches this probability."
    )
    user: Label | None = Field(None, description=NO_EFFECT)
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = Field(
        None, description=NO_EFFECT
    )
    prompt_cache_key: Label | None = Field(None, description=NO_EFFECT)
    safety_identifier: Label | None = Field(None, description=NO_EFFECT)
    service_tier: Label | None = Field(None, description=NO_EFFECT)

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, value in body.items():
            if name in cls.model_fields:
                continue
            if name in NEUTRAL:
                if not any(value == v and type(value) in (type(v), float) for v in NEUTRAL[name]):
                    raise FieldError(
                        f"`{name}` is not supported by this route; leave it out.",
                        name,
                        "unsupported_parameter",
                    )
                continue
            raise UnknownField(name, cls.model_fields)
        return {name: body[name] for name in body if name in cls.model_fields}

    @model_validator(mode="after")
    def _what_needs_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise FieldError("`stream_options` needs `stream: true`.", "stream_options")
        if self.stream_steps and not self.stream:
            raise FieldError("`stream_steps` needs `stream: true`.", "stream_steps")
        return self

    @property
    def choices(self) -> int:
        """How many choices of each prompt."""
        return 1 if self.n is None else self.n

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, empty ones left out."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    @abstractmethod
    def length_field(self) -> str:
        """The field that the length is given by."""

    @property
    def gives_length(self) -> bool:
        """Whether the client itself gave a length: null is none."""
        return any(
            name in self.model_fields_set and getattr(self, name) is not None
            for name in ("max_tokens", "max_completion_tokens")
        )

    @property
    @abstractmethod
    def logprob_count(self) -> int | None:
        """How many likeliest tokens to tell of each place besides its own; none: no logprobs."""

    def sampling(self, max_tokens: int, seed: int) -> SamplingParams:
        """The engine's settings; a field that is null takes its default."""
        return SamplingParams(
            max_tokens=max_tokens,
            seed=seed,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            logprobs=self.logprob_count,
            **self.settings(),
        )


class CompletionRequest(Request):
    """Body of `POST /v1/completions`."""

    prompt_field: ClassVar[str] = "prompt"
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
    ) = Field(description="A text, token ids, or a list of either.")
    suffix: Text | None = Field(
        None,
        description="What follows the completion, of every prompt. A model that was trained on "
        "rearranged documents (infill=psm) writes what it takes to get there; a bidirectional one, "
        "or where prompt, hole and suffix end within one block, fills exactly `max_tokens` tokens, "
        "which no token ends. Elsewhere the model could not see it, and it is refused.",
    )
    max_tokens: Annotated[int, Field(ge=0, lt=INT31)] | None = Field(
        DEFAULT_MAX_TOKENS,
        description="Tokens of a choice at most; 0 with `echo` alone, which decodes nothing.",
    )
    echo: bool | None = Field(
        False,
        description="Put the prompt before the text. With `logprobs` its tokens are scored: each "
        "given the earlier blocks, the tokens on its left in its block and masks on its right "
        "(what rule sequential tells); the first has null. The sum is exact, also of any part.",
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        None,
        description="Tell each token's log-probability (nats, before temperature, top_k and top_p, "
        "in the step that filled its place) and those of this many likeliest ones.",
    )

    @model_validator(mode="after")
    def _bounded_together(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise FieldError("`max_tokens`=0 needs `echo: true`; use at least 1.", "max_tokens")
        if self.suffix and self.echo and self.logprobs is not None:
            raise FieldError(
                "`echo` with `logprobs` scores a text as it stands, so without a `suffix`; leave "
                "one of them out.",
                "suffix",
            )
        prompts = self.prompts
        require_total(prompts, MAX_PROMPT_CHARACTERS, "prompt", "characters or tokens")
        wanted = len(prompts) * self.choices * self.length
        if wanted > MAX_REQUESTED_TOKENS:
            raise FieldError(
                f"{len(prompts)} prompts x `n`={self.choices} x `max_tokens`={self.length} ask for "
                f"{wanted} tokens, over {MAX_REQUESTED_TOKENS}; lower one of them.",
                "max_tokens",
            )
        return self

    @property
    def length(self) -> int:
        """Tokens to generate at most."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def length_field(self) -> str:
        """See `Request`."""
        return "max_tokens"

    @property
    def logprob_count(self) -> int | None:
        """See `Request`."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class _Part(BaseModel):
    """An object of a conversation. What it is comes first, and a field that there is not last: an
    image is to be refused as one, and not by the fields of an image."""

    model_config = ConfigDict(strict=True, json_schema_extra={"additionalProperties": False})

    @model_validator(mode="wrap")
    @classmethod
    def _require_known_last(cls, given: Any, read: ModelWrapValidatorHandler[Self]) -> Self:
        part = read(given)
        require_known(cls, given)
        return part


class TextPart(_Part):
    """One text part of a message; images and sound are refused by the type."""

    type: Literal["text"]
    text: Text


def _without_nulls(message: Any) -> Any:
    """A message as a client's library gives its own answers back: with fields that are null."""
    if not isinstance(message, dict):
        return message
    return {name: value for name, value in message.items() if value is not None}


class _Message(_Part):
    model_config = ConfigDict(title="Message")
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=64)]

    @property
    def text(self) -> str:
        """The content as one text."""
        parts = self.content
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)

    def plain(self) -> dict[str, str]:
        """Role and text, as chat templates want them."""
        return {"role": as_templates_say(self.role), "content": self.text}


Message = Annotated[_Message, BeforeValidator(_without_nulls)]
Messages = Annotated[list[Message], Field(min_length=1, max_length=1024)]


class ChatRequest(Request):
    """Body of `POST /v1/chat/completions`."""

    prompt_field: ClassVar[str] = "messages"
    messages: Messages = Field(
        description="The conversation; written by the model's chat template. A text cannot write a "
        "special token. `developer` is `system`."
    )
    max_completion_tokens: Annotated[int, Field(ge=1, lt=INT31)] | None = Field(
        None, description="Tokens of a choice at most. Default: what `max_model_len` leaves."
    )
    max_tokens: Annotated[int, Field(ge=1, lt=INT31)] | None = Field(
        None, description="The older name of `max_completion_tokens`."
    )
    logprobs: bool | None = Field(
        False,
        description="Tell each token's log-probability (nats, before temperature, top_k and top_p, "
        "in the step that filled its place).",
    )
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        None, description="With `logprobs`: also those of this many likeliest tokens."
    )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise FieldError(
                f"`max_tokens`={both[0]} and `max_completion_tokens`={both[1]} differ; "
                "give `max_completion_tokens` alone.",
                "max_tokens",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("`top_logprobs` needs `logprobs: true`.", "top_logprobs")
        texts = [message.text for message in self.messages]
        require_total(texts, MAX_PROMPT_CHARACTERS, "messages", "characters")
        return self

    @property
    def length(self) -> int | None:
        """Tokens to generate at most; None: what `max_model_len` leaves."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def length_field(self) -> str:
        """See `Request`."""
        return "max_completion_tokens" if self.max_tokens is None else "max_tokens"

    @property
    def logprob_count(self) -> int | None:
        """See `Request`."""
        return (self.top_logprobs or 0) if self.logprobs else None
