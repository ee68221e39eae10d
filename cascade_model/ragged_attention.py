"""Attention of a ragged pass: pieces of rows, each over the keys and values of its own sequence.

Two ways behind one interface. `by_piece` runs anywhere: one call for each piece, in the same shape
whatever runs beside it, which makes float32 exact on a CPU. `by_varlen` is one call of torch's
variable-length flash attention for all pieces, on a GPU in bfloat16 or float16.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade_model.attention import prefix_mask
from cascade_model.pages import PageArena, Run

RaggedAttention = Callable[[Tensor, int], Tensor]
"""Queries [1, h, rows, head_dim] and the number of a layer -> [1, h, rows, head_dim]; rows behind
those of the pieces may hold anything."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one block of one sequence: the same however a pass was cut. Pieces follow each
    other."""

    run: Run
    limits: list[int]
    """For each row, how many of the run's entries it sees."""


def attention_of(arena: PageArena, pieces: Sequence[Piece]) -> RaggedAttention:
    """The faster way that the arena's device has."""
    entries = arena.entries
    is_varlen = entries.is_cuda and entries.dtype in (torch.bfloat16, torch.float16)
    return (by_varlen if is_varlen else by_piece)(arena, pieces)


def by_piece(arena: PageArena, pieces: Sequence[Piece]) -> RaggedAttention:
    """Heads that share their keys stand in one matrix: fewer and larger products."""
    views = cache(arena.views)
    seen = [views(piece.run, max(piece.limits)) for piece in pieces]
    sizes = [len(piece.limits) for piece in pieces]
    total, kv_heads = sum(sizes), arena.entries.shape[3]

    @cache
    def masks(sharing: int) -> list[Tensor | None]:
        device = arena.entries.device
        return [_mask(piece.limits * sharing, device) for piece in pieces]

    def one(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        folded = q.reshape(1, kv_heads, -1, q.shape[-1])
        done = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
        return done.view_as(q)

    def attend(q: Tensor, layer: int) -> Tensor:
        added = q.shape[2] - total
        each = masks(q.shape[1] // kv_heads)
        if len(seen) == 1 and not added:
            return one(q, *seen[0][layer], each[0])
        *parts, rest = q.split([*sizes, added], dim=2)
        done = [
            one(part, *views[layer], mask)
            for part, views, mask in zip(parts, seen, each, strict=True)
        ]
        rows = [part.transpose(1, 2) for part in [*done, rest]]
        return torch.cat(rows, dim=1).transpose(1, 2)

    return attend


def by_varlen(arena: PageArena, pieces: Sequence[Piece]) -> RaggedAttention:
    """Rows that see the same are one sequence of the kernel; its keys begin where the run does and
    are read in place. The kernel is told not to split keys, since where it splits them depends on
    what else runs."""
    from torch.nn.attention.varlen import varlen_attn

    if not pieces:
        return lambda q, layer: q
    groups = [
        (piece.run.first * arena.page_tokens, limit, len(list(rows)))
        for piece in pieces
        for limit, rows in itertools.groupby(piece.limits)
    ]
    first, seen, rows = (list(column) for column in zip(*groups, strict=True))
    ends = list(itertools.accumulate(rows, initial=0))
    device = arena.entries.device
    query_starts, key_starts, used = (
        torch.tensor(values, dtype=torch.int32, device=device)
        for values in (ends, [*first, first[-1]], seen)
    )

    def attend(q: Tensor, layer: int) -> Tensor:
        own = q[0, :, : ends[-1]].transpose(0, 1)
        keys, values = arena.entries[:, layer]
        done = varlen_attn(
            own,
            keys,
            values,
            query_starts,
            key_starts,
            max(rows),
            max(seen),
            enable_gqa=True,
            seqused_k=used,
            num_splits=1,
        )
        assert isinstance(done, Tensor)
        rest = q[0, :, ends[-1] :].transpose(0, 1)
        return torch.cat([done, rest])[None].transpose(1, 2)

    return attend


def _mask(limits: list[int], device: torch.device) -> Tensor | None:
    """What rows of a piece see, where they do not all see the same."""
    if min(limits) == max(limits):
        return None
    return prefix_mask(torch.tensor(limits, device=device), max(limits))
