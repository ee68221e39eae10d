"""Ranks that stand still, are told to leave, meet a NaN, or come back in another number.

Each row has a control: the same check, of a run that lacks what the check looks for.
"""

import itertools
import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.benchmarks.rank_points import counts_of, ids_of, name_of
from tests.benchmarks.rank_runs import STEPS, Launcher, Ranks, Result, flags, result_of
from tests.benchmarks.report import Row

BOUND = 6.0
"""Seconds that ranks wait for one that stands still."""
GRACE = 5.0
STILL_IN_SAVE = (("data half written", 1), ("manifest written", 0))
"""The first rank waits for the other's data, the other one for the first rank's COMMIT."""
PER_STEP = 4
_TOLERANCE = 1e-6


def rank_rows(
    launcher: Launcher, corpus: str, folder: Path, undisturbed: Result, reference: Path
) -> Iterator[Row]:
    """All of them; `reference` holds the events of the undisturbed run on two ranks."""
    yield from still_rows(launcher, corpus, folder / "still", undisturbed)
    yield from stop_rows(launcher, corpus, folder / "stop", undisturbed)
    yield from nan_rows(launcher, corpus, folder / "nan", undisturbed, reference)
    yield from resize_rows(launcher, corpus, folder / "resize", undisturbed, reference)


def still_rows(launcher: Launcher, corpus: str, folder: Path, undisturbed: Result) -> Iterator[Row]:
    """SIGSTOP of a rank; the control waits for longer than the check does."""
    seconds, told, again = stand_still(launcher, corpus, folder / "run", BOUND)
    yield Row("SIGSTOP of a rank: the other one ends, after", seconds, "s", BOUND + GRACE, True)
    yield Row("SIGSTOP: it says that it waited in vain", int("timed out" in told.lower()), "of 1",
              bar=1)  # fmt: skip
    same = again == [0, 0] and result_of(folder / "run/run") == undisturbed
    yield Row("SIGSTOP: run again, weights and log lines as undisturbed", int(same), "of 1", bar=1)
    longer, _, _ = stand_still(launcher, corpus, folder / "control", 10 * BOUND)
    is_late = longer > BOUND + GRACE
    yield Row("control: with a longer patience it still waits", int(is_late), "of 1", bar=1)
    for phase, rank in STILL_IN_SAVE:
        name, run = name_of(phase, rank), folder / phase
        seconds, _, again = stand_still(launcher, corpus, run, BOUND, (phase, rank, 3))
        limit = BOUND + GRACE
        yield Row(f"SIGSTOP, {name}: the other one ends, after", seconds, "s", limit, True)
        same = again == [0, 0] and result_of(run / "run") == undisturbed
        yield Row(f"SIGSTOP, {name}: run again, all as undisturbed", int(same), "of 1", bar=1)


def stand_still(
    launcher: Launcher,
    corpus: str,
    folder: Path,
    bound: float,
    point: tuple[str, int, int] = ("collective", 1, 5),
) -> tuple[float, str, list[int | None]]:
    """Stop a rank when it comes to a phase for the n-th time (`point`).

    Seconds until the rank beside it ended (infinite: not in time), its words, and how the same
    command ended that was run again.
    """
    phase, still, number = point
    words = [*flags(corpus, folder / "run"), "--collective-timeout-s", str(bound)]
    ranks = launcher.start(words, folder / "events", target=(name_of(phase, still), number))
    seconds = math.inf
    if ranks.until_paused():
        ranks.signal(signal.SIGSTOP, still)
        began = time.monotonic()
        other = 1 - still
        if _ended(ranks, other, BOUND + GRACE) and ranks.exits[other] not in (0, None):
            seconds = time.monotonic() - began
    ranks.kill_all()  # what `torchrun` does when a rank has failed
    told = ranks.told()
    return seconds, told, launcher.run(flags(corpus, folder / "run"), folder / "again")


def _ended(ranks: Ranks, rank: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while ranks.exits[rank] is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return ranks.exits[rank] is not None


def stop_rows(launcher: Launcher, corpus: str, folder: Path, undisturbed: Result) -> Iterator[Row]:
    """SIGTERM of one rank; the control is a SIGKILL at the same point."""
    codes, lost, again = _end_by(launcher, corpus, folder / "run", signal.SIGTERM)
    yield Row("SIGTERM of one rank: both exit with 75", int(codes == [75, 75]), "of 1", bar=1)
    yield Row("SIGTERM: steps that were begun and are in no checkpoint", lost, "steps", 1, True)
    same = again == [0, 0] and result_of(folder / "run/run") == undisturbed
    yield Row("SIGTERM: run again, weights and log lines as undisturbed", int(same), "of 1", bar=1)
    codes, lost, _ = _end_by(launcher, corpus, folder / "control", signal.SIGKILL)
    bad = codes != [75, 75] and lost > 1
    yield Row("control: SIGKILL at the same point loses more", int(bad), "of 1", bar=1)


def _end_by(
    launcher: Launcher, corpus: str, folder: Path, number: int
) -> tuple[list[int | None], int, list[int | None]]:
    """Exit codes, steps begun beyond the newest checkpoint, and how the second run ended."""
    words = flags(corpus, folder / "run")
    ranks = launcher.start(words, folder / "events", target=(name_of("forward", 0), 6))
    if ranks.until_paused():
        ranks.signal(number, 1)
    ranks.go()
    ranks.wait()
    ranks.kill_all()
    begun = counts_of(folder / "events", 2)["forward", 0]
    lost = begun - max(committed(folder / "run"), default=0)
    return ranks.exits, lost, launcher.run(words, folder / "again")


def committed(run: Path) -> list[int]:
    """Steps of a run folder that have a COMMIT."""
    found = (run / "checkpoints").glob("step_*/COMMIT")
    return sorted(int(path.parent.name.removeprefix("step_")) for path in found)


def nan_rows(
    launcher: Launcher, corpus: str, folder: Path, undisturbed: Result, reference: Path
) -> Iterator[Row]:
    """A NaN in one rank's loss; the control's comes behind every check."""
    step = 5
    wanted = steps_of(ids_of(reference, 2))[step - 1]
    loss = {"loss": {"rank": 1, "forward": step}}
    codes, ids, updates, again = _meet_nan(launcher, corpus, folder / "run", loss, step)
    yield Row("NaN on one rank: both refuse to go on", int(codes == [2, 2]), "of 1", bar=1)
    yield Row("NaN: updates of the weights after it", updates, "", bar=0, is_limit=True)
    yield Row("NaN: the step's sequence ids are written down", int(ids == wanted), "of 1", bar=1)
    same = again == [0, 0] and result_of(folder / "run/run") == undisturbed
    yield Row("NaN: run again, weights and log lines as undisturbed", int(same), "of 1", bar=1)
    behind = {"gradient": {"rank": 1, "step": step}}
    _, ids, updates, _ = _meet_nan(launcher, corpus, folder / "control", behind, step)
    bad = ids != wanted and updates > 0
    yield Row("control: a NaN behind the checks moves the weights", int(bad), "of 1", bar=1)


def _meet_nan(
    launcher: Launcher, corpus: str, folder: Path, faults: dict, step: int
) -> tuple[list[int | None], list[int], int, list[int | None]]:
    """Exit codes, ids written for the step, updates from this step on, and the second run."""
    words = flags(corpus, folder / "run")
    codes = launcher.run(words, folder / "events", faults=faults)
    note = folder / f"run/not_finite_step_{step:08d}.json"
    ids = json.loads(note.read_text())["sequence_ids"] if note.exists() else []
    passed = counts_of(folder / "events", 2)
    updates = max(passed["optimiser", rank] for rank in range(2)) - (step - 1)
    return codes, ids, updates, launcher.run(words, folder / "again")


def resize_rows(
    launcher: Launcher, corpus: str, folder: Path, undisturbed: Result, reference: Path
) -> Iterator[Row]:
    """1 rank, then 2, then 1, each killed but the last; the control has another order."""
    wanted, words = steps_of(ids_of(reference, 2)), flags(corpus, folder / "run")
    stretches = []
    for number, (ranks, forward) in enumerate([(1, 9), (2, 4), (1, None)]):
        events = folder / f"events-{number}"
        target = (name_of("forward", 0), forward) if forward else ("none", 0)
        started = launcher.start(words, events, ranks=ranks, target=target)
        if forward and started.until_paused():
            started.signal(signal.SIGKILL, ranks - 1)
            started.go()
        started.wait()
        started.kill_all()
        stretches.append(steps_of(ids_of(events, ranks)))
    found = result_of(folder / "run")
    yield Row("1 -> 2 -> 1 ranks: the same sequences in the same order",
              int(follows(stretches, wanted)), "of 1", bar=1)  # fmt: skip
    yield Row("1 -> 2 -> 1 ranks: largest relative difference of a loss",
              difference(found, undisturbed), "", _TOLERANCE, is_limit=True)  # fmt: skip
    other = [*words[: words.index("--output")], "--output", str(folder / "control")]
    other += [*words[words.index("--output") + 2 :], "--noise.seed", "1"]
    launcher.run(other, folder / "events-control")
    strange = steps_of(ids_of(folder / "events-control", 2))
    is_other = len(strange) == STEPS and not follows([strange], wanted)
    is_far = difference(result_of(folder / "control"), undisturbed) > _TOLERANCE
    yield Row("control: another order is found out", int(is_other and is_far), "of 1", bar=1)


def steps_of(ids: Sequence[Sequence[list[int]]]) -> list[list[int]]:
    """Global batches in order, from each rank's batches; one that is not whole is left out."""
    together = [list(itertools.chain.from_iterable(batches)) for batches in zip(*ids, strict=False)]
    flat = list(itertools.chain.from_iterable(together))
    return [flat[i : i + PER_STEP] for i in range(0, len(flat) - PER_STEP + 1, PER_STEP)]


def follows(stretches: Sequence[Sequence[list[int]]], wanted: list[list[int]]) -> bool:
    """Whether each stretch of steps is one of the wanted order, none leaves a gap behind the one
    before, and the last reaches the end."""
    done = 0
    for stretch in stretches:
        if not stretch or stretch[0] not in wanted:
            return False
        start = wanted.index(stretch[0])
        if start > done or list(stretch) != wanted[start : start + len(stretch)]:
            return False
        done = start + len(stretch)
    return done == len(wanted)


def difference(found: Result | None, wanted: Result) -> float:
    """The largest relative difference of two runs' losses; infinite where one has fewer."""
    if found is None or len(found.losses) != len(wanted.losses):
        return math.inf
    pairs = zip(found.losses, wanted.losses, strict=True)
    return max(abs(one / two - 1) for one, two in pairs)
