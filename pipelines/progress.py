"""One line about a running job: what is done, how fast, how long it may still take."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

QUIET_SECONDS = 10.0
"""Between two lines where nobody watches; on a terminal the one line is written anew."""
LIVE_SECONDS = 0.2


class Progress:
    """Parts done of a round, with tokens per second and the time that is left."""

    def __init__(
        self,
        label: str,
        total: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label, self._total = label, total
        self._stream = stream if stream is not None else sys.stderr
        self._is_live = self._stream.isatty()
        self._clock = clock
        self._begun = self._shown = clock()
        self._done = self._tokens = 0

    def add(self, tokens: int = 0) -> None:
        """A part is done."""
        self._done += 1
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
        left = seconds / self._done * (self._total - self._done) if self._done else 0.0
        speed = f"  {self._tokens / seconds:,.0f} tokens/s" if self._tokens else ""
        return f"{self._label}  {self._done}/{self._total} parts{speed}  {clock_text(left)} left"

    def _write(self, text: str) -> None:
        self._stream.write(f"\r\x1b[2K{text}" if self._is_live else f"{text}\n")
        self._stream.flush()


def clock_text(seconds: float) -> str:
    """Seconds as 0:07 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
