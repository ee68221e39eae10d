"""Lines for the person who watches, on stderr, so that stdout stays the job's result.

On a terminal the newest progress stands in one line that is redrawn, above it what was told;
elsewhere, in a file or a pipe, each is a line of its own.
"""

import os
import sys
import threading

_ERASE = "\r\x1b[K"
"""To the line's beginning; clear what is there."""
_WIDTH = 80
"""Columns of a terminal that does not know how many it has."""


class _Screen:
    """What stands in the last line; any thread may write."""

    def __init__(self) -> None:
        self._is_open, self._lock = False, threading.Lock()

    def tell(self, line: str) -> None:
        with self._lock:
            self._close()
            self._write(line + "\n")

    def redraw(self, line: str) -> None:
        if not _is_terminal():
            self.tell(line)
            return
        with self._lock:
            self._write(_ERASE + line[: _columns() - 1])  # a wrapped line cannot be taken back
            self._is_open = True

    def end(self) -> None:
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._is_open:
            self._write("\n")
        self._is_open = False

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


_screen = _Screen()


def tell(line: str) -> None:
    """A line that stays."""
    _screen.tell(line)


def redraw(line: str) -> None:
    """A line of progress, in the place of the one before where that is possible."""
    _screen.redraw(line)


def end_line() -> None:
    """Let the last progress stay and begin a new line, as the job ends or another writes."""
    _screen.end()


def _is_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or _WIDTH
    except OSError:
        return _WIDTH
