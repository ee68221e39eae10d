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
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.benchmarks.fault_points import (
    AFTER_MANIFEST,
    BEFORE_MANIFEST,
    GO,
    IN_COMMIT,
    IN_TASK,
    PAUSED,
    counts_of,
)
from tests.benchmarks.fault_runs import contents, finished, left_half_written, started
from tests.benchmarks.faults_data import Point, kill, tree, until
from tests.benchmarks.faults_generate_poison import poison_rows
from tests.benchmarks.report import Row, publish

SEED = 21
MODULE = "tests.benchmarks.fault_points_generate"
VICTIMS = ("actor", "worker", "driver")
ROWS, ROWS_PER_SHARD = 60, 5
_PATIENCE = 120.0
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
    from cascade_model.model import Transformer
    from cascade_model.tokenizer import byte_tokenizer
    from cascade_model.weights import save_model
    from tests.tiny_models import text_config

    tokenizer = byte_tokenizer()
    network = Transformer(text_config(tokenizer))
    network.init_weights(0)
    save_model(folder, network, tokenizer)


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


def victim_of(point: Point, driver: int, paused: int) -> psutil.Process:
    """The process to kill, one of those that this round started."""
    mine = tree(driver)
    if point.victim == "driver":
        return mine[0]
    others = [p for p in mine if p.name().startswith("ray::") and p.pid != paused]
    if point.victim == "actor":
        return next((p for p in mine if p.pid == paused), mine[0])
    actors = [p for p in others if p.name().startswith(_ACTOR[:15])]
    return (actors or [p for p in others if "Agent" not in p.name()] or mine)[0]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a round left."""

    is_same: bool
    lost: int
    doubled: int
    half_written: int
    says: str


def round_of(point: Point, folder: Path, words: list[str], undisturbed: Path) -> Outcome:
    """Kill at the point, run the same command again, compare."""
    began = time.perf_counter()
    events, output = folder / "events", Path(words[words.index("--output") + 1])
    process = started(events, (point.phase, point.number), words, MODULE)
    until(lambda: (events / PAUSED).exists() or process.poll() is not None, _PATIENCE)
    family, victim = tree(process.pid), None
    if (events / PAUSED).exists() and process.poll() is None:
        victim = victim_of(point, process.pid, int((events / PAUSED).read_text()))
        told = f"{victim.pid} {victim.name()}"
        kill(victim)
    else:
        told = "nobody"
    (events / GO).touch()
    is_over = until(lambda: process.poll() is not None, _PATIENCE)
    code = process.poll()
    for each in {*family, *tree(process.pid)}:
        kill(each)
    process.wait()
    is_finished = (output / "manifest.json").exists()
    again = finished(folder / "again", words, MODULE)
    wanted, found = rows_in(undisturbed), rows_in(output)
    says = f"{point.phase} {point.number}: killed {told} ({point.victim}), driver "
    says += f"{f'exit {code}' if is_over else 'stopped by us'}, "
    says += f"{'finished' if is_finished else 'unfinished'}, again {again}, "
    says += f"{time.perf_counter() - began:.0f} s"
    return Outcome(
        is_same=victim is not None and again == 0 and contents(output) == contents(undisturbed),
        lost=len(wanted - found),
        doubled=sum(count - 1 for count in found.values()),
        half_written=left_half_written(output),
        says=says,
    )


def control_round(folder: Path, words: list[str], undisturbed: Path) -> bool:
    """Whether the check finds fault with a job without the protocol, killed inside a write."""
    events, output = folder / "events", Path(words[words.index("--output") + 1])
    naive = {"CASCADE_FAULTS_UNPROTECTED": "1"}
    process = started(events, ("data half written", 3), words, MODULE, **naive)
    until(lambda: (events / PAUSED).exists() or process.poll() is not None, _PATIENCE)
    for each in reversed(tree(process.pid)):
        kill(each)
    process.wait()
    again = finished(folder / "again", words, MODULE, **naive)
    return again != 0 or contents(output) != contents(undisturbed)


def kill_rows(count: int, folder: Path, model: Path) -> Iterator[Row]:
    """All rounds and their control."""
    folder.mkdir(parents=True)
    source = folder / "prompts.jsonl"
    write_prompts(source)
    undisturbed = folder / "undisturbed" / "out"
    if finished(folder / "undisturbed" / "events", flags(model, source, undisturbed), MODULE):
        print((folder / "undisturbed" / "events.log").read_text(), file=sys.stderr)
        raise SystemExit("the undisturbed run failed")
    points = points_of(count, counts_of(folder / "undisturbed" / "events"))
    outcomes = []
    for place, point in enumerate(points):
        own = folder / f"round-{place}"
        words = flags(model, source, own / "out")
        outcomes.append(round_of(point, own, words, undisturbed))
        print(f"{place + 1}/{count} {outcomes[-1].says}", file=sys.stderr, flush=True)
        if not outcomes[-1].is_same:
            print((own / "again.log").read_text()[-3000:], file=sys.stderr)
    in_commit = sum(point.phase in IN_COMMIT for point in points)
    same = sum(outcome.is_same for outcome in outcomes)
    yield Row("kill -9: bytes of the undisturbed run", same, f"of {count}", bar=count)
    yield Row("kill -9: points inside a commit", in_commit, "points", bar=-(-count // 4))
    for name in VICTIMS:
        yield Row(f"kill -9: of the {name}", sum(p.victim == name for p in points), "points")
    lost, doubled = sum(o.lost for o in outcomes), sum(o.doubled for o in outcomes)
    yield Row("kill -9: rows lost", lost, "", bar=0, is_limit=True)
    yield Row("kill -9: rows doubled", doubled, "", bar=0, is_limit=True)
    half = sum(outcome.half_written for outcome in outcomes)
    yield Row("kill -9: half-written files left, which nothing reads", half, "files")
    words = flags(model, source, folder / "control" / "out")
    caught = control_round(folder / "control", words, undisturbed)
    yield Row("control: without the commit protocol the check fails", int(caught), "of 1", bar=1)


def main(count: int) -> int:
    """The table of all faults."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="faults", dir="/tmp") as temporary:
        folder = Path(temporary)
        os.environ["RAY_TMPDIR"] = temporary  # short enough for Ray's sockets
        model = folder / "model"
        write_model(model)
        rows = [*kill_rows(count, folder / "kill", model), *poison_rows(folder / "poison", model)]
    rows.append(Row("seconds", time.perf_counter() - began, "s"))
    return publish("generate", rows, kind="faults", points=count, seed=SEED)


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1])))
