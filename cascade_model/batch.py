"""A training batch as tensors on one device."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

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
    """float32 [n, L / block_size]: the mask rate t of each block, threshold / 2^32."""
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
