"""What a training pass is fed, and which of its rows predicts which token.

A block-causal model is fed the doubled sequence (noisy || clean), a bidirectional one the noisy
sequence alone, an autoregressive one the clean sequence alone. A block as long as the sequence sees
nothing but itself, so that its clean half is left out too: half the cost (LLaDA2's stable phase).
The block size may differ from the model's own from batch to batch (`config_for`): while it grows,
the same weights are trained at one size after the other.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from cascade_model.attention import (
    Attend,
    DoubledAttention,
    Keep,
    dense,
    grouped_clean,
)
from cascade_model.batch import TrainBatch
from cascade_model.config import ModelConfig
from cascade_model.errors import InputError
from cascade_model.networks import Network

T = TypeVar("T")
Read = Callable[[Tensor, nn.Module], T]


def config_for(config: ModelConfig, batch: TrainBatch) -> ModelConfig:
    """The model's choices at the block size that the batch's noise was made for.

    A bidirectional model has no blocks of its own. At block size 1, shifted logits read from the
    clean half are those of an autoregressive model, and the batch is learnt as it would learn it.
    """
    size = batch.noise_block_size
    if config.attention == "bidirectional" or size == config.block_size:
        return config
    return dataclasses.replace(config, block_size=size)


def source_rows(config: ModelConfig, batch: TrainBatch) -> Tensor:
    """Which input row predicts each token, int64 [n, L]; -1 where none can.

    Rows are counted in the input that `read_places` runs: noisy 0..L-1 then clean L..2L-1, or
    0..L-1 alone where there is one half. With shifted logits the row on the left predicts; a
    block's first token takes the row that `first_place` names, and a document's first token has no
    left neighbour, so only `own` predicts it. A bidirectional model has no blocks here: `own` is
    for a document's first token (Dream), without it that token is not predicted (DiffuLLaMA).
    """
    n, length = batch.clean_tokens.shape
    place = torch.arange(length, device=batch.clean_tokens.device)
    if config.logits == "aligned":
        return place.expand(n, -1)
    left = left_neighbours(batch)
    if config.is_autoregressive:
        return left
    if config.attention == "bidirectional":
        return torch.where(left >= 0, left, place) if config.first_place == "own" else left
    # The grid of blocks restarts with a document, also where a block is longer than one.
    is_first = (place % config.block_size == 0) | (left < 0)
    if config.first_place == "own":
        return torch.where(is_first, place, left)
    if config.first_place == "clean":
        return torch.where(is_first & (left >= 0), left + length, left)
    return left


def left_neighbours(batch: TrainBatch) -> Tensor:
    """The place before each token, int64 [n, L]; -1 for a document's first token."""
    n, length = batch.clean_tokens.shape
    has_left = torch.zeros_like(batch.is_maskable)
    has_left[:, 1:] = batch.segments[:, 1:] == batch.segments[:, :-1]
    place = torch.arange(length, device=batch.clean_tokens.device)
    return (place - 1).expand(n, -1).masked_fill(~has_left, -1)


def supervised(config: ModelConfig, batch: TrainBatch) -> Tensor:
    """The tokens that carry a loss, bool [n, L]: masked ones, or all of an autoregressive model."""
    chosen = batch.is_maskable if config.is_autoregressive else batch.is_masked & batch.is_maskable
    return chosen & (source_rows(config, batch) >= 0)


def read_places(
    model: Network,
    batch: TrainBatch,
    sequences: Tensor,
    places: Tensor,
    read: Read[T],
    config: ModelConfig | None = None,
) -> T:
    """Run the training input once and `read` the rows that predict the given tokens.

    sequences and places int64 [r] name tokens whose `source_rows` is not -1; `read` gets their
    hidden states [r, hidden_size] and the head, and returns a tensor or a tuple of tensors. A
    `config` replaces the model's own choices, such as its block size.
    """
    config = config or model.config
    return read_rows(
        model, batch, config, sequences, source_rows(config, batch)[sequences, places], read
    )


def read_rows(
    model: Network,
    batch: TrainBatch,
    config: ModelConfig,
    sequences: Tensor,
    rows: Tensor,
    read: Read[T],
    *,
    is_doubled: bool = False,
) -> T:
    """Run the training input once and `read` the given rows of it, int64 [r] each.

    `is_doubled` says that rows of the clean half are among them though no masked token needs it.
    """
    tokens, positions, attend, keep = _training_input(
        config, batch, model.training_attention, is_doubled=is_doubled
    )
    return model(
        tokens,
        positions,
        attend,
        lambda hidden, head: read(hidden[sequences, rows], head),
        keep=keep,
    )


def _training_input(
    config: ModelConfig, batch: TrainBatch, doubled: DoubledAttention, *, is_doubled: bool
) -> tuple[Tensor, Tensor, Attend, Keep | None]:
    """Tokens, positions, who sees whom, and the only rows that can be read if not all."""
    clean, positions, segments = batch.clean_tokens, batch.positions, batch.segments
    if config.is_autoregressive:
        return clean, positions, grouped_clean(segments, 1, config.clean_half), None
    # Padding is shown as masks, as in decoding, so that nothing tells where the text ends.
    noisy = torch.where(batch.is_masked | batch.is_padding(config), config.mask_id, clean)
    if config.attention == "bidirectional":
        return noisy, positions, whole_documents(segments), None
    _require_block_size(config, batch)
    if config.block_size == clean.shape[1] and not is_doubled:
        return noisy, positions, whole_documents(segments), None
    attend = doubled(segments, config.block_size, config.clean_half)
    # With aligned logits, or first places from the noisy half, no clean row is read.
    is_clean_read = is_doubled or (config.logits == "shifted" and config.first_place == "clean")
    keep = None if is_clean_read else Keep(slice(clean.shape[1]), attend)
    return torch.cat([noisy, clean], dim=1), torch.cat([positions] * 2, dim=1), attend, keep


def whole_documents(segments: Tensor) -> Attend:
    """Every token sees its whole document; segments int32 [n, L]."""
    if not bool((segments != segments[:, :1]).any()):
        return dense(None)
    return dense((segments[:, :, None] == segments[:, None, :])[:, None])


def _require_block_size(config: ModelConfig, batch: TrainBatch) -> None:
    found, wanted = batch.noise_block_size, config.block_size
    if found != wanted:
        raise InputError(
            f"noise.block_size={found} differs from model.block_size={wanted}; "
            f"set noise.block_size={wanted}"
        )
