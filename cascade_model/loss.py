"""The loss of masked diffusion: weighted cross entropy of the masked tokens, and terms beside it.

Per block, the sum over masked tokens of (1/t) x cross entropy, t the block's mask rate, has the
negative evidence lower bound as its expectation (MDLM, arXiv 2406.07524; per block BD3-LM,
arXiv 2503.09573); other weights and normalisers stand in `objective`. What the model is fed, and
which row predicts which token, stands in `training_input`. Only rows that are supervised reach the
output head, and that in chunks, so that the logits of all rows never exist at once.

Beside it, both off unless asked for (`AuxiliaryConfig`):

- the autoregressive loss of the clean half, in the same pass: its row i-1 predicts token i
  (NBDiff, arXiv 2512.06776). Only where a clean token sees nothing to its right;
- the entropy of the masked tokens that are predicted correctly: lower, it lets a step write more
  of them (LLaDA2's confidence-aware loss; dParallel, arXiv 2509.26488, at temperature 0.5).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cascade_model.batch import TrainBatch
from cascade_model.config import ModelConfig, Normaliser, Outcomes, Weight
from cascade_model.model import vocabulary_logits
from cascade_model.networks import Network
from cascade_model.objective import (
    LossParts,
    RowLosses,
    Term,
    banned_ids,
    loss_parts,
    weights_of,
)
from cascade_model.settings import check
from cascade_model.training_config import AuxiliaryConfig
from cascade_model.training_input import (
    config_for,
    left_neighbours,
    read_rows,
    source_rows,
    supervised,
)

LOGITS_PER_CHUNK = 2**24
"""Logits that may exist at once, in numbers."""
_PLAIN = AuxiliaryConfig()
OfLogits = Callable[..., Tensor]
"""Logits [r, v] of masked tokens, and whatever was given for each -> one number each, [r]."""


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """What one pass tells of a batch's tokens, before anything is weighed or summed."""

    rows: RowLosses
    """The supervised tokens, r in all, with their cross entropy."""
    extra: Tensor | None
    """float32 [r]: what `of_logits` made of their logits."""
    terms: list[Term]
    """The auxiliary losses that are switched on."""


def diffusion_loss(
    model: Network,
    batch: TrainBatch,
    *,
    weight: Weight = "elbo",
    normaliser: Normaliser = "maskable",
    outcomes: Outcomes = "text",
    auxiliary: AuxiliaryConfig = _PLAIN,
) -> LossParts:
    """The training loss of one batch; the axes are those of `objective`.

    An autoregressive model counts every maskable token that has a left neighbour, with weight 1.
    The block size is the batch's, see `config_for`. Raises `InputError` for an autoregressive term
    without a token-causal clean half.
    """
    config = config_for(model.config, batch)
    found = token_losses(model, batch, config, banned_ids(config, outcomes), auxiliary)
    weights = weights_of(config, batch, found.rows, weight)
    return loss_parts(weights * found.rows.losses, batch, found.rows, normaliser, found.terms)


def row_losses(model: Network, batch: TrainBatch, *, outcomes: Outcomes = "text") -> RowLosses:
    """Cross entropy of every supervised token at the model's own block size; differentiable."""
    config = model.config
    return token_losses(model, batch, config, banned_ids(config, outcomes)).rows


def token_losses(
    model: Network,
    batch: TrainBatch,
    config: ModelConfig,
    banned: list[int],
    auxiliary: AuxiliaryConfig = _PLAIN,
    of_logits: OfLogits | None = None,
    given: tuple[Tensor, ...] = (),
) -> TokenLosses:
    """Everything that the losses of one batch need, from one pass; differentiable.

    `of_logits` adds a number of its own for each supervised token, in the order of
    `supervised(config, batch).nonzero()`, from its logits and its row of each tensor `given`.
    """
    sequences, places = supervised(config, batch).nonzero(as_tuple=True)
    targets = batch.clean_tokens[sequences, places]
    count, length = len(sequences), batch.clean_tokens.shape[1]
    require_next_tokens(model.config, auxiliary)
    next_sequences, next_places = next_tokens(config, batch, auxiliary)
    next_targets = batch.clean_tokens[next_sequences, next_places]
    rows = [source_rows(config, batch)[sequences, places], next_places - 1 + length]

    def of_masked(logits: Tensor, wanted: Tensor, *given: Tensor) -> Tensor:
        columns = [F.cross_entropy(logits, wanted, reduction="none")]
        if auxiliary.entropy_weight:
            columns.append(entropy(logits, auxiliary.entropy_temperature, banned))
            columns.append((logits.argmax(dim=-1) == wanted).to(logits.dtype))
        if of_logits is not None:
            columns.append(of_logits(logits, *given))
        return torch.stack(columns, dim=1)

    def read(hidden: Tensor, head: nn.Module) -> tuple[Tensor, Tensor]:
        def of_rows(rows: Tensor, *others: Tensor) -> Tensor:
            return of_masked(outcome_logits(rows, head, banned), *others)

        columns = in_chunks(of_rows, hidden[:count], targets, *given, vocabulary=_vocabulary(head))
        if not len(next_targets):
            return columns, columns.new_zeros(0)
        return columns, cross_entropy(hidden[count:], head, next_targets, banned)

    columns, next_nats = read_rows(
        model,
        batch,
        config,
        torch.cat([sequences, next_sequences]),
        torch.cat(rows),
        read,
        is_doubled=len(next_targets) > 0,
    )
    terms = []
    if auxiliary.ar_weight:
        terms.append(Term("ar", auxiliary.ar_weight, next_sequences, next_nats))
    if auxiliary.entropy_weight:
        is_right = columns[:, 2] > 0
        weight, values = auxiliary.entropy_weight, columns[is_right, 1]
        terms.append(Term("entropy", weight, sequences[is_right], values))
    extra = None if of_logits is None else columns[:, -1]
    return TokenLosses(rows_of(config, batch, sequences, places, columns[:, 0]), extra, terms)


def next_tokens(
    config: ModelConfig, batch: TrainBatch, auxiliary: AuxiliaryConfig
) -> tuple[Tensor, Tensor]:
    """The tokens of the autoregressive term, sequences and places, int64 [m] each.

    They are the maskable ones with a left neighbour in their document. There are none where it is
    off, nor in a phase of block size 1 that is autoregressive already.
    """
    is_wanted = batch.is_maskable & (left_neighbours(batch) >= 0)
    if not auxiliary.ar_weight or config.is_autoregressive:
        is_wanted = torch.zeros_like(is_wanted)
    sequences, places = is_wanted.nonzero(as_tuple=True)
    return sequences, places


def require_next_tokens(config: ModelConfig, auxiliary: AuxiliaryConfig) -> None:
    """Refuse the autoregressive term where a clean token sees what it would have to predict, and
    where it would be the loss itself. Raises `InputError`."""
    if not auxiliary.ar_weight:
        return
    check(
        config.attention == "block_causal" and config.clean_half == "token_causal",
        f"ar_weight={auxiliary.ar_weight} with model.attention={config.attention} and "
        f"model.clean_half={config.clean_half} would have a clean token predict what it sees; use "
        "ar_weight=0, or a block-causal model with model.clean_half=token_causal",
    )
    check(
        not config.is_autoregressive,
        f"ar_weight={auxiliary.ar_weight} with an autoregressive model (model.block_size=1) would "
        "count its only loss twice; use ar_weight=0",
    )


def entropy(logits: Tensor, temperature: float, banned: list[int]) -> Tensor:
    """Nats [r] of softmax(logits / temperature), logits [r, v] being -inf at the banned ids."""
    log_p = (logits / temperature).log_softmax(dim=-1)
    ids = torch.tensor(banned, device=logits.device, dtype=torch.int64)
    # What has no probability adds nothing, where 0 x -inf would be NaN.
    return -(log_p.exp() * log_p.index_fill(1, ids, 0.0)).sum(dim=-1)


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


def cross_entropy(hidden: Tensor, head: nn.Module, targets: Tensor, banned: list[int]) -> Tensor:
    """Nats of each target, float32 [r], from hidden states [r, d]; banned ids get no probability.

    More rows than one chunk are recomputed chunk by chunk in the backward pass.
    """

    def nats(rows: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(outcome_logits(rows, head, banned), wanted, reduction="none")

    return in_chunks(nats, hidden, targets, vocabulary=_vocabulary(head))


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
    size = rows_per_chunk(vocabulary)
    if len(hidden) <= size:
        return function(hidden, *others)
    chunks = zip(*(rows.split(size) for rows in (hidden, *others)), strict=True)
    return torch.cat([_recomputed(function, chunk) for chunk in chunks])


def rows_per_chunk(vocabulary: int) -> int:
    """Rows whose logits may exist at once."""
    return max(1, LOGITS_PER_CHUNK // vocabulary)


def _recomputed(function: Callable[..., Tensor], chunk: tuple[Tensor, ...]) -> Tensor:
    result = checkpoint(function, *chunk, use_reentrant=False)
    assert isinstance(result, Tensor)
    return result


def _vocabulary(head: nn.Module) -> int:
    """Rows of the head's weight."""
    return cast(Tensor, head.weight).shape[0]
