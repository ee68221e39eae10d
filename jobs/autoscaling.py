"""How many samplers there should be: by the blocks that wait and the places that are free.

Requests say little, as one asks for two blocks and another for a thousand. A sampler states what it
does (`Load`), and Serve's controller asks `QueuedBlocks` ten times a second what follows from it.
Serve applies the delays, factors and bounds of `autoscaling_config` on top.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cascade_model.settings import check

POLICY = "jobs.autoscaling:QueuedBlocks"
_NEW_BLOCKS_A_REQUEST, _NEW_PLACES = 16.0, 8.0  # before anything was stated
_MEMORY = 0.9  # of a mean, per request or per statement


class Load:
    """What a sampler has to do and how fast it does it."""

    def __init__(self, places: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.places = places
        """Choices that it decodes at once."""
        self.running = 0
        self.blocks_left = 0
        """Of the running choices, were none to end early."""
        self.blocks_done = 0
        self.blocks_a_request = _NEW_BLOCKS_A_REQUEST
        self.blocks_per_second = 0.0
        """While it is busy; 0 until it is known."""
        self._clock = clock
        self._busy_seconds = self._told_seconds = 0.0
        self._told_blocks = 0
        self._changed = clock()

    @contextlib.contextmanager
    def request(self, blocks: int) -> Iterator[Callable[[], None]]:
        """Hold a choice of so many blocks at most; call what is given for each one that is done."""
        left, done = blocks, 0

        def block_done() -> None:
            nonlocal left, done
            if left:
                self.blocks_left -= 1
                left -= 1
            self.blocks_done += 1
            done += 1

        self._pass_time()
        self.running += 1
        self.blocks_left += blocks
        try:
            yield block_done
        finally:
            self._pass_time()
            self.running -= 1
            self.blocks_left -= left
            self.blocks_a_request += (1 - _MEMORY) * (done - self.blocks_a_request)

    def statement(self) -> dict[str, float]:
        """For `record_autoscaling_stats`; plain numbers."""
        self._pass_time()
        seconds, blocks = self._busy_seconds - self._told_seconds, self.blocks_done
        if seconds > 0.5:
            now = (blocks - self._told_blocks) / seconds
            before = self.blocks_per_second or now
            self.blocks_per_second = 0.5 * before + 0.5 * now
            self._told_seconds, self._told_blocks = self._busy_seconds, blocks
        return {
            "running": float(self.running),
            "places": float(self.places),
            "blocks_left": float(self.blocks_left),
            "blocks_a_request": self.blocks_a_request,
            "blocks_per_second": self.blocks_per_second,
        }

    def _pass_time(self) -> None:
        now = self._clock()
        if self.running:
            self._busy_seconds += now - self._changed
        self._changed = now


@dataclass(frozen=True)
class QueuedBlocks:
    """The policy: `autoscaling_config.policy.policy_function` of the sampler deployment.

    Enough replicas that of the places in all at least `free_share` is free, and that the blocks
    that wait for a place would be done within `queue_seconds`, were they spread over all; but never
    more than the waiting requests could fill. One at least while anything runs or waits; none
    otherwise, if `min_replicas` lets it.
    """

    queue_seconds: float = 2.0
    """Blocks that wait for a place are done within this, by as many replicas as it takes."""
    free_share: float = 0.25
    """Of the places for streams, how many are kept free: replicas are added before a queue is."""

    def __post_init__(self) -> None:
        check(self.queue_seconds > 0, f"queue_seconds={self.queue_seconds} must be above 0; use 2")
        check(
            0.0 <= self.free_share < 1.0,
            f"free_share={self.free_share} must be at least 0 and below 1; use 0.25",
        )

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Replicas wanted, and no state (called by Serve's controller)."""
        told = context.aggregated_metrics or {}
        queued = max(context.total_queued_requests or 0.0, 0.0)
        running = max(
            sum(told.get("running", {}).values()), (context.total_num_requests or 0.0) - queued
        )
        wanted = self.wanted(
            replicas=context.current_num_replicas,
            running=running,
            queued=queued,
            places=_mean(told.get("places", {})) or _NEW_PLACES,
            blocks_a_request=_mean(told.get("blocks_a_request", {})) or _NEW_BLOCKS_A_REQUEST,
            blocks_per_second=_mean(told.get("blocks_per_second", {})),
        )
        return wanted, {}

    def wanted(
        self,
        *,
        replicas: int,
        running: float,
        queued: float,
        places: float,
        blocks_a_request: float,
        blocks_per_second: float,
    ) -> int:
        """Replicas for a load; `places` and `blocks_per_second` are one replica's, the latter 0
        where it is not known."""
        if running <= 0 and queued <= 0:
            return 0
        by_places = math.ceil(running / (places * (1 - self.free_share)))
        most = math.ceil((running + queued) / places)
        blocks = queued * blocks_a_request
        if blocks_per_second > 0:
            more = blocks / (blocks_per_second * self.queue_seconds) - replicas
            by_queue = min(replicas + max(math.ceil(more), 0), most)
        else:
            by_queue = most
        return max(1, by_places, by_queue)


def _mean(values: dict[Any, float]) -> float:
    known = [value for value in values.values() if value > 0]
    return sum(known) / len(known) if known else 0.0
