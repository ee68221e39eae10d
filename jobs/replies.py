"""A request made ready, and its reply in OpenAI's words: whole, or as the events of a stream.

A whole reply is the events of the same stream joined, so the two cannot differ.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse

from cascade_model.text_stream import Chunk, TokenLogprob
from jobs.choices import Admission, Choice, Step, merged
from jobs.endpoint import Endpoint
from jobs.logprobs import CompletionLogprobs, TokenSpelling, chat_logprobs, joined
from jobs.openai_protocol import ApiError, error_body

log = logging.getLogger("cascade.endpoint")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Echo:
    """A prompt that a reply repeats."""

    text: str
    tokens: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A request made ready: its prompts, its choices, and how its replies are spelt."""

    head: dict[str, Any]
    prompts: list[list[int]]
    choices: list[Choice]
    is_chat: bool
    wants_usage: bool
    logprobs: int | None
    """How many likeliest tokens to tell of each place; none: no logprobs."""
    echoes: list[Echo] | None
    """Of each prompt, where the reply repeats it."""


class Writer:
    """Spells the pieces of a reply; it remembers where each choice is."""

    def __init__(self, job: Job, spelling: TokenSpelling) -> None:
        self._job, self._spelling = job, spelling
        self._started: set[int] = set()
        self._logprobs = {each.index: CompletionLogprobs(spelling) for each in job.choices}

    def piece(self, choice: Choice, chunk: Chunk) -> dict[str, Any]:
        """The part of a choice that one block added."""
        logprobs = None
        if self._job.logprobs is not None:
            told = chunk.logprobs or ()
            if self._job.is_chat:
                logprobs = chat_logprobs(self._spelling, chunk.token_ids, told)
            else:
                logprobs = self._logprobs[choice.index].write(chunk.token_ids, told)
        piece = self._spelt(choice, chunk.text, logprobs, chunk.finish_reason, chunk.stop_reason)
        counted = {"steps": chunk.steps, "passes": chunk.passes}
        return piece | ({"block": counted} if choice.watch else {})

    def step(self, choice: Choice, step: Step) -> dict[str, Any]:
        """A piece without text that tells what a denoising step wrote."""
        text_of = self._spelling.text_of
        tokens = [None if token is None else text_of(token) for token in step["tokens"]]
        return self._spelt(choice, "", None, None, None) | {"denoised": {**step, "tokens": tokens}}

    def echo(
        self, choice: Choice, echo: Echo, told: Sequence[TokenLogprob | None] | None
    ) -> dict[str, Any]:
        """The part of a choice that repeats the prompt."""
        logprobs = None
        if told is not None:
            logprobs = self._logprobs[choice.index].write(echo.tokens, told)
        reason = "length" if choice.params is None else None
        return self._spelt(choice, echo.text, logprobs, reason, None)

    def _spelt(
        self, choice: Choice, text: str, logprobs: Any, reason: str | None, stop: int | str | None
    ) -> dict[str, Any]:
        role = {} if choice.index in self._started else {"role": "assistant"}
        self._started.add(choice.index)
        body = {"delta": {**role, "content": text}} if self._job.is_chat else {"text": text}
        return {
            "index": choice.index,
            **body,
            "logprobs": logprobs,
            "finish_reason": reason,
            "stop_reason": stop,
        }


def usage(prompts: Sequence[Sequence[int]], chunks: Sequence[Chunk]) -> dict[str, Any]:
    """Tokens up to and including each stop, and the forward passes they took."""
    prompt_tokens = sum(map(len, prompts))
    completion_tokens = sum(len(chunk.token_ids) for chunk in chunks)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens_details": {"passes": sum(chunk.passes for chunk in chunks)},
    }


async def pieces_of(
    endpoint: Endpoint, job: Job, seen: list[Chunk]
) -> AsyncGenerator[dict[str, Any], None]:
    """Pieces of all choices as they come; `seen` gets what was decoded."""
    writer = Writer(job, endpoint.spelling)
    if job.echoes is not None:
        told: list[Sequence[TokenLogprob | None] | None] = [None] * len(job.prompts)
        if job.logprobs is not None:
            told = [await endpoint.score(tokens, job.logprobs) for tokens in job.prompts]
        for choice in job.choices:
            yield writer.echo(choice, job.echoes[choice.prompt], told[choice.prompt])
    decoded = merged(endpoint.decode, endpoint.tokenizer.decode, job.choices)
    async with contextlib.aclosing(decoded) as chunks:
        async for choice, part in chunks:
            if isinstance(part, Chunk):
                seen.append(part)
                yield writer.piece(choice, part)
            else:
                yield writer.step(choice, part)


def whole(job: Job, pieces: Sequence[dict[str, Any]], seen: Sequence[Chunk]) -> dict[str, Any]:
    """The body of a reply that is not streamed."""
    choices = []
    for choice in job.choices:
        own = [piece for piece in pieces if piece["index"] == choice.index]
        if job.is_chat:
            text = "".join(piece["delta"]["content"] for piece in own)
            body = {"message": {"role": "assistant", "content": text, "refusal": None}}
        else:
            body = {"text": "".join(piece["text"] for piece in own)}
        logprobs = None if job.logprobs is None else joined([piece["logprobs"] for piece in own])
        choices.append({**own[-1], **body, "logprobs": logprobs})
        choices[-1].pop("delta", None)
    return {**job.head, "choices": choices, "usage": usage(job.prompts, seen)}


def event(body: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def events(endpoint: Endpoint, job: Job, admission: Admission) -> AsyncGenerator[str, None]:
    """The stream's events up to [DONE]; a failure raises."""
    seen: list[Chunk] = []
    no_usage = {"usage": None} if job.wants_usage else {}
    with admission(len(job.choices)):
        async with contextlib.aclosing(pieces_of(endpoint, job, seen)) as pieces:
            async for piece in pieces:
                yield event({**job.head, "choices": [piece], **no_usage})
    if job.wants_usage:
        yield event({**job.head, "choices": [], "usage": usage(job.prompts, seen)})
    yield "data: [DONE]\n\n"


async def reply(endpoint: Endpoint, job: Job, admission: Admission, stream: bool) -> Response:
    """Run the job; the first event is awaited, so that an early failure has its own status."""
    if not stream:
        seen: list[Chunk] = []
        with admission(len(job.choices)):
            async with contextlib.aclosing(pieces_of(endpoint, job, seen)) as source:
                pieces = [piece async for piece in source]
        return JSONResponse(whole(job, pieces, seen))
    stream_events = events(endpoint, job, admission)
    first = await anext(stream_events)

    async def body() -> AsyncIterator[str]:
        async with contextlib.aclosing(stream_events):
            yield first
            try:
                async for piece in stream_events:
                    yield piece
            except ApiError as error:
                yield event(error.body)
            except Exception:
                log.exception("a stream failed")
                yield event(error_body("The server failed.", type="server_error", code="internal"))

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(body(), media_type="text/event-stream", headers=headers)
