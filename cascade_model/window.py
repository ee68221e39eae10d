"""The sums of the steps between two lines of metrics, and the means that are told of them."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

OTHER = "other/"
"""Begins the names of the sums that a loss adds of its own; each has a `_count` beside it."""


class HeldOut(NamedTuple):
    """A value on text that is not trained on, nats per token, and its standard error."""

    loss: float
    standard_error: float


def told_of(value: HeldOut | None) -> dict[str, float | None]:
    """A held-out value as a line of metrics has it."""
    loss, error = value or (None, None)
    return {"held_out_loss": loss, "held_out_standard_error": error}


@dataclass(kw_only=True)
class Window:
    """Sums since the last line of metrics.

    It travels in the checkpoint, so that a resumed run writes the same lines.
    """

    sums: dict[str, float] = field(default_factory=dict)
    """Over ranks and steps, by name: `loss`, `count`, `band/J` and `band/J_count` for each band of
    mask rates, and others."""
    norm: float = 0.0
    waited: float = 0.0
    seconds: float = 0.0
    saving: float = 0.0
    steps: int = 0
    skipped: int = 0
    tokens: int = 0
    processed: int = 0
    flops: float = 0.0

    def add(self, sums: dict[str, float], norm: float) -> None:
        """Add what one step learnt from: its sums over all ranks and its gradient norm."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.norm += norm

    def spend(
        self, *, seconds: float, waited: float, tokens: int, processed: int, flops: float
    ) -> None:
        """Add what one step took: this rank's seconds, of these waiting for data; data tokens of
        all ranks, rows they made in the network, and useful operations."""
        self.seconds += seconds
        self.waited += waited
        self.tokens += tokens
        self.processed += processed
        self.flops += flops
        self.steps += 1

    def means(self, peak: float | None = None) -> dict[str, Any]:
        """Loss, mean cross entropy of the masked rows by band, other losses by name, speeds.

        A mean over nothing is None. `peak` is what all devices together can do at most, in FLOP/s;
        without it the utilisation `mfu`, a share of it, is None.
        """
        seconds, learnt = max(self.seconds, 1e-9), self.steps - self.skipped
        bands = sum(name.startswith("band/") for name in self.sums) // 2
        others = sorted(
            name for name in self.sums if name.startswith(OTHER) and not name.endswith("_count")
        )
        return {
            "loss": _ratio(self.sums.get("loss", 0.0), self.sums.get("count", 0.0)),
            "loss_by_mask_rate": [self._mean(f"band/{band}") for band in range(bands)],
            **{name.removeprefix(OTHER): self._mean(name) for name in others},
            "grad_norm": _ratio(self.norm, learnt),
            "skipped_steps": self.skipped,
            "tokens_per_second": self.tokens / seconds,
            "processed_tokens_per_second": self.processed / seconds,
            "mfu": self.flops / seconds / peak if peak else None,
            "data_wait_rate": self.waited / seconds,
            "checkpoint_seconds": self.saving,
            "seconds": self.seconds,
        }

    def _mean(self, name: str) -> float | None:
        return _ratio(self.sums[name], self.sums[f"{name}_count"])


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None
