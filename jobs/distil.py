"""Distil an autoregressive teacher into a block-diffusion student: pretrain with another loss.

The teacher runs beside the student (`teacher`), or has spoken before (`cascade teach`, `targets`).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cascade_model.config import TeacherWeight
from cascade_model.settings import check
from jobs.cli import command
from jobs.objectives import LossConfig, auxiliary, auxiliary_objective, check_auxiliary
from jobs.ranks import Started
from jobs.starting import require_context, starting_config
from jobs.training import fit, start

if TYPE_CHECKING:
    from cascade_model.distillation import Reference
    from cascade_model.trainer import LossFn


@dataclass(frozen=True, kw_only=True, slots=True)
class DistilConfig(LossConfig):
    """Train a student on a prepared corpus against an autoregressive teacher's distributions."""

    teacher: str | None = None
    """Model folder of an autoregressive model (block size 1, shifted logits) with the corpus's
    tokenizer, which runs beside the student; or else `targets`."""
    targets: str | None = None
    """Folder or URL of what a teacher said of this corpus, as `cascade teach` wrote it."""
    alpha: float = 0.5
    """Share of the teacher: loss = (1 - alpha) x cross entropy + alpha x w x KL."""
    teacher_weight: TeacherWeight = "right_context"
    """How w weighs the teacher's word on a masked token. right_context: less the more of the text
    to its right, which the teacher does not see, is visible in its block. rate: by the mask rate
    alone."""
    temperature: float = 1.0
    """Temperature of teacher and student in the KL."""

    def __post_init__(self) -> None:
        LossConfig.__post_init__(self)
        check(
            (self.teacher is None) != (self.targets is None),
            f"teacher={self.teacher} and targets={self.targets}: give one of the two, a model "
            "folder or what `cascade teach` wrote",
        )
        check(0.0 <= self.alpha <= 1.0, f"alpha={self.alpha} must be in 0..1; use 0.5")
        check(
            0.0 < self.temperature < float("inf"),
            f"temperature={self.temperature} must be above 0; use 1",
        )


def run(config: DistilConfig) -> dict[str, Any]:
    """Check the settings, train, and return the run's summary."""
    check_settings(config)
    return start(config, train, objective(config))


def check_settings(config: DistilConfig) -> None:
    """Refuse what this stage alone knows of, before any worker starts."""
    check_teacher(config)
    check_auxiliary(config)


def check_teacher(config: DistilConfig) -> None:
    """Refuse a teacher, or its targets, that do not fit the student, before any worker starts."""
    from cascade_model.corpus import Corpus
    from cascade_model.distillation import require_teacher
    from cascade_model.weights import read_config

    corpus = Corpus.open(config.corpus)
    shape = starting_config(config, corpus)
    if config.teacher is not None:
        teacher = read_config(config.teacher)
        require_teacher(teacher, shape)
        require_context(f"teacher={config.teacher}", teacher, corpus, config.corpus)
    else:
        from cascade_model.stored_teaching import require_targets
        from cascade_model.teacher_targets import TeacherTargets

        targets = TeacherTargets(str(config.targets), corpus.manifest)
        require_targets(targets.manifest, shape, config.temperature)
        targets.require_units()


def objective(config: DistilConfig) -> dict[str, Any]:
    """What is minimised; a run goes on with the same only."""
    return {
        "name": "distillation",
        **axes(config),
        "temperature": config.temperature,
        **teacher_of(config),
        **auxiliary_objective(config),
    }


def teacher_of(config: DistilConfig) -> dict[str, str]:
    """Digests of the teacher's weights and of its targets, where they are stored."""
    if config.teacher is not None:
        from cascade_model.weights import weights_digest

        return {"teacher": weights_digest(config.teacher)}
    from cascade_model.teacher_targets import read_targets

    found = read_targets(str(config.targets))
    return {"teacher": found.teacher, "targets": found.digest}


def axes(config: DistilConfig) -> dict[str, Any]:
    """The settings of the loss."""
    names = ("alpha", "teacher_weight", "weight", "normaliser")
    return {name: getattr(config, name) for name in names}


def train(config: DistilConfig, device: str, started: Started) -> dict[str, Any]:
    """One rank's part."""
    from cascade_model.stored_teaching import Stored

    reference = reference_of(config, device)
    ahead = {"read_ahead": reference.read_ahead} if isinstance(reference, Stored) else {}
    return fit(config, device, objective(config), _loss(config, reference), started, **ahead)


def loss_of(config: DistilConfig, device: str) -> "LossFn":
    """What one rank minimises."""
    return _loss(config, reference_of(config, device))


def _loss(config: DistilConfig, reference: "Reference") -> "LossFn":
    from functools import partial

    from cascade_model.distillation import distillation_loss

    return partial(
        distillation_loss,
        reference=reference,
        **axes(config),
        auxiliary=auxiliary(config),
    )


def reference_of(config: DistilConfig, device: str) -> "Reference":
    """Where this rank takes the teacher's word from."""
    from cascade_model.corpus import Corpus

    corpus = Corpus.open(config.corpus)
    if config.teacher is not None:
        from cascade_model.distillation import Online, banned_with
        from cascade_model.weights import load_model

        teacher = load_model(config.teacher)[0].to(device).eval().requires_grad_(False)
        banned = banned_with(teacher.config, starting_config(config, corpus))
        return Online(teacher, banned, config.temperature)
    from cascade_model.stored_teaching import Stored
    from cascade_model.teacher_targets import TeacherTargets

    return Stored(TeacherTargets(str(config.targets), corpus.manifest, cache=config.cache))


main = command(DistilConfig, run)

if __name__ == "__main__":
    raise SystemExit(main())
