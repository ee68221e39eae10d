"""Rounds of `kill -9`: stop a job at a point, kill a process of it, run it again, compare.

For the fault tables of jobs that commit their outputs to a folder. Only processes that a round
itself started are killed, each by its id.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.benchmarks.fault_points import GO, IN_COMMIT, PAUSED, counts_of
from tests.benchmarks.fault_runs import contents, finished, left_half_written, started
from tests.benchmarks.report import Row
from tests.benchmarks.waiting import until

_PATIENCE = 120.0


@dataclass(frozen=True, slots=True)
class Point:
    """Whom to kill when a process of the job has come to the `number`-th point of a phase."""

    victim: str
    phase: str
    number: int


@dataclass(frozen=True, slots=True)
class Job:
    """What the rounds of one job differ in.

    Attributes:
        module: runs the job with its points.
        flags: the job's flags, from the folder that it writes and where its tasks run: on
            a Ray of its own (true), or wherever a run that nobody disturbs is fastest.
        victim_of: the process to kill, from the point, all processes of the job (the driver first)
            and the id of the one that stands at the point.
        units_in: how often each unit of the result stands in a folder.
        units: what those are called.
    """

    module: str
    flags: Callable[[Path, bool], list[str]]
    victim_of: Callable[[Point, list[psutil.Process], int], psutil.Process]
    units_in: Callable[[Path], Counter]
    units: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a round left."""

    is_same: bool
    lost: int
    doubled: int
    half_written: int
    says: str


def tree(pid: int) -> list[psutil.Process]:
    """A process and all that it started."""
    with suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    return []


def kill(process: psutil.Process) -> None:
    """`kill -9`, unless it is gone; psutil compares start times, so a reused id is safe."""
    with suppress(psutil.NoSuchProcess):
        process.kill()


def undisturbed_run(job: Job, folder: Path) -> dict[str, int]:
    """Write `folder/output` without a fault; returns how often each point was passed."""
    if finished(folder / "events", job.flags(folder / "output", True), job.module):
        print((folder / "events.log").read_text(), file=sys.stderr)
        raise SystemExit("the undisturbed run failed")
    return counts_of(folder / "events")


def round_of(job: Job, point: Point, folder: Path, undisturbed: Path) -> Outcome:
    """Kill at the point, run the same command again, compare."""
    began = time.perf_counter()
    events, output = folder / "events", folder / "output"
    process = started(events, (point.phase, point.number), job.flags(output, True), job.module)
    until(lambda: (events / PAUSED).exists() or process.poll() is not None, _PATIENCE)
    family, told = tree(process.pid), "nobody"
    if (events / PAUSED).exists() and process.poll() is None:
        victim = job.victim_of(point, family, int((events / PAUSED).read_text()))
        told = f"{victim.pid} {victim.name()}"
        kill(victim)
    (events / GO).touch()
    is_over = until(lambda: process.poll() is not None, _PATIENCE)
    code = process.poll()
    for each in {*family, *tree(process.pid)}:
        kill(each)
    process.wait()
    is_finished = (output / "manifest.json").exists()
    again = finished(folder / "again", job.flags(output, False), job.module)
    wanted, found = job.units_in(undisturbed), job.units_in(output)
    says = f"{point.phase} {point.number}: killed {told} ({point.victim}), "
    says += f"driver {f'exit {code}' if is_over else 'stopped by us'}, "
    says += f"{'finished' if is_finished else 'unfinished'}, again {again}, "
    says += f"{time.perf_counter() - began:.0f} s"
    return Outcome(
        is_same=told != "nobody" and again == 0 and contents(output) == contents(undisturbed),
        lost=len(wanted - found),
        doubled=sum(count - 1 for count in found.values()),
        half_written=left_half_written(output),
        says=says,
    )


def control_round(job: Job, folder: Path, undisturbed: Path) -> bool:
    """Whether the check finds fault with a job without the protocol, killed inside a write."""
    events, output = folder / "events", folder / "output"
    flags, naive = job.flags(output, False), {"CASCADE_FAULTS_UNPROTECTED": "1"}
    process = started(events, ("data half written", 3), flags, job.module, **naive)
    until(lambda: (events / PAUSED).exists() or process.poll() is not None, _PATIENCE)
    for each in reversed(tree(process.pid)):
        kill(each)
    process.wait()
    again = finished(folder / "again", flags, job.module, **naive)
    return again != 0 or contents(output) != contents(undisturbed)


def kill_rows(job: Job, points: Sequence[Point], folder: Path, undisturbed: Path) -> Iterator[Row]:
    """A round for each point, their control, and what all of them came to."""
    outcomes, count = [], len(points)
    for place, point in enumerate(points):
        own = folder / f"round-{place}"
        outcomes.append(round_of(job, point, own, undisturbed))
        print(f"{place + 1}/{count} {outcomes[-1].says}", file=sys.stderr, flush=True)
        if not outcomes[-1].is_same:
            print((own / "again.log").read_text()[-3000:], file=sys.stderr)
    in_commit = sum(point.phase in IN_COMMIT for point in points)
    same = sum(outcome.is_same for outcome in outcomes)
    yield Row("kill -9: bytes of the undisturbed run", same, f"of {count}", bar=count)
    yield Row("kill -9: points inside a commit", in_commit, "points", bar=-(-count // 4))
    for name, number in sorted(Counter(point.victim for point in points).items()):
        yield Row(f"kill -9: of the {name}", number, "points")
    lost, doubled = sum(o.lost for o in outcomes), sum(o.doubled for o in outcomes)
    yield Row(f"kill -9: {job.units} lost", lost, "", bar=0, is_limit=True)
    yield Row(f"kill -9: {job.units} doubled", doubled, "", bar=0, is_limit=True)
    half = sum(outcome.half_written for outcome in outcomes)
    yield Row("kill -9: half-written files left, which nothing reads", half, "files")
    caught = control_round(job, folder / "control", undisturbed)
    yield Row("control: without the commit protocol the check fails", int(caught), "of 1", bar=1)
