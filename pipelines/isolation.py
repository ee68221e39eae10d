"""A record that kills the process costs itself, not the job.

A killed process cannot tell why it died. So each attempt at a part leaves a mark that only a death
leaves behind; after two of them the part's records are tried one by one in forked children, and a
record whose child dies is set aside. What is found is kept with the part, so that every later
attempt sets the same records aside. A death with another cause finds nothing and changes nothing.
"""

import json
import logging
import mmap
import os
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cascade_model.commit import Folder
from cascade_model.errors import InputError

KILLED = "killed the process"
"""Reason of the dead letter."""
DEATHS = 2
"""Attempts at a part that may die before its records are tried one by one."""
_STATE = struct.Struct("<qq")
"""In memory shared with a child: the row it is at, and whether that row is still being read."""
log = logging.getLogger(__name__)

Trial = Callable[[int, Callable[[int, bool], None]], None]
"""Does a part's work record by record from a row on, and tells each row before it is touched."""


@contextmanager
def attempt(work: Folder, name: str) -> Iterator[int]:
    """Mark an attempt at a unit, as long as it lives; the body gets how many earlier ones died."""
    marks = [f"{name}.attempt-{number}" for number in range(DEATHS)]
    deaths = sum(work.exists(mark) for mark in marks)
    mine = marks[min(deaths, DEATHS - 1)]
    work.publish(mine, b"")
    try:
        yield deaths
    finally:
        if deaths < DEATHS:
            work.remove(mine)


def killers(work: Folder, name: str, trial: Trial) -> frozenset[int]:
    """Rows of a part that kill the process that touches them; found once, then kept."""
    unit = f"{name}.killers.json"
    if not work.exists(unit):
        log.warning("%s died %d times; its records are tried one by one", name, DEATHS)
        work.publish(unit, json.dumps(_found(trial, name)).encode())
    return frozenset(json.loads(work.read_bytes(unit)))


def _found(trial: Trial, name: str) -> list[int]:
    """Try row after row, each child going on behind the row that killed the one before."""
    found: list[int] = []
    start = 0
    while True:
        row, is_reading = died_at(trial, start)
        if row is None:
            return found
        if is_reading:
            raise InputError(
                f"{name}: reading its record {row} kills the process, before its text is known; "
                "leave that file out or give workers more memory"
            )
        found.append(row)
        start = row + 1


def died_at(trial: Trial, start: int) -> tuple[int | None, bool]:
    """The row at which a forked child died in a trial from `start` on, none if it lived; and
    whether that row was still being read.

    A child that ends with an exception has lived: the same exception will come in the parent.
    """
    with mmap.mmap(-1, _STATE.size) as shared:
        shared[:] = _STATE.pack(start, 1)

        def tell(row: int, is_reading: bool) -> None:
            if os.getppid() != parent:  # whoever killed the parent must not leave the child
                os._exit(1)
            shared[:] = _STATE.pack(row, is_reading)

        parent, child = os.getpid(), os.fork()
        if child == 0:
            _live(trial, start, tell)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) >= 0:
            return None, False
        row, is_reading = _STATE.unpack(shared[:])
        return row, bool(is_reading)


def _live(trial: Trial, start: int, tell: Callable[[int, bool], None]) -> None:
    """The child's whole life; nothing of the parent's is ended or written with it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        trial(start, tell)
    finally:
        os._exit(0)
