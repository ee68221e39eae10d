"""The loss of masked diffusion: weighted cross entropy of the masked tokens.

Per block, the sum over masked tokens of (1/t) x cross entropy, t the block's mask rate, has the
negative evidence lower bound as its expectation (MDLM, arXiv 2406.07524; per block BD3-LM,
arXiv 2503.09573); other weights and normalisers stand in `objective`. A block-causal model is fed
the doubled sequence (noisy || clean), a bidirectional one the noisy sequence alone, an
autoregressive one the clean sequence alone. Which row of the input predicts a token is told by
`source_rows`; only rows that are supervised reach the output head, and that in chunks, so that the
logits of all rows never exist at once.
"""

from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cascade_model.attention import (
    Attend,
    DoubledAttention,
    Keep,
    dense,
    grouped_clean,
)
from cascade_model.batch import TrainBatch
from cascade_model.config import ModelConfig, Normaliser, Outcomes, Weight
from cascade_model.errors import InputError
from cascade_model.model import vocabulary_logits
from cascade_model.networks import Network
from cascade_model.objective import LossParts, RowLosses, banned_ids, loss_parts, weights_of

T = TypeVar("T")
Read = Callable[[Tensor, nn.Module], T]
_LOGITS_PER_CHUNK = 2**24


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
    has_left = torch.zeros_like(batch.is_maskable)
    has_left[:, 1:] = batch.segments[:, 1:] == batch.segments[:, :-1]
    left = (place - 1).expand(n, -1).masked_fill(~has_left, -1)
    if config.is_autoregressive:
        return left
    if config.attention == "bidirectional":
        return torch.where(has_left, left, place) if config.first_place == "own" else left
    is_first = place % config.block_size == 0
    if config.first_place == "own":
        return torch.where(is_first, place, left)
    if config.first_place == "clean":
        return torch.where(is_first & (left >= 0), left + length, left)
    return left


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
    rows = source_rows(config, batch)[sequences, places]
    doubled = model.training_attention
    tokens, positions, attend, keep = _training_input(config, batch, doubled)
    return model(
        tokens,
        positions,
        attend,
        lambda hidden, head: read(hidden[sequences, rows], head),
        keep=keep,
    )


def _training_input(
    config: ModelConfig, batch: TrainBatch, doubled: DoubledAttention
) -> tuple[Tensor, Tensor, Attend, Keep | None]:
    """Tokens, positions, who sees whom, and the only rows that can be read if not all."""
    clean, positions, segments = batch.clean_tokens, batch.positions, batch.segments
    if config.is_autoregressive:
        return clean, positions, grouped_clean(segments, 1, config.clean_half), None
    noisy = torch.where(batch.is_masked | _padding(config, batch), config.mask_id, clean)
    if config.attention == "bidirectional":
        return noisy, positions, whole_documents(segments), None
    _require_block_size(config, batch)
    attend = doubled(segments, config.block_size, config.clean_half)
    # With aligned logits, or first places from the noisy half, no clean row is read.
    is_clean_read = config.logits == "shifted" and config.first_place == "clean"
    keep = None if is_clean_read else Keep(slice(clean.shape[1]), attend)
    return torch.cat([noisy, clean], dim=1), torch.cat([positions] * 2, dim=1), attend, keep


def _padding(config: ModelConfig, batch: TrainBatch) -> Tensor:
    """Padding behind a text, bool [n, L]: shown as masks, as it is in decoding, so that nothing
    tells a model where the text ends. Padding that is end-of-text too cannot be told from text."""
    if config.pad_id in config.end_ids:
        return torch.zeros_like(batch.is_maskable)
    return ~batch.is_maskable & (batch.clean_tokens == config.pad_id)


def whole_documents(segments: Tensor) -> Attend:
    """Every token sees its whole document; segments int32 [n, L]."""
    if not bool((segments != segments[:, :1]).any()):
        return dense(None)
    return dense((segments[:, :, None] == segments[:, None, :])[:, None])


def row_losses(model: Network, batch: TrainBatch, *, outcomes: Outcomes = "text") -> RowLosses:
    """Cross entropy of every supervised token; differentiable."""
    config = model.config
    sequences, places = supervised(config, batch).nonzero(as_tuple=True)
    targets = batch.clean_tokens[sequences, places]
    banned = banned_ids(config, outcomes)

    def read(hidden: Tensor, head: nn.Module) -> Tensor:
        return cross_entropy(hidden, head, targets, banned)

    losses = read_places(model, batch, sequences, places, read)
    return rows_of(config, batch, sequences, places, losses)


def rows_of(
    config: ModelConfig, batch: TrainBatch, sequences: Tensor, places: Tensor, losses: Tensor
) -> RowLosses:
    """Losses [r] of the given tokens, with their mask rates and the tokens that count."""
    if config.is_autoregressive:
        rates = torch.ones_like(losses)
    else:
        rates = batch.rates_at(sequences, places).to(losses.dtype)
    return RowLosses(
        sequences=sequences,
        places=places,
        losses=losses,
        rates=rates,
        is_counted=batch.is_maskable & (source_rows(config, batch) >= 0),
    )


def diffusion_loss(
    model: Network,
    batch: TrainBatch,
    *,
    weight: Weight = "elbo",
    normaliser: Normaliser = "maskable",
    outcomes: Outcomes = "text",
) -> LossParts:
    """The training loss of one batch; the axes are those of `objective`.

    An autoregressive model counts every maskable token that has a left neighbour, with weight 1.
    """
    rows = row_losses(model, batch, outcomes=outcomes)
    weights = weights_of(model.config, batch, rows, weight)
    return loss_parts(weights * rows.losses, batch, rows, normaliser)


def cross_entropy(hidden: Tensor, head: nn.Module, targets: Tensor, banned: list[int]) -> Tensor:
    """Nats of each target, float32 [r], from hidden states [r, d]; banned ids get no probability.

    More rows than one chunk are recomputed chunk by chunk in the backward pass.
    """

    def nats(rows: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(outcome_logits(rows, head, banned), wanted, reduction="none")

    return in_chunks(nats, hidden, targets, vocabulary=head.weight.shape[0])  # type: ignore[union-attr]


def outcome_logits(hidden: Tensor, head: nn.Module, banned: list[int]) -> Tensor:
    """Rows [r, d] -> logits [r, vocabulary] in float32 or wider; of no banned id, all of them."""
    if banned:
        return vocabulary_logits(hidden, head, banned)
    logits = cast(Tensor, head(hidden))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def in_chunks(
    function: Callable[..., Tensor], hidden: Tensor, *others: Tensor, vocabulary: int
) -> Tensor:
    """`function` over chunks of the rows [r, ...] of its arguments, its results joined."""
    size = max(1, _LOGITS_PER_CHUNK // vocabulary)
    if len(hidden) <= size:
        return function(hidden, *others)
    chunks = zip(*(rows.split(size) for rows in (hidden, *others)), strict=True)
    return torch.cat([_recomputed(function, chunk) for chunk in chunks])


def _recomputed(function: Callable[..., Tensor], chunk: tuple[Tensor, ...]) -> Tensor:
    result = checkpoint(function, *chunk, use_reentrant=False)
    assert isinstance(result, Tensor)
    return result


def _require_block_size(config: ModelConfig, batch: TrainBatch) -> None:
    found, wanted = batch.noise_block_size, config.block_size
    if found != wanted:
        raise InputError(
            f"noise.block_size={found} differs from model.block_size={wanted}; "
            f"set noise.block_size={wanted}"
        )
