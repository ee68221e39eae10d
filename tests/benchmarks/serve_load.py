"""Overload, hang-ups and a soak of an endpoint: what a fault table says of them."""

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil

from tests.benchmarks.report import Row
from tests.benchmarks.serve_client import Told, client, streamed
from tests.benchmarks.serve_runs import busy_slots, requests, serve_processes

PLACES = 16
"""Choices in flight that the server under load takes."""


LONG = {"max_tokens": 800, "stop_at_eos": False}
"""Each takes as long as any other, and long by the side of a refusal."""
STRETCH_SECONDS = 5.0


async def at_peak(url: str, seconds: float) -> list[Told]:
    """As many clients as there are places, each asking again as soon as it is answered."""
    found: list[Told] = []
    deadline = time.monotonic() + seconds
    async with client(url) as http:
        await asyncio.gather(
            *(_asking(http, each, deadline, found) for each in requests(PLACES, **LONG))
        )
    return found


async def _asking(
    http: Any, request: dict[str, Any], deadline: float, found: list[Told], **settings: Any
) -> None:
    while time.monotonic() < deadline:
        found.append(await streamed(http, request, **settings))
        if found[-1].status == 429:
            await asyncio.sleep(float(found[-1].retry_after or 0))


async def in_turns(url: str, a_second: float, pairs: int) -> tuple[list[Told], list[int], int]:
    """The clients of the peak, and in every second stretch beside them so many requests a second
    whatever becomes of those before: everything told, pieces in each stretch, requests beside."""
    found: list[Told] = []
    pieces, beside = [0] * (2 * pairs), []
    wanted = requests(PLACES, **LONG)
    begin = time.monotonic() + STRETCH_SECONDS  # until all places are taken
    end = begin + STRETCH_SECONDS * len(pieces)

    def count(told: Told) -> None:
        stretch = int((time.monotonic() - begin) // STRETCH_SECONDS)
        if 0 <= stretch < len(pieces):
            pieces[stretch] += 1

    async with client(url) as http:
        peak = [
            asyncio.create_task(_asking(http, each, end, found, on_piece=count)) for each in wanted
        ]
        for pair in range(pairs):
            for number in range(round(a_second * STRETCH_SECONDS)):
                due = begin + (2 * pair + 1) * STRETCH_SECONDS + number / a_second
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                asked = streamed(http, wanted[number % PLACES], count)
                beside.append(asyncio.create_task(asked))
        found += await asyncio.gather(*beside)
        await asyncio.gather(*peak)
    return found, pieces, len(beside)


def overload_rows(url: str, pairs: int, is_judged: bool) -> Iterator[Row]:
    """The peak, then the peak and three times its requests in turns: a speed that drifts is that of
    both. A short run's goodput is told and not judged."""
    began = time.perf_counter()
    calm = asyncio.run(at_peak(url, 3 * STRETCH_SECONDS))
    peak = sum(told.is_whole for told in calm) / (time.perf_counter() - began)
    found, pieces, beside = asyncio.run(in_turns(url, 2 * peak, pairs))
    rejects = [told for told in found if not told.is_whole]
    wrong = sum(told.status != 429 or told.retry_after is None for told in rejects)
    goodput = sum(pieces[1::2]) / sum(pieces[::2])
    yield Row("overload x 3: peak", peak, "requests/s")
    yield Row("... goodput by that of the peak", goodput, "", bar=0.9 if is_judged else None)
    yield Row("... requests beside the peak's", beside, "requests")
    yield Row("... refused with 429 and Retry-After", len(rejects) - wrong, "requests", bar=1)
    yield Row("... refused otherwise", wrong, "", bar=0, is_limit=True)
    unasked = sum(not told.is_whole for told in calm)
    yield Row("control: refused at the peak", unasked, "requests", bar=0, is_limit=True)


async def hung_up(url: str, count: int) -> int:
    """Busy places while nobody hangs up; then `count` clients that leave after the first piece."""

    def leave(told: Told) -> None:
        raise EOFError

    async with client(url) as http:
        long = requests(8, max_tokens=400)
        stay = [asyncio.create_task(streamed(http, each)) for each in long]
        busy = 0
        while not busy and not all(task.done() for task in stay):
            busy = await asyncio.to_thread(busy_slots)
        await asyncio.gather(*stay)
        for start in range(0, count, 10):
            batch = requests(min(10, count - start), max_tokens=800)
            await asyncio.gather(*(streamed(http, each, leave) for each in batch))
    return busy


def hang_up_rows(url: str, count: int) -> Iterator[Row]:
    """Clients leave in mid-stream; the places must be free soon after the last one."""
    busy = asyncio.run(hung_up(url, count))
    began = time.perf_counter()
    while left := busy_slots():
        if time.perf_counter() - began > 10:
            break
    took = time.perf_counter() - began
    yield Row("hang-ups: places still held", left, f"after {count}", bar=0, is_limit=True)
    yield Row("... seconds until all were free", took, "s", bar=1, is_limit=True)
    yield Row("control: places held while the clients stay", busy, "places", bar=1)


def growth(values: Sequence[float], steps: Sequence[float]) -> float:
    """Least-squares slope of the values over the steps."""
    mean_x, mean_y = sum(steps) / len(steps), sum(values) / len(values)
    above = sum((x - mean_x) * (y - mean_y) for x, y in zip(steps, values, strict=True))
    return above / sum((x - mean_x) ** 2 for x in steps)


LEAK = """
import os, sys
kept = []
for line in sys.stdin:
    kept += [bytearray(os.urandom(8192)) for _ in range(int(line))]
    kept.append(open(os.devnull))
    print(flush=True)
"""
"""A process that keeps 8 KB of every request, and a descriptor of every batch."""


@contextlib.contextmanager
def leaking() -> Iterator[tuple[psutil.Process, Callable[[int], Any]]]:
    """The control's process, and how to tell it of so many requests."""
    words = [sys.executable, "-c", LEAK]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def leak(requests: int) -> None:
            process.stdin.write(f"{requests}\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            process.stdout.readline()  # type: ignore[union-attr]

        yield psutil.Process(process.pid), leak
        process.stdin.close()


def soak_rows(url: str, count: int) -> Iterator[Row]:
    """Short requests, 8 at a time; memory and descriptors of every process in their second half,
    and of one that leaks, which the same look must find."""
    with leaking() as (control, leak):
        yield from _soak_rows(url, count, control, leak)


def _soak_rows(
    url: str, count: int, control: psutil.Process, leak: Callable[[int], Any]
) -> Iterator[Row]:
    seen: list[tuple[int, dict[int, tuple[float, int]]]] = []
    wrong = 0

    async def soak() -> None:
        nonlocal wrong
        async with client(url) as http:
            for start in range(0, count, 40):
                batch = requests(40, max_tokens=8, confidence_threshold=0.0)
                for group in range(0, 40, 8):
                    told = await asyncio.gather(
                        *(streamed(http, each) for each in batch[group : group + 8])
                    )
                    wrong += sum(not each.is_whole for each in told)
                leak(40)
                seen.append((start + 40, measured([*serve_processes(), control])))

    asyncio.run(soak())
    half = seen[len(seen) // 2 :]
    steps = [number for number, _ in half]
    same = set.intersection(*(set(each) for _, each in half))
    names = {each.pid: each.name().removeprefix("ray::") for each in serve_processes()}
    kilobytes = {p: growth([each[p][0] for _, each in half], steps) / 1024 for p in same}
    files = {pid: half[-1][1][pid][1] - half[0][1][pid][1] for pid in same}
    leaked, kept_open = kilobytes.pop(control.pid), files.pop(control.pid)
    yield Row("soak: requests", count, "requests")
    yield Row("... that failed", wrong, "", bar=0, is_limit=True)
    yield Row("... processes watched: proxy, ingress, samplers", len(kilobytes), "", bar=4)
    for pid, slope in kilobytes.items():
        yield Row(f"... memory of {names[pid]}", slope, "KB/request")
    most, limit = max(kilobytes.values()), 4
    yield Row("... memory, the fastest-growing process", most, "KB/request", limit, True)
    more = max(files.values())
    yield Row("... descriptors, the fastest-growing process", more, "more", limit, True)
    yield Row("control: memory of a process that leaks 8 KB a request", leaked, "KB/request", limit)
    if len(half) > limit + 1:  # a descriptor a batch
        yield Row("... and its descriptors", kept_open, "more", limit)


def measured(processes: Sequence[psutil.Process]) -> dict[int, tuple[float, int]]:
    """Resident bytes and descriptors of processes."""
    return {each.pid: (float(each.memory_info().rss), each.num_fds()) for each in processes}
