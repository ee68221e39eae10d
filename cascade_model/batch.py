"""A training batch as tensors on one device."""

import dataclasses
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from cascade_model.config import ModelConfig
from cascade_model.corpus import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainBatch:
    """n packed sequences of L tokens with the noise of their samples."""

    sequence_ids: Tensor
    """int64 [n]: which sequences of the corpus these are."""
    clean_tokens: Tensor
    """int64 [n, L]; padding keeps the padding id."""
    is_masked: Tensor
    """bool [n, L]: replaced by the mask token in the noisy half; only where maskable."""
    is_maskable: Tensor
    """bool [n, L]: False for padding and prompts."""
    mask_rates: Tensor
    """float32 [n, blocks]: the mask rate t of each block of L / blocks tokens, threshold / 2^32."""
    positions: Tensor
    """int64 [n, L]: place within the document, counted from 0."""
    segments: Tensor
    """int32 [n, L]: which document of the sequence, counted from 0."""

    @classmethod
    def from_numpy(cls, batch: Batch, device: torch.device | str = "cpu") -> Self:
        """Copy a corpus batch to a device."""

        def move(values: np.ndarray, dtype: np.dtype | type) -> Tensor:
            return torch.from_numpy(np.array(values, dtype=dtype)).to(device)

        return cls(
            sequence_ids=move(batch.sequence_ids, np.int64),
            clean_tokens=move(batch.clean_tokens, np.int64),
            is_masked=move(batch.is_masked, np.bool_),
            is_maskable=move(batch.is_maskable, np.bool_),
            mask_rates=move(np.asarray(batch.thresholds, np.float64) / 2**32, np.float32),
            positions=move(batch.positions, np.int64),
            segments=move(batch.segments, np.int32),
        )

    @classmethod
    def of(
        cls,
        clean_tokens: Tensor,
        is_masked: Tensor,
        *,
        block_size: int | None = None,
        is_maskable: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Self:
        """Sequences with given masks, each one document unless `segments` says otherwise.

        The mask rates are 1, one for each block, or without `block_size` one for each sequence.
        """
        n, length = clean_tokens.shape
        device = clean_tokens.device
        if segments is None:
            segments = torch.zeros(n, length, dtype=torch.int32, device=device)
        place = torch.arange(length, device=device).expand(n, -1)
        is_start = torch.ones_like(segments, dtype=torch.bool)
        is_start[:, 1:] = segments[:, 1:] != segments[:, :-1]
        return cls(
            sequence_ids=torch.arange(n, device=device),
            clean_tokens=clean_tokens,
            is_masked=is_masked,
            is_maskable=torch.ones_like(is_masked) if is_maskable is None else is_maskable,
            mask_rates=torch.ones(n, length // (block_size or length), device=device),
            positions=place - torch.where(is_start, place, 0).cummax(dim=1).values,
            segments=segments,
        )

    @property
    def noise_block_size(self) -> int:
        """Tokens that share a mask rate."""
        return self.clean_tokens.shape[1] // self.mask_rates.shape[1]

    def is_padding(self, config: ModelConfig) -> Tensor:
        """The places behind a text that are no part of it, bool [n, L].

        Padding that ends texts too cannot be told from a prompt's end, so it counts as text.
        """
        if config.pad_id in config.end_ids:
            return torch.zeros_like(self.is_maskable)
        return ~self.is_maskable & (self.clean_tokens == config.pad_id)

    def rates_at(self, sequences: Tensor, places: Tensor) -> Tensor:
        """Mask rates of the given tokens, float32 [r]."""
        return self.mask_rates[sequences, places // self.noise_block_size]

    def select(self, sequences: Tensor) -> Self:
        """These sequences, int64 [m]; one may come several times."""
        names = (f.name for f in dataclasses.fields(self))
        return type(self)(**{name: getattr(self, name)[sequences] for name in names})
