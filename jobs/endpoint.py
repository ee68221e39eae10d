"""The ingress as a FastAPI application: OpenAI routes over any source of decoded blocks.

It holds no weights. Given prompt tokens, settings and a choice number, the source (`Decode`) yields
dicts `{"tokens", "passes", "steps", "finish_reason", "stop_reason"}`, one a block; here they become
text, are cut at stop strings and sent. The seed is drawn here when the client gives none.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from cascade_model.chat_template import ChatTemplate
from cascade_model.config import ModelConfig
from cascade_model.errors import InputError
from cascade_model.requests import check_prompt, check_request, rearranged
from cascade_model.sampling import SamplingParams
from cascade_model.text_stream import Chunk, Completion, TextStream, complete
from cascade_model.tokenizer import Tokenizer
from jobs.gate import ApiKeys, Gate, error_response, http_error
from jobs.openai_protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    error_body,
    overloaded,
    validation_error,
)

Decode = Callable[[list[int], SamplingParams, int], AsyncIterator[dict[str, Any]]]
DEFAULT_MAX_TOKENS = 16  # OpenAI's for completions; a chat gets what the context leaves
log = logging.getLogger("cascade.endpoint")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """What the routes need to know."""

    model_name: str
    config: ModelConfig
    tokenizer: Tokenizer
    fingerprint: str
    """Short digest of the weights."""
    decode: Decode
    keys: ApiKeys | None
    """None: no authorisation."""
    max_choices_in_flight: int
    """Completions decoded or waiting at once; beyond it 429."""
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def model_card(self) -> dict[str, Any]:
        """The model object of `/v1/models`."""
        return {
            "id": self.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "cascade",
            "max_model_len": self.config.max_sequence_length,
        }

    def require_model(self, name: str) -> None:
        """404 for another model's name."""
        if name != self.model_name:
            raise ApiError(
                404,
                f"The model `{name}` does not exist; this server has `{self.model_name}`.",
                param="model",
                code="model_not_found",
            )

    def require_prompt(self, tokens: Sequence[int], max_tokens: int, param: str) -> None:
        """400 for a prompt that cannot be decoded."""
        try:
            check_prompt(self.config, tokens, max_tokens)
        except InputError as error:
            too_long = len(tokens) + max_tokens > self.config.max_sequence_length
            code = "context_length_exceeded" if too_long else "invalid_value"
            raise ApiError(400, str(error), param=param, code=code) from None

    def prompt_tokens(self, prompt: str | list[int], suffix: str | None) -> list[int]:
        """Token ids of a prompt, and of what follows the completion; 400 for a suffix that the
        model was not trained to see."""
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not suffix:
            return tokens
        try:
            return rearranged(self.config, tokens, self.tokenizer.encode(suffix))
        except InputError as error:
            code = "unsupported_parameter"
            raise ApiError(400, str(error), param="suffix", code=code) from None

    def settings(
        self, body: CompletionRequest | ChatRequest, tokens: Sequence[int], length: int, seed: int
    ) -> SamplingParams:
        """The engine's settings; 400 for those that contradict each other or the model."""
        try:
            params = body.sampling(length, seed)
            check_request(self.config, tokens, params)
        except InputError as error:
            name = str(error).partition("=")[0]
            param = name if name in type(body).model_fields else None
            raise ApiError(400, str(error), param=param, code="invalid_value") from None
        return params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """One choice to decode."""

    index: int
    choice: int
    prompt_tokens: list[int]
    params: SamplingParams
    stop: tuple[str, ...]


class Admission:
    """Counts choices in flight; a full house answers 429 at once instead of queueing."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0

    @contextlib.contextmanager
    def __call__(self, wanted: int):
        """Hold `wanted` places for the time of the block."""
        if wanted > self.limit:
            message = f"{wanted} completions in one request are over this server's {self.limit}."
            raise ApiError(400, message, param="n", code="invalid_value")
        if self.count + wanted > self.limit:
            raise overloaded()
        self.count += wanted
        try:
            yield
        finally:
            self.count -= wanted


async def chunks_of(endpoint: Endpoint, answer: Answer) -> AsyncIterator[Chunk]:
    """Decode one choice; leaving early (a stop, a disconnect) ends the decoding too."""
    text = TextStream(endpoint.tokenizer.decode, answer.stop)
    source = endpoint.decode(answer.prompt_tokens, answer.params, answer.choice)
    async with contextlib.aclosing(source) as blocks:  # type: ignore[type-var]
        async for block in blocks:
            chunk = text.push(**block)
            yield chunk
            if chunk.finish_reason is not None:
                return
    raise RuntimeError("the sampler's stream ended without a finish reason")


async def completion_of(endpoint: Endpoint, answer: Answer) -> Completion:
    """One choice, whole."""
    return complete(iter([chunk async for chunk in chunks_of(endpoint, answer)]))


async def merged(
    endpoint: Endpoint, answers: Sequence[Answer]
) -> AsyncIterator[tuple[Answer, Chunk]]:
    """Chunks of all choices as they come; the short queue makes the sampler wait for the reader."""
    queue: asyncio.Queue[tuple[Answer, Chunk] | BaseException] = asyncio.Queue(maxsize=2)

    async def pump(answer: Answer) -> None:
        try:
            async for chunk in chunks_of(endpoint, answer):
                await queue.put((answer, chunk))
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(pump(answer)) for answer in answers]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            running -= item[1].finish_reason is not None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def completions_of(endpoint: Endpoint, answers: Sequence[Answer]) -> list[Completion]:
    """All choices, whole; the first failure ends the others."""
    tasks = [asyncio.create_task(completion_of(endpoint, answer)) for answer in answers]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def usage(prompts: Sequence[Sequence[int]], chunks: Sequence[Chunk | Completion]) -> dict[str, Any]:
    """Tokens up to and including each stop, and the forward passes they took."""
    prompt_tokens = sum(map(len, prompts))
    completion_tokens = sum(len(chunk.token_ids) for chunk in chunks)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens_details": {"passes": sum(chunk.passes for chunk in chunks)},
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A request made ready: its prompts, its choices, and how its replies are spelt."""

    head: dict[str, Any]
    prompts: list[list[int]]
    answers: list[Answer]
    is_chat: bool
    wants_usage: bool

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The body of a reply that is not streamed."""
        choices = [
            {
                "index": answer.index,
                **(
                    {"message": {"role": "assistant", "content": completion.text}}
                    if self.is_chat
                    else {"text": completion.text}
                ),
                "logprobs": None,
                "finish_reason": completion.finish_reason,
                "stop_reason": completion.stop_reason,
            }
            for answer, completion in zip(self.answers, completions, strict=True)
        ]
        return {**self.head, "choices": choices, "usage": usage(self.prompts, completions)}

    def piece(self, answer: Answer, chunk: Chunk, is_first: bool) -> dict[str, Any]:
        """One event of a stream: one block."""
        role = {"role": "assistant"} if is_first else {}
        body = {"delta": {**role, "content": chunk.text}} if self.is_chat else {"text": chunk.text}
        choice = {
            "index": answer.index,
            **body,
            "logprobs": None,
            "finish_reason": chunk.finish_reason,
            "stop_reason": chunk.stop_reason,
        }
        return {**self.head, "choices": [choice], **({"usage": None} if self.wants_usage else {})}


def job_for(
    endpoint: Endpoint,
    body: CompletionRequest | ChatRequest,
    prompts: list[list[int]],
    max_tokens: int | None,
) -> Job:
    """Check the prompts, draw the seed, and lay out the choices (prompt by prompt)."""
    is_chat = isinstance(body, ChatRequest)
    number = body.n or 1
    seed = secrets.randbits(63) if body.seed is None else body.seed
    answers = []
    for tokens in prompts:
        length = max_tokens or max(endpoint.config.max_sequence_length - len(tokens), 1)
        endpoint.require_prompt(tokens, length, "messages" if is_chat else "prompt")
        params = endpoint.settings(body, tokens, length, seed)
        answers += [
            Answer(
                index=len(answers) + choice,
                choice=choice,
                prompt_tokens=tokens,
                params=params,
                stop=body.stops,
            )
            for choice in range(number)
        ]
    kind = "chat.completion" if is_chat else "text_completion"
    head = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
        "object": f"{kind}.chunk" if is_chat and body.stream else kind,
        "created": int(time.time()),
        "model": endpoint.model_name,
        "system_fingerprint": endpoint.fingerprint,
    }
    return Job(
        head=head,
        prompts=prompts,
        answers=answers,
        is_chat=is_chat,
        wants_usage=body.wants_usage,
    )


def event(body: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def events(endpoint: Endpoint, job: Job, admission: Admission) -> AsyncIterator[str]:
    """The stream's events up to [DONE]; a failure raises."""
    started: set[int] = set()
    seen: list[Chunk] = []
    with admission(len(job.answers)):
        async with contextlib.aclosing(merged(endpoint, job.answers)) as pieces:  # type: ignore[type-var]
            async for answer, chunk in pieces:
                yield event(job.piece(answer, chunk, answer.index not in started))
                started.add(answer.index)
                seen.append(chunk)
    if job.wants_usage:
        yield event({**job.head, "choices": [], "usage": usage(job.prompts, seen)})
    yield "data: [DONE]\n\n"


async def reply(endpoint: Endpoint, job: Job, admission: Admission, stream: bool) -> Response:
    """Run the job; the first event is awaited, so that an early failure has its own status."""
    if not stream:
        with admission(len(job.answers)):
            return JSONResponse(job.whole(await completions_of(endpoint, job.answers)))
    source = events(endpoint, job, admission)
    first = await anext(source)

    async def body() -> AsyncIterator[str]:
        async with contextlib.aclosing(source):  # type: ignore[type-var]
            yield first
            try:
                async for piece in source:
                    yield piece
            except ApiError as error:
                yield event(error.body)
            except Exception:
                log.exception("a stream failed")
                yield event(error_body("The server failed.", type="server_error", code="internal"))

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(body(), media_type="text/event-stream", headers=headers)


def build_api(endpoint: Endpoint, behind_serve: bool = False) -> FastAPI:
    """The routes. Every answer has `x-request-id`, every error the four fields."""
    api = FastAPI(title="CASCADE", docs_url=None, redoc_url=None)
    admission = Admission(endpoint.max_choices_in_flight)
    template = ChatTemplate.of("plain", endpoint.tokenizer)
    api.add_middleware(Gate, keys=endpoint.keys, behind_serve=behind_serve)
    api.add_exception_handler(ApiError, lambda _, error: error_response(error))  # type: ignore[arg-type]
    api.add_exception_handler(
        RequestValidationError,
        lambda _, error: error_response(validation_error(error)),  # type: ignore[arg-type]
    )
    api.add_exception_handler(StarletteHTTPException, http_error)  # type: ignore[arg-type]

    @api.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [endpoint.model_card()]}

    @api.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        endpoint.require_model(name)
        return endpoint.model_card()

    @api.post("/v1/completions")
    async def completions(body: CompletionRequest) -> Response:
        endpoint.require_model(body.model)
        prompts = await asyncio.to_thread(
            lambda: [endpoint.prompt_tokens(prompt, body.suffix) for prompt in body.prompts]
        )
        job = job_for(endpoint, body, prompts, body.max_tokens or DEFAULT_MAX_TOKENS)
        return await reply(endpoint, job, admission, bool(body.stream))

    @api.post("/v1/chat/completions")
    async def chat(body: ChatRequest) -> Response:
        endpoint.require_model(body.model)
        tokens = await asyncio.to_thread(
            lambda: endpoint.tokenizer.encode(
                template.prompt([message.plain() for message in body.messages])
            )
        )
        job = job_for(endpoint, body, [tokens], body.length)
        return await reply(endpoint, job, admission, bool(body.stream))

    return api
