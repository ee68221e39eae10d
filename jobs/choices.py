"""The choices of a request decoded: each alone, all as they come, and how many at once.

A choice's blocks come from any source (`Decode`); here they become text, are cut at stop strings,
and a choice that is left early ends its decoding.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Protocol

from cascade_model.sampling import SamplingParams
from cascade_model.text_stream import Chunk, TextStream
from jobs.openai_protocol import ApiError, overloaded

STEP = "denoised"
Step = dict[str, Any]
"""The fields of a `cascade_model.watching.DenoisedStep`."""


class Decode(Protocol):
    """Where the blocks of a choice come from."""

    def __call__(
        self, tokens: list[int], params: SamplingParams, choice: int, /, *, watch: bool = False
    ) -> AsyncIterator[dict[str, Any]]:
        """`Choice.tokens`, settings, choice -> one dict a block, `TextStream.push`'s arguments by
        name; with `watch` before it `{STEP: ...}` for each of its denoising steps."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """One choice to decode."""

    index: int
    """Its place in the reply."""
    prompt: int
    """Which prompt of the request."""
    choice: int
    """Which choice of that prompt."""
    tokens: list[int]
    """The prompt; with mask tokens, a text whose holes are to be filled."""
    params: SamplingParams | None
    """None: nothing is decoded, the prompt is only echoed."""
    stop: tuple[str, ...]
    watch: bool = False
    """Whether each denoising step is told of."""


class Admission:
    """Counts choices in flight; a full house answers 429 at once instead of queueing."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0

    @contextlib.contextmanager
    def __call__(self, wanted: int) -> Iterator[None]:
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


async def chunks_of(
    decode: Decode, text_of: Callable[[list[int]], str], choice: Choice
) -> AsyncGenerator[Chunk | Step, None]:
    """One choice, with its steps where it is watched; leaving early (a stop, a disconnect) ends the
    decoding too."""
    if choice.params is None:
        return
    text = TextStream(text_of, choice.stop)
    asked = {"watch": True} if choice.watch else {}
    source = decode(choice.tokens, choice.params, choice.choice, **asked)
    async with contextlib.aclosing(source) as blocks:  # type: ignore[type-var]
        async for block in blocks:
            if STEP in block:
                yield block[STEP]
                continue
            chunk = text.push(**block)
            yield chunk
            if chunk.finish_reason is not None:
                return
    raise RuntimeError("the sampler's stream ended without a finish reason")


async def merged(
    decode: Decode, text_of: Callable[[list[int]], str], choices: Sequence[Choice]
) -> AsyncGenerator[tuple[Choice, Chunk | Step], None]:
    """Chunks and steps of all choices as they come; the short queue makes the sampler wait for the
    reader. The first failure ends them all."""
    queue: asyncio.Queue[tuple[Choice, Chunk | Step] | BaseException] = asyncio.Queue(maxsize=2)

    async def pump(choice: Choice) -> None:
        try:
            async with contextlib.aclosing(chunks_of(decode, text_of, choice)) as chunks:
                async for chunk in chunks:
                    await queue.put((choice, chunk))
        except Exception as error:
            await queue.put(error)

    decoded = [choice for choice in choices if choice.params is not None]
    tasks = [asyncio.create_task(pump(choice)) for choice in decoded]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            running -= isinstance(item[1], Chunk) and item[1].finish_reason is not None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
