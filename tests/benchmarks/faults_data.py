"""faults-data: `prepare` under `kill -9`, a faulty S3, a full disk and poison rows.

    make faults-data N=20

Kills: N seeded points, at least a quarter of them inside a commit and three in twenty after the
data but before the manifest; the victim is a worker, the driver or the raylet of a Ray of the run's
own. Whatever is killed, the same command is run again and must end with the bytes of an undisturbed
run. Each kind of fault has a control: with the protection off, the same check must fail. Only
processes that a round itself started are killed, each by its id.
"""

import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa

from tests.benchmarks.fault_points import (
    AFTER_MANIFEST,
    BEFORE_MANIFEST,
    GO,
    IN_COMMIT,
    IN_TASK,
    PAUSED,
    PHASES,
    counts_of,
)
from tests.benchmarks.fault_runs import (
    contents,
    finished,
    flags,
    left_half_written,
    started,
    write_texts,
)
from tests.benchmarks.faults_disk import disk_rows
from tests.benchmarks.faults_poison import poison_rows
from tests.benchmarks.faults_s3 import s3_rows
from tests.benchmarks.report import Row, publish

SEED = 20
VICTIMS = ("worker", "driver", "raylet")
_PATIENCE = 90.0


@dataclass(frozen=True, slots=True)
class Point:
    """Whom to kill when a process of the job has come to the `number`-th point of a phase."""

    victim: str
    phase: str
    number: int


def points_of(count: int, passed: dict[str, int], seed: int = SEED) -> list[Point]:
    """The seeded list: first what must be in it, then any phase."""
    chance = random.Random(seed)
    wanted = [IN_COMMIT] * -(-count // 4) + [BEFORE_MANIFEST] * -(-count * 3 // 20)
    wanted += [IN_TASK + IN_COMMIT + ("record named",) + AFTER_MANIFEST] * (count - len(wanted))
    points = []
    for place, phases in enumerate(wanted[:count]):
        phase = phases[place % len(phases)] if phases == BEFORE_MANIFEST else chance.choice(phases)
        victim = VICTIMS[place % len(VICTIMS)]
        points.append(Point(victim, phase, chance.randint(1, max(1, passed[phase]))))
    return points


def sequences(folder: Path) -> Counter:
    """How often each (split, sequence id) stands in any shard of the folder."""
    found: Counter = Counter()
    for path in folder.glob("shard-*.arrow"):
        split = path.name.split("-")[1]
        with suppress(pa.ArrowInvalid):
            ids = pa.ipc.open_file(path).read_all().column("sequence_id").to_numpy()
            found.update((split, int(each)) for each in ids)
    return found


def until(is_so: Callable[[], bool], seconds: float) -> bool:
    """Wait for something to become so."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def tree(pid: int) -> list[psutil.Process]:
    """A process and all that it started."""
    with suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    return []


def victim_of(point: Point, driver: int, paused: int) -> psutil.Process:
    """The process to kill, one of those that this round started."""
    mine = tree(driver)
    if point.victim == "raylet":
        return next(p for p in mine if "raylet" in p.name())
    if point.victim == "worker":
        if paused != driver:
            return next(p for p in mine if p.pid == paused)
        # Not an agent: those belong to the raylet, which does not outlive them.
        idle = (p for p in mine if p.name().startswith("ray::") and "Agent" not in p.name())
        return next(idle, mine[0])
    return mine[0]


def kill(process: psutil.Process) -> None:
    """`kill -9`, unless it is gone; psutil compares start times, so a reused id is safe."""
    with suppress(psutil.NoSuchProcess):
        process.kill()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a round left."""

    is_same: bool
    lost: int
    doubled: int
    half_written: int
    says: str


def round_of(point: Point, folder: Path, source: Path, undisturbed: Path) -> Outcome:
    """Kill at the point, run the same command again, compare."""
    began = time.perf_counter()
    events, output = folder / "events", folder / "corpus"
    process = started(events, (point.phase, point.number), flags(source, output, "ray"))
    came = until(lambda: (events / PAUSED).exists() or process.poll() is not None, _PATIENCE)
    family = tree(process.pid)
    victim = None
    if came and (events / PAUSED).exists():
        victim = victim_of(point, process.pid, int((events / PAUSED).read_text()))
        kill(victim)
    (events / GO).touch()
    is_over = until(lambda: process.poll() is not None, _PATIENCE)
    code = process.poll()
    for each in {*family, *tree(process.pid)}:
        kill(each)
    process.wait()
    is_finished = (output / "manifest.json").exists()
    again = finished(folder / "again", flags(source, output, "local"))
    wanted, found = sequences(undisturbed), sequences(output)
    says = f"{point.phase} {point.number}: killed {victim.pid if victim else 'nobody'} "
    says += f"({point.victim}), driver {f'exit {code}' if is_over else 'stopped by us'}, "
    says += f"{'finished' if is_finished else 'unfinished'}, again {again}, "
    says += f"{time.perf_counter() - began:.0f} s"
    return Outcome(
        is_same=victim is not None and again == 0 and contents(output) == contents(undisturbed),
        lost=len(wanted - found),
        doubled=sum(count - 1 for count in found.values()),
        half_written=left_half_written(output),
        says=says,
    )


def control_round(folder: Path, source: Path, undisturbed: Path) -> bool:
    """Whether the check finds fault with a job without the protocol, killed inside a write."""
    events, output = folder / "events", folder / "corpus"
    words, naive = flags(source, output, "local"), {"CASCADE_FAULTS_UNPROTECTED": "1"}
    process = started(events, ("data half written", 3), words, **naive)
    until(lambda: (events / PAUSED).exists() or process.poll() is not None, _PATIENCE)
    process.kill()
    process.wait()
    again = finished(folder / "again", words, **naive)
    return again != 0 or contents(output) != contents(undisturbed)


def kill_rows(count: int, folder: Path, source: Path) -> Iterator[Row]:
    """All rounds and their control."""
    undisturbed = folder / "undisturbed" / "corpus"
    if finished(folder / "undisturbed" / "events", flags(source, undisturbed, "ray")):
        print((folder / "undisturbed" / "events.log").read_text(), file=sys.stderr)
        raise SystemExit("the undisturbed run failed")
    passed = counts_of(folder / "undisturbed" / "events")
    points, outcomes = points_of(count, passed), []
    for place, point in enumerate(points):
        outcomes.append(round_of(point, folder / f"round-{place}", source, undisturbed))
        print(f"{place + 1}/{count} {outcomes[-1].says}", file=sys.stderr, flush=True)
        if not outcomes[-1].is_same:
            print((folder / f"round-{place}" / "again.log").read_text()[-3000:], file=sys.stderr)
    in_commit = sum(point.phase in IN_COMMIT for point in points)
    before = sum(point.phase in BEFORE_MANIFEST for point in points)
    same = sum(outcome.is_same for outcome in outcomes)
    yield Row("kill -9: bytes of the undisturbed run", same, f"of {count}", bar=count)
    yield Row("kill -9: points inside a commit", in_commit, "points", bar=-(-count // 4))
    yield Row("kill -9: after the data, before the manifest", before, "points",
              bar=-(-count * 3 // 20))  # fmt: skip
    for name in VICTIMS:
        yield Row(f"kill -9: of the {name}", sum(p.victim == name for p in points), "points")
    for phase in PHASES:
        yield Row(f"kill -9: when {phase}", sum(p.phase == phase for p in points), "points")
    lost, doubled = sum(o.lost for o in outcomes), sum(o.doubled for o in outcomes)
    yield Row("kill -9: sequences lost", lost, "", bar=0, is_limit=True)
    yield Row("kill -9: sequences doubled", doubled, "", bar=0, is_limit=True)
    half = sum(outcome.half_written for outcome in outcomes)
    yield Row("kill -9: half-written files left, which nothing reads", half, "files")
    caught = control_round(folder / "control", source, undisturbed)
    yield Row("control: without the commit protocol the check fails", int(caught), "of 1", bar=1)


def main(count: int) -> int:
    """The table of all faults."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="faults", dir="/tmp") as temporary:
        folder = Path(temporary)
        os.environ["RAY_TMPDIR"] = temporary  # short enough for Ray's sockets
        source = folder / "texts.jsonl"
        write_texts(source, 1_500_000)
        rows = [
            *kill_rows(count, folder / "kill", source),
            *s3_rows(folder / "s3", source, seeds=max(1, count // 5)),
            *disk_rows(folder / "disk", source),
            *poison_rows(folder / "poison"),
        ]
    rows.append(Row("seconds", time.perf_counter() - began, "s"))
    return publish("data", rows, kind="faults", points=count, seed=SEED)


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1])))
