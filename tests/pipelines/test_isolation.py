"""Real deaths of real processes: who is to blame is found, and others are not blamed."""

import faulthandler
import os
import signal

import pytest

from cascade_model.commit import Folder
from cascade_model.errors import InputError
from pipelines.isolation import DEATHS, attempt, died_at, killers

pytestmark = pytest.mark.forks


def deadly(*rows, while_reading=()):
    """A trial of ten rows, of which some kill the process that touches them."""

    def trial(start, tell):
        for row in range(10):
            tell(row, True)
            if row in while_reading:
                os.kill(os.getpid(), signal.SIGKILL)
            if row >= start:
                tell(row, False)
                if row in rows:
                    faulthandler.disable()  # a death on purpose needs no report
                    os.kill(os.getpid(), signal.SIGSEGV if row % 2 else signal.SIGKILL)

    return trial


@pytest.mark.parametrize("rows", [(), (0,), (9,), (3, 4, 8)])
def test_each_row_that_kills_is_found(tmp_path, rows):
    assert killers(Folder(tmp_path), "part", deadly(*rows)) == frozenset(rows)


def test_what_was_found_is_kept(tmp_path):
    killers(Folder(tmp_path), "part", deadly(3))
    assert killers(Folder(tmp_path), "part", deadly(4)) == {3}
    assert killers(Folder(tmp_path), "other", deadly(4)) == {4}


def test_a_row_that_cannot_even_be_read_stops_the_job(tmp_path):
    with pytest.raises(InputError, match="reading its record 6 kills the process"):
        killers(Folder(tmp_path), "part", deadly(2, while_reading=(6,)))


def test_an_exception_is_no_death():
    def trial(start, tell):
        tell(5, False)
        raise ValueError("to be raised again by the parent")

    assert died_at(trial, 0) == (None, False)


def test_only_a_death_leaves_a_mark(tmp_path):
    work = Folder(tmp_path)
    with attempt(work, "part") as deaths:
        assert deaths == 0
    with pytest.raises(KeyboardInterrupt), attempt(work, "part"):
        raise KeyboardInterrupt
    assert work.list() == []
    for expected in (0, 1, DEATHS, DEATHS):
        child = os.fork()
        if child == 0:
            with attempt(work, "part") as deaths:
                os.kill(os.getpid(), signal.SIGKILL if deaths == expected else signal.SIGUSR1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    with attempt(work, "other") as deaths:
        assert deaths == 0
    with attempt(work, "part") as deaths:
        assert deaths == DEATHS
