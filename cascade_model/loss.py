"""The block-diffusion loss: cross entropy of the masked tokens, weighted by 1/t.

Per block, the sum over masked tokens of (1/t) x cross entropy, t the block's mask rate, has the
negative evidence lower bound as its expectation (MDLM, arXiv 2406.07524; per block BD3-LM,
arXiv 2503.09573). Which row of the input predicts a token is told by `source_rows`; only rows that
are supervised reach the output head, and that in chunks, so that the logits of all rows never
exist at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cascade_model.attention import Attend, grouped_clean, grouped_training
from cascade_model.batch import TrainBatch
from cascade_model.config import ModelConfig
from cascade_model.errors import InputError
from cascade_model.model import Transformer, never_emitted, vocabulary_logits

T = TypeVar("T")
Weight = Literal["elbo", "unit"]
Read = Callable[[Tensor, nn.Module], T]
NUM_BANDS = 8
_LOGITS_PER_CHUNK = 2**24


@dataclass(frozen=True, kw_only=True, slots=True)
class LossParts:
    """Sums of one forward pass; the trainer divides by the global number of maskable tokens."""

    sum: Tensor
    """float32 scalar, differentiable: weight x cross entropy, summed over supervised tokens."""
    num_maskable: int
    """Tokens that could have been masked and predicted: the normaliser."""
    band_sums: Tensor
    """float32 [8]: unweighted cross entropy by mask rate, band j being [j/8, (j+1)/8)."""
    band_counts: Tensor
    """float32 [8]: supervised tokens of each band."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLosses:
    """The supervised tokens of a batch, r in all."""

    sequences: Tensor
    """int64 [r]: row of the batch."""
    places: Tensor
    """int64 [r]: place in the sequence."""
    losses: Tensor
    """float32 [r]: cross entropy in nats."""
    rates: Tensor
    """float32 [r]: mask rate of the token's block; 1 for an autoregressive model."""
    num_maskable: Tensor
    """int64 [n]: maskable and predictable tokens of each sequence."""

    @property
    def weights(self) -> Tensor:
        """float32 [r]: 1/t, under which the sum is the bound's estimate."""
        return self.rates.reciprocal()


def source_rows(config: ModelConfig, batch: TrainBatch) -> Tensor:
    """Which input row predicts each token, int64 [n, L]; -1 where none can.

    Rows are counted in the input that `read_places` runs: noisy 0..L-1 then clean L..2L-1, or for
    an autoregressive model clean 0..L-1 alone. With shifted logits the row on the left predicts;
    a block's first token takes the row that `first_place` names, and a document's first token has
    no left neighbour, so only `own` predicts it.
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
    model: Transformer, batch: TrainBatch, sequences: Tensor, places: Tensor, read: Read[T]
) -> T:
    """Run the training input once and `read` the rows that predict the given tokens.

    sequences and places int64 [r] name tokens whose `source_rows` is not -1; `read` gets their
    hidden states [r, hidden_size] and the head, and returns a tensor or a tuple of tensors.
    """
    config = model.config
    rows = source_rows(config, batch)[sequences, places]
    keep = None
    if config.is_autoregressive:
        tokens, positions = batch.clean_tokens, batch.positions
    else:
        _require_block_size(config, batch)
        noisy = torch.where(batch.is_masked, config.mask_id, batch.clean_tokens)
        tokens = torch.cat([noisy, batch.clean_tokens], dim=1)
        positions = torch.cat([batch.positions, batch.positions], dim=1)
        if config.logits == "aligned" or config.first_place != "clean":
            keep = batch.clean_tokens.shape[1]  # no clean row is read
    return model(
        tokens,
        positions,
        _attend(config, batch.segments),
        lambda hidden, head: read(hidden[sequences, rows], head),
        keep=keep,
    )


def row_losses(model: Transformer, batch: TrainBatch) -> RowLosses:
    """Cross entropy of every supervised token; differentiable."""
    config = model.config
    sequences, places = supervised(config, batch).nonzero(as_tuple=True)
    targets = batch.clean_tokens[sequences, places]
    banned = never_emitted(config)

    def read(hidden: Tensor, head: nn.Module) -> Tensor:
        return cross_entropy(hidden, head, targets, banned)

    losses = read_places(model, batch, sequences, places, read)
    if config.is_autoregressive:
        rates = torch.ones_like(losses)
    else:
        rates = batch.mask_rates[sequences, places // config.block_size].to(losses.dtype)
    counts = (batch.is_maskable & (source_rows(config, batch) >= 0)).sum(dim=1)
    return RowLosses(
        sequences=sequences,
        places=places,
        losses=losses,
        rates=rates,
        num_maskable=counts,
    )


def diffusion_loss(model: Transformer, batch: TrainBatch, *, weight: Weight = "elbo") -> LossParts:
    """The training loss of one batch: weight 1/t ("elbo") or 1 ("unit").

    An autoregressive model counts every maskable token that has a left neighbour, with weight 1.
    """
    rows = row_losses(model, batch)
    weights = rows.weights if weight == "elbo" else torch.ones_like(rows.losses)
    return loss_parts((weights * rows.losses).sum(), rows)


def loss_parts(total: Tensor, rows: RowLosses) -> LossParts:
    """A differentiable total beside the sums that are logged by mask rate."""
    losses = rows.losses.detach().float()
    band = (rows.rates * NUM_BANDS).long().clamp(max=NUM_BANDS - 1)
    zeros = losses.new_zeros(NUM_BANDS)
    return LossParts(
        sum=total,
        num_maskable=int(rows.num_maskable.sum()),
        band_sums=zeros.index_add(0, band, losses),
        band_counts=zeros.index_add(0, band, torch.ones_like(losses)),
    )


def cross_entropy(hidden: Tensor, head: nn.Module, targets: Tensor, banned: list[int]) -> Tensor:
    """Nats of each target, float32 [r], from hidden states [r, d]; banned ids get no probability.

    More rows than one chunk are recomputed chunk by chunk in the backward pass.
    """

    def nats(rows: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(vocabulary_logits(rows, head, banned), wanted, reduction="none")

    return in_chunks(nats, hidden, targets, vocabulary=head.weight.shape[0])  # type: ignore[union-attr]


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


def _attend(config: ModelConfig, segments: Tensor) -> Attend:
    grouped = grouped_clean if config.is_autoregressive else grouped_training
    return grouped(segments, config.block_size, config.clean_half)


def _require_block_size(config: ModelConfig, batch: TrainBatch) -> None:
    length = batch.clean_tokens.shape[1]
    noise_block = length // batch.mask_rates.shape[1]
    if noise_block != config.block_size:
        raise InputError(
            f"noise.block_size={noise_block} differs from model.block_size={config.block_size}; "
            f"set noise.block_size={config.block_size}"
        )
