"""Steps of the real trainer, timed one by one, with this or that loss: the arms of `bench-train`.

An arm is a `Trainer` on a corpus of bytes. Its loss function reads the clocks when it is called,
once a step, so a step is timed with all that the trainer does; after the wanted steps it ends the
run by an exception, so no arm writes a checkpoint.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cascade_model.batch import TrainBatch
from cascade_model.commit import Folder
from cascade_model.config import ModelConfig, NoiseConfig
from cascade_model.corpus import Corpus
from cascade_model.loss import LossParts, diffusion_loss
from cascade_model.model import Transformer
from cascade_model.trainer import Trainer
from cascade_model.training_config import OptimizerConfig, TrainerConfig
from tests.cascade_model.corpus_making import make_corpus

Loss = Callable[[Any, TrainBatch], LossParts]
BLOCK = 32
SMALL: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "num_layers": 6,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 64,
    "intermediate_size": 768,
}
SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_layers": 30,
    "num_heads": 9,
    "num_kv_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
}
"""The shape of SmolLM2-135M."""
AUTOREGRESSIVE: dict[str, Any] = {
    "block_size": 1,
    "logits": "shifted",
    "clean_half": "token_causal",
}


class Enough(Exception):
    """The steps that were to be timed are taken."""


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds from one call of the loss function to the next."""

    wall: float
    cpu: float


class Timed:
    """A loss function that reads the clocks; the first `warm` steps are not told."""

    def __init__(self, loss: Loss, steps: int, warm: int) -> None:
        self._loss, self._wanted, self._warm = loss, steps, warm
        self._marks: list[tuple[float, float]] = []

    def __call__(self, model: Any, batch: TrainBatch) -> LossParts:
        if batch.clean_tokens.is_cuda:
            torch.cuda.synchronize()
        self._marks.append((time.perf_counter(), time.process_time()))
        if len(self._marks) > self._wanted + self._warm:
            raise Enough
        return self._loss(model, batch)

    @property
    def steps(self) -> list[Step]:
        """The timed steps."""
        marks = self._marks[self._warm :]
        return [Step(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks)]


def corpus_of(folder: Path, length: int, sequences: int = 64) -> Corpus:
    """Sequences of one document, which fills all of them, with rates uniform in each block."""
    text = "".join(chr(97 + (7 * i + i // 11) % 26) for i in range(length * sequences - 1))
    noise = NoiseConfig(block_size=BLOCK)
    return Corpus.open(
        make_corpus(folder, {"letters": [text]}, noise=noise, sequence_length=length)
    )


def config_of(corpus: Corpus, shape: dict[str, Any], **choices: Any) -> ModelConfig:
    """A shape for a corpus, whose vocabulary may be smaller."""
    manifest = corpus.manifest
    settings: dict[str, Any] = {"block_size": BLOCK, "max_sequence_length": corpus.sequence_length}
    return ModelConfig(
        mask_id=manifest.mask_id,
        pad_id=manifest.pad_id,
        eos_id=manifest.eos_id,
        tokenizer_sha256=manifest.tokenizer_sha256,
        **(shape | settings | choices),
    )


def model_of(corpus: Corpus, shape: dict[str, Any], **choices: Any) -> Transformer:
    """Fresh weights of a shape."""
    model = Transformer(config_of(corpus, shape, **choices))
    model.init_weights(0)
    return model


def elbo(model: Any, batch: TrainBatch) -> LossParts:
    """The loss of `cascade pretrain`."""
    return diffusion_loss(model, batch, weight="elbo")


def timed_steps(
    model: Transformer,
    corpus: Corpus,
    loss: Loss,
    folder: Path,
    *,
    steps: int,
    sequences: int,
    warm: int = 1,
    device: str = "cpu",
    **settings: Any,
) -> list[Step]:
    """Train a few steps of one forward pass each, and tell what each took.

    `settings` are further ones of the trainer.
    """
    timed, total = Timed(loss, steps, warm), steps + warm + 2
    trainer = Trainer(
        model=model,
        corpus=corpus,
        noise=corpus.manifest.noise,
        loss_fn=timed,
        objective={"name": "bench"},
        optimizer=OptimizerConfig(peak_lr=1e-4),
        trainer=TrainerConfig(
            num_steps=total,
            sequences_per_step=sequences,
            sequences_per_forward=sequences,
            checkpoint_every=total,
            log_every=total,
            **settings,
        ),
        folder=Folder(folder),
        device=torch.device(device),
    )
    try:
        trainer.fit()
    except Enough:
        return timed.steps
    raise RuntimeError("the run ended before its steps were timed")


def compared(
    arms: dict[str, Callable[[int], list[Step]]], rounds: int
) -> dict[str, tuple[float, float]]:
    """Run arms in turns, each with the round's number; median (wall, CPU) seconds of a step."""
    found: dict[str, list[Step]] = {name: [] for name in arms}
    for number in range(rounds):
        for name, arm in arms.items():
            found[name] += arm(number)
    return {
        name: (
            statistics.median(step.wall for step in steps),
            statistics.median(step.cpu for step in steps),
        )
        for name, steps in found.items()
    }
