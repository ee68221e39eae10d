"""A question to all replicas of a deployment, and their answers as they come.

Ray Serve gathers the answers of a broadcast into one list, which one silent replica withholds from
everybody; so each is waited for by itself here.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Iterable
from typing import Any


async def answers_of_all(handle: Any, method: str, seconds: float) -> AsyncGenerator[Any, None]:
    """What the replicas behind a Serve handle answer to a call without arguments, as `as_they_come`
    tells it; nothing where there is no replica. None is started for it."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        asked = handle.broadcast(method)
        # Not of Serve's public interface, which has no way to the single answers.
        replies = await asyncio.wait_for(asked._fetch_replica_results_async(), seconds)
    except (RayServeException, RayError):  # no replica at all
        return
    calls = [each.get_async() for each in replies]
    async with contextlib.aclosing(as_they_come(calls, seconds)) as answers:
        async for answer in answers:
            yield answer


async def as_they_come(
    calls: Iterable[Coroutine[Any, Any, Any]], seconds: float
) -> AsyncGenerator[Any, None]:
    """What calls return, the quickest first; those that fail are left out. `TimeoutError` behind
    the last answer where one says nothing for `seconds`. To be closed (`contextlib.aclosing`) where
    not all are taken: it waits for no call then."""
    loop = asyncio.get_running_loop()
    waiting: set[asyncio.Task[Any]] = {asyncio.create_task(call) for call in calls}
    deadline = loop.time() + seconds
    try:
        while waiting:
            left = max(0.0, deadline - loop.time())
            done, waiting = await asyncio.wait(
                waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                raise TimeoutError(f"{len(waiting)} calls were not answered in {seconds:g} s")
            for each in done:
                if not each.cancelled() and each.exception() is None:
                    yield each.result()
    finally:
        for each in waiting:
            each.cancel()
