"""One forward pass over one sequence, as a request and as its execution.

Decoding is planned in plain Python (`contexts`, `sampler`) and yields a `Pass` whenever it needs
logits; whoever drives it runs the pass, alone (`Runner`) or together with those of other sequences.
"""

import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cascade_model.attention import Keep, dense, prefix_mask
from cascade_model.kv_cache import KVCache
from cascade_model.networks import Network


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """Rows to run: their keys and values are written at start..start+r of the sequence's cache."""

    tokens: list[int]
    """One a row, r in all."""
    start: int
    """Place of the first row, for the cache and for rotary positions."""
    limits: list[int]
    """Row i sees cache entries 0..limits[i]-1, those of this pass included."""
    visible: int
    """Cache entries that some row may see."""
    reads: list[int]
    """The m rows whose logits are wanted."""
    stream: int = 0
    """Which of the sequence's caches; guidance has a second one."""

    @property
    def end(self) -> int:
        """Place behind the last row."""
        return self.start + len(self.tokens)

    def cuts(self, size: int) -> Iterator[int]:
        """Where the pass can be cut in two: rising counts of rows, ending with whole blocks of
        `size`, that see nothing behind themselves and are not read."""
        last = min([len(self.tokens) - 1, *self.reads])
        furthest = 0
        for count, limit in enumerate(itertools.islice(self.limits, last), start=1):
            furthest, end = max(furthest, limit), self.start + count
            if furthest <= end and end % size == 0:
                yield count

    def chunk(self, budget: int, size: int) -> "Pass":
        """The first rows within the budget; at least up to the first cut, all without one."""
        if len(self.tokens) <= budget:
            return self
        count = 0
        for cut in self.cuts(size):
            if count and cut > budget:
                break
            count = cut
        if not count:
            return self
        return replace(
            self,
            tokens=self.tokens[:count],
            limits=self.limits[:count],
            visible=self.start + count,
            reads=[],
        )

    def behind(self, start: int) -> "Pass":
        """The rows from a place on."""
        skipped = max(0, start - self.start)
        return replace(
            self,
            tokens=self.tokens[skipped:],
            start=self.start + skipped,
            limits=self.limits[skipped:],
            reads=[row - skipped for row in self.reads],
        )


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
        device = next(self.model.parameters()).device
        tokens, places, limits = (
            torch.tensor(values, device=device)
            for values in (wanted.tokens, range(wanted.start, wanted.end), wanted.limits)
        )
        reads = torch.tensor(wanted.reads, dtype=torch.int64, device=device)
        mask = prefix_mask(limits, wanted.visible)
        kept = Keep(reads, dense(None if mask is None else mask[:, :, reads]))
        return self.model(
            tokens[None],
            places[None],
            dense(mask),
            lambda hidden, head: _wide(head(hidden[0])),
            self._cache(wanted.stream).slot(wanted.start, len(tokens), wanted.visible),
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
