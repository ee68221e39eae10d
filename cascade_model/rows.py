"""What gives a row's result the same bits in any company, on a CPU.

Its kernels sum in another order where rows are few: in float32 for 1 to 3 rows with MKL, for one
with oneDNN (both measured). So rows are repeated up to a multiple of 4. SiLU and the like round the
last few of a tensor's numbers differently, those that do not fill a pair of the CPU's registers:
with 4 rows none is left over where a row has a multiple of 8 numbers, and others are filled up to
that. And a large tensor is cut among the threads wherever that may be, where again some are the
last.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ROW_MULTIPLE = 4
SIZE_MULTIPLE = 8
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
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return function(x)
    missing = -x.shape[-1] % SIZE_MULTIPLE
    if missing:
        return in_whole_rows(function, F.pad(x, (0, missing)))[..., :-missing]
    if x.numel() < WHOLE_BELOW:
        return function(x)
    rows = max(1, (WHOLE_BELOW - 1) // x.shape[-1])
    return torch.cat([function(part) for part in x.split(rows, dim=-2)], dim=-2)
