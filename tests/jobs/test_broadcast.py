"""Answers are taken one by one: neither a silent call nor a failing one keeps the others back."""

import asyncio
import contextlib

import pytest

from jobs.broadcast import answers_of_all, as_they_come


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


class Handle:
    """A handle of Serve whose broadcast fails."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def broadcast(self, method: str) -> "Handle":
        return self

    async def _fetch_replica_results_async(self) -> list:
        raise self._error


def test_without_a_replica_nobody_answers_and_a_fault_of_ours_is_not_taken_for_that():
    from ray.serve._private.common import DeploymentID
    from ray.serve.exceptions import DeploymentUnavailableError

    async def answers(error: Exception) -> list:
        return [each async for each in answers_of_all(Handle(error), "ready", 1.0)]

    gone = DeploymentUnavailableError(DeploymentID(name="Sampler", app_name="cascade"))
    assert asyncio.run(answers(gone)) == []
    with pytest.raises(AttributeError, match="renamed"):
        asyncio.run(answers(AttributeError("renamed")))
