"""A signal is noted once, a second interrupt is obeyed, and handlers are given back."""

import signal
import threading

import pytest

from cascade_model.stopping import signals_noted

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
