"""Which source a global sample comes from: whole shares of 1024, near at every prefix.

Each source of a corpus has a share s of every 1024 samples. Within a period of 1024 the sources
come in the order of R. Tijdeman, "The chairman assignment problem" (Discrete Mathematics 32, 1980):
after n samples each source has had n s / 1024 of them, to less than one sample. So the state is the
sample's number alone: the source and its count of samples so far are looked up in two tables.

All sequences have the same number of places, so a share of the samples is one of the tokens, apart
from padding. A source shows its own sequences in draws of its own: a small one with a large share
comes round more often.
"""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from cascade_model.config import NoiseConfig
from cascade_model.errors import CorpusMismatch
from cascade_model.manifest import CURE, SourceEntry
from cascade_model.noise import rank_of, sequence_at
from cascade_model.settings import check

UNITS = 1024
"""Samples of a period, which the shares of all sources add up to."""


def shares(weights: Sequence[float]) -> list[int]:
    """Weights as shares of 1024, by largest remainder; every source gets at least 1.

    `InputError` when a weight is not above 0 or there are more than 1024.
    """
    count = len(weights)
    check(
        1 <= count <= UNITS,
        f"{count} sources cannot be mixed; give between 1 and {UNITS}",
    )
    for weight in weights:
        check(
            math.isfinite(weight) and weight > 0,
            f"source weight={weight} must be a finite number above 0; leave the source out instead",
        )
    total = sum(Fraction(weight) for weight in weights)
    over = [max(UNITS * Fraction(weight) / total - 1, Fraction(0)) for weight in weights]
    free = UNITS - count
    wanted = [free * each / (sum(over) or 1) for each in over]
    given = [int(each) for each in wanted]
    by_remainder = sorted(range(count), key=lambda i: (given[i] - wanted[i], i))
    for index in by_remainder[: free - sum(given)]:
        given[index] += 1
    return [1 + each for each in given]


@lru_cache(maxsize=64)
def period(given: tuple[int, ...]) -> np.ndarray:
    """The source of each sample of a period, int64 [1024].

    Of m sources, one is eligible whose debt (due so far, less given so far) has reached
    1 / (2m - 2); of those the one goes first whose debt would first exceed 1 - 1 / (2m - 2).
    """
    rates = np.array(given, dtype=np.int64)
    scale = max(2 * len(given) - 2, 1)
    order, debt = np.empty(UNITS, dtype=np.int64), np.zeros(len(given), dtype=np.int64)
    for place in range(UNITS):
        debt += rates * scale  # in units of 1 / (1024 scale)
        slack = (UNITS * (scale - 1) - debt) / rates  # exact enough to order: below 2^53
        slack[debt < UNITS] = np.inf
        order[place] = np.argmin(slack)
        debt[order[place]] -= UNITS * scale
    return order


class Mixture:
    """The order in which a split's sources are read."""

    def __init__(self, sources: Sequence[SourceEntry], num_sequences: int) -> None:
        """`CorpusMismatch` unless the sources hold each sequence once and share all samples."""
        sizes = [source.num_sequences for source in sources]
        firsts = [source.first_sequence for source in sources]
        given = tuple(source.share for source in sources)
        if (
            firsts != [0, *itertools.accumulate(sizes)][:-1]
            or sum(sizes) != num_sequences
            or min(sizes, default=0) < 1
            or min(given, default=0) < 1
            or sum(given) != UNITS
        ):
            raise CorpusMismatch(
                f"the manifest's sources {[source.name for source in sources]} do not hold its "
                f"{num_sequences} sequences in shares of {UNITS}; {CURE}"
            )
        self._shares, self._sizes = np.array(given, dtype=np.uint64), sizes
        self._firsts = np.array(firsts, dtype=np.uint64)
        self._order = period(given)
        self._before = np.zeros(UNITS, dtype=np.uint64)
        for source in range(len(sizes)):
            mine = self._order == source
            self._before[mine] = np.arange(mine.sum())

    def sources_of(self, samples: np.ndarray) -> np.ndarray:
        """The source of each sample (uint64, any shape), int64."""
        return self._order[(samples % np.uint64(UNITS)).astype(np.int64)]

    def places(
        self, samples: np.ndarray, noise: NoiseConfig
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sequence ids, ranks and draws, uint64 [n], of the samples, uint64 [n].

        Sample g is the k-th of its source, which holds N sequences: rank k mod N of the source's
        draw k div N. The rank that enters the noise counts on from the source's first sequence, so
        that no two sources share a mask rate.
        """
        sources = self.sources_of(samples)
        slots = (samples % np.uint64(UNITS)).astype(np.int64)
        count = samples // np.uint64(UNITS) * self._shares[sources] + self._before[slots]
        draws, ranks, ids = (np.empty_like(samples) for _ in range(3))
        for source in np.unique(sources):
            mine, size = sources == source, self._sizes[source]
            draws[mine], own = np.divmod(count[mine], np.uint64(size))
            ranks[mine] = self._firsts[source] + own
            ids[mine] = self._firsts[source] + sequence_at(own, size, noise, draws[mine])
        return ids, ranks, draws

    def ranks_of(self, sequence_ids: np.ndarray, noise: NoiseConfig, draw: int) -> np.ndarray:
        """The ranks that enter the noise, uint64 [n], of these sequences in a draw.

        `CorpusMismatch` for one that no source has.
        """
        ids = np.asarray(sequence_ids, dtype=np.uint64)
        if ids.size and int(ids.max()) >= sum(self._sizes):
            raise CorpusMismatch(
                f"sequence {int(ids.max())} is beyond the {sum(self._sizes)} of the manifest's "
                "sources; prepare the corpus again"
            )
        ranks = np.empty_like(ids)
        owners = np.searchsorted(self._firsts, ids, side="right") - 1
        for source in np.unique(owners):
            mine, first = owners == source, self._firsts[source]
            ranks[mine] = first + rank_of(ids[mine] - first, self._sizes[source], noise, draw)
        return ranks


@lru_cache(maxsize=16)
def mixture_of(sources: tuple[SourceEntry, ...], num_sequences: int) -> Mixture:
    """`Mixture`, whose tables are made once."""
    return Mixture(sources, num_sequences)
