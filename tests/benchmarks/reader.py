"""The reader's speed: tokens per CPU-second from the page cache, on one core.

    python -m tests.benchmarks.reader

The corpus is the demo's text with its recipe at two sequence lengths. `rows` and `batch` take
sequences in the order of training, in batches of 32,768 places. The ceiling beside them is a plain
numpy loop that copies the same tokens in the same order out of one memory-mapped array, with no
masks, no documents and no checks. A row is the median of all rounds.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cascade_model.corpus import Corpus
from jobs.cli import parse
from pipelines.config import PrepareConfig
from pipelines.prepare import prepare
from tests.benchmarks.cpu_clock import cpu_seconds
from tests.benchmarks.report import Row, publish

RECIPE = Path(__file__).parents[2] / "jobs/recipes/demo/prepare.yaml"
PLACES = 32_768
"""Tokens of a batch, padding included."""
BAR = 20e6
"""Tokens per second on one core that the reader must give."""


def batches_of(corpus: Corpus, first: int = 0) -> list[tuple[int, int]]:
    """First sample and size of each batch of a draw."""
    step, total = PLACES // corpus.sequence_length, corpus.num_sequences
    return [(first + at, min(step, total - at)) for at in range(0, total, step)]


def read_rows(corpus: Corpus) -> None:
    """Every sequence in the order of draw 0, without noise."""
    for first, count in batches_of(corpus):
        ids, *_ = corpus._places(np.arange(first, first + count, dtype=np.uint64), corpus.recipe)
        corpus.rows(ids)


def read_batches(corpus: Corpus, draw: int) -> None:
    """Every batch of a draw: draw 0 is stored, later ones are computed."""
    for first, count in batches_of(corpus, draw * corpus.num_sequences):
        corpus.batch(first, count, corpus.recipe)


def plain_copies(tokens: np.ndarray, order: np.ndarray, step: int) -> None:
    """The ceiling: rows out of a memory map, nothing else."""
    for at in range(0, len(order), step):
        tokens[order[at : at + step]].copy()


def speeds(folder: Path, length: int, rounds: int) -> dict[str, float]:
    """Tokens per CPU-second of each way of reading, medians."""
    output = folder / f"corpus-{length}"
    words = ["--config", str(RECIPE), "--output", str(output), "--runner", "local"]
    prepare(parse(PrepareConfig, [*words, "--sequence-length", str(length)]))
    opened = Corpus.open(str(output))
    places = opened.num_sequences * length
    every = np.arange(opened.num_sequences, dtype=np.uint64)
    np.save(folder / "plain.npy", opened.rows(every).tokens)
    plain = np.load(folder / "plain.npy", mmap_mode="r")
    order = opened._places(every, opened.recipe)[0].astype(np.int64)
    ways: dict[str, Callable[[], Any]] = {
        "rows": lambda: read_rows(opened),
        "batch, draw 0 (stored)": lambda: read_batches(opened, 0),
        "batch, draw 1 (computed)": lambda: read_batches(opened, 1),
        "batch, first touch (checked)": lambda: read_batches(Corpus.open(str(output)), 0),
        "numpy: copy of the same rows": lambda: plain_copies(plain, order, PLACES // length),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(places / cpu_seconds(way))
    return {name: statistics.median(each) for name, each in found.items()}


def rows(rounds: int = 5) -> Iterator[Row]:
    """Both lengths; `bench-data` has these rows too."""
    with tempfile.TemporaryDirectory() as temporary:
        for length in (1024, 256):
            for name, speed in speeds(Path(temporary), length, rounds).items():
                is_bound = name in ("rows", "batch, draw 0 (stored)")
                bar = BAR if is_bound else None
                yield Row(f"L = {length}: {name}", speed, "tokens/CPU-s", bar)


def main(rounds: int = 5) -> int:
    """The table."""
    began = time.monotonic()
    made = list(rows(rounds))
    seconds = round(time.monotonic() - began)
    return publish("reader", made, rounds=rounds, places=PLACES, threads=1, seconds=seconds)


if __name__ == "__main__":
    raise SystemExit(main(*map(int, sys.argv[1:])))
