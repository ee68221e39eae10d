"""Requests to stop: by a signal or by whoever watches over the run, agreed by all ranks."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def signals_noted() -> Iterator[Callable[[], str | None]]:
    """While the body runs, SIGTERM and SIGINT are noted in place of ending the process.

    Yields a function that gives the name of the first of them, or None. A second SIGINT is a
    `KeyboardInterrupt`, for whoever cannot wait for the end of a step; a second SIGTERM is not, as
    launchers send one after the other. Only Python's main thread can have this; in another nothing
    is changed and nothing noted.
    """
    noted: list[str] = []

    def note(number: int, frame: FrameType | None) -> None:
        if noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        noted.append(signal.Signals(number).name)

    def first() -> str | None:
        return noted[0] if noted else None

    if threading.current_thread() is not threading.main_thread():
        yield first
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield first
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
