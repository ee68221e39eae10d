"""One line about a running job: what is done, how fast, how long it may still take."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

QUIET_SECONDS = 10.0
"""Between two lines where nobody watches; on a terminal the one line is written anew."""
LIVE_SECONDS = 0.2


class Progress:
    """Parts or rows done of a job, with their speed, tokens per second and the time left."""

    def __init__(
        self,
        label: str,
        total: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        unit: str = "parts",
    ) -> None:
        """`unit` is what is counted; where it is no parts, its speed is told too."""
        self._label, self._total = label, total
        self._stream = stream if stream is not None else sys.stderr
        self._is_live = self._stream.isatty()
        self._clock = clock
        self._begun = self._shown = clock()
        self._unit = unit
        self._done = self._tokens = self._earlier = 0

    def resume(self, count: int) -> None:
        """So many were done by an earlier run: they count, but not for the speed."""
        self._done = self._earlier = count

    def began(self, seconds: float) -> None:
        """What is done first began so many seconds ago: before that nobody was ready."""
        if self._done == self._earlier:
            self._begun = self._clock() - seconds

    def add(self, tokens: int = 0, count: int = 1) -> None:
        """A part, or so many rows, are done."""
        self._done += count
        self._tokens += tokens
        now = self._clock()
        if now - self._shown >= (LIVE_SECONDS if self._is_live else QUIET_SECONDS):
            self._shown = now
            self._write(self.line(now))

    def close(self) -> None:
        """Leave the last state on a terminal."""
        if self._is_live and self._done:
            self._write(self.line(self._clock()) + "\n")

    def line(self, now: float) -> str:
        """The state as text."""
        seconds = max(now - self._begun, 1e-9)
        made = self._done - self._earlier
        left = seconds / made * (self._total - self._done) if made else 0.0
        speed = f"  {made / seconds:,.1f} {self._unit}/s" if self._unit != "parts" else ""
        speed += f"  {self._tokens / seconds:,.0f} tokens/s" if self._tokens else ""
        counted = f"{self._done:,}/{self._total:,} {self._unit}"
        return f"{self._label}  {counted}{speed}  {clock_text(left)} left"

    def _write(self, text: str) -> None:
        self._stream.write(f"\r\x1b[2K{text}" if self._is_live else f"{text}\n")
        self._stream.flush()


def clock_text(seconds: float) -> str:
    """Seconds as 0:07 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
