"""What a step of block diffusion costs beside other steps of the same trainer.

Arms take turns in one process on one thread. A row is the ratio of the medians of processor time,
which others on the machine disturb less than wall time; on one thread nothing waits.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cascade_model.corpus import Corpus
from tests.benchmarks.report import Row
from tests.benchmarks.train_arms import (
    AUTOREGRESSIVE,
    SMALL,
    SMOLLM2,
    Loss,
    Step,
    compared,
    corpus_of,
    elbo,
    model_of,
    timed_steps,
)
from tests.benchmarks.train_baselines import causal_loss, dense_loss

AR_BAR, DENSE_BAR = 1.8, 1.5


def step_rows(folder: Path, rounds: int, steps: int) -> Iterator[Row]:
    """All comparisons, the large shape with fewer steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    short, long = corpus_of(folder / "short", 256), corpus_of(folder / "long", 1024, sequences=32)
    try:
        yield from against_causal(short, SMALL, "d 256", folder / "small", rounds, steps, 8, AR_BAR)
        yield from against_dense(long, SMALL, folder / "dense", rounds, steps, 2)
        few = max(1, steps // 3)
        yield from against_causal(short, SMOLLM2, "135M", folder / "large", 1, few, 1, None)
    finally:
        torch.set_num_threads(threads)


def against_causal(
    corpus: Corpus,
    shape: dict[str, Any],
    name: str,
    folder: Path,
    rounds: int,
    steps: int,
    sequences: int,
    bar: float | None,
) -> Iterator[Row]:
    """Block diffusion against the autoregressive step that the same weights could take."""
    times = compared(
        {
            "ours": _arm(corpus, elbo, shape, folder / "ours", steps, sequences),
            "causal": _arm(
                corpus, causal_loss, shape, folder / "causal", steps, sequences, **AUTOREGRESSIVE
            ),
        },
        rounds,
    )
    ratio = times["ours"][1] / times["causal"][1]
    what = f"{name}, V {shape['vocab_size']:,}, L {corpus.sequence_length}"
    yield Row(f"{what}: block diffusion / causal AR", ratio, "x", bar, is_limit=True)
    tokens = sequences * corpus.sequence_length
    for arm, (_, cpu) in times.items():
        yield Row(f"{what}: {arm}", tokens / cpu, "data tokens/CPU-s")


def against_dense(
    corpus: Corpus, shape: dict[str, Any], folder: Path, rounds: int, steps: int, sequences: int
) -> Iterator[Row]:
    """The same loss with one mask over [2L, 2L] and logits of every row."""
    times = compared(
        {
            "ours": _arm(corpus, elbo, shape, folder / "ours", steps, sequences),
            "dense": _arm(corpus, dense_loss, shape, folder / "dense", steps, sequences),
        },
        rounds,
    )
    what = f"d 256, V {shape['vocab_size']:,}, L {corpus.sequence_length}"
    ratio = times["dense"][1] / times["ours"][1]
    yield Row(f"{what}: dense mask with full logits / ours", ratio, "x", DENSE_BAR)
    tokens = sequences * corpus.sequence_length
    for arm, (_, cpu) in times.items():
        yield Row(f"{what}: {arm}", tokens / cpu, "data tokens/CPU-s")


def _arm(
    corpus: Corpus,
    loss: Loss,
    shape: dict[str, Any],
    folder: Path,
    steps: int,
    sequences: int,
    **choices: Any,
) -> Callable[[int], list[Step]]:
    """A call for each round: fresh weights, a run folder of its own."""

    def run(number: int) -> list[Step]:
        model = model_of(corpus, shape, **choices)
        place = folder / f"round-{number}"
        place.mkdir(parents=True)
        return timed_steps(model, corpus, loss, place, steps=steps, sequences=sequences)

    return run
