"""The losses that every training stage can switch on beside its own, as settings of its command."""

from dataclasses import dataclass
from typing import Any

from cascade_model.training_config import AuxiliaryConfig
from jobs.starting import starting_config
from jobs.training import TrainingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig(TrainingConfig):
    """What to train on, and what is minimised beside the stage's own loss."""

    ar_weight: float = 0.0
    """Weight of the next-token loss of the clean half, in the same pass (0.3); it needs
    model.clean_half=token_causal."""
    entropy_weight: float = 0.0
    """Weight of the entropy of correctly predicted masked tokens: a second stage, after which a
    block takes fewer steps (2)."""
    entropy_temperature: float = 1.0
    """Temperature at which that entropy is taken (LLaDA2: 1, dParallel: 0.5)."""

    def __post_init__(self) -> None:
        auxiliary(self)


def auxiliary(config: LossConfig) -> AuxiliaryConfig:
    """The terms as the loss takes them."""
    return AuxiliaryConfig(
        ar_weight=config.ar_weight,
        entropy_weight=config.entropy_weight,
        entropy_temperature=config.entropy_temperature,
    )


def auxiliary_objective(config: LossConfig) -> dict[str, Any]:
    """What a run goes on with; nothing of a term that is off."""
    chosen: dict[str, Any] = {}
    if config.ar_weight:
        chosen["ar_weight"] = config.ar_weight
    if config.entropy_weight:
        chosen["entropy_weight"] = config.entropy_weight
        chosen["entropy_temperature"] = config.entropy_temperature
    return chosen


def check_auxiliary(config: LossConfig) -> None:
    """Refuse terms that this model cannot have, before any worker starts."""
    if config.ar_weight:
        from cascade_model.corpus import Corpus
        from cascade_model.loss import require_next_tokens

        shape = starting_config(config, Corpus.open(config.corpus))
        require_next_tokens(shape, auxiliary(config))
