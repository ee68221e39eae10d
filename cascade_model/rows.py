"""What gives a row's result the same bits in any company, on a CPU.

Its kernels sum in another order where rows are few: in float32 for 1 to 3 rows with MKL, for one
with oneDNN (both measured). So rows are repeated up to a multiple of 4. SiLU and the like round the
last few of a tensor's numbers differently: with 4 rows none is left over where sizes are multiples
of 8 (inner sizes, experts), as in all published models. And a large tensor is cut among the threads
wherever that may be, where again some are the last.
"""

from collections.abc import Callable

import torch
from torch import Tensor

ROW_MULTIPLE = 4
WHOLE_BELOW = 32_768
"""Numbers of an elementwise operation that torch does not cut among threads (its grain size)."""


def filler(count: int) -> int:
    """Rows to add to `count` rows: up to a multiple of 4, and not 0."""
    return -count % ROW_MULTIPLE if count else ROW_MULTIPLE


def filled(rows: Tensor) -> Tensor:
    """Rows [r, ...], r > 0, with the first repeated until they are enough."""
    missing = filler(len(rows))
    return torch.cat([rows, rows[:1].expand(missing, *rows.shape[1:])]) if missing else rows


def in_whole_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """An elementwise function of rows [..., r, size], cut nowhere within a row while decoding."""
    if x.numel() < WHOLE_BELOW or x.device.type != "cpu" or torch.is_grad_enabled():
        return function(x)
    rows = max(1, (WHOLE_BELOW - 1) // x.shape[-1])
    return torch.cat([function(part) for part in x.split(rows, dim=-2)], dim=-2)
