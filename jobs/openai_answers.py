"""The shapes of answers, for the OpenAPI document and for those who check what is sent."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ErrorFields(_Shape):
    """What went wrong; always all four."""

    message: str
    type: str
    param: str | None = Field(description="The field that is wrong.")
    code: str | None


class ErrorBody(_Shape):
    """Every answer that is no success, and the last event of a stream that failed."""

    error: ErrorFields


class UsageDetails(_Shape):
    """Beyond OpenAI's."""

    passes: int = Field(description="Forward passes that the choices took.")


class Usage(_Shape):
    """Tokens up to and with the stop or end that ended each choice."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: UsageDetails


class CompletionLogprobsShape(_Shape):
    """One entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="null: the first token of an echo.")
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="In characters of the choice's text.")


class LikelyToken(_Shape):
    """A token and how probable it was."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(LikelyToken):
    """One token of the answer."""

    top_logprobs: list[LikelyToken]


class ChatLogprobsShape(_Shape):
    """One entry for each token."""

    content: list[ChatToken]


class _Choice(_Shape):
    index: int
    finish_reason: Literal["stop", "length"] | None = Field(description="null: not the last piece.")
    stop_reason: int | str | None = Field(description="The token or the text that ended it.")


class DenoisedShape(_Shape):
    """What a denoising step wrote (`stream_steps`)."""

    offset: int = Field(description="Tokens of the choice before the block.")
    length: int = Field(description="Tokens that the block can add.")
    step: int = Field(description="Steps made in the block; 0: it opens, all masks.")
    places: list[int] = Field(description="Where it wrote, counted from the block's first token.")
    tokens: list[str | None] = Field(description="null: the place was masked again.")
    confidences: list[float | None] = Field(description="Of each token as it was written, 0 to 1.")


class BlockShape(_Shape):
    """What a block took (`stream_steps`)."""

    steps: int
    passes: int


class _Piece(_Choice):
    """A piece of a choice; it has one of these two where each step is told of."""

    denoised: DenoisedShape | None = None
    block: BlockShape | None = None


class CompletionChoice(_Choice):
    """A choice."""

    text: str
    logprobs: CompletionLogprobsShape | None


class CompletionPiece(_Piece):
    """A piece of a choice."""

    text: str
    logprobs: CompletionLogprobsShape | None


class ChatMessageShape(_Shape):
    """What the assistant says, or a piece of it."""

    role: Literal["assistant"] | None = None
    content: str
    refusal: None = None


class ChatChoice(_Choice):
    """A choice."""

    message: ChatMessageShape
    logprobs: ChatLogprobsShape | None


class ChatPiece(_Piece):
    """A piece of a choice."""

    delta: ChatMessageShape
    logprobs: ChatLogprobsShape | None


class _Head(_Shape):
    id: str
    created: int
    model: str
    system_fingerprint: str = Field(description="Names the weights.")


class CompletionAnswer(_Head):
    """An answer of `/v1/completions`."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None = None


class CompletionEvent(_Head):
    """An event of its stream."""

    object: Literal["text_completion"]
    choices: list[CompletionPiece]
    usage: Usage | None = None


class ChatAnswer(_Head):
    """An answer of `/v1/chat/completions`."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatEvent(_Head):
    """An event of its stream."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatPiece]
    usage: Usage | None = None


class ModelCard(_Shape):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["cascade"] = "cascade"
    max_model_len: int = Field(
        description="Tokens of prompt and answer together, at most: the context, or what of it the "
        "server's memory holds, which guidance needs twice."
    )
    block_size: int = Field(description="Tokens that are denoised together.")
    infill: Literal["none", "psm"] = Field(description="psm: `suffix` is honoured.")


class ModelList(_Shape):
    """The served models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Status(_Shape):
    """That a part of the server answers."""

    status: Literal["ok"] = "ok"


class Tokenized(_Shape):
    """A text's tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(_Shape):
    """Tokens as text."""

    prompt: str


class TokenizerInfo(_Shape):
    """What a client that counts tokens needs to know."""

    tokenizer_class: Literal["tokenizers"] = "tokenizers"
    sha256: str = Field(description="Of the tokenizer.json.")
    vocab_size: int
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    mask_token: str | None
    special_tokens: dict[str, int]
    chat_template: str


def answers(shape: type[BaseModel], *statuses: int, stream: bool = False) -> dict[Any, Any]:
    """`responses` of a route: its success, and its errors, all of one shape."""
    content: dict[str, Any] = {}
    if stream:
        words = "JSON: one a block, an error as `{error: ...}`; the last one is `[DONE]`."
        one = {"type": "object", "required": ["data"], "description": "One event."}
        data = {"data": {"type": "string", "description": words}}
        content = {"text/event-stream": {"schema": {**one, "properties": data}}}
    errors = {status: {"model": ErrorBody, "description": _WORDS[status]} for status in statuses}
    return {200: {"model": shape, "content": content, "description": "Done."}, **errors}


_WORDS = {
    400: "The request is wrong; `param` names the field.",
    401: "No valid API key.",
    404: "No such route or model.",
    405: "The route has another method.",
    413: "The body is too large.",
    415: "The body is no `application/json`.",
    429: "The server is full; `Retry-After` tells when to try again.",
    431: "Too many headers.",
    500: "The server failed.",
    503: "No sampler answers.",
}
READS = (401, 431, 500)
WRITES = (400, 401, 404, 413, 415, 431, 500)
DECODES = (*WRITES, 429, 503)
