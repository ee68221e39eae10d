"""Keys and values of text that was seen before, ready for the next request that begins with it.

An entry is a run of pages with the tokens it was computed from. It is found by the digests of its
page-long prefixes and trusted only after the tokens themselves were compared. The arena holds one
model at one dtype, block size and block origin, so these need not stand in the key.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from cascade_model.pages import PageArena, Run


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """Committed tokens, whole pages of them, and where their keys and values lie."""

    tokens: tuple[int, ...]
    run: Run


class PrefixCache:
    """Least recently used entries go first; `max_pages` bounds them all together."""

    def __init__(self, arena: PageArena, max_pages: int) -> None:
        self.arena, self.max_pages = arena, max_pages
        self._entries: OrderedDict[int, Entry] = OrderedDict()
        self._by_digest: dict[bytes, tuple[int, int]] = {}  # -> entry and pages
        self._next = 0
        self.pages = 0

    def find(self, tokens: list[int]) -> tuple[Run, int] | None:
        """The longest known beginning of `tokens`: its run, and how many tokens (whole pages)."""
        size = self.arena.page_tokens
        for pages, key in reversed(list(enumerate(_digests(tokens, size), start=1))):
            if key in self._by_digest:
                number, _ = self._by_digest[key]
                entry = self._entries[number]
                if entry.tokens[: pages * size] == tuple(tokens[: pages * size]):
                    self._entries.move_to_end(number)
                    return entry.run, pages * size
        return None

    def publish(self, tokens: list[int], source: Run) -> None:
        """Copy the whole pages of a sequence's committed tokens, unless they are known."""
        size = self.arena.page_tokens
        keys = _digests(tokens, size)
        if not keys or keys[-1] in self._by_digest or len(keys) > self.max_pages:
            return
        while self.pages + len(keys) > self.max_pages:
            self.evict()
        run = self.arena.take(len(keys))
        if run is None:
            return
        self.arena.copy(source, run, len(keys) * size)
        self._entries[self._next] = Entry(tuple(tokens[: len(keys) * size]), run)
        for pages, key in enumerate(keys, start=1):
            self._by_digest.setdefault(key, (self._next, pages))
        self._next += 1
        self.pages += len(keys)

    def evict(self) -> bool:
        """Drop the entry that was not used for longest; False when there is none."""
        if not self._entries:
            return False
        number, entry = self._entries.popitem(last=False)
        self._by_digest = {k: v for k, v in self._by_digest.items() if v[0] != number}
        self.pages -= entry.run.count
        self.arena.give_back(entry.run)
        return True

    def clear(self) -> None:
        """Give every page back."""
        while self.evict():
            pass


def _digests(tokens: list[int], size: int) -> list[bytes]:
    """One digest for each page-long beginning, each chained to the one before."""
    chain, result = hashlib.sha256(), []
    for end in range(size, len(tokens) + 1, size):
        chain.update(np.asarray(tokens[end - size : end], dtype="<i8").tobytes())
        result.append(chain.digest())
    return result
