"""The training masks as flex attention: one compiled kernel that skips the empty blocks (GPU).

The block mask depends on the documents of a batch and is built once per batch; the kernel is
compiled once. On a CPU the same predicate runs uncompiled, slow but equal, so that it can be tested
against the dense oracle anywhere.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from cascade_model.attention import Attend


def flex_training(segments: Tensor, block_size: int, clean_half: str) -> Attend:
    """The same result as `dense(training_mask(...))`: segments int32 [n, L], input of 2L rows.

    Where q has no clean rows (length L), only the noisy half's result is returned.
    """
    n, length = segments.shape

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q_place, k_place = q % length, k % length
        q_block, k_block = q_place // block_size, k_place // block_size
        q_clean, k_clean = q >= length, k >= length
        if clean_half == "token_causal":
            clean = q_clean & k_clean & (k_place <= q_place)
        else:
            clean = q_clean & k_clean & (k_block <= q_block)
        own = ~q_clean & ~k_clean & (q_block == k_block)
        earlier = ~q_clean & k_clean & (k_block < q_block)
        same = segments[batch, q_place] == segments[batch, k_place]
        return same & (clean | own | earlier)

    masks: dict[int, BlockMask] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = q.shape[2]
        if rows not in masks:
            masks[rows] = create_block_mask(sees, n, None, rows, 2 * length, q.device)
        is_grouped = q.shape[1] != k.shape[1]
        return _kernel(q.device.type)(q, k, v, block_mask=masks[rows], enable_gqa=is_grouped)

    return attend


@lru_cache(maxsize=2)
def _kernel(device: str):
    """Compiled once on a GPU; elsewhere as it is."""
    return torch.compile(flex_attention) if device == "cuda" else flex_attention
