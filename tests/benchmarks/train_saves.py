"""How long a save holds training up, beside a bare copy of the same state.

The trainer itself saves, so everything is in it that a step waits for: the log that is flushed, the
copy of the state, the loss curve that is put and the next one that is begun, as at no real save
more often. The state is that of AdamW: weights and both moments, of the 135M shape. Both copies go
into buffers that were there before, so neither pays for fresh memory; the first save, which does,
is a row of its own. Saves are waited for in between, so that none waits for the one before it.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch

from cascade_model import metrics
from cascade_model.checkpoint import Saving
from cascade_model.checkpoint_state import state_of
from cascade_model.commit import Folder
from cascade_model.trainer import Trainer
from cascade_model.training_config import OptimizerConfig, TrainerConfig
from tests.benchmarks.report import Row
from tests.benchmarks.train_arms import SMALL, SMOLLM2, corpus_of, elbo, model_of

BAR = 1.5


def save_rows(folder: Path, rounds: int) -> Iterator[Row]:
    """The 135M shape with the bar, the small one beside it."""
    yield from _rows(folder / "large", SMOLLM2, "135M", rounds, BAR)
    yield from _rows(folder / "small", SMALL, "d 256", rounds, None)


@dataclass
class Watch:
    """Seconds of each save of a run, and of a copy behind it."""

    trainer: Trainer | None = None
    blocked: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    copied: list[float] = field(default_factory=list)
    copies: dict[str, torch.Tensor] = field(default_factory=dict)

    def __call__(self, saving: Saving) -> None:
        """The step has its thread back; until COMMIT nothing else is done."""
        assert self.trainer is not None
        held, began = self.trainer._at.window.saving, time.perf_counter()
        if not saving.wait():
            raise RuntimeError(f"the save failed: {saving.reason}")
        self.blocked.append(held)
        self.whole.append(held + time.perf_counter() - began)
        state = state_of(self.trainer.model, self.trainer._adam)
        if not self.copies:
            self.copies = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
            _copy(state, self.copies)  # takes the memory
        self.copied.append(_copy(state, self.copies))


def _rows(folder: Path, shape: dict, name: str, rounds: int, bar: float | None) -> Iterator[Row]:
    corpus, watch = corpus_of(folder / "corpus", 64, sequences=8), Watch()
    steps = 1 + 2 * rounds
    watch.trainer = Trainer(
        model=model_of(corpus, shape),
        corpus=corpus,
        noise=corpus.manifest.noise,
        loss_fn=elbo,
        objective={"name": "bench"},
        optimizer=OptimizerConfig(peak_lr=1e-4),
        trainer=TrainerConfig(
            num_steps=steps,
            sequences_per_step=1,
            sequences_per_forward=1,
            checkpoint_every=1,
            keep_last=1,
            log_every=1,
        ),
        folder=Folder(folder / "run"),
        on_save=watch,
    )
    with mock.patch.object(metrics, "DRAW_EVERY", 0.0):
        watch.trainer.fit()
    size = sum(tensor.nbytes for tensor in watch.copies.values())
    pairs = list(zip(watch.blocked, watch.copied, strict=True))[1:]
    ratio = statistics.median(a / b for a, b in pairs)
    blocked, copied = (statistics.median(column) for column in zip(*pairs, strict=True))
    yield Row(f"save, {name}, {size / 2**20:,.0f} MiB: blocked / memcpy", ratio, "x", bar, True)
    yield Row(f"save, {name}: training blocked", 1e3 * blocked, "ms")
    yield Row(f"save, {name}: memcpy of the state", 1e3 * copied, "ms")
    yield Row(f"save, {name}: the first, into fresh memory", 1e3 * watch.blocked[0], "ms")
    yield Row(f"save, {name}: until COMMIT", 1e3 * statistics.median(watch.whole[1:]), "ms")


def _copy(state: dict[str, torch.Tensor], copies: dict[str, torch.Tensor]) -> float:
    """Seconds of a bare copy, with as many threads as the save has."""
    began = time.perf_counter()
    with torch.no_grad():
        for name, tensor in state.items():
            copies[name].copy_(tensor)
    return time.perf_counter() - began
