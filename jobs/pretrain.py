"""Pretrain a block-diffusion model on a prepared corpus, on Ray Train workers or in this process.

With `model.block_size=1` and `model.logits=shifted` the same job trains an autoregressive model.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cascade_model.config import Outcomes
from jobs.cli import command
from jobs.objectives import LossConfig, auxiliary, auxiliary_objective, check_auxiliary
from jobs.ranks import Started
from jobs.training import fit, start

if TYPE_CHECKING:
    from cascade_model.trainer import LossFn


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig(LossConfig):
    """Train a model from scratch, or go on from `initial_model`, on a prepared corpus."""

    outcomes: Outcomes = "text"
    """What can be predicted: text leaves out mask and padding, all_but_mask the mask alone (MDLM),
    all nothing (LLaDA)."""


def run(config: PretrainConfig) -> dict[str, Any]:
    """Check the settings, train, and return the run's summary."""
    check_settings(config)
    return start(config, train, objective(config))


def check_settings(config: PretrainConfig) -> None:
    """Refuse what this stage alone knows of, before any worker starts."""
    check_auxiliary(config)


def objective(config: PretrainConfig) -> dict[str, Any]:
    """What is minimised; a run goes on with the same only."""
    return {"name": "diffusion", **axes(config), **auxiliary_objective(config)}


def axes(config: PretrainConfig) -> dict[str, Any]:
    """The settings of the loss."""
    return {name: getattr(config, name) for name in ("weight", "normaliser", "outcomes")}


def train(config: PretrainConfig, device: str, started: Started) -> dict[str, Any]:
    """One rank's part."""
    return fit(config, device, objective(config), loss_of(config, device), started)


def loss_of(config: PretrainConfig, device: str) -> "LossFn":
    """What one rank minimises."""
    from functools import partial

    from cascade_model.loss import diffusion_loss

    return partial(diffusion_loss, **axes(config), auxiliary=auxiliary(config))


main = command(PretrainConfig, run)

if __name__ == "__main__":
    raise SystemExit(main())
