"""A stream of blocks that outlives the sampler that decodes it.

What a sampler draws is a pure function of (weights, request, seed, choice, block), so a choice goes
on elsewhere from its finished blocks and nobody can tell the two streams apart. Here are the
tokens and steps of those blocks; text, stops and usage are counted further up, where a loss is but
a pause. Nothing here knows Ray: a `Source` is anything that greets and then decodes.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from cascade_model.sampling import SamplingParams
from jobs.choices import STEP
from jobs.openai_protocol import ApiError, overloaded

Block = dict[str, Any]
"""A greeting `{"weights": digest}`, which comes first, the fields of a `DecodedBlock`, or `{STEP:
...}`, a step of the block to come: told again by another sampler, or not at all. Of a text that is
scored, one item behind the greeting."""
Blocks = AsyncGenerator[Block, None]
Source = Callable[[SamplingParams, list[int], int], Blocks]
"""(params, committed tokens, steps made) -> what some sampler says. Raises `SamplerLost`, `NoRoom`,
or an error that is the request's or the engine's own."""
_PAUSES = (0.02, 0.05, 0.1, 0.2, 0.5)  # seconds before a sampler is asked again; the last repeats
_LOOK = 0.5  # seconds between looks at whether everything is to end
log = logging.getLogger("cascade.endpoint")


class SamplerLost(Exception):
    """The sampler died, or there is none."""


class NoRoom(Exception):
    """The queue in front of the samplers is full."""


class _Parked(Exception):
    """The reader fell so far behind that the sampler was let go."""


class Pulse:
    """What the streams of one ingress share. When any sampler was last heard of: a full house is
    waited for, a dead one is not. And the end of all of them."""

    def __init__(self) -> None:
        self.last = float("-inf")
        self.running: set[Callable[[Exception], None]] = set()
        """How to end each stream that a sampler has."""
        self.error: Exception | None = None

    def beat(self) -> None:
        """A sampler has spoken."""
        self.last = time.monotonic()

    def end(self, error: Exception) -> None:
        """End every stream with an error, also those that wait for a sampler."""
        self.error = error
        for end in list(self.running):
            end(error)

    def silence(self, since: float) -> float:
        """Seconds without a word, counted from `since` at the earliest."""
        return time.monotonic() - max(self.last, since)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """What a stream bears before it ends with an error."""

    seconds: float = 120.0
    """Without a word of any sampler, while none has the request."""
    losses: int = 3
    """Samplers that die over it with no block in between; more look like its own doing."""
    blocks_ahead: int = 64
    """Blocks that came and were not read; then the sampler's place is given to others."""


async def resuming(
    source: Source,
    params: SamplingParams,
    *,
    weights: str,
    pulse: Pulse,
    patience: Patience,
    on_loss: Callable[[], None] = lambda: None,
) -> Blocks:
    """Blocks of one choice up to the one with a finish reason.

    Whenever a sampler is lost, another one with the same `weights` (digest) goes on behind the
    blocks that came. A block's `passes` are those of the sampler that finished it: a block that was
    lost unfinished counts once. Raises `ApiError`: 429 where no sampler had room at first, 503
    `sampler_lost` where none is left for too long or too many died over it, 503 `model_changed`
    where those that are left hold other weights; and what the source itself raises. A deadline
    counts from when the first sampler had it; each one is told what is left when it is asked.
    """
    began, committed, steps_made, losses = None, [], 0, 0

    def rest() -> Blocks:
        return source(_in_time(params, began), list(committed), steps_made)

    while True:
        own = await _taken(rest, weights, pulse, patience, is_first=began is None)
        began = time.monotonic() if began is None else began
        try:
            async with contextlib.aclosing(
                _read_ahead(own, patience.blocks_ahead, pulse)
            ) as blocks:
                async for block in blocks:
                    pulse.beat()
                    if STEP in block:
                        yield block
                        continue
                    committed += block["tokens"]
                    steps_made += block["steps"]
                    losses = 0
                    yield block
                    if block["finish_reason"] is not None:
                        return
        except _Parked:
            log.info("a reader fell %d blocks behind and goes on", patience.blocks_ahead)
        except SamplerLost:
            losses += 1
            on_loss()
            if losses > patience.losses:
                raise _gone("The samplers that decoded this request died over it.") from None
            log.warning("a sampler was lost behind %d tokens of a choice", len(committed))


async def told_whole(
    source: Callable[[], Blocks],
    *,
    weights: str,
    pulse: Pulse,
    patience: Patience,
    on_loss: Callable[[], None] = lambda: None,
) -> Block:
    """The one item that a sampler with these `weights` says behind its greeting, from another one
    where it dies over it; raises as `resuming` does."""
    for loss in range(1 + patience.losses):
        own = await _taken(source, weights, pulse, patience, is_first=loss == 0)
        try:
            async with contextlib.aclosing(_read_ahead(own, 1, pulse)) as said:
                told = await anext(said)
                pulse.beat()
                return told
        except SamplerLost:
            on_loss()
    raise _gone("The samplers that had this request died over it.")


async def _taken(
    rest: Callable[[], Blocks], weights: str, pulse: Pulse, patience: Patience, is_first: bool
) -> Blocks:
    """What a sampler with the right weights says behind its greeting; it is asked for until there
    is one, as long as any sampler is heard of."""
    since = time.monotonic()
    refusal = nobody = _gone("No sampler can decode this request now.")
    for attempt in itertools.count():
        if pulse.error is not None:
            raise pulse.error
        own = rest()
        try:
            greeting = await _within(anext(own), pulse, patience.seconds, since)
            if greeting["weights"] == weights:
                pulse.beat()
                return own
            refusal = _gone("The model of this server has changed.", code="model_changed")
        except NoRoom:
            refusal = overloaded()
        except (SamplerLost, StopAsyncIteration):
            refusal = nobody
        except TimeoutError:
            pass
        except BaseException:
            await own.aclose()
            raise
        await own.aclose()
        if (is_first and refusal.status == 429) or pulse.silence(since) >= patience.seconds:
            raise refusal
        await asyncio.sleep(_PAUSES[min(attempt, len(_PAUSES) - 1)])
    raise AssertionError("counted to the end")


async def _within(
    word: Coroutine[Any, Any, Block], pulse: Pulse, seconds: float, since: float
) -> Block:
    """A sampler's word; `TimeoutError` after that many seconds in which none was heard of."""
    task = asyncio.ensure_future(word)
    try:
        while (left := seconds - pulse.silence(since)) > 0:
            done, _ = await asyncio.wait({task}, timeout=min(left, _LOOK))
            if done:
                return task.result()
            if pulse.error is not None:
                raise pulse.error
        raise TimeoutError
    finally:
        task.cancel()
        await asyncio.wait({task})


async def _read_ahead(source: Blocks, limit: int, pulse: Pulse) -> Blocks:
    """What a source says, read as it comes. With `limit` items unread the source is closed, and
    `_Parked` follows the last of them; `SamplerLost` follows where it ends by itself. A reader half
    that far behind hears of no more steps, so each time it goes on there is a block more."""
    queue: asyncio.Queue[Block | Exception] = asyncio.Queue()

    async def pump() -> None:
        async with contextlib.aclosing(source):
            try:
                async for item in source:
                    if STEP in item and queue.qsize() >= limit // 2:
                        continue
                    queue.put_nowait(item)
                    if STEP not in item and queue.qsize() >= limit:
                        queue.put_nowait(_Parked())
                        return
                queue.put_nowait(SamplerLost())
            except Exception as error:
                queue.put_nowait(error)

    task = asyncio.create_task(pump())
    pulse.running.add(queue.put_nowait)
    try:
        while True:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        pulse.running.discard(queue.put_nowait)
        task.cancel()
        await asyncio.wait({task})


def _in_time(params: SamplingParams, began: float | None) -> SamplingParams:
    """The settings with what is left of the deadline; all of it where no sampler had it yet."""
    if params.deadline_seconds is None or began is None:
        return params
    left = params.deadline_seconds - (time.monotonic() - began)
    return dataclasses.replace(params, deadline_seconds=max(left, 1e-3))


def _gone(message: str, code: str = "sampler_lost") -> ApiError:
    return ApiError(503, f"{message} Send it again.", type="server_error", code=code)
