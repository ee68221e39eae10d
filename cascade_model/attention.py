"""Who sees whom: the masks of block diffusion, and the ways to attend under them.

A mask is a bool tensor [n, 1, queries, keys], True where the query sees the key. The rule for the
doubled training input (noisy half first, then clean half) is that of BD3-LM (arXiv 2503.09573),
shared by SDAR, LLaDA2 and Fast-dLLM v2, within one document:

- a noisy query sees its own noisy block and the strictly earlier clean blocks;
- a clean query sees the clean blocks up to its own (block_causal) or the clean tokens up to itself
  (token_causal);
- a clean query never sees the noisy half.

An `Attend` takes queries [n, h, q, d] and keys and values [n, h_kv, k, d] and returns [n, h, q, d].
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
DoubledAttention = Callable[[Tensor, int, str], Attend]
"""segments int32 [n, L], block size and clean half -> attention of the doubled input."""


def clean_mask(segments: Tensor, block_size: int, clean_half: str) -> Tensor:
    """What clean tokens see of each other; segments int32 [n, L] -> bool [n, 1, L, L]."""
    place = torch.arange(segments.shape[1], device=segments.device)
    step = place if clean_half == "token_causal" else place // block_size
    earlier = step[None, :] <= step[:, None]
    return (earlier & _same_document(segments, segments))[:, None]


def training_mask(segments: Tensor, block_size: int, clean_half: str) -> Tensor:
    """The mask of noisy || clean; segments int32 [n, L] -> bool [n, 1, 2L, 2L]."""
    n, length = segments.shape
    block = torch.arange(length, device=segments.device) // block_size
    together = _same_document(segments, segments)
    mask = torch.zeros(n, 1, 2 * length, 2 * length, dtype=torch.bool, device=segments.device)
    mask[:, 0, :length, :length] = together & (block[None, :] == block[:, None])
    mask[:, 0, :length, length:] = together & (block[None, :] < block[:, None])
    mask[:, :, length:, length:] = clean_mask(segments, block_size, clean_half)
    return mask


def prefix_mask(limits: Tensor, visible: int) -> Tensor | None:
    """Query i sees keys 0..limits[i]-1 of `visible`: int64 [q] -> bool [1, 1, q, visible].

    None stands for everything. Every mask of decoding has this form.
    """
    if bool((limits == visible).all()):
        return None
    return (torch.arange(visible, device=limits.device) < limits[:, None])[None, None]


@dataclass(frozen=True, slots=True)
class Keep:
    """The rows that the last layer computes beyond keys and values, and what they see."""

    rows: slice | Tensor
    attend: Attend


def dense(mask: Tensor | None) -> Attend:
    """Attention over all pairs under one mask [n, 1, q, k]: the oracle, and that of decoding."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attention(q, k, v, mask)

    return attend


def grouped_training(
    segments: Tensor, block_size: int, clean_half: str, group_tokens: int = 64
) -> Attend:
    """The same result as `dense(training_mask(...))` at about half its cost.

    The sequence is cut into groups of whole blocks. A group's noisy queries meet only the group's
    own noisy keys and the clean keys up to the group's end; its clean queries only the latter. So
    the large empty parts of the [2L, 2L] square are never computed. Where q has no clean rows
    (length L, as with `Keep`), only the noisy half's result is returned.
    """
    length = segments.shape[1]
    groups = _groups(length, block_size, group_tokens)
    masks = [_noisy_group_mask(segments, block_size, start, end) for start, end in groups]
    clean = grouped_clean(segments, block_size, clean_half, group_tokens)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = []
        for (start, end), mask in zip(groups, masks, strict=True):
            keys = torch.cat([k[:, :, start:end], k[:, :, length : length + end]], dim=2)
            values = torch.cat([v[:, :, start:end], v[:, :, length : length + end]], dim=2)
            pieces.append(_attention(q[:, :, start:end], keys, values, mask))
        if q.shape[2] > length:
            pieces.append(clean(q[:, :, length:], k[:, :, length:], v[:, :, length:]))
        return torch.cat(pieces, dim=2)

    return attend


def grouped_clean(
    segments: Tensor, block_size: int, clean_half: str, group_tokens: int = 64
) -> Attend:
    """The same result as `dense(clean_mask(...))` without the pairs that lie in the future."""
    length = segments.shape[1]
    groups = _groups(length, block_size, group_tokens)
    masks = [
        _clean_group_mask(segments, block_size, clean_half, start, end) for start, end in groups
    ]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = [
            _attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], mask)
            for (start, end), mask in zip(groups, masks, strict=True)
        ]
        return torch.cat(pieces, dim=2)

    return attend


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention with grouped key and value heads."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def _groups(length: int, block_size: int, group_tokens: int) -> list[tuple[int, int]]:
    """Cut range(length) into groups of whole blocks, about `group_tokens` each."""
    size = max(1, group_tokens // block_size) * block_size
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _noisy_group_mask(segments: Tensor, block_size: int, start: int, end: int) -> Tensor:
    """Noisy queries start..end against [noisy start..end, clean 0..end]."""
    block = torch.arange(end, device=segments.device) // block_size
    own = block[start:, None]
    rule = torch.cat([block[None, start:] == own, block[None, :] < own], dim=1)
    keys = torch.cat([segments[:, start:end], segments[:, :end]], dim=1)
    return (rule & _same_document(segments[:, start:end], keys))[:, None]


def _clean_group_mask(
    segments: Tensor, block_size: int, clean_half: str, start: int, end: int
) -> Tensor:
    """Clean queries start..end against clean 0..end."""
    place = torch.arange(end, device=segments.device)
    step = place if clean_half == "token_causal" else place // block_size
    rule = step[None, :] <= step[start:, None]
    return (rule & _same_document(segments[:, start:end], segments[:, :end]))[:, None]


def _same_document(queries: Tensor, keys: Tensor) -> Tensor:
    """Segments [n, q] and [n, k] -> bool [n, q, k]."""
    return queries[:, :, None] == keys[:, None, :]
