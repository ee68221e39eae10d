"""Keys and values of committed tokens, append-only, for one sequence being decoded."""

import torch
from torch import Tensor

from cascade_model.config import ModelConfig
from cascade_model.errors import InputError


class KVCache:
    """Per layer, keys and values [1, kv_heads, capacity, head_dim] of which `length` are committed.

    A forward pass writes its rows behind the committed ones and sees both. They stay provisional,
    and the next pass overwrites them, until `commit` declares them final. Committed entries are
    never written again.
    """

    def __init__(
        self, config: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (2, config.num_layers, 1, config.num_kv_heads, capacity, config.head_dim)
        self._entries = torch.zeros(shape, dtype=dtype, device=device)
        self.capacity = capacity
        self.length = 0

    def join(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Place r new rows [1, kv_heads, r, head_dim] behind the committed ones; return all."""
        end = self.length + keys.shape[2]
        if end > self.capacity:
            raise InputError(
                f"the sequence has {end} tokens and the cache holds {self.capacity}; "
                "lower max_tokens or shorten the prompt"
            )
        self._entries[0, layer, :, :, self.length : end] = keys
        self._entries[1, layer, :, :, self.length : end] = values
        return self._entries[0, layer, :, :, :end], self._entries[1, layer, :, :, :end]

    def commit(self, rows: int) -> None:
        """Keep the last pass's first `rows` rows for good."""
        self.length += rows
