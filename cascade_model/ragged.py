"""One forward pass over the rows of many sequences: prompt chunks, commits and denoising together.

Matrix products see all rows at once (`rows` says why some are added); attention runs block by block
over exactly the keys that the block sees. So a sequence's logits depend neither on what runs beside
it nor on how its prompt was cut into passes, bit for bit: a block's attention always has one shape.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade_model.attention import Keep, prefix_mask
from cascade_model.config import ModelConfig
from cascade_model.networks import Network
from cascade_model.pages import PageArena, Run, Views
from cascade_model.passes import Pass
from cascade_model.rows import filler


@dataclass(frozen=True, slots=True)
class Job:
    """A pass and the run of pages that its sequence holds."""

    wanted: Pass
    run: Run


@torch.inference_mode()
def run_together(model: Network, arena: PageArena, jobs: Sequence[Job]) -> list[Tensor]:
    """The logits [m, vocabulary] of each job, in float32 or wider."""
    passes = [job.wanted for job in jobs]
    starts = itertools.accumulate((len(wanted.tokens) for wanted in passes), initial=0)
    tokens = [token for wanted in passes for token in wanted.tokens]
    places = [place for wanted in passes for place in range(wanted.start, wanted.end)]
    reads = [start + row for start, wanted in zip(starts, passes, strict=False)
             for row in wanted.reads]  # fmt: skip
    device = arena.entries.device
    ragged = _Ragged(arena, jobs, model.config)
    logits = model(
        _index(tokens, device)[None],
        _index(places, device)[None],
        ragged.attend,
        lambda hidden, head: head(hidden[0]),
        ragged,
        Keep(_index(reads, device), ragged.attend_kept),
    )
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return list(wide[: len(reads)].split([len(wanted.reads) for wanted in passes]))


def _index(values: list[int], device: torch.device) -> Tensor:
    """int64, with as many rows as `rows` asks for."""
    added = (values[:1] or [0]) * filler(len(values))
    return torch.tensor(values + added, device=device)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of one block of one job: the unit of attention, the same however a pass was cut."""

    rows: int
    """How many; pieces follow each other."""
    seen: Views
    """What the rows see: no more is read."""
    mask: Tensor | None


class _Ragged:
    """The cache and the attention of one ragged pass: both know which rows are whose."""

    def __init__(self, arena: PageArena, jobs: Sequence[Job], config: ModelConfig) -> None:
        self.arena, self.layer = arena, 0
        page = arena.page_tokens
        entries = [
            job.run.first * page + place
            for job in jobs
            for place in range(job.wanted.start, job.wanted.end)
        ]
        self.entries = torch.tensor(entries, device=arena.entries.device)
        shape = (config.block_size, config.num_heads // config.num_kv_heads)
        self.pieces: list[_Piece] = []
        self.kept: list[_Piece] = []
        for job in jobs:
            views = cache(partial(arena.views, job.run))
            self.pieces += _cut(job.wanted, range(len(job.wanted.tokens)), *shape, views)
            self.kept += _cut(job.wanted, job.wanted.reads, *shape, views)

    def join(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write every job's new rows to its pages; attention finds them there."""
        self.layer = layer
        for place, new in enumerate((keys, values)):
            rows = new[0].transpose(0, 1)[: len(self.entries)]
            self.arena.entries[place, layer].index_copy_(0, self.entries, rows)
        return keys, values

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All rows: q [1, h, rows, head_dim]."""
        return self._each(q, self.pieces)

    def attend_kept(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The rows that are read, in the last layer."""
        return self._each(q, self.kept)

    def _each(self, q: Tensor, pieces: list[_Piece]) -> Tensor:
        sizes = [piece.rows for piece in pieces]
        added = q.shape[2] - sum(sizes)
        *parts, rest = q.split([*sizes, added], dim=2)
        done = [self._one(part, piece) for part, piece in zip(parts, pieces, strict=True)]
        if len(done) == 1 and not added:
            return done[0]
        rows = [part.transpose(1, 2) for part in [*done, rest]]  # the added ones as they are
        return torch.cat(rows, dim=1).transpose(1, 2)

    def _one(self, q: Tensor, piece: _Piece) -> Tensor:
        """Queries that share their keys stand in one matrix: fewer and larger products."""
        keys, values = piece.seen[self.layer]
        folded = q.reshape(1, keys.shape[1], -1, q.shape[-1])
        done = F.scaled_dot_product_attention(folded, keys, values, attn_mask=piece.mask)
        return done.view_as(q)


def _cut(
    wanted: Pass, rows: Sequence[int], size: int, sharing: int, views: Callable[[int], Views]
) -> Iterator[_Piece]:
    """Pieces of rows that lie in one block, or (bidirectional) that all see the same; `sharing`
    heads of a row see the same keys."""
    sees_all = len(rows) > size and all(wanted.limits[row] == wanted.visible for row in rows)
    for _, group in itertools.groupby(
        rows, key=lambda row: 0 if sees_all else (wanted.start + row) // size
    ):
        limits = [wanted.limits[row] for row in group]
        seen = views(max(limits))
        yield _Piece(len(limits), seen, _mask(limits * sharing, seen[0][0].device))


def _mask(limits: list[int], device: torch.device) -> Tensor | None:
    if min(limits) == max(limits):
        return None
    return prefix_mask(torch.tensor(limits, device=device), max(limits))
