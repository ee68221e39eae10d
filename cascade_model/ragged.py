"""One forward pass over the rows of many sequences: prompt chunks, commits and denoising together.

Matrix products see all rows at once; attention runs sequence by sequence over its own keys. A
sequence's logits do not depend on what runs beside it, bit for bit in float32: the products' rows
are padded to a multiple of 4 (for fewer the CPU's kernels sum in another order, measured), and a
sequence's attention has the same shapes alone and in company.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade_model.attention import Keep, prefix_mask
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
    ragged = _Ragged(arena, jobs, starts)
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


class _Ragged:
    """The cache and the attention of one ragged pass: both know which rows are whose."""

    def __init__(self, arena: PageArena, jobs: Sequence[Job], starts: list[int]) -> None:
        self.arena, self.jobs, self.starts = arena, jobs, starts
        self.layer = 0
        self.masks = [prefix_mask(job.wanted.limits, job.wanted.visible) for job in jobs]

    def join(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write every job's new rows to its pages; attention finds them there."""
        self.layer = layer
        size = self.arena.page_tokens
        for job, start in zip(self.jobs, self.starts, strict=False):
            rows = len(job.wanted.tokens)
            place = job.run.first * size + job.wanted.start
            self.arena.entries[0, layer, :, place : place + rows] = keys[0, :, start : start + rows]
            self.arena.entries[1, layer, :, place : place + rows] = values[
                0, :, start : start + rows
            ]
        return keys, values

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All rows: q [1, h, rows, head_dim]."""
        return self._each(q, self.starts, self.masks)

    def kept(self, starts: list[int]):
        """The attention of the rows that are read, in the last layer."""
        masks = [
            None if mask is None else mask[:, :, job.wanted.reads]
            for job, mask in zip(self.jobs, self.masks, strict=True)
        ]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self._each(q, starts, masks)

        return attend

    def _each(self, q: Tensor, starts: list[int], masks: list[Tensor | None]) -> Tensor:
        result = torch.zeros_like(q)
        for index, (job, mask) in enumerate(zip(self.jobs, masks, strict=True)):
            start, end = starts[index], starts[index + 1]
            if start == end:
                continue
            keys, values = self.arena.view(job.run, self.layer, job.wanted.visible)
            grouped = keys.shape[1] != q.shape[1]
            result[:, :, start:end] = F.scaled_dot_product_attention(
                q[:, :, start:end], keys, values, attn_mask=mask, enable_gqa=grouped
            )
        return result


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
