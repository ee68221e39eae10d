"""The same faults through Ray Train itself: `cascade pretrain --num-workers 2`.

Ray restarts the ranks by itself, so the command is run once. A rank that stands still must end the
command with a cause, and nothing of it may be left.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.benchmarks.fault_points import GO, PAUSED
from tests.benchmarks.fault_runs import ROOT, environment
from tests.benchmarks.rank_points import name_of
from tests.benchmarks.rank_runs import Result, flags, result_of
from tests.benchmarks.report import Row
from tests.benchmarks.waiting import until

POINTS = (("manifest written", 0, 3), ("forward", 1, 7), ("data half written", 1, 4))
"""Phase, rank and number, in turn."""
BOUND = 15.0
"""Seconds that ranks wait for one that stands still."""
LEAVING = 45.0
"""Seconds that Ray and the command may take on top of that to end everything."""
PATIENCE = 180.0


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of the command."""

    code: int | None
    """Exit code; none where it had to be ended."""
    came: bool
    """Whether a rank came to the point."""
    seconds: float
    """From the fault to the end."""
    left: int
    """Processes of it that were left, and had to be killed."""
    told: str


def ray_rows(corpus: str, folder: Path, undisturbed: Result, rounds: int) -> Iterator[Row]:
    """Kills, and a rank that stands still; each with its control."""
    same = 0
    for number in range(rounds):
        phase, rank, count = POINTS[number % len(POINTS)]
        run = folder / f"round-{number}"
        ended = with_fault(corpus, run, (name_of(phase, rank), count), signal.SIGKILL)
        is_same = result_of(run / "run") == undisturbed
        same += ended.came and ended.code == 0 and is_same
        print(f"ray {number + 1}/{rounds} {phase}: {ended}", file=sys.stderr, flush=True)
    yield Row("Ray Train, kill -9 of a rank: weights and every log line", same, f"of {rounds}",
              bar=rounds)  # fmt: skip
    alone = with_fault(
        corpus, folder / "alone", (name_of("forward", 1), 7), signal.SIGKILL, "--max-failures", "0"
    )
    is_lost = alone.came and alone.code != 0 and result_of(folder / "alone/run") is None
    yield Row("control: without a restart the run fails", int(is_lost), "of 1", bar=1)
    patience = ["--collective-timeout-s", str(BOUND), "--max-failures", "0"]
    still = with_fault(
        corpus, folder / "still", (name_of("collective", 1), 5), signal.SIGSTOP, *patience
    )
    print(f"ray SIGSTOP: {still}", file=sys.stderr, flush=True)
    is_told = still.came and still.code not in (0, None) and "rank" in still.told
    yield Row("Ray Train, SIGSTOP of a rank: the command ends and says why", int(is_told), "of 1",
              bar=1)  # fmt: skip
    yield Row("Ray Train, SIGSTOP: seconds to the end", still.seconds, "s", BOUND + LEAVING, True)
    yield Row("Ray Train: processes left behind", still.left + alone.left, "", 0, True)


def with_fault(
    corpus: str, folder: Path, target: tuple[str, int], number: int, *more: str
) -> Ended:
    """Run the command, send the signal to the rank that came to the point, wait for the end."""
    words = [*flags(corpus, folder / "run"), *more]
    words[words.index("--num-workers") + 1] = "2"
    events = folder / "events"
    process = started(events, target, words, folder / "log")
    came = until(lambda: (events / PAUSED).exists() or process.poll() is not None, PATIENCE)
    came = came and (events / PAUSED).exists()
    family = tree(process.pid)
    if came:
        with suppress(ProcessLookupError):
            os.kill(int((events / PAUSED).read_text()), number)
    (events / GO).touch()
    began = time.monotonic()
    has_ended = until(lambda: process.poll() is not None, PATIENCE)
    seconds, code = time.monotonic() - began, process.poll()
    if has_ended:  # Ray's own processes follow their parent within a moment
        until(lambda: not alive(family), 10.0)
    left = alive(family)
    for each in {*left, *tree(process.pid)}:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    log = " ".join((folder / "log").read_text(errors="replace").replace("│", " ").split())
    return Ended(code, came, seconds, len(left), log[-800:])


def started(
    events: Path, target: tuple[str, int], words: Sequence[str], log: Path
) -> subprocess.Popen:
    """The command as a process of its own."""
    events.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.benchmarks.rank_driver", str(events)]
    command += [target[0], str(target[1]), *words]
    settings = environment() | {"PYTHONPATH": str(ROOT)}
    with log.open("ab") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=settings, stdout=file, stderr=file, start_new_session=True
        )


def tree(pid: int) -> list[psutil.Process]:
    """A process and all that it started."""
    with suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    return []


def alive(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; a dead one that nobody has asked for does not."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
