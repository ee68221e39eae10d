"""How many rows a matrix product gets in decoding, so that a row's result has the same bits in any
company.

The CPU's kernels sum in another order where rows are few: in float32 for 1 to 3 rows with MKL, for
one row with oneDNN (both measured). So rows are repeated up to a multiple of 4. SiLU and the like
round the last few of a tensor's numbers differently: with 4 rows none is left over where sizes are
multiples of 8 (inner sizes, experts), as in all published models.
"""

import torch
from torch import Tensor

ROW_MULTIPLE = 4


def filler(count: int) -> int:
    """Rows to add to `count` rows: up to a multiple of 4, and not 0."""
    return -count % ROW_MULTIPLE if count else ROW_MULTIPLE


def filled(rows: Tensor) -> Tensor:
    """Rows [r, ...], r > 0, with the first repeated until they are enough."""
    missing = filler(len(rows))
    return torch.cat([rows, rows[:1].expand(missing, *rows.shape[1:])]) if missing else rows
