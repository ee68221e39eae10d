"""Requests to stop: by a signal or by whoever watches over the run, agreed by all ranks.

A command has one handler of SIGTERM from its first line to its last, `sigterm_interrupts`: it acts
as Ctrl-C does. A stage that has an orderly stop of its own, such as a training loop, puts another
one over it meanwhile.
"""

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from cascade_model.errors import Stopped

_AGAIN_AFTER = 0.05
"""Seconds after which a SIGTERM that came at a bad moment is sent again."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came, which acts on a command as Ctrl-C does.

    A class of its own, as an interpreter that saw a plain `KeyboardInterrupt` in a call of `exec`
    ends itself by SIGINT, whatever was made of it.
    """


class _Interrupt:
    """The handler of SIGTERM: raises `Terminated` in the main thread, or only notes it.

    It is only noted while it is held off, when the command is over, and while an exception that
    ends the command is on its way: launchers send a second SIGTERM, which must not cut short what
    the first one let be put in order. It is held off at first.
    """

    def __init__(self) -> None:
        self.has_come = False
        self.is_held = True
        self.is_over = False

    def let_in(self) -> None:
        """Raise `Terminated` from now on, and now if SIGTERM came while it was held off."""
        self.is_held = False
        if self.has_come and not self.is_over:
            raise Terminated

    def hold_off(self) -> None:
        """Only note SIGTERM from now on."""
        self.is_held = True

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.has_come = True
        if self.is_held or self.is_over or _is_ending():
            return
        if _is_bad_moment(frame):
            # No `threading.Thread`: the moment may be inside of `threading`, with a lock taken.
            _thread.start_new_thread(_send_again, ())
            return
        raise Terminated


def _is_ending() -> bool:
    """Whether the exception that is being handled, or one that it came out of, ends the command."""
    error = sys.exception()
    while error is not None:
        if isinstance(error, (KeyboardInterrupt, SystemExit, Stopped)):
            return True
        error = error.__context__
    return False


def _is_bad_moment(frame: FrameType | None) -> bool:
    """Whether an exception would be lost here, or leave a lock taken that all threads need."""
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if frame.f_code.co_name == "__del__" or module.partition(".")[0] == "logging":
            return True
        frame = frame.f_back
    return False


def _send_again() -> None:
    time.sleep(_AGAIN_AFTER)
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def sigterm_interrupts(*, is_program: bool) -> Iterator[_Interrupt]:
    """While the body runs, SIGTERM raises `Terminated` in the main thread, where the body lets it.

    Yields the handler, which holds SIGTERM off until the body calls `let_in`, so that a body can
    catch whatever it raises, and tells whether it has come: libraries may make a plain
    `KeyboardInterrupt` of it. After a program's body SIGTERM is ignored: the interpreter's own end,
    in which Ray ends its processes, takes seconds. In another thread nothing is changed.
    """
    own = _Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield own
        return
    before = signal.signal(signal.SIGTERM, own)
    try:
        yield own
    finally:
        own.is_over = True
        after = signal.SIG_IGN if is_program else before or signal.SIG_DFL
        signal.signal(signal.SIGTERM, after)


def command_is_running() -> bool:
    """Whether SIGTERM to this process is already that of a command, around what runs now."""
    handler = signal.getsignal(signal.SIGTERM)
    return isinstance(handler, _Interrupt) and not handler.is_over


def sigterm_has_come() -> bool:
    """Whether SIGTERM came to the command of this process; false outside of one."""
    handler = signal.getsignal(signal.SIGTERM)
    return isinstance(handler, _Interrupt) and handler.has_come


@contextlib.contextmanager
def sigterm_held_off() -> Iterator[bool]:
    """A SIGTERM that comes while the body runs interrupts at its end; yields whether it does.

    For a body that cannot be left in its middle and may put other handlers into the place of a
    command's, which is put back. Outside of a command, and in another thread, nothing is changed.
    """
    handler = signal.getsignal(signal.SIGTERM)
    is_main = threading.current_thread() is threading.main_thread()
    if not isinstance(handler, _Interrupt) or not is_main:
        yield False
        return
    handler.is_held = True
    try:
        yield True
    finally:
        signal.signal(signal.SIGTERM, handler)
        handler.is_held = False
        if handler.has_come:
            signal.raise_signal(signal.SIGTERM)


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
            if noted and isinstance(handler, _Interrupt):
                handler.is_over = True  # the stop that was asked for is under way
