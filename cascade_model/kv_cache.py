"""Keys and values of the tokens of one sequence, written once a pass where the pass says.

What may be overwritten is not decided here but by who plans the passes (`contexts`): an exact
cache only ever writes behind its committed tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cascade_model.config import ModelConfig
from cascade_model.errors import InputError


class KVCache:
    """Per layer, keys and values [1, kv_heads, capacity, head_dim]."""

    def __init__(
        self, config: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (2, config.num_layers, 1, config.num_kv_heads, capacity, config.head_dim)
        self.entries = torch.zeros(shape, dtype=dtype, device=device)
        self.capacity = capacity

    def slot(self, start: int, rows: int, visible: int) -> "CacheSlot":
        """Room for `rows` rows at `start`, from where entries 0..visible-1 can be seen."""
        if max(start + rows, visible) > self.capacity:
            raise InputError(
                f"the sequence has {max(start + rows, visible)} tokens and the cache holds "
                f"{self.capacity}; lower max_tokens or shorten the prompt"
            )
        return CacheSlot(entries=self.entries, start=start, visible=visible)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSlot:
    """One pass's view of a cache."""

    entries: Tensor
    start: int
    visible: int

    def join(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write r new rows [1, kv_heads, r, head_dim]; return all visible ones."""
        end = self.start + keys.shape[2]
        self.entries[0, layer, :, :, self.start : end] = keys
        self.entries[1, layer, :, :, self.start : end] = values
        seen = self.entries[:, layer, :, :, : self.visible]
        return seen[0], seen[1]
