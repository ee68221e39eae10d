"""One forward pass over the rows of many sequences: prompt chunks, commits and denoising together.

Matrix products see all rows at once; attention runs block by block over exactly the keys that the
block sees. So a sequence's logits depend neither on what runs beside it nor on how its prompt was
cut into passes, bit for bit in float32: the products' rows are padded to a multiple of 4 (for fewer
the CPU's kernels sum in another order, measured), and a block's attention always has one shape.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade_model.attention import Attend, Keep, prefix_mask
from cascade_model.networks import Network
from cascade_model.pages import PageArena, Run
from cascade_model.passes import Pass

ROW_MULTIPLE = 4


@dataclass(frozen=True, slots=True)
class Job:
    """A pass and the run of pages that its sequence holds."""

    wanted: Pass
    run: Run


@torch.inference_mode()
def run_together(model: Network, arena: PageArena, jobs: Sequence[Job]) -> list[Tensor]:
    """The logits [m, vocabulary] of each job, in float32 or wider."""
    passes = [job.wanted for job in jobs]
    device = passes[0].tokens.device
    starts = _starts([len(wanted.tokens) for wanted in passes])
    tokens = _padded(torch.cat([wanted.tokens for wanted in passes]))
    positions = _padded(
        torch.cat(
            [
                torch.arange(wanted.start, wanted.start + len(wanted.tokens), device=device)
                for wanted in passes
            ]
        )
    )
    reads = torch.cat([wanted.reads + start for wanted, start in zip(passes, starts, strict=False)])
    config = model.config
    ragged = _Ragged(arena, jobs, starts, config.block_size)
    counts = [len(wanted.reads) for wanted in passes]
    keep = Keep(_padded(reads), ragged.kept(_starts(counts)))
    logits = model(
        tokens[None],
        positions[None],
        ragged.attend,
        lambda hidden, head: head(hidden[0]),
        ragged,
        keep,
    )
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return list(wide[: sum(counts)].split(counts))


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of one block of one job: the unit of attention, the same however a pass was cut."""

    run: Run
    start: int
    end: int
    """Rows of the query."""
    keys: int
    """Entries of the run that the rows see; exactly these are read."""
    mask: Tensor | None


class _Ragged:
    """The cache and the attention of one ragged pass: both know which rows are whose."""

    def __init__(self, arena: PageArena, jobs: Sequence[Job], starts: list[int], size: int) -> None:
        self.arena, self.jobs, self.starts, self.size = arena, jobs, starts, size
        self.layer = 0
        every = [torch.arange(len(job.wanted.tokens)) for job in jobs]
        self.pieces = self._pieces(every, starts)

    def join(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write every job's new rows to its pages; attention finds them there."""
        self.layer = layer
        entries, page = self.arena.entries, self.arena.page_tokens
        for job, start in zip(self.jobs, self.starts, strict=False):
            rows = slice(start, start + len(job.wanted.tokens))
            first = job.run.first * page + job.wanted.start
            place = slice(first, first + len(job.wanted.tokens))
            entries[0, layer, :, place] = keys[0, :, rows]
            entries[1, layer, :, place] = values[0, :, rows]
        return keys, values

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All rows: q [1, h, rows, head_dim]."""
        return self._each(q, self.pieces)

    def kept(self, starts: list[int]) -> Attend:
        """The attention of the rows that are read, in the last layer."""
        pieces = self._pieces([job.wanted.reads for job in self.jobs], starts)
        return lambda q, k, v: self._each(q, pieces)

    def _pieces(self, rows: list[Tensor], starts: list[int]) -> list[_Piece]:
        """Cut each job's rows (int64, rising or not) where their block changes."""
        return [
            piece
            for job, own, start in zip(self.jobs, rows, starts, strict=False)
            for piece in _cut(job, own.cpu(), start, self.size)
        ]

    def _each(self, q: Tensor, pieces: list[_Piece]) -> Tensor:
        result = torch.zeros_like(q)
        for piece in pieces:
            keys, values = self.arena.view(piece.run, self.layer, piece.keys)
            rows = slice(piece.start, piece.end)
            result[:, :, rows] = F.scaled_dot_product_attention(
                q[:, :, rows],
                keys,
                values,
                attn_mask=piece.mask,
                enable_gqa=keys.shape[1] != q.shape[1],
            )
        return result


def _cut(job: Job, rows: Tensor, offset: int, size: int) -> Iterator[_Piece]:
    """Pieces of rows that lie in one block, or (bidirectional) that all see the same."""
    if len(rows) == 0:
        return
    wanted = job.wanted
    limits = wanted.limits.cpu()[rows]
    blocks = (wanted.start + rows) // size
    is_one = bool((limits == wanted.visible).all()) and len(rows) > size
    same = torch.ones(len(rows) - 1, dtype=torch.bool) if is_one else blocks[1:] == blocks[:-1]
    edges = [0, *((~same).nonzero()[:, 0] + 1).tolist(), len(rows)]
    for start, end in itertools.pairwise(edges):
        own = limits[start:end]
        keys = int(own.max())
        mask = prefix_mask(own.to(wanted.limits.device), keys)
        yield _Piece(job.run, offset + start, offset + end, keys, mask)


def _starts(counts: list[int]) -> list[int]:
    """Where each part begins, and the end of the last."""
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return starts


def _padded(index: Tensor) -> Tensor:
    """Repeat the first entry until the length is a multiple of ROW_MULTIPLE, and not 0."""
    missing = -len(index) % ROW_MULTIPLE or (0 if len(index) else ROW_MULTIPLE)
    if not missing:
        return index
    filler = index[:1] if len(index) else index.new_zeros(1)
    return torch.cat([index, filler.expand(missing)])
