"""What the routes know of the model that they serve, and where its blocks and scores come from.

The ingress holds no weights. Blocks come from `decode`, scores of given texts from `score`; both
are samplers elsewhere, or in tests a model of this process.
"""

import dataclasses
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import cached_property
from typing import Any

from cascade_model.chat_template import ChatTemplate
from cascade_model.config import ModelConfig
from cascade_model.engine_config import Room
from cascade_model.errors import InputError
from cascade_model.requests import (
    between,
    check_infilling,
    check_prompt,
    check_request,
    check_room,
    longest_text,
)
from cascade_model.sampling import SamplingParams
from cascade_model.settings import check
from cascade_model.text_stream import TokenLogprob
from cascade_model.tokenizer import Tokenizer
from jobs.choices import Decode
from jobs.gate import Keys
from jobs.logprobs import TokenSpelling
from jobs.openai_protocol import ApiError
from jobs.openai_requests import ChatRequest, CompletionRequest

Score = Callable[[list[int], int], Awaitable[Sequence[TokenLogprob | None]]]
"""Tokens, how many likeliest ones to tell -> one entry for each token; none for the first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """What the routes need to know."""

    model_name: str
    config: ModelConfig
    room: Room
    """What the engine of a sampler holds."""
    tokenizer: Tokenizer
    template: ChatTemplate
    fingerprint: str
    """Short digest of the weights."""
    decode: Decode
    score: Score
    require_open: Callable[[], None]
    """Raises `ApiError` once the server is ending and takes no new requests."""
    ready: Callable[[], Awaitable[bool]]
    """Whether a sampler answers, or did lately; told without waiting for one that is busy."""
    metrics: Callable[[], Awaitable[bytes]]
    """Prometheus text."""
    keys: Keys | None
    """None: no authorisation."""
    max_choices_in_flight: int
    """Completions decoded or waiting at once; beyond it 429."""
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @cached_property
    def spelling(self) -> TokenSpelling:
        """Single tokens as text."""
        return TokenSpelling(self.tokenizer)

    def longest(self, guidance_scale: float | None = None) -> int:
        """Tokens of prompt and answer together, at most: the context (`longest_text`), or what of
        it a sampler's `cache_bytes` holds, which guidance needs twice."""
        return min(longest_text(self.config), self.room.longest(2 if guidance_scale else 1))

    def model_card(self) -> dict[str, Any]:
        """The model object of `/v1/models`."""
        return {
            "id": self.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "cascade",
            "max_model_len": self.longest(),
            "block_size": self.config.block_size,
            "infill": self.config.infill,
        }

    def require_model(self, name: str | None) -> None:
        """404 for another model's name."""
        if name not in (None, self.model_name):
            raise ApiError(
                404,
                f"The model `{name[:200]}` does not exist; this server has `{self.model_name}`.",
                param="model",
                code="model_not_found",
            )

    def require_prompt(
        self, body: CompletionRequest | ChatRequest, tokens: Sequence[int], longest: int
    ) -> None:
        """400 for a prompt that cannot be decoded, or with the answer is too long; one without
        tokens to decode takes no room."""
        size, context = len(tokens), self.config.max_sequence_length
        wanted = 1 if body.length is None else body.length
        limit = longest if wanted else context
        room = f"the context of {context}"
        if limit < longest_text(self.config):
            room = f"the {limit} that this server holds of one choice (engine.cache_bytes)"
        elif limit < context:
            room = f"the {limit} that whole blocks take of the context of {context}"
        prompt, length = body.prompt_field, body.length_field
        is_default = not body.gives_length
        names = {"prompt": prompt, "length": length}
        try:
            check_room(size, wanted, limit, room, **names, is_default=is_default)
        except InputError as error:
            param = prompt if is_default or size >= limit else length
            code = "context_length_exceeded"
            raise ApiError(400, str(error), param=param, code=code) from None
        try:
            check_prompt(self.config, tokens, 0)
        except InputError as error:
            raise ApiError(400, str(error), param=prompt, code="invalid_value") from None

    def prompt_tokens(self, prompt: str | list[int], suffix: str | None, length: int) -> list[int]:
        """Token ids of a prompt, and of what follows the completion (`requests.between`); 400 for
        a suffix that the model does not see."""
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not suffix:
            return tokens
        try:
            return between(self.config, tokens, self.tokenizer.encode(suffix), length)
        except InputError as error:
            if str(error).startswith("prompt"):
                raise ApiError(400, str(error), param="prompt", code="invalid_value") from None
            code = "unsupported_parameter"
            raise ApiError(400, str(error), param="suffix", code=code) from None

    def settings(
        self,
        body: CompletionRequest | ChatRequest,
        tokens: Sequence[int],
        length: int,
        seed: int,
        has_holes: bool = False,
    ) -> SamplingParams:
        """The engine's settings; 400 for those that contradict each other or the model."""
        try:
            params = body.sampling(length, seed)
            if has_holes:
                check_no_ends(body)
                check_infilling(self.config, tokens, params)
            else:
                check_request(self.config, tokens, params)
        except InputError as error:
            name = str(error).partition("=")[0]
            param = name if name in type(body).model_fields else None
            raise ApiError(400, str(error), param=param, code="invalid_value") from None
        return params


def check_no_ends(body: CompletionRequest | ChatRequest) -> None:
    """Refuse (`InputError`) ends of a choice that is filled whole."""
    for name in ("stop_ids", "stop_at_eos"):
        check(
            not getattr(body, name),
            f"{name}={getattr(body, name)} would end a choice before a suffix that this model "
            "sees in its place; leave it out",
        )
