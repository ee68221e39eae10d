"""faults-train: `cascade pretrain` on two ranks under `kill -9` and all else that goes wrong.

    make faults-train N=20

Kills: N seeded points, at least a quarter of them inside a save and three in twenty after the data
but before COMMIT, and every phase there is from N = 14 on; the victim is either rank, wherever the
other one is just then. Whatever is
killed, the same command is run again and must end with the undisturbed run's weights and log lines.
Every kind of fault has a control: with the protection off, the same check must fail. Only processes
that a round itself started are killed, each by its id.
"""

import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cascade_model.config import NoiseConfig
from tests.benchmarks.faults_train_damage import damage_rows, hostile_rows
from tests.benchmarks.faults_train_ranks import rank_rows
from tests.benchmarks.faults_train_ray import ray_rows
from tests.benchmarks.faults_train_saves import save_rows
from tests.benchmarks.rank_points import (
    AFTER_DATA,
    IN_SAVE,
    OF_FIRST_RANK,
    PHASES,
    counts_of,
    name_of,
)
from tests.benchmarks.rank_runs import Launcher, Result, flags, result_of
from tests.benchmarks.report import Row, publish
from tests.cascade_model.corpus_making import make_corpus

SEED = 20
RANKS = 2


@dataclass(frozen=True, slots=True)
class Point:
    """Whom to kill when `rank` has come to the `number`-th point of a phase."""

    phase: str
    rank: int
    number: int
    victim: int

    def __str__(self) -> str:
        return f"{name_of(self.phase, self.rank)} {self.number}, victim rank {self.victim}"


def points_of(count: int, passed: dict[tuple[str, int], int], seed: int = SEED) -> list[Point]:
    """The seeded list: first what must be in it, then any phase, always of those that came least
    often so far, so that none is left out."""
    chance = random.Random(seed)
    wanted = [AFTER_DATA] * -(-count * 3 // 20)
    wanted += [IN_SAVE] * (-(-count // 4) - len(wanted))
    wanted += [PHASES] * (count - len(wanted))
    points, drawn = [], Counter[str]()
    for phases in wanted[:count]:
        fewest = min(drawn[phase] for phase in phases)
        phase = chance.choice([phase for phase in phases if drawn[phase] == fewest])
        drawn[phase] += 1
        rank = 0 if phase in OF_FIRST_RANK else chance.randrange(RANKS)
        number = chance.randint(1, max(1, passed[phase, rank]))
        points.append(Point(phase, rank, number, victim=chance.randrange(RANKS)))
    return points


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a round came to."""

    is_same: bool
    was_killed: bool
    has_hung: bool
    says: str


def round_of(
    launcher: Launcher,
    point: Point,
    folder: Path,
    corpus: str,
    undisturbed: Result,
    *,
    is_naive: bool = False,
) -> Outcome:
    """Kill at the point, run the same command again, compare."""
    began, words = time.perf_counter(), flags(corpus, folder / "run")
    target = (name_of(point.phase, point.rank), point.number)
    ranks = launcher.start(words, folder / "events", target=target, is_naive=is_naive)
    came = ranks.until_paused()
    if came:
        ranks.signal(signal.SIGKILL, point.victim)
    ranks.go()
    has_hung = not ranks.wait()
    ranks.kill_all()
    first = ranks.exits
    again = launcher.run(words, folder / "again", is_naive=is_naive)
    was_killed = came and first[point.victim] == -signal.SIGKILL
    found = result_of(folder / "run")
    says = f"{point}: exits {first}, again {again}, {time.perf_counter() - began:.1f} s"
    is_same = was_killed and again == [0] * RANKS and found == undisturbed
    return Outcome(is_same and not has_hung, was_killed, has_hung, says)


def undisturbed_run(launcher: Launcher, corpus: str, folder: Path, seed: int = 0) -> Result:
    """What a run leaves that nobody disturbs; its points are in `events`."""
    codes = launcher.run(flags(corpus, folder / "run", seed=seed), folder / "events")
    found = result_of(folder / "run")
    if codes != [0] * RANKS or found is None:
        for log in folder.glob("events/*.log"):
            print(log.read_text(), file=sys.stderr)
        raise SystemExit(f"the undisturbed run failed: exits {codes}")
    return found


def kill_rows(launcher: Launcher, count: int, corpus: str, folder: Path) -> Iterator[Row]:
    """All rounds on forked ranks, and their controls."""
    undisturbed = undisturbed_run(launcher, corpus, folder / "undisturbed")
    points = points_of(count, counts_of(folder / "undisturbed/events", RANKS))
    outcomes = []
    for place, point in enumerate(points):
        outcome = round_of(launcher, point, folder / f"round-{place}", corpus, undisturbed)
        outcomes.append(outcome)
        print(f"{place + 1}/{count} {outcome.says}", file=sys.stderr, flush=True)
        if not outcome.is_same:
            for log in sorted((folder / f"round-{place}").glob("*/rank-*.log")):
                print(f"{log}\n{log.read_text()[-2000:]}", file=sys.stderr)
    same = sum(outcome.is_same for outcome in outcomes)
    yield Row("kill -9: weights and every log line of the undisturbed run", same, f"of {count}",
              bar=count)  # fmt: skip
    in_save = sum(point.phase in IN_SAVE for point in points)
    after = sum(point.phase in AFTER_DATA for point in points)
    yield Row("kill -9: points inside a save", in_save, "points", bar=-(-count // 4))
    yield Row("kill -9: after the data, before COMMIT", after, "points", bar=-(-count * 3 // 20))
    hung = sum(outcome.has_hung for outcome in outcomes)
    yield Row("kill -9: rounds whose other rank did not end", hung, "", bar=0, is_limit=True)
    for rank in range(RANKS):
        killed = sum(point.victim == rank for point in points)
        yield Row(f"kill -9: of rank {rank}", killed, "points")
    for phase in PHASES:
        yield Row(f"kill -9: when {phase}", sum(p.phase == phase for p in points), "points")
    other = undisturbed_run(launcher, corpus, folder / "other", seed=1)
    is_found = other.weights != undisturbed.weights and other.lines != undisturbed.lines
    yield Row("control: another seed gives other weights", int(is_found), "of 1", bar=1)
    point = Point("data half written", 0, 3, victim=0)
    bad = round_of(launcher, point, folder / "naive", corpus, undisturbed, is_naive=True)
    is_found = bad.was_killed and not bad.is_same
    yield Row("control: without the commit protocol the check fails", int(is_found), "of 1", bar=1)


def corpus_in(folder: Path) -> str:
    """Some hundred short sequences; blocks of four."""
    texts = [
        f"Row {row} says that {row * row} is a square, and it is right.\n" for row in range(99)
    ]
    noise = NoiseConfig(block_size=4)
    return make_corpus(folder, {"rows": texts}, noise=noise, sequence_length=64)


def main(count: int) -> int:
    """The table of all faults."""
    began = time.perf_counter()
    # In memory where that is at hand: a killed process loses nothing that it has written.
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"
    with tempfile.TemporaryDirectory(prefix="faults", dir=place) as temporary:
        folder = Path(temporary)
        os.environ["RAY_TMPDIR"] = temporary  # short enough for Ray's sockets
        corpus = corpus_in(folder / "corpus")
        rows: list[Row] = []
        with Launcher() as launcher:
            rows += kill_rows(launcher, count, corpus, folder / "kill")
            undisturbed = result_of(folder / "kill/undisturbed/run")
            assert undisturbed is not None
            events = folder / "kill/undisturbed/events"
            rows += rank_rows(launcher, corpus, folder / "ranks", undisturbed, events)
            rows += save_rows(launcher, corpus, folder / "saves", undisturbed, count)
            rows += damage_rows(launcher, corpus, folder / "damage", undisturbed)
            rows += hostile_rows(launcher, corpus, folder / "hostile")
        rows += ray_rows(corpus, folder / "ray", undisturbed, rounds=-(-count * 3 // 20))
    rows.append(Row("seconds", time.perf_counter() - began, "s"))
    return publish("train", rows, kind="faults", points=count, seed=SEED)


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1])))
