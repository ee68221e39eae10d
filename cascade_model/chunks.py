"""Cutting a pass in two, so that a long prompt can share its rounds with others.

A pass may only be cut where no row sees behind the cut: there the rows before it give the same keys
and values alone. What a cut leaves of a pass is a pass again.
"""

from dataclasses import replace

import torch
from torch import Tensor

from cascade_model.passes import Pass


def cuts(wanted: Pass, size: int) -> Tensor:
    """Where a pass can be cut in two: int64, rising counts of rows, whole blocks of `size`, that
    see nothing behind themselves and are not read."""
    rows = len(wanted.tokens)
    ends = wanted.start + torch.arange(1, rows + 1, device=wanted.limits.device)
    is_closed = wanted.limits.cummax(dim=0).values <= ends
    found = (is_closed & (ends % size == 0)).nonzero()[:, 0] + 1
    first_read = int(wanted.reads.min()) if len(wanted.reads) else rows
    return found[found <= min(first_read, rows - 1)]


def chunk(wanted: Pass, budget: int, size: int) -> Pass:
    """The first rows of a pass within the budget; at least up to its first cut, all without one."""
    if len(wanted.tokens) <= budget:
        return wanted
    ends = cuts(wanted, size)
    if len(ends) == 0:
        return wanted
    within = ends[ends <= budget]
    count = int(within[-1] if len(within) else ends[0])
    return replace(
        wanted,
        tokens=wanted.tokens[:count],
        limits=wanted.limits[:count],
        visible=wanted.start + count,
        reads=wanted.reads[:0],
    )


def behind(wanted: Pass, start: int) -> Pass:
    """The rows of a pass from a place on."""
    skipped = max(0, start - wanted.start)
    return replace(
        wanted,
        tokens=wanted.tokens[skipped:],
        start=wanted.start + skipped,
        limits=wanted.limits[skipped:],
        reads=wanted.reads - skipped,
    )
