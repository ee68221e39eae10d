"""Runs of `cascade pretrain` on forked ranks, and what they leave: for the fault table."""

import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cascade_model.commit import Folder
from tests.benchmarks.fault_points import GO, PAUSED
from tests.benchmarks.fault_runs import ROOT, environment
from tests.benchmarks.rank_points import NOWHERE
from tests.benchmarks.waiting import until

PATIENCE = 90.0
STEPS = 12
_OF_TIME = {
    "seconds",
    "seconds_left",
    "tokens_per_second",
    "processed_tokens_per_second",
    "mfu",
    "data_wait_rate",
    "checkpoint_seconds",
    "failed_checkpoints",
}
"""Values of a line of metrics that tell of the machine and not of what was learnt."""


def flags(corpus: str, output: str | Path, *, seed: int = 0, steps: int = STEPS) -> list[str]:
    """A tiny run that saves every second step and logs each."""
    words = ["--corpus", corpus, "--output", str(output), "--num-workers", "0"]
    words += ["--model.hidden-size", "32", "--model.num-layers", "2", "--model.num-heads", "2"]
    words += ["--model.num-kv-heads", "1", "--model.head-dim", "16"]
    words += ["--model.intermediate-size", "64", "--trainer.num-steps", str(steps)]
    words += ["--trainer.sequences-per-step", "4", "--trainer.sequences-per-forward", "2"]
    words += ["--trainer.checkpoint-every", "2", "--trainer.log-every", "1"]
    return [*words, "--trainer.seed", str(seed)]


@dataclass(frozen=True, slots=True)
class Result:
    """What a finished run taught: the digest of its weights, and every line but its times."""

    weights: str
    lines: list[dict[str, Any]]

    @property
    def losses(self) -> list[float]:
        """Loss of each step."""
        return [line["loss"] for line in self.lines]


def result_of(output: str | Path) -> Result | None:
    """Of a run folder, local or in a store; none where the run is not finished."""
    folder = Folder(output)
    if not folder.exists("summary.json"):
        return None
    digest, model = hashlib.sha256(), folder / "model"
    for name in sorted(name for name in model.files() if name.endswith(".safetensors")):
        digest.update(name.encode() + model.read_bytes(name))
    texts = folder.read_bytes("metrics.jsonl").decode().splitlines()
    lines = [{k: v for k, v in json.loads(t).items() if k not in _OF_TIME} for t in texts]
    return Result(digest.hexdigest(), lines)


@dataclass
class Ranks:
    """The ranks of one start."""

    events: Path
    pids: list[int]
    codes: dict[int, int]
    """Exit code (or minus the signal) by process id, of all that have ended."""

    @property
    def exits(self) -> list[int | None]:
        """Exit codes by rank; none for one that lives."""
        return [self.codes.get(pid) for pid in self.pids]

    @property
    def are_gone(self) -> bool:
        """Whether all have ended."""
        return None not in self.exits

    def wait(self, seconds: float = PATIENCE) -> bool:
        """Whether all have ended in time."""
        return until(lambda: self.are_gone, seconds)

    def signal(self, number: int, rank: int) -> None:
        """Send a signal to a rank that has not ended."""
        if self.pids[rank] not in self.codes:
            os.kill(self.pids[rank], number)

    def kill_all(self) -> None:
        """End what is left, the stopped included."""
        for rank in range(len(self.pids)):
            with suppress(ProcessLookupError):
                self.signal(signal.SIGKILL, rank)
        self.wait(10)

    @property
    def paused(self) -> int | None:
        """The rank that waits at its point."""
        with suppress(FileNotFoundError, ValueError):
            return self.pids.index(int((self.events / PAUSED).read_text()))
        return None

    def until_paused(self, seconds: float = PATIENCE) -> bool:
        """Wait until a rank has come to the chosen point; False where none did."""
        until(lambda: self.paused is not None or self.are_gone, seconds)
        return self.paused is not None

    def go(self) -> None:
        """Let the rank that waits go on."""
        (self.events / GO).touch()

    def told(self) -> str:
        """What the ranks wrote, without the frames of the command line."""
        logs = sorted(self.events.glob("rank-*.log"))
        text = " ".join(log.read_text(errors="replace") for log in logs)
        return " ".join(text.replace("│", " ").split())


class Launcher:
    """A `rank_launcher` of one's own; `before` are words that its command begins with."""

    def __init__(self, before: Sequence[str] = ()) -> None:
        self._before = before
        self._started: queue.Queue[list[int] | None] = queue.Queue()
        self._codes: dict[int, int] = {}

    def __enter__(self) -> Self:
        command = [*self._before, sys.executable, "-m", "tests.benchmarks.rank_launcher"]
        settings = environment() | {"PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=settings, stdin=pipe, stdout=pipe, text=True, bufsize=1
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._reader.join()

    @property
    def pid(self) -> int:
        """The process that forks."""
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            if "ended" in told:
                self._codes[told["ended"]] = told["code"]
                continue
            for pid in told["started"]:  # a number may come a second time
                self._codes.pop(pid, None)
            self._started.put(told["started"])
        self._started.put(None)

    def start(
        self,
        words: Sequence[str],
        events: Path,
        *,
        ranks: int = 2,
        target: tuple[str, int] = NOWHERE,
        faults: Mapping[str, Any] | None = None,
        is_naive: bool = False,
        **settings: str,
    ) -> Ranks:
        """Start the ranks of one attempt; `settings` are variables of their environment."""
        assert self._process.stdin is not None
        events.mkdir(parents=True, exist_ok=True)
        order = {"words": list(words), "ranks": ranks, "events": str(events), "target": target}
        order |= {"faults": faults or {}, "is_naive": is_naive, "environment": settings}
        self._process.stdin.write(json.dumps(order) + "\n")
        pids = self._started.get(timeout=PATIENCE)
        if pids is None:
            raise RuntimeError("the launcher of the ranks is gone; what it said stands above")
        return Ranks(events, pids, self._codes)

    def run(self, words: Sequence[str], events: Path, **settings: Any) -> list[int | None]:
        """Start, wait for the end, kill what does not end; exit codes by rank."""
        ranks = self.start(words, events, **settings)
        if not ranks.wait():
            ranks.kill_all()
        return ranks.exits
