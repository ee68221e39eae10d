"""faults-serve: the endpoint under `kill -9`, overload, hang-ups, an update and a soak.

    make faults-serve N=10

Real Ray Serve, two samplers of a tiny model, streams at temperature 1. Each part says what an
undisturbed run gives and compares; each has a control in the same run, in which the protection is
off or the fault is not there, and in which the same check must find the difference. Only processes
that this run started are killed, each by its id.
"""

import asyncio
import dataclasses
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jobs.serve import serve_document, start_ray_for
from jobs.serve_config import ServeConfig
from tests.benchmarks.report import Row, publish
from tests.benchmarks.serve_client import Told, streams
from tests.benchmarks.serve_load import hang_up_rows, overload_rows, soak_rows
from tests.benchmarks.serve_runs import (
    busy_slots,
    busy_victim,
    config_of,
    kill,
    requests,
    running,
    serving,
    states,
    update,
    write_model,
)
from tests.benchmarks.waiting import wait_until

STREAMS = 8
MORE: tuple[dict[str, Any], ...] = ({"n": 2}, {"logprobs": 2}, {"stop": ["q", "zz"]})
"""What some of them ask for besides."""


def during(url: str, wanted: list[dict[str, Any]], act: Callable[[], Any]) -> list[Told]:
    """The streams, while something happens to the server."""
    found: list[Told] = []
    thread = threading.Thread(target=lambda: found.extend(asyncio.run(streams(url, wanted))))
    thread.start()
    try:
        act()
    finally:
        thread.join()
    return found


def kill_one() -> None:
    """`kill -9` of a sampler that has a stream in mid-block, while two are ready."""
    kill(busy_victim())


def kill_both() -> None:
    """`kill -9` of all samplers while streams run."""
    busy_victim()
    for each in states():
        kill(each)


def two_ready() -> None:
    """Wait for two samplers that answer."""
    wait_until(lambda: running() == 2 and len(states()) == 2, 120)


def kill_rows(url: str, count: int) -> Iterator[Row]:
    """One of two samplers dies, `count` times; then both at once."""
    failed = truncated = same = both_told = both_same = 0
    for round_number in range(count + 1):
        wanted = requests(STREAMS, max_tokens=160)
        for each in wanted:
            each["seed"] += 1000 * round_number
        for each, more in zip(wanted, MORE, strict=False):
            each |= more
        calm = asyncio.run(streams(url, wanted))
        if not all(told.is_whole for told in calm):
            raise SystemExit(f"the undisturbed run failed: {calm}")
        two_ready()
        is_last = round_number == count
        found = during(url, wanted, kill_both if is_last else kill_one)
        equal = sum(a.content() == b.content() for a, b in zip(calm, found, strict=True))
        print(f"{round_number + 1}/{count + 1} {equal} of {STREAMS} equal", file=sys.stderr)
        if is_last:
            both_told, both_same = sum(told.is_told for told in found), equal
        else:
            failed += sum(told.status != 200 or told.error is not None for told in found)
            truncated += sum(not told.is_told for told in found)
            same += equal
        two_ready()
    total = count * STREAMS
    yield Row("kill -9 of one sampler of two", count, "kills", bar=count)
    yield Row("... streams that failed", failed, f"of {total}", bar=0, is_limit=True)
    yield Row("... streams cut off in silence", truncated, f"of {total}", bar=0, is_limit=True)
    yield Row("... equal to the undisturbed run, to the byte", same, f"of {total}", bar=total)
    yield Row("kill -9 of both: ended whole or with an error", both_told, f"of {STREAMS}",
              bar=STREAMS)  # fmt: skip
    yield Row("... equal to the undisturbed run, to the byte", both_same, f"of {STREAMS}")


def update_rows(url: str, config: ServeConfig, other: str) -> Iterator[Row]:
    """Other weights are rolled out while clients ask without a pause."""
    wanted = requests(4, max_tokens=60)
    before = asyncio.run(streams(url, wanted))
    found: list[Told] = []
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            found.extend(asyncio.run(streams(url, wanted)))

    thread = threading.Thread(target=ask)
    thread.start()
    old = {state["weights"] for state in states()}
    update(dataclasses.replace(config, model=other))
    try:
        wait_until(lambda: is_updated(old), 180)
        time.sleep(5)  # the old ingress goes
    finally:
        is_over.set()
        thread.join()
    after = asyncio.run(streams(url, wanted))
    known = {str(told.content()) for told in [*before, *after]}
    of_one = sum(str(told.content()) in known and len(told.fingerprints) == 1 for told in found)
    yield Row("rolling update to other weights: streams meanwhile", len(found), "streams", bar=8)
    wrong = sum(not told.is_whole for told in found)
    for told in found:
        if not told.is_whole:
            print(f"update: {told}", file=sys.stderr)
    yield Row("... that failed", wrong, "", bar=0, is_limit=True)
    yield Row("... that are of one model from end to end", of_one, f"of {len(found)}",
              bar=len(found))  # fmt: skip
    models = len({next(iter(told.fingerprints), "") for told in [*before, *after]})
    yield Row("control: the two models answer differently", models, "fingerprints", bar=2)


def is_updated(old: set[str]) -> bool:
    """Whether two samplers answer and none has the old weights."""
    told = states()
    return len(told) == 2 and running() == 2 and not old & {state["weights"] for state in told}


def control_rows(model: str, folder: Path) -> Iterator[Row]:
    """The same kill and the same load with the protections off."""
    config = config_of(model, folder, max_sampler_losses=0, max_in_flight=1000)
    with serving(config) as url:
        wanted = requests(STREAMS, max_tokens=160)
        asyncio.run(streams(url, wanted))
        two_ready()
        found = during(url, wanted, kill_one)
        lost = sum(not told.is_whole for told in found)
        yield Row("control: without resumption a kill fails streams", lost, f"of {STREAMS}", bar=1)
        told = sum(told.is_told for told in found)
        yield Row("... each of them told so", told, f"of {STREAMS}", bar=STREAMS)
        two_ready()
        found = during(url, requests(3 * 16, max_tokens=16), lambda: None)
        refused = sum(told.status == 429 for told in found)
        yield Row("control: without a limit nobody is refused", refused, f"of {len(found)}",
                  bar=0, is_limit=True)  # fmt: skip
        wait_until(lambda: busy_slots() == 0)


def main(count: int) -> int:
    """The table of all faults; fewer than 10 kills are a short run, with a smaller load too."""
    import ray

    began = time.perf_counter()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    share = min(1.0, count / 10)
    with tempfile.TemporaryDirectory(prefix="faults", dir="/tmp") as temporary:
        folder = Path(temporary)
        os.environ["RAY_TMPDIR"] = temporary  # short enough for Ray's sockets
        os.environ.pop("RAY_ADDRESS", None)
        model, other = write_model(folder / "tiny"), write_model(folder / "other", seed=1)
        config = config_of(model, folder, max_in_flight=16)
        start_ray_for(serve_document(config))
        try:
            with serving(config) as url:
                rows = [
                    *kill_rows(url, count),
                    *overload_rows(url, pairs=round(8 * share) or 1, is_judged=count >= 10),
                    *hang_up_rows(url, count=max(30, round(300 * share))),
                    *soak_rows(
                        url, count=max(1000, round(2000 * share))
                    ),  # a new sampler fills up first
                    *update_rows(url, config, other),
                ]
            rows += control_rows(model, folder)
        finally:
            ray.shutdown()
    rows.append(Row("seconds", time.perf_counter() - began, "s"))
    return publish("serve", rows, kind="faults", kills=count)


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1])))
