"""Reading ahead changes when things are made, and nothing else."""

import itertools
import threading
import time

import pytest

from cascade_model.prefetch import ahead


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def wait_for(condition) -> bool:
    until = time.monotonic() + 60
    while not condition() and time.monotonic() < until:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_the_same_items_come_in_the_same_order(depth):
    assert list(ahead(iter(range(50)), depth)) == list(range(50))
    assert list(ahead(iter([]), depth)) == []


def test_items_are_made_before_they_are_asked_for_but_not_without_bound():
    made = []
    items = ahead((made.append(i) or i for i in itertools.count()), 3)
    assert next(items) == 0
    # Three are ready, one waits for room.
    assert wait_for(lambda: len(made) == 5)
    time.sleep(0.05)
    assert len(made) == 5
    items.close()


def test_what_is_raised_comes_after_the_items_before_it():
    def broken():
        yield 1
        raise ValueError("here")

    items = ahead(broken(), 4)
    assert next(items) == 1
    with pytest.raises(ValueError, match="here"):
        next(items)
    assert wait_for(lambda: "prefetch" not in threads())


def test_closing_ends_the_thread():
    items = ahead(itertools.count(), 2)
    next(items)
    assert "prefetch" in threads()
    items.close()
    assert "prefetch" not in threads()


def test_a_forgotten_iterator_ends_the_thread_too():
    next(ahead(itertools.count(), 2))
    assert wait_for(lambda: "prefetch" not in threads())
