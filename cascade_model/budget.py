"""How many steps each block gets where a request's steps or its seconds are limited.

A window's ceiling K_b is set when it is opened: an equal share of the steps that are left, so what
earlier blocks did not use goes to later ones. A lower ceiling makes the schedule ask for more
positions a step: what waited for a threshold is committed sooner, and no request fails. With
`max_steps` alone all of this is a function of the request; a deadline asks the clock.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cascade_model.canvas import Window
from cascade_model.sampling import SamplingParams


class Need(NamedTuple):
    """Steps that blocks take at least, and that they can use."""

    least: int
    most: int


def share(left: int, blocks: int, own: Need, later: Need) -> int:
    """Steps that the first of `blocks` blocks may take of the `left` that all have together.

    An equal share, rounded down; more where the later blocks cannot use theirs, fewer where they
    need more than theirs, and never less than its own least.
    """
    fair = max(left // blocks, left - later.most)
    return max(own.least, min(fair, left - later.least, own.most))


def steps_in_time(seconds_left: float, seconds_per_step: float | None) -> int | None:
    """Whole steps that still fit: 0 when the time is over, none while no speed is known."""
    if seconds_left <= 0:
        return 0
    return int(seconds_left / seconds_per_step) if seconds_per_step else None


class Budget:
    """The limits of one request, whose windows are opened in order.

    The time runs from the moment this is made. The speed is measured behind the first step, which
    also waits for its turn and reads the prompt.
    """

    def __init__(
        self,
        windows: Sequence[Window],
        params: SamplingParams,
        *,
        steps_made: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.params, self.clock, self.steps_made = params, clock, steps_made
        needs = [self._need(window) for window in windows]
        self._later = Need(sum(need.least for need in needs), sum(need.most for need in needs))
        self._later_blocks = len(windows)
        self._own = Need(0, 0)
        self._ceiling = self._allowed = 0
        self._is_timed = params.deadline_seconds is not None
        self._began = clock() if self._is_timed else 0.0
        self._first_step: tuple[int, float] | None = None  # steps made, and the time, behind it

    def open(self, window: Window) -> None:
        """Set the ceilings of the next window."""
        own = self._own = self._need(window)
        self._later = Need(self._later.least - own.least, self._later.most - own.most)
        self._later_blocks -= 1
        self._ceiling, self._allowed = window.max_steps, own.most
        if self.params.max_steps is not None:
            left = self.params.max_steps - self.steps_made
            self._allowed = share(left, 1 + self._later_blocks, own, self._later)
        self._fit(window)

    def note_step(self, window: Window) -> None:
        """Count a step that the window made, and hurry the next ones where the time runs out."""
        self.steps_made += 1
        if self._is_timed:
            self._first_step = self._first_step or (self.steps_made, self.clock())
            self._fit(window)

    def _fit(self, window: Window) -> None:
        """Ceilings from the window's share, less where the time does not reach."""
        allowed, left = self._allowed, self._steps_in_time()
        if left is not None:
            own = Need(*(max(0, count - window.step) for count in self._own))
            more = share(left, 1 + self._later_blocks, own, self._later)
            allowed = min(allowed, window.step + more)
        window.max_steps, window.budget = min(self._ceiling, allowed), allowed

    def _steps_in_time(self) -> int | None:
        if self.params.deadline_seconds is None:
            return None
        now, pace = self.clock(), None
        if self._first_step is not None and self.steps_made > self._first_step[0]:
            steps, since = self._first_step
            pace = (now - since) / (self.steps_made - steps)
        return steps_in_time(self._began + self.params.deadline_seconds - now, pace)

    def _need(self, window: Window) -> Need:
        """Its least, and its own ceiling with the steps that may revise it."""
        is_editing = self.params.editing_threshold is not None
        revisions = self.params.max_post_steps if is_editing else 0
        return Need(self.params.least_steps(window.num_masked), window.max_steps + revisions)
