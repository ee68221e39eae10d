"""Where a run stands between two steps, and what one step adds to that."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from cascade_model.batch import TrainBatch
from cascade_model.config import ModelConfig, NoiseConfig
from cascade_model.flops import training_flops
from cascade_model.objective import LossParts
from cascade_model.phases import block_size_at
from cascade_model.training_config import TrainerConfig
from cascade_model.window import OTHER, Window


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """What a loss computes beside the tokens that the model supervises of itself."""

    has_next_tokens: bool = False
    """Whether the clean half predicts its next tokens (`AuxiliaryConfig.ar_weight`)."""
    teacher: ModelConfig | None = None
    """An autoregressive model that runs forward on the same tokens."""
    has_targets: bool = False
    """Whether a teacher's stored word is compared with the logits: memory, no matrix product."""
    has_entropy: bool = False
    """Whether the entropy of the logits is part of the loss (`AuxiliaryConfig.entropy_weight`)."""


NOTHING_BESIDE = Beside()


@dataclass(kw_only=True)
class Progress:
    """The state of a run beside weights and optimiser; it travels in the checkpoint."""

    step: int = 0
    samples: int = 0
    rate: float = 0.0
    """Learning rate of the last step that moved the weights."""
    skipped_in_a_row: int = 0
    is_told: bool = True
    """Whether this step was evaluated and logged, where that is due: not so of one at which the
    run was stopped, which must save without delay."""
    window: Window = field(default_factory=Window)

    @classmethod
    def from_facts(cls, values: dict[str, Any]) -> Self:
        """Read back what `to_dict` made of it."""
        fields: dict[str, Any] = {**values, "window": Window(**values["window"])}
        return cls(**fields)


def sums_of(parts: LossParts, batch: TrainBatch) -> dict[str, torch.Tensor]:
    """The detached sums of one forward pass, float64 scalars by the names of `Window.sums`; and
    `tokens`, the data tokens."""
    sums = {"loss": parts.sum.detach(), "count": parts.sum.new_tensor(float(parts.count))}
    sums["tokens"] = parts.sum.new_tensor(float(batch.clean_tokens.numel()))
    for band in range(len(parts.band_sums)):
        sums[f"band/{band}"] = parts.band_sums[band]
        sums[f"band/{band}_count"] = parts.band_counts[band]
    sums |= {f"{OTHER}{name}": value.detach() for name, value in parts.others.items()}
    return {name: value.double() for name, value in sums.items()}


def model_at(step: int, model: ModelConfig, trainer: TrainerConfig) -> ModelConfig:
    """The model's config with the block size that a step, counted from 0, trains with."""
    size = block_size_at(step, trainer)
    return model if size is None else dataclasses.replace(model, block_size=size)


def line_of(
    at: Progress, model: ModelConfig, trainer: TrainerConfig, length: int
) -> dict[str, Any]:
    """Where a line of metrics stands: step, samples, data tokens, block size, learning rate."""
    return {
        "step": at.step,
        "samples": at.samples,
        "tokens": at.samples * length,
        "block_size": model_at(at.step - 1, model, trainer).block_size,
        "lr": at.rate,
    }


def work_of(
    model: ModelConfig, noise: NoiseConfig, length: int, beside: Beside = NOTHING_BESIDE
) -> tuple[int, float]:
    """Of one data token: the rows it takes in the network, 2 where noisy and clean half stand side
    by side, and the useful floating point operations, a running teacher's included."""
    rate = (noise.min_rate + noise.max_rate) / 2
    next_tokens = beside.has_next_tokens and not model.is_autoregressive
    if model.block_size >= length and not next_tokens:  # has no clean half
        model = dataclasses.replace(model, attention="bidirectional")
    rows = 1 if model.is_autoregressive or model.attention == "bidirectional" else 2
    own = training_flops(
        model, sequence_length=length, mask_rate=rate, has_next_tokens=next_tokens
    ).total
    if beside.teacher is None:
        return rows, own
    teacher = training_flops(beside.teacher, sequence_length=length)
    taught = 1.0 if model.is_autoregressive else rate  # tokens whose logits it is asked for
    return rows, own + teacher.linear + teacher.attention + taught * teacher.head
