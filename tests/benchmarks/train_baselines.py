"""What a training step is measured against, written as one would without this project's savings.

So that they are no straw men, each must give the loss and the gradients of `diffusion_loss`
(`test_baselines.py`), on sequences of one document each.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade_model.attention import dense, training_mask
from cascade_model.batch import TrainBatch
from cascade_model.model import Transformer, never_emitted, vocabulary_logits
from cascade_model.objective import NUM_BANDS, LossParts


def causal_loss(model: Transformer, batch: TrainBatch) -> LossParts:
    """An autoregressive step: causal SDPA over the clean tokens, logits of all rows but the last.

    Documents are not kept apart, so sequences must be of one document each.
    """
    tokens, banned = batch.clean_tokens, never_emitted(model.config)
    is_counted = batch.is_maskable[:, 1:]

    def read(hidden: Tensor, head: nn.Module) -> Tensor:
        logits = vocabulary_logits(hidden[:, :-1].flatten(0, 1), head, banned)
        targets = tokens[:, 1:].masked_fill(~is_counted, -100).flatten()
        return F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)

    return _parts(model(tokens, batch.positions, _causal, read), int(is_counted.sum()))


def dense_loss(model: Transformer, batch: TrainBatch) -> LossParts:
    """A block-diffusion step with one mask over [2L, 2L] and logits of all 2L rows."""
    config, clean = model.config, batch.clean_tokens
    length, banned = clean.shape[1], never_emitted(config)
    is_padding = ~batch.is_maskable & (clean == config.pad_id)
    noisy = torch.where(batch.is_masked | is_padding, config.mask_id, clean)
    mask = training_mask(batch.segments, config.block_size, config.clean_half)
    places = torch.arange(length, device=clean.device)
    weights = batch.is_masked / batch.rates_at(
        torch.arange(len(clean), device=clean.device)[:, None], places
    )

    def read(hidden: Tensor, head: nn.Module) -> Tensor:
        logits = vocabulary_logits(hidden.flatten(0, 1), head, banned)
        logits = logits.unflatten(0, hidden.shape[:2])[:, :length]
        # The targets of rows that do not count must not be banned ids, whose loss is infinite.
        targets = torch.where(batch.is_masked, clean, 0)
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        return (losses * weights).sum()

    tokens, positions = torch.cat([noisy, clean], dim=1), torch.cat([batch.positions] * 2, dim=1)
    return _parts(model(tokens, positions, dense(mask), read), int(batch.is_maskable.sum()))


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The fused kernel that knows its mask by itself."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def _parts(total: Tensor, count: int) -> LossParts:
    """A sum without its bands."""
    zeros = total.new_zeros(NUM_BANDS)
    return LossParts(sum=total, count=count, band_sums=zeros, band_counts=zeros)


BASELINES: dict[str, Callable[[Transformer, TrainBatch], LossParts]] = {
    "causal": causal_loss,
    "dense": dense_loss,
}
