"""Which checkpoints of a run stay."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cascade_model.settings import check


@dataclass(frozen=True, kw_only=True, slots=True)
class Keep:
    """The rule; a checkpoint stays if any part of it wants it."""

    last: int = 2
    """The newest ones."""
    every: int | None = None
    """Those of every n-th step, for ever."""
    best: int = 1
    """Those with the lowest held-out loss, of those that were measured."""

    def __post_init__(self) -> None:
        check(self.last >= 1, f"keep.last={self.last} must be at least 1")
        check(
            self.every is None or self.every >= 1,
            f"keep.every={self.every} must be at least 1, or none",
        )
        check(self.best >= 0, f"keep.best={self.best} must be at least 0")


def kept_steps(scores: Mapping[int, float | None], keep: Keep) -> set[int]:
    """The steps to keep of those that are committed, each with its held-out loss if it has one."""
    newest = sorted(scores)[-keep.last :]
    eternal = [step for step in scores if keep.every and step % keep.every == 0]
    measured = {step: score for step, score in scores.items() if is_measured(score)}
    best = sorted(measured, key=lambda step: (measured[step], step))[: keep.best]
    return {*newest, *eternal, *best}


def is_measured(score: float | None) -> bool:
    """Whether a held-out loss can be compared."""
    return score is not None and math.isfinite(score)
