"""Distil an autoregressive teacher into a block-diffusion student: pretrain with another loss."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cascade_model.config import OptimizerConfig, TrainerConfig, check, to_dict
from jobs.cli import command
from jobs.launch import launch, with_absolute_paths
from jobs.pretrain import (
    ModelShape,
    check_start,
    noise_of,
    prepare_run,
    print_summary,
    starting_config,
    starting_model,
)

if TYPE_CHECKING:
    from cascade_model.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class DistilConfig:
    """Train a student on a prepared corpus against an autoregressive teacher's distributions."""

    corpus: str
    """Folder or URL that `cascade prepare` wrote, with the teacher's tokenizer."""
    output: str
    """Run folder, as of pretrain; a run that is there already goes on."""
    teacher: str
    """Model folder of an autoregressive model (block size 1, shifted logits)."""
    alpha: float = 0.5
    """Share of the teacher: loss = (1 - alpha) x cross entropy + alpha x w(t) x KL."""
    initial_model: str | None = None
    """Model folder of the student to start from; its shape then replaces `model`."""
    model: ModelShape = field(default_factory=ModelShape)
    weight: Literal["elbo", "unit"] = "elbo"
    """Weight of a masked token in the cross entropy: elbo is 1 / mask rate, unit is 1."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    num_workers: int = 2
    """Ranks on Ray Train; 0 trains in this process, without Ray."""
    use_gpu: bool = False
    """One GPU per rank."""
    max_failures: int = 2
    """Restarts after a rank died, each from the newest complete checkpoint; -1: no limit."""

    def __post_init__(self) -> None:
        check(0.0 <= self.alpha <= 1.0, f"alpha={self.alpha} must be in 0..1; use 0.5")


def run(config: DistilConfig) -> dict[str, Any]:
    """Check the settings, train, and return the run's summary."""
    check_start(config)
    check_teacher(config)
    folder = prepare_run(config)
    summary = launch(
        train,
        with_absolute_paths(config),
        folder=folder,
        num_workers=config.num_workers,
        use_gpu=config.use_gpu,
        max_failures=config.max_failures,
    )
    print_summary(summary)
    return summary


def check_teacher(config: DistilConfig) -> None:
    """Refuse a teacher that does not fit the student, before any worker starts."""
    from cascade_model.corpus import Corpus
    from cascade_model.distillation import require_teacher

    require_teacher(read_teacher(config), starting_config(config, Corpus.open(config.corpus)))


def read_teacher(config: DistilConfig) -> "ModelConfig":
    """The teacher's configuration, without its weights."""
    from cascade_model.weights import read_config

    return read_config(config.teacher)


def train(config: DistilConfig, device: str) -> dict[str, Any]:
    """One rank's part, inside its process group (or alone)."""
    import torch

    from cascade_model.corpus import Corpus
    from cascade_model.distillation import distillation_loss
    from cascade_model.trainer import Trainer
    from cascade_model.weights import load_model, weights_digest

    corpus = Corpus.open(config.corpus)
    model = starting_model(config, corpus)
    teacher = load_model(config.teacher)[0].to(device).eval().requires_grad_(False)
    return Trainer(
        model=model,
        corpus=corpus,
        noise=noise_of(model.config, corpus),
        loss_fn=lambda model, batch: distillation_loss(
            model, batch, teacher=teacher, alpha=config.alpha, weight=config.weight
        ),
        objective={
            "name": "distillation",
            "alpha": config.alpha,
            "weight": config.weight,
            "teacher": weights_digest(config.teacher),
        },
        optimizer=config.optimizer,
        trainer=config.trainer,
        folder=Path(config.output).absolute(),
        settings=to_dict(config),
        device=torch.device(device),
    ).fit()


main = command(DistilConfig, run)

if __name__ == "__main__":
    raise SystemExit(main())
