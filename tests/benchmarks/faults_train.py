"""faults-train: kill a rank in mid-run, N times; it must end with the undisturbed run's weights.

    make faults-train N=5

Each round is the suite's own test in a process of its own. The control, a death without a restart,
must fail the run: it shows that the kill kills.
"""

import subprocess
import sys
import time
from pathlib import Path

from tests.benchmarks.report import Row, publish

ROOT = Path(__file__).parents[2]
DEATH = "tests/jobs/test_pretrain.py::test_rank_that_dies_is_replaced_and_the_run_ends_the_same"
CONTROL = "tests/jobs/test_launch.py::test_a_death_without_a_restart_fails_the_run"


def passes(test: str) -> bool:
    """Whether one test passes, by itself."""
    words = [sys.executable, "-m", "pytest", "-q", "--no-header", test]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-4000:], file=sys.stderr)
    return done.returncode == 0


def main(rounds: int) -> int:
    """The table of all rounds."""
    began = time.perf_counter()
    survived = sum(passes(DEATH) for _ in range(rounds))
    each = (time.perf_counter() - began) / max(rounds, 1)
    rows = [
        Row("kill -9 of a rank: same weights at the end", survived, f"of {rounds}", bar=rounds),
        Row("control: a death without a restart fails", int(passes(CONTROL)), "of 1", bar=1),
        Row("seconds a round", each, "s"),
    ]
    return publish("train", rows, kind="faults", rounds=rounds)


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1])))
