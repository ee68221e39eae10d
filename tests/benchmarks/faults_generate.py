"""faults-generate: `generate` under `kill -9`, and poison prompts.

    make faults-generate N=20

Kills: N points from a recorded seed, at least a quarter of them inside a commit. The victim is the
actor that stands at the point, another worker of the same Ray, or the driver. Whatever is killed,
the same command is run again and must end with the bytes of an undisturbed run. Each kind of fault
has a control: with the protection off, the same check must fail. Only processes that a round itself
started are killed, each by its id.
"""

import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.benchmarks.fault_points import AFTER_MANIFEST, BEFORE_MANIFEST, IN_COMMIT, IN_TASK
from tests.benchmarks.faults_generate_poison import MODULE, poison_rows
from tests.benchmarks.kill_rounds import Job, Point, kill_rows, undisturbed_run
from tests.benchmarks.report import Row, publish

SEED = 21
VICTIMS = ("actor", "worker", "driver")
ROWS, ROWS_PER_SHARD = 60, 5
_ACTOR = "ray::MapWorker"


def points_of(count: int, passed: dict[str, int], seed: int = SEED) -> list[Point]:
    """The seeded list: first what must lie in a commit, then any phase. Only the driver passes the
    points of the manifest, so it is what is killed there."""
    chance = random.Random(seed)
    in_commit = -(-count // 4)
    anywhere = IN_TASK + IN_COMMIT + ("record named",) + BEFORE_MANIFEST + AFTER_MANIFEST
    points = []
    for place in range(count):
        phase = chance.choice(IN_COMMIT if place < in_commit else anywhere)
        of_driver = phase in BEFORE_MANIFEST + AFTER_MANIFEST
        victim = "driver" if of_driver else VICTIMS[place % len(VICTIMS)]
        points.append(Point(victim, phase, chance.randint(1, max(1, passed[phase]))))
    return points


def write_prompts(target: Path, rows: int = ROWS) -> None:
    """Prompts of several lengths; every seventh line holds none."""
    lines = [
        "{broken" if row % 7 == 3 else json.dumps({"prompt": f"Row {row}: " + "a b " * (row % 9)})
        for row in range(rows)
    ]
    target.write_text("\n".join(lines) + "\n")


def write_model(folder: Path) -> None:
    """A tiny model with random weights: what is checked are bytes, not texts."""
    from tests.tiny_models import saved_text_model

    saved_text_model(folder)


def flags(model: Path, source: Path, output: Path) -> list[str]:
    """The job: many small parts and two actors, so that there is much to interrupt."""
    words = ["--model", str(model), "--input", str(source), "--output", str(output)]
    words += ["--rows-per-shard", str(ROWS_PER_SHARD), "--num-workers", "2"]
    words += ["--threads-per-worker", "1", "--max-dead-rate", "0.5"]
    return [*words, "--sampling.max-tokens", "24", "--sampling.temperature", "1"]


def rows_in(folder: Path) -> Counter:
    """How often each row stands in any shard of completions or dead letters."""
    found: Counter = Counter()
    for path in [*folder.glob("completions-*.jsonl"), *folder.glob("dead-*.jsonl")]:
        for line in path.read_text().splitlines():
            row = json.loads(line) if line.endswith("}") else {}
            found[int(row.get("id", row.get("row", -1)))] += 1
    return found


def victim_of(point: Point, processes: list[psutil.Process], paused: int) -> psutil.Process:
    """The process to kill, one of those that this round started."""
    driver = processes[0]
    if point.victim == "driver":
        return driver
    if point.victim == "actor":
        return next((p for p in processes if p.pid == paused), driver)
    others = [p for p in processes if p.name().startswith("ray::") and p.pid != paused]
    actors = [p for p in others if p.name().startswith(_ACTOR[:15])]
    return (actors or [p for p in others if "Agent" not in p.name()] or processes)[0]


def killed_rows(count: int, folder: Path, model: Path) -> Iterator[Row]:
    """All rounds and their control."""
    folder.mkdir(parents=True)
    source = folder / "prompts.jsonl"
    write_prompts(source)
    job = Job(
        module=MODULE,
        flags=lambda output, on_ray: flags(model, source, output),
        victim_of=victim_of,
        units_in=rows_in,
        units="rows",
    )
    points = points_of(count, undisturbed_run(job, folder / "undisturbed"))
    yield from kill_rows(job, points, folder, folder / "undisturbed/output")


def main(count: int) -> int:
    """The table of all faults."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="faults", dir="/tmp") as temporary:
        folder = Path(temporary)
        os.environ["RAY_TMPDIR"] = temporary  # short enough for Ray's sockets
        model = folder / "model"
        write_model(model)
        rows = [
            *killed_rows(count, folder / "kill", model),
            *poison_rows(folder / "poison", model),
        ]
    rows.append(Row("seconds", time.perf_counter() - began, "s"))
    return publish("generate", rows, kind="faults", points=count, seed=SEED)


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1])))
