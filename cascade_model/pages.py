"""One arena of keys and values for many sequences, handed out in runs of pages.

A run is contiguous, so that attention reads it in place; it grows by moving to a larger one. A page
holds whole blocks. Nothing here knows what a sequence is: `scheduler` decides who gets pages.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cascade_model.config import ModelConfig

Views = list[tuple[Tensor, Tensor]]
"""Of each layer, keys and values [1, kv_heads, entries, head_dim]."""


@dataclass(slots=True, eq=False)
class Run:
    """Pages first..first+count-1 of the arena, held by one owner."""

    first: int
    count: int


class PageArena:
    """Per layer, keys and values [tokens, kv_heads, head_dim] of all pages; first fit."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_pages: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.page_tokens, self.num_pages = page_tokens, num_pages
        tokens = num_pages * page_tokens
        shape = (2, config.num_layers, tokens, config.num_kv_heads, config.head_dim)
        # Not zeros: an entry is only read once it is written, and memory is taken page by page.
        self.entries = torch.empty(shape, dtype=dtype, device=device)
        self.layers = list(zip(*(part.unbind() for part in self.entries.unbind()), strict=True))
        """The same memory, keys and values of each layer."""
        self._free: list[tuple[int, int]] = [(0, num_pages)]  # first page and count, rising

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds, perhaps not in one piece."""
        return sum(count for _, count in self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-tokens // self.page_tokens)

    def take(self, count: int) -> Run | None:
        """A run of `count` pages, or None where no free piece is that long."""
        for index, (first, length) in enumerate(self._free):
            if length >= count:
                rest = [(first + count, length - count)] if length > count else []
                self._free[index : index + 1] = rest
                return Run(first, count)
        return None

    def extend(self, run: Run, count: int) -> bool:
        """Make a run `count` pages long where it is, if the pages behind it are free."""
        for index, (first, length) in enumerate(self._free):
            missing = count - run.count
            if first == run.first + run.count and length >= missing:
                rest = [(first + missing, length - missing)] if length > missing else []
                self._free[index : index + 1] = rest
                run.count = count
                return True
        return False

    def fits_in_place_of(self, run: Run, count: int) -> bool:
        """Whether a run of `count` pages could be taken if this one were given back."""
        behind = dict(self._free).get(run.first + run.count, 0)
        before = next((length for at, length in self._free if at + length == run.first), 0)
        gap = before + run.count + behind
        return max([gap, *(length for _, length in self._free)]) >= count

    def give_back(self, run: Run) -> None:
        """Free a run; its owner must not use it again."""
        pieces = sorted([*self._free, (run.first, run.count)])
        self._free = [pieces[0]]
        for first, count in pieces[1:]:
            last, length = self._free[-1]
            if first < last + length:
                raise RuntimeError(f"page {first} was given back twice")
            if first == last + length:
                self._free[-1] = (last, length + count)
            else:
                self._free.append((first, count))
        run.count = 0

    def shorten(self, run: Run, count: int) -> None:
        """Free the pages of a run behind its first `count`."""
        if count < run.count:
            rest = Run(run.first + count, run.count - count)
            run.count = count
            self.give_back(rest)

    def copy(self, source: Run, target: Run, tokens: int) -> None:
        """Copy the first `tokens` entries of one run to another."""
        a, b = source.first * self.page_tokens, target.first * self.page_tokens
        self.entries[:, :, b : b + tokens] = self.entries[:, :, a : a + tokens]

    def views(self, run: Run, visible: int) -> Views:
        """The first `visible` entries of a run, in place."""
        start = run.first * self.page_tokens
        seen = self.entries[:, :, None, start : start + visible].transpose(3, 4)
        return list(zip(*(part.unbind() for part in seen.unbind()), strict=True))
