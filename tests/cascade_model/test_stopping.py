"""A signal is noted once, a second interrupt is obeyed, and handlers are given back; SIGTERM to a
command interrupts it once, at no bad moment."""

import logging
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from cascade_model.errors import Stopped
from cascade_model.stopping import (
    Terminated,
    command_is_running,
    signals_noted,
    sigterm_has_come,
    sigterm_held_off,
    sigterm_interrupts,
)

BOTH = (signal.SIGTERM, signal.SIGINT)


def handlers():
    return [signal.getsignal(number) for number in BOTH]


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_is_noted_by_name_and_handlers_are_given_back(number):
    before = handlers()
    with signals_noted() as noted:
        assert noted() is None
        signal.raise_signal(number)
        assert noted() == number.name
    assert handlers() == before


def test_the_first_signal_is_the_one_that_is_told():
    with signals_noted() as noted:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert noted() == "SIGINT"


def interrupt_twice():
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)


def test_an_interrupt_after_a_signal_is_obeyed_at_once():
    before = handlers()
    with pytest.raises(KeyboardInterrupt), signals_noted():
        interrupt_twice()
    assert handlers() == before


def test_another_thread_changes_nothing():
    found = []

    def work():
        with signals_noted() as noted:
            found.append((handlers(), noted()))

    before = handlers()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(before, None)]


def sigterm():
    signal.raise_signal(signal.SIGTERM)


@contextmanager
def interrupted(*, is_program=False):
    """A command that lets SIGTERM in from its beginning."""
    with sigterm_interrupts(is_program=is_program) as handler:
        handler.let_in()
        yield handler


def test_sigterm_interrupts_a_command_and_the_handler_is_given_back():
    before = handlers()
    with interrupted() as handler:
        assert not handler.has_come
        assert not sigterm_has_come()
        with pytest.raises(Terminated):
            sigterm()
        assert sigterm_has_come()
    assert handler.has_come
    assert not sigterm_has_come()  # to no command any more
    assert handlers() == before


def test_an_interrupt_inside_of_exec_does_not_end_the_interpreter_by_sigint(tmp_path):
    """Under `python -m` CPython remembers a plain `KeyboardInterrupt` of there, and its end is then
    a SIGINT; dataclasses are made by `exec`, so that any import may be such a call."""
    (tmp_path / "interrupted.py").write_text("""
import sys
from cascade_model.stopping import Terminated
try:
    exec(f"raise {sys.argv[1]}")
except KeyboardInterrupt:
    sys.exit(75)
""")
    path = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    ends = [
        subprocess.run([sys.executable, "-m", "interrupted", name], env=path).returncode
        for name in ("Terminated", "KeyboardInterrupt")
    ]
    assert ends == [75, -signal.SIGINT]


def test_before_it_is_let_in_and_after_it_is_held_off_again_it_is_only_noted():
    with sigterm_interrupts(is_program=False) as handler:
        sigterm()
        assert handler.has_come
        with pytest.raises(Terminated):
            handler.let_in()
        handler.hold_off()
        sigterm()


def test_a_command_runs_from_its_handler_to_its_end():
    assert not command_is_running()
    with sigterm_interrupts(is_program=False) as handler:
        assert command_is_running()
        handler.is_over = True
        assert not command_is_running()
    assert not command_is_running()


def test_ctrl_c_is_no_sigterm():
    with interrupted() as handler:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert not handler.has_come


def test_after_a_program_it_is_ignored():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with interrupted(is_program=True):
            pass
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def stop():
    raise Stopped.at(3, "SIGTERM")


@pytest.mark.parametrize("begin", [sigterm, lambda: signal.raise_signal(signal.SIGINT), stop])
def test_a_further_sigterm_does_not_cut_short_what_the_end_puts_in_order(begin):
    done = []

    def rest():
        try:
            yield
        finally:  # the exception that is being handled here is a GeneratorExit
            sigterm()
            done.append("closed")

    def work():
        lines = rest()
        next(lines)
        try:
            begin()
        finally:
            sigterm()
            lines.close()
            done.append("in order")

    with interrupted(), pytest.raises((KeyboardInterrupt, Stopped)):
        work()
    assert done == ["closed", "in order"]


def test_an_error_that_is_dealt_with_does_not_keep_sigterm_off():
    def work():
        try:
            raise ValueError
        except ValueError:
            sigterm()

    with interrupted(), pytest.raises(Terminated):
        work()


def wait_for_the_interrupt():
    for _ in range(1000):
        time.sleep(0.01)


def test_inside_of_logging_it_waits_until_the_lock_is_free():
    said, free = [], []

    class Handler(logging.Handler):
        def emit(self, record):
            sigterm()
            said.append(record.getMessage())

    log, handler = logging.Logger("here"), Handler()
    log.addHandler(handler)

    def work():
        log.warning("whole")
        wait_for_the_interrupt()

    with pytest.raises(KeyboardInterrupt), interrupted():
        work()
    assert said == ["whole"]
    other = threading.Thread(target=lambda: free.append(handler.lock.acquire(timeout=5)))
    other.start()
    other.join()
    assert free == [True]


def test_inside_of_a_finaliser_where_it_would_be_lost_it_waits():
    class Ended:
        def __del__(self):
            sigterm()

    def work():
        Ended()
        wait_for_the_interrupt()

    with pytest.raises(KeyboardInterrupt), interrupted():
        work()


def test_while_it_is_held_off_it_waits_and_another_handler_is_taken_away():
    done = []

    def work():
        with sigterm_held_off() as is_held:
            assert is_held
            sigterm()
            signal.signal(signal.SIGTERM, lambda *_: done.append("the other's"))
        done.append("after")

    with interrupted() as handler:
        ours = handlers()
        with pytest.raises(KeyboardInterrupt):
            work()
        assert handler.has_come
        assert handlers() == ours
    assert done == []


def test_nothing_is_held_off_outside_of_a_command():
    before = handlers()
    with sigterm_held_off() as is_held:
        assert not is_held
        assert handlers() == before


def test_a_stage_with_a_stop_of_its_own_notes_it_and_is_not_interrupted_afterwards():
    with interrupted():
        with signals_noted() as noted:
            sigterm()
            assert noted() == "SIGTERM"
        sigterm()
        with signals_noted() as noted:
            assert noted() is None


def test_a_stage_with_a_stop_of_its_own_that_nobody_asked_for_leaves_the_command_as_it_was():
    with interrupted():
        with signals_noted():
            pass
        with pytest.raises(Terminated):
            sigterm()
