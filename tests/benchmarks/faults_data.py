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
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow as pa

from tests.benchmarks.fault_points import (
    AFTER_MANIFEST,
    BEFORE_MANIFEST,
    IN_COMMIT,
    IN_TASK,
    PHASES,
)
from tests.benchmarks.fault_runs import PREPARE, flags, write_texts
from tests.benchmarks.faults_disk import disk_rows
from tests.benchmarks.faults_poison import poison_rows
from tests.benchmarks.faults_s3 import s3_rows
from tests.benchmarks.kill_rounds import Job, Point, kill_rows, undisturbed_run
from tests.benchmarks.report import Row, publish

SEED = 20
VICTIMS = ("worker", "driver", "raylet")


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


def victim_of(point: Point, processes: list[psutil.Process], paused: int) -> psutil.Process:
    """The process to kill, one of those that this round started."""
    driver = processes[0]
    if point.victim == "raylet":
        return next(p for p in processes if "raylet" in p.name())
    if point.victim == "worker":
        if paused != driver.pid:
            return next(p for p in processes if p.pid == paused)
        # Not an agent: those belong to the raylet, which does not outlive them.
        idle = (p for p in processes if p.name().startswith("ray::") and "Agent" not in p.name())
        return next(idle, driver)
    return driver


def job_of(source: Path) -> Job:
    """`prepare` of one file: on Ray, and what was left once more in its own process."""
    return Job(
        module=PREPARE,
        flags=lambda output, on_ray: flags(source, output, "ray" if on_ray else "local"),
        victim_of=victim_of,
        units_in=sequences,
        units="sequences",
    )


def killed_rows(count: int, folder: Path, source: Path) -> Iterator[Row]:
    """All rounds and their control."""
    job = job_of(source)
    points = points_of(count, undisturbed_run(job, folder / "undisturbed"))
    yield from kill_rows(job, points, folder, folder / "undisturbed/output")
    before = sum(point.phase in BEFORE_MANIFEST for point in points)
    yield Row("kill -9: after the data, before the manifest", before, "points",
              bar=min(-(-count * 3 // 20), count - -(-count // 4)))  # fmt: skip
    for phase in PHASES:
        yield Row(f"kill -9: when {phase}", sum(p.phase == phase for p in points), "points")


def main(count: int) -> int:
    """The table of all faults."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="faults", dir="/tmp") as temporary:
        folder = Path(temporary)
        os.environ["RAY_TMPDIR"] = temporary  # short enough for Ray's sockets
        source = folder / "texts.jsonl"
        write_texts(source, 1_500_000)
        rows = [
            *killed_rows(count, folder / "kill", source),
            *s3_rows(folder / "s3", source, seeds=max(1, count // 5)),
            *disk_rows(folder / "disk", source),
            *poison_rows(folder / "poison"),
        ]
    rows.append(Row("seconds", time.perf_counter() - began, "s"))
    return publish("data", rows, kind="faults", points=count, seed=SEED)


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1])))
