"""Whether a sampler answers, told to a probe that does not wait for a busy one.

A sampler that decodes on a scarce CPU may need seconds for a question that costs nothing. So a
probe waits for `WAIT_SECONDS`; the question stays open behind it, for the next probe, and until it
is answered a sampler counts that was heard of lately. One that has died, or is not there yet, does
not leave the question open: Ray answers for it.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

WAIT_SECONDS = 0.5
LATELY_SECONDS = 30.0
"""Well beyond a forward pass, and about as long as Serve gives a replica that answers no more."""


class Readiness:
    """What is known of the samplers, and a question under way."""

    def __init__(
        self,
        ask: Callable[[], Awaitable[bool]],
        last_heard: Callable[[], float],
        wait_seconds: float = WAIT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`ask`: whether any sampler answers, told as soon as one does; `TimeoutError` where there
        is no word of them for long. `last_heard`: when one spoke for any other reason, as `clock`
        tells it."""
        self._ask, self._last_heard = ask, last_heard
        self._wait, self._clock = wait_seconds, clock
        self._answered = self._denied = float("-inf")
        self._question: asyncio.Task[None] | None = None

    async def is_ready(self) -> bool:
        """Whether a sampler answers, or did so lately and no word says that it has gone; within
        `wait_seconds`."""
        if self._question is None or self._question.done():
            self._question = asyncio.create_task(self._settle())
        await asyncio.wait({self._question}, timeout=self._wait)
        heard = max(self._answered, self._last_heard())
        return heard > self._denied and self._clock() - heard < LATELY_SECONDS

    async def _settle(self) -> None:
        """Ask, and note when and how it was answered."""
        try:
            answers = await self._ask()
        except TimeoutError:
            return
        if answers:
            self._answered = self._clock()
        else:
            self._denied = self._clock()
