"""One forward pass over the rows of many sequences: prompt chunks, commits and denoising together.

Matrix products see all rows at once (`rows` says why some are added); attention runs block by block
over exactly the keys that the block sees. So a sequence's logits depend neither on what runs beside
it nor on how its prompt was cut into passes, bit for bit: a block's attention always has one shape.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade_model.attention import Keep
from cascade_model.networks import Network
from cascade_model.pages import PageArena, Run
from cascade_model.passes import Pass
from cascade_model.ragged_attention import Piece, attention_of
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
    ragged = _Ragged(arena, jobs, model.config.block_size)
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


class _Ragged:
    """The cache and the attention of one ragged pass: both know which rows are whose."""

    def __init__(self, arena: PageArena, jobs: Sequence[Job], size: int) -> None:
        self.arena, self.layer = arena, 0
        page = arena.page_tokens
        entries = [
            job.run.first * page + place
            for job in jobs
            for place in range(job.wanted.start, job.wanted.end)
        ]
        self.entries = torch.tensor(entries, device=arena.entries.device)
        self.count, self.has_filler = len(entries), filler(len(entries)) > 0
        every = [piece for job in jobs for piece in _cut(job, range(len(job.wanted.tokens)), size)]
        kept = [piece for job in jobs for piece in _cut(job, job.wanted.reads, size)]
        self.every, self.kept = attention_of(arena, every), attention_of(arena, kept)

    def join(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write every job's new rows to its pages; attention finds them there."""
        self.layer = layer
        for held, new in zip(self.arena.layers[layer], (keys, values), strict=True):
            rows = new.squeeze(0).transpose(0, 1)
            held.index_copy_(0, self.entries, rows[: self.count] if self.has_filler else rows)
        return keys, values

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All rows: q [1, h, rows, head_dim]."""
        return self.every(q, self.layer)

    def attend_kept(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The rows that are read, in the last layer."""
        return self.kept(q, self.layer)


def _cut(job: Job, rows: Sequence[int], size: int) -> Iterator[Piece]:
    """Pieces of rows that lie in one block, or (bidirectional) that all see the same."""
    wanted = job.wanted
    sees_all = len(rows) > size and all(wanted.limits[row] == wanted.visible for row in rows)
    for _, group in itertools.groupby(
        rows, key=lambda row: 0 if sees_all else (wanted.start + row) // size
    ):
        yield Piece(job.run, [wanted.limits[row] for row in group])
