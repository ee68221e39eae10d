"""bench-train: what a step of block diffusion costs, what the loop adds, what a save holds up.

    make bench-train

Each baseline is measured in the same run, in turns with ours: `train_steps` (an autoregressive
step, a dense mask), `train_loop` (bare forward and backward, the best GEMM), `train_saves` (a
memcpy of the state).
"""

import argparse
import tempfile
from pathlib import Path

import torch

from pipelines.cluster import cores
from tests.benchmarks.report import publish
from tests.benchmarks.train_loop import PER_FORWARD, STEPS, loop_rows
from tests.benchmarks.train_saves import save_rows
from tests.benchmarks.train_steps import step_rows


def main() -> int:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(prog="bench-train")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every comparison")
    parser.add_argument("--steps", type=int, default=9, help="timed steps of an arm in a turn")
    settings = parser.parse_args()
    torch.set_num_threads(cores())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = [
            *loop_rows(folder / "loop", settings.rounds),
            *save_rows(folder / "saves", settings.rounds),
            *step_rows(folder / "steps", settings.rounds, settings.steps),
        ]
    config = {"recipe": f"demo/pretrain, {STEPS} steps, {PER_FORWARD} sequences a forward"}
    config |= {"precision": "bfloat16", "threads": torch.get_num_threads()}
    return publish("train", rows, **config, comparisons="float32, 1 thread", **vars(settings))


if __name__ == "__main__":
    raise SystemExit(main())
