"""Keys and values of text that was seen before, ready for the next request that begins with it.

An entry is a run of pages that a sequence left behind, with the tokens it was computed from. It is
found by the digests of its page-long beginnings and trusted only after the tokens themselves were
compared. Two texts with a common beginning each hold a run of their own, since a run is contiguous;
but no entry is the beginning of another. The arena holds one model at one dtype, block size and
block origin, so these need not stand in the key.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from operator import eq
from typing import Self

import numpy as np

from cascade_model.pages import PageArena, Run


@dataclass(frozen=True, slots=True)
class Beginning:
    """Whole pages of tokens, and for each page the digest of everything up to its end."""

    tokens: bytes = b""
    """int64, little-endian."""
    digests: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, tokens: Sequence[int], page_tokens: int) -> Self:
        """The whole pages that a text begins with."""
        data, size = np.asarray(tokens, dtype="<i8").tobytes(), page_tokens * 8
        chain, digests = hashlib.sha256(), []
        for end in range(size, len(data) + 1, size):
            chain.update(data[end - size : end])
            digests.append(chain.digest())
        return cls(data[: len(digests) * size], tuple(digests))

    @property
    def pages(self) -> int:
        """How many."""
        return len(self.digests)

    def first(self, pages: int) -> "Beginning":
        """At most this many of its pages."""
        size = len(self.tokens) // max(self.pages, 1)
        return Beginning(self.tokens[: pages * size], self.digests[:pages])

    def shared(self, other: "Beginning") -> int:
        """Pages that both begin with."""
        alike = sum(map(eq, self.digests, other.digests))  # chained: equal ones come first
        return alike if self.first(alike) == other.first(alike) else 0


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """Committed tokens and where their keys and values lie."""

    beginning: Beginning
    run: Run


class PrefixCache:
    """Least recently used entries go first; `max_pages` bounds them all together."""

    def __init__(self, arena: PageArena, max_pages: int) -> None:
        self.arena, self.max_pages = arena, max_pages
        self.pages = 0
        self._entries: OrderedDict[Entry, None] = OrderedDict()
        self._by_digest: dict[bytes, list[Entry]] = {}

    def find(self, wanted: Beginning) -> tuple[Run, int] | None:
        """Who knows most of a beginning: its run, and how many pages."""
        for pages in range(wanted.pages, 0, -1):
            for entry in self._by_digest.get(wanted.digests[pages - 1], ()):
                if entry.beginning.first(pages) == wanted.first(pages):
                    self._entries.move_to_end(entry)
                    return entry.run, pages
        return None

    def adopt(self, beginning: Beginning, run: Run) -> bool:
        """Keep the run of a sequence that needs it no longer, unless all of it is known.

        The run's first entries are those of `beginning`; the pages behind are given back, and so
        are those of a text longer than the bound. False: the run still belongs to the caller.
        """
        kept = beginning.first(self.max_pages)
        found = self.find(kept)
        if kept.pages == 0 or (found is not None and found[1] == kept.pages):
            return False
        for entry in self._within(kept):
            self._drop(entry)
        while self.pages + kept.pages > self.max_pages:
            self.evict()
        self.arena.shorten(run, kept.pages)
        entry = Entry(kept, run)
        self._entries[entry] = None
        for digest in kept.digests:
            self._by_digest.setdefault(digest, []).append(entry)
        self.pages += kept.pages
        return True

    def evict(self) -> bool:
        """Drop the entry that was not used for longest; False when there is none."""
        if not self._entries:
            return False
        self._drop(next(iter(self._entries)))
        return True

    def _within(self, longer: Beginning) -> list[Entry]:
        """The entries that are a beginning of a longer one."""
        return [
            entry
            for pages, digest in enumerate(longer.digests, start=1)
            for entry in self._by_digest.get(digest, ())
            if entry.beginning.pages == pages
        ]

    def _drop(self, entry: Entry) -> None:
        """Forget an entry; others that begin alike are found as before."""
        del self._entries[entry]
        for digest in entry.beginning.digests:
            holders = self._by_digest[digest]
            holders.remove(entry)
            if not holders:
                del self._by_digest[digest]
        self.pages -= entry.beginning.pages
        self.arena.give_back(entry.run)
