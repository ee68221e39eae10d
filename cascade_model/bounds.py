"""The published losses as functions of given noise: clean tokens, noisy tokens, mask rates.

Training draws its noise from the recipe and evaluation from a fixed one; here the caller gives it,
so that values can be compared with the published code's. Each bound returns its value and the
weighted cross entropy of every token [n, L], which is 0 where the noisy token is not the mask.

| system | rate p of time t | weight | mask token | value |
|---|---|---|---|---|
| LLaDA | (1 - eps) t + eps | 1/p | may be predicted | sum / all tokens; answers: see there |
| MDLM | (1 - eps) t | dsigma / (exp(sigma) - 1) = 1/t | never | mean over all tokens |
| MD4 | 1 - alpha(t) | -alpha' / (1 - alpha) | never | sum + constant, mean over sequences |
| BD3-LM | given per block | 1/p | never | sum / tokens after the first |

Sources, all on arXiv: LLaDA 2502.09992, MDLM 2406.07524, MD4 2406.04329, BD3-LM 2503.09573.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade_model.batch import TrainBatch
from cascade_model.config import ModelConfig, Outcomes
from cascade_model.errors import InputError
from cascade_model.loss import (
    cross_entropy,
    in_chunks,
    outcome_logits,
)
from cascade_model.networks import Network
from cascade_model.objective import banned_ids
from cascade_model.training_input import Read, read_places, supervised


def llada_rate(t: Tensor, eps: float = 1e-3) -> Tensor:
    """LLaDA's mask rate: an affine map of t in [0, 1] to [eps, 1], not a clamp."""
    return (1 - eps) * t + eps


def loglinear_noise(t: Tensor, eps: float = 1e-3) -> tuple[Tensor, Tensor]:
    """MDLM's total noise sigma and its slope; a token is masked with rate 1 - exp(-sigma)."""
    return -torch.log1p(-(1 - eps) * t), (1 - eps) / (1 - (1 - eps) * t)


def loglinear_weight(t: Tensor, eps: float = 1e-3) -> Tensor:
    """MDLM's weight dsigma / (exp(sigma) - 1), which is 1/t whatever eps is."""
    sigma, slope = loglinear_noise(t, eps)
    return slope / torch.expm1(sigma)


def md4_rate(t: Tensor, eps: float = 1e-4) -> Tensor:
    """MD4's mask rate under its linear schedule: from eps to 1 - eps."""
    return 1 - ((1 - 2 * eps) * (1 - t) + eps)


def md4_weight(t: Tensor, eps: float = 1e-4) -> Tensor:
    """MD4's weight -alpha' / (1 - alpha) under its linear schedule."""
    return (1 - 2 * eps) / md4_rate(t, eps)


def llada_loss(
    model: Network,
    clean: Tensor,
    noisy: Tensor,
    rates: Tensor,
    prompt_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """LLaDA's loss; rates float [n] are the nominal mask rates of the sequences.

    Without prompts the sum over all n x L tokens divided by their number. With prompt lengths
    int64 [n] its fine-tuning loss: each sequence divided by its other tokens, padding included,
    then the mean.
    """
    losses = token_losses(model, clean, noisy, rates.reciprocal()[:, None], outcomes="all")
    if prompt_lengths is None:
        return losses.mean(), losses
    answers = clean.shape[1] - prompt_lengths
    return (losses.sum(dim=1) / answers).mean(), losses


def mdlm_bound(
    model: Network, clean: Tensor, noisy: Tensor, t: Tensor, eps: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """MDLM's bound per token at times t float [n]."""
    weights = loglinear_weight(t, eps)[:, None]
    losses = token_losses(model, clean, noisy, weights, outcomes="all_but_mask")
    return losses.mean(), losses


def md4_bound(
    model: Network, clean: Tensor, noisy: Tensor, t: Tensor, eps: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """MD4's bound per sequence at times t float [n], its constant for time 0 included."""
    weights = md4_weight(t, eps)[:, None]
    losses = token_losses(model, clean, noisy, weights, outcomes="all_but_mask")
    constant = clean.shape[1] * eps * math.log(model.config.vocab_size)
    return losses.sum(dim=1).mean() + constant, losses


def bd3_bound(
    model: Network,
    clean: Tensor,
    noisy: Tensor,
    rates: Tensor,
    *,
    block_size: int | None = None,
    is_first_given: bool = True,
) -> tuple[Tensor, Tensor]:
    """BD3-LM's bound per token; rates float [n, L] are those of each token's block.

    A sequence's first token begins the text, is never masked and not counted, unless
    `is_first_given` is False. A `block_size` replaces the model's.
    """
    losses = token_losses(
        model, clean, noisy, rates.reciprocal(), outcomes="all_but_mask", block_size=block_size
    )
    if is_first_given:
        losses = losses * (torch.arange(clean.shape[1], device=clean.device) > 0)
    return losses.sum() / (losses.numel() - len(losses) * is_first_given), losses


def token_losses(
    model: Network,
    clean: Tensor,
    noisy: Tensor,
    weights: Tensor,
    *,
    outcomes: Outcomes,
    segments: Tensor | None = None,
    block_size: int | None = None,
    guidance: float = 0.0,
    is_given: Tensor | None = None,
) -> Tensor:
    """Weight x cross entropy of each masked token, float [n, L]; 0 elsewhere; differentiable.

    clean and noisy int64 [n, L] differ in mask tokens only; weights broadcast to [n, L]. With
    `guidance` w above 0 the logits are u + (w + 1)(c - u), u from an input whose `is_given` tokens
    (the prompt's, bool [n, L]) are masked too. A token that no row predicts counts 0.
    """
    config = model.config
    config = replace(config, block_size=block_size) if block_size else config
    is_masked = noisy == config.mask_id
    if bool((~is_masked & (noisy != clean)).any()):
        raise InputError(
            "the noisy tokens differ from the clean ones in more than mask tokens "
            f"(mask_id={config.mask_id}); give noise that only masks"
        )
    length = config.block_size if config.attention == "block_causal" else None
    batch = TrainBatch.of(clean, is_masked, block_size=length, segments=segments)
    sequences, places = supervised(config, batch).nonzero(as_tuple=True)
    targets, banned = clean[sequences, places], banned_ids(config, outcomes)

    def read(hidden: Tensor, head: nn.Module) -> Tensor:
        return cross_entropy(hidden, head, targets, banned)

    reader: Read[Tensor] = read
    if guidance and is_given is not None:
        unconditional = replace(batch, is_masked=is_masked | is_given)
        reader = _guided(model, config, unconditional, sequences, places, targets, banned, guidance)
    nats = read_places(model, batch, sequences, places, reader, config)
    weights = weights.to(nats.dtype).expand(clean.shape)
    result = nats.new_zeros(clean.shape)
    return result.index_put((sequences, places), nats * weights[sequences, places])


def _guided(
    model: Network,
    config: ModelConfig,
    unconditional: TrainBatch,
    sequences: Tensor,
    places: Tensor,
    targets: Tensor,
    banned: list[int],
    guidance: float,
) -> Read[Tensor]:
    """A reader of cross entropies under classifier-free guidance; runs the second pass now."""
    without = read_places(
        model, unconditional, sequences, places, lambda hidden, head: hidden, config
    )

    def read(hidden: Tensor, head: nn.Module) -> Tensor:
        def nats(conditional: Tensor, plain: Tensor, wanted: Tensor) -> Tensor:
            c, u = (outcome_logits(rows, head, []) for rows in (conditional, plain))
            mixed = u + (guidance + 1) * (c - u)
            ids = torch.tensor(banned, dtype=torch.int64, device=mixed.device)
            mixed = mixed.index_fill(-1, ids, float("-inf"))
            return F.cross_entropy(mixed, wanted, reduction="none")

        weight = head.weight
        assert isinstance(weight, Tensor)
        return in_chunks(nats, hidden, without, targets, vocabulary=weight.shape[0])

    return read
