"""Answers are taken one by one: neither a silent call nor a failing one keeps the others back."""

import asyncio
import contextlib

import pytest

from jobs.broadcast import as_they_come


async def after(seconds: float, answer: object) -> object:
    await asyncio.sleep(seconds)
    if isinstance(answer, BaseException):
        raise answer
    return answer


async def taken(*calls, seconds: float = 30.0) -> list[object]:
    """What comes, and at the end the timeout if there is one."""
    came = []
    try:
        async for answer in as_they_come(calls, seconds):
            came.append(answer)
    except TimeoutError as error:
        came.append(error)
    return came


def test_the_quickest_is_the_first_and_a_failing_one_is_left_out():
    calls = (after(0.2, "late"), after(0, "soon"), after(0.1, ValueError("broken")))
    assert asyncio.run(taken(*calls)) == ["soon", "late"]


def test_of_a_cancelled_call_nothing_is_told():
    assert asyncio.run(taken(after(0, asyncio.CancelledError()), after(0.1, 1))) == [1]


def test_without_calls_nothing_comes_at_once():
    assert asyncio.run(taken(seconds=0)) == []


def test_a_silent_call_ends_it_behind_the_answers_of_the_others():
    *came, end = asyncio.run(taken(after(60, "never"), after(0, 1), after(0.05, 2), seconds=0.3))
    assert came == [1, 2]
    assert isinstance(end, TimeoutError)
    assert str(end) == "1 calls were not answered in 0.3 s"


@pytest.mark.parametrize("how", ["left", "timeout"])
def test_no_call_is_left_running(how):
    async def running() -> set[asyncio.Task]:
        if how == "timeout":
            await taken(after(60, 1), seconds=0.01)
        else:
            async with contextlib.aclosing(as_they_come([after(60, 1), after(0, 2)], 60)) as came:
                assert await anext(came) == 2
        await asyncio.sleep(0)
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(running()) == set()
