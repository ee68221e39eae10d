"""What an earlier start left in the run folder, and how the settings of this one differ from it.

A run is bound to its model, corpus, noise and objective, which `checkpoint.require_same` compares.
Its steps, optimiser and evaluation may change while it goes on; that is told, never silent.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cascade_model.commit import Folder
from cascade_model.errors import InputError
from cascade_model.settings import to_dict
from jobs.ranks import CHECKPOINTS
from jobs.training_settings import TrainingConfig

if TYPE_CHECKING:
    from cascade_model.checkpoint import Checkpoint

_FREE = ("optimizer", "trainer", "held_out")
"""The groups of settings that a run may change; all others it is bound to, or they say where it
runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Earlier:
    """A run that is there already."""

    output: str
    step: int
    """Of its newest complete checkpoint."""
    changes: tuple[str, ...]
    """Each a setting with its value then and now: `optimizer.peak_lr 0.001 -> 0.01`."""
    summary: dict[str, Any] | None
    """Of a run that has finished, which is left as it is; none if it goes on."""

    @classmethod
    def of(
        cls, found: "Checkpoint", summary: dict[str, Any] | None, config: TrainingConfig
    ) -> "Earlier":
        """Compare the settings that the newest checkpoint was made with."""
        before = found.facts.get("settings", {})
        changes = tuple(change for name in _FREE for change in _changes(name, before, config))
        return cls(output=config.output, step=found.step, changes=changes, summary=summary)

    def __str__(self) -> str:
        """One line for the person who started it again."""
        told = ", ".join(self.changes)
        if self.summary is None:
            return f"goes on from step {self.step}" + (f" with {told}" if told else "")
        unused = f"; not used: {told}; give another output to train so" if told else ""
        return f"{self.output} had finished, at step {self.step}; nothing was done{unused}"


def newest_checkpoint(folder: Folder, tell: Callable[[str], None] | None) -> "Checkpoint | None":
    """The newest complete checkpoint of a run folder.

    Damaged ones are told; without a `tell` only where none is whole, so that no run follows which
    would do so itself.
    """
    from cascade_model import checkpoint, metrics

    lines: list[str] = []
    try:
        found = checkpoint.newest(folder / CHECKPOINTS, lines.append)
    except InputError:
        for line in lines:
            metrics.tell(line)
        raise
    if tell is not None:
        for line in lines:
            tell(line)
    return found


def _changes(group: str, before: dict[str, Any], config: TrainingConfig) -> Iterator[str]:
    """The settings of a group that differ; one that the earlier program did not have is none."""
    now, then = to_dict(getattr(config, group)), before.get(group, {})
    for name, value in now.items():
        if then.get(name, value) != value:
            yield f"{group}.{name} {then[name]} -> {value}"
