"""A probe is answered in time, by what samplers said lately and never against what is known."""

import asyncio

import pytest

from jobs.readiness import LATELY_SECONDS, Readiness

LONG_AGO = float("-inf")


def asked(*answers):
    """A question that is answered so, one after the other: at once, by silence, or by a future."""
    left = list(answers)

    async def ask() -> bool:
        answer = left.pop(0)
        if answer is None:
            raise TimeoutError
        return await answer if isinstance(answer, asyncio.Future) else answer

    return ask, left


def readiness(ask, last_heard=lambda: LONG_AGO, **settings) -> Readiness:
    return Readiness(ask, last_heard, wait_seconds=0.02, **settings)


@pytest.mark.parametrize("answer", [True, False])
def test_a_quick_answer_is_taken_as_it_is(answer):
    async def probe() -> bool:
        ask, _ = asked(answer)
        return await readiness(ask).is_ready()

    assert asyncio.run(probe()) is answer


def test_one_that_was_never_heard_of_is_not_ready_while_it_is_silent():
    async def probe() -> list[bool]:
        ask, _ = asked(None, asyncio.get_running_loop().create_future())
        own = readiness(ask)
        return [await own.is_ready() for _ in range(3)]

    assert asyncio.run(probe()) == [False] * 3


def test_a_late_answer_counts_for_the_next_probe_and_only_one_question_is_open():
    async def probe() -> list[bool]:
        late = asyncio.get_running_loop().create_future()
        ask, left = asked(late, False)
        own = readiness(ask)
        told = [await own.is_ready(), await own.is_ready()]
        assert left == [False]  # the second probe asked nothing of its own
        late.set_result(True)
        await asyncio.sleep(0)
        open_question = asyncio.get_running_loop().create_future()
        left[:] = [open_question]
        return [*told, await own.is_ready()]

    assert asyncio.run(probe()) == [False, False, True]


def test_a_busy_one_is_ready_for_as_long_as_it_was_heard_of_lately():
    async def probe() -> list[bool]:
        ask, _ = asked(asyncio.get_running_loop().create_future())
        own = readiness(ask, lambda: heard, clock=lambda: now)
        heard = now = 100.0
        told = [await asyncio.wait_for(own.is_ready(), 20)]
        now = 99.9 + LATELY_SECONDS
        told.append(await own.is_ready())
        now = 100.1 + LATELY_SECONDS
        told.append(await own.is_ready())
        heard = now
        return [*told, await own.is_ready()]

    assert asyncio.run(probe()) == [True, True, False, True]


def test_one_that_has_died_is_not_ready_however_lately_it_spoke():
    """Nor while nothing is known of its successor, until that one speaks."""

    async def probe() -> list[bool]:
        ask, _ = asked(False, asyncio.get_running_loop().create_future())
        own = readiness(ask, lambda: heard, clock=lambda: now)
        heard, now = 100.0, 100.1
        told = [await own.is_ready(), await own.is_ready()]
        heard = now = 101.0
        return [*told, await own.is_ready()]

    assert asyncio.run(probe()) == [False, False, True]
