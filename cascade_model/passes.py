"""One forward pass over one sequence, as a request and as its execution.

Decoding is planned in plain Python (`contexts`, `sampler`) and yields a `Pass` whenever it needs
logits; whoever drives it runs the pass, alone (`Runner`) or together with those of other sequences.
"""

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade_model.attention import Keep, dense, prefix_mask
from cascade_model.kv_cache import KVCache
from cascade_model.networks import Network


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """Rows to run: their keys and values are written at start..start+r of the sequence's cache."""

    tokens: Tensor
    """int64 [r]."""
    start: int
    """Place of the first row, for the cache and for rotary positions."""
    limits: Tensor
    """int64 [r]: row i sees cache entries 0..limits[i]-1, those of this pass included."""
    visible: int
    """Cache entries that some row may see."""
    reads: Tensor
    """int64 [m]: the rows whose logits are wanted."""
    stream: int = 0
    """Which of the sequence's caches; guidance has a second one."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a context answers: logits [m, vocabulary] of places int64 [m] of the canvas.

    A strategy may set logits to -inf in place, the same ones for all its predictions.
    """

    places: Tensor
    logits: Tensor


Predicting = Generator[Pass, Tensor, Prediction]


class Runner:
    """Runs the passes of one sequence, each stream with a cache of its own."""

    def __init__(self, model: Network, capacity: int) -> None:
        self.model, self.capacity = model, capacity
        self._caches: dict[int, KVCache] = {}

    @torch.inference_mode()
    def run(self, wanted: Pass) -> Tensor:
        """Logits [m, vocabulary] of the rows that are read, in float32 or wider."""
        rows = len(wanted.tokens)
        slot = self._cache(wanted.stream).slot(wanted.start, rows, wanted.visible)
        mask = prefix_mask(wanted.limits, wanted.visible)
        kept = Keep(wanted.reads, dense(None if mask is None else mask[:, :, wanted.reads]))
        positions = torch.arange(wanted.start, wanted.start + rows, device=wanted.tokens.device)
        return self.model(
            wanted.tokens[None],
            positions[None],
            dense(mask),
            lambda hidden, head: _wide(head(hidden[0])),
            slot,
            kept,
        )

    def _cache(self, stream: int) -> KVCache:
        if stream not in self._caches:
            weight = next(self.model.parameters())
            self._caches[stream] = KVCache(
                self.model.config, self.capacity, weight.dtype, weight.device
            )
        return self._caches[stream]


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
