"""Documents rearranged as prefix, suffix, middle, so that a model learns to fill holes.

A block-causal model never sees later blocks. So a drawn document is cut at two places and written
as <prefix> its beginning <suffix> its end <middle> what stands between, then EOS: PSM mode of
Bavarian et al. 2022 (arXiv 2207.14255), with their cuts: two characters' places, drawn uniformly.
The parts are tokenised apart, as those of a request must be. Whether and where a document is cut
depends on the seed and its text alone.

Only documents that fit into a sequence are rearranged: of a longer one the middle would come to
stand in another sequence than what it is to be seen from. Held-out documents and conversations stay
as they are: held-out values then mean the same with and without, and nobody can ask for the middle
of an answer.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cascade_model.tokenizer import Encoded, Tokenizer

Parts = tuple[str, str, str]
"""Prefix, suffix and middle of a text."""


@dataclass(frozen=True, slots=True)
class Infilling:
    """Which documents of a corpus are rearranged, and by which tokens."""

    rate: float
    seed: int
    ids: tuple[int, int, int]
    """Tokens before prefix, suffix and middle."""
    max_tokens: int
    """Tokens of a rearranged document at most, these three counted, EOS not."""

    @classmethod
    def of(
        cls, rate: float, seed: int, tokenizer: Tokenizer, sequence_length: int
    ) -> "Infilling | None":
        """For a corpus of sequences of this length; none where nothing is rearranged."""
        if rate == 0.0:
            return None
        return cls(rate, seed, tokenizer.infill_ids, sequence_length - 1)

    def parts(self, text: str) -> Parts | None:
        """The parts of a text, each perhaps empty; none for one that is not drawn."""
        data = hashlib.blake2b(
            text.encode(), digest_size=24, key=self.seed.to_bytes(8, "big"), person=b"infilling"
        ).digest()
        draw, *places = (int.from_bytes(data[i : i + 8], "big") for i in (0, 8, 16))
        if draw >= self.rate * 2**64:
            return None
        first, last = sorted(place * (len(text) + 1) >> 64 for place in places)
        return text[:first], text[last:], text[first:last]


def rearranged(
    encoded: Encoded,
    texts: Sequence[str],
    infilling: Infilling,
    encode: Callable[[Sequence[str]], Encoded],
) -> tuple[Encoded, int]:
    """The encoded texts with those that are drawn and fit rearranged, and how many these are.

    `encode` is what encoded the texts. The three tokens stand for no byte of the text.
    """
    room = infilling.max_tokens - len(infilling.ids)
    fitting = np.flatnonzero(encoded.lengths <= room).tolist()
    drawn = {i: parts for i in fitting if (parts := infilling.parts(texts[i])) is not None}
    found = encode([part for parts in drawn.values() for part in parts])
    lengths = found.lengths.reshape(-1, 3)
    fits = lengths.sum(axis=1) <= room  # parts apart may have more tokens than the whole
    starts = (np.cumsum(found.lengths) - found.lengths).astype(np.int64)
    marks = np.tile(np.array(infilling.ids, dtype=np.uint32), len(drawn))
    whole = Encoded(
        np.insert(found.tokens, starts, marks),
        lengths.sum(axis=1) + len(infilling.ids),
        np.insert(found.sizes, starts, np.uint32(0)),
    )
    kept = [place for place, fit in zip(drawn, fits, strict=True) if fit]
    tokens, sizes = whole.split()
    chosen = np.flatnonzero(fits).tolist()
    others = Encoded.of([tokens[i] for i in chosen], [sizes[i] for i in chosen])
    return encoded.replaced(kept, others), len(kept)
