"""The first rank's lines of metrics, in the terminal of the command.

The ranks' own output stays in Ray's logs, where Ray mixes it with its own of every actor.
"""

import time

from cascade_model.commit import Folder
from cascade_model.metrics import read_metrics, show
from cascade_model.status_line import end_line, tell

_STORE_EVERY = 5.0
"""Seconds between two looks at the lines in a store, which are read whole."""


class Terminal:
    """What was shown of a run's metrics.jsonl."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._asked = float("-inf")
        lines = self._lines()
        self._shown = lines[-1]["step"] if lines else 0

    def show(self, is_last: bool = False) -> None:
        """Show the lines that came since, each once; also that the ranks started again."""
        is_early = time.monotonic() - self._asked < _STORE_EVERY
        if is_early and not (self._folder.is_local or is_last):
            return
        lines = self._lines()
        newest = lines[-1]["step"] if lines else 0
        if newest < self._shown:
            tell(f"the ranks were started again; going on after step {newest}")
            self._shown = newest
        for line in lines:
            if line["step"] > self._shown:
                show(line)
                self._shown = line["step"]
        if is_last:
            end_line()

    def _lines(self) -> list:
        self._asked = time.monotonic()
        return read_metrics(self._folder)
