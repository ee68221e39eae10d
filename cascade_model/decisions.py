"""What is told of a step's decisions besides their outcome: how probable, and how narrow.

The margin of a decision is the distance by which it was made, in the unit of what was compared. Two
machines whose floating point differs by less give the same tokens; the limits are told below.
Numbers that are drawn from keys are the same on every machine and have no margin of their own.

- A token at temperature 0: the probability of the best less that of the second best.
- A token above it: the distance of the uniform number from the border to another token, in the
  distribution that temperature and cuts leave; with Gumbel noise the lead of the best sum of logit
  and noise. Top-k and top-p count by the probability that would shift the cut by one token, where
  that gives another token; a cut through more than two equal ones is not seen whole.
- Positions: the distance of the nearest score from the rule's bar, and the lead of the places taken
  by the schedule's share over those left, in the rule's score or its logarithm with noise.
- A written token: the distance of its probability from the threshold that masks it again; of the
  likeliest other token from the one that rewrites.
"""

import math

import numpy as np
import torch
from torch import Tensor

from cascade_model.drawing import keep_most_probable, perturbed, uniforms, vocabulary_uniforms
from cascade_model.noise import TOKEN
from cascade_model.sampling import SamplingParams
from cascade_model.text_stream import TokenLogprob
from cascade_model.unmasking import RULES, Drawn, falling, probability, sure

Key = tuple[int, int, int, list[int]]
"""Choice, block, step and places within the block: what a step's randomness is keyed by."""


def logprobs_of(drawn: Drawn, rows: list[int], count: int) -> list[TokenLogprob]:
    """Log-probabilities of the tokens of some rows, and of the `count` best tokens of each; of
    equally probable ones the lower ids. Banned ids are never among them."""
    index = torch.tensor(rows, dtype=torch.int64, device=drawn.logits.device)
    chosen = drawn.log_probability[index].tolist()
    if count == 0 or not rows:
        return [TokenLogprob(value, ()) for value in chosen]
    logits = drawn.logits[index]
    best = logits.topk(min(count, logits.shape[-1]), dim=-1).values
    tops = []
    for row, last, total in zip(logits, best[:, -1], drawn.log_total[index], strict=True):
        ids = ((row >= last) & ~row.isneginf()).nonzero()[:, 0]  # with all ties of the last
        ids = ids[row[ids].argsort(descending=True, stable=True)[:count]]
        tops.append(tuple(zip(ids.tolist(), (row[ids] - total).tolist(), strict=True)))
    return [TokenLogprob(value, top) for value, top in zip(chosen, tops, strict=True)]


def unmasking_margin(
    drawn: Drawn,
    scores: np.ndarray,
    order: np.ndarray,
    bounds: tuple[int, int],
    taken: np.ndarray,
    params: SamplingParams,
    key: Key,
) -> float:
    """The narrowest decision of an unmasking step, positions and tokens; see `choose`.

    Tokens that were drawn and not taken count only where the choice of positions looks at them.
    """
    is_seen = params.temperature > 0 and RULES[params.rule].score is probability
    counted = np.ones_like(taken) if is_seen or params.suppress_eos == "confidence" else taken
    narrowest = token_margins(drawn, params, key)[counted].min(initial=math.inf)
    return min(float(narrowest), choice_margin(scores, order, *bounds, params))


def choice_margin(
    scores: np.ndarray, order: np.ndarray, least: int, most: int, params: SamplingParams
) -> float:
    """How narrowly `choose` took its positions; infinite where nothing computed decides."""
    rule = RULES[params.rule]
    if rule.is_exact or least >= len(scores):
        return math.inf
    is_sure, rank = sure(scores, params), np.argsort(falling(order))
    found = [_lead(order, rank < least, ~is_sure), _lead(order, rank < most, is_sure)]
    if rule.surplus is not None:
        surplus = np.abs(rule.surplus(scores, params))
        found += [np.fmin.reduce(surplus), _lead(scores, is_sure, np.ones_like(is_sure))]
    return max(0.0, float(min(found)))


def _lead(values: np.ndarray, inside: np.ndarray, matters: np.ndarray) -> float:
    """By how much places inside lead those outside, in the pairs whose exchange matters."""
    with np.errstate(invalid="ignore"):  # two at -inf are apart by decree
        leads = np.subtract.outer(values[inside], values[~inside])
    pairs = np.logical_or.outer(matters[inside], matters[~inside])
    return np.fmin.reduce(leads[pairs].astype(np.float64), initial=math.inf)


def remasking_margin(probabilities: np.ndarray, threshold: float) -> float:
    """How narrowly places were masked again or not, given what their tokens are worth now."""
    return float(np.abs(probabilities - threshold).min(initial=math.inf))


def editing_margin(best: Drawn, is_old: np.ndarray, threshold: float) -> float:
    """How narrowly places were rewritten with their best token or not, which `is_old` tells."""
    first, second = _best_two(best).T
    rewrites = np.minimum(first - second, first - threshold)
    stays = np.where(is_old, np.maximum(first - second, threshold - second), threshold - first)
    is_changed = ~is_old & (first > threshold)
    return max(0.0, float(np.where(is_changed, rewrites, stays).min(initial=math.inf)))


def token_margins(drawn: Drawn, params: SamplingParams, key: Key) -> np.ndarray:
    """How far the draw of each row was from another token, float64 [m]."""
    if params.temperature == 0.0:
        first, second = _best_two(drawn).T
        return first - second
    scaled = drawn.logits.double() / params.temperature
    kept = keep_most_probable(scaled, params.top_k, params.top_p)
    margins = _distance(kept, drawn.tokens, params, key)
    if kept is not scaled:
        ranked, order = scaled.sort(dim=-1, descending=True, stable=True)
        count = (kept > -math.inf).sum(dim=-1, keepdim=True)
        rank = torch.arange(kept.shape[-1], device=kept.device)
        shift = _cut_distance(ranked, count, rank, params)
        for size in (count - 1, count + 1):
            left = ranked.masked_fill(rank >= size.clamp(min=1), -math.inf)
            left = torch.empty_like(kept).scatter_(-1, order, left)
            margins = margins.minimum(shift.maximum(_distance(left, drawn.tokens, params, key)))
    return margins.cpu().numpy()


def _best_two(drawn: Drawn) -> np.ndarray:
    """The two highest probabilities of each row, float64 [m, 2]."""
    best = drawn.logits.topk(2, dim=-1).values.double()
    return (best - drawn.log_total.double()[:, None]).exp().cpu().numpy()


def _distance(kept: Tensor, tokens: Tensor, params: SamplingParams, key: Key) -> Tensor:
    """How far these tokens are from not being drawn from logits [m, vocabulary]; below 0 where
    others are."""
    chosen = tokens[:, None]
    if params.token_draw == "gumbel":
        noise = vocabulary_uniforms(params.seed, *key, kept.shape[-1])
        scores = perturbed(kept, torch.from_numpy(noise).to(kept.device))
        rivals = scores.scatter(-1, chosen, -math.inf).amax(dim=-1)
        return scores.gather(-1, chosen)[:, 0] - rivals
    uniform = torch.from_numpy(uniforms(TOKEN, params.seed, *key)).to(kept.device)
    sums = kept.softmax(dim=-1).cumsum(dim=-1)
    borders = torch.cat([torch.zeros_like(sums[:, :1]), sums], dim=-1) / sums[:, -1:]
    lower, upper = borders.gather(-1, torch.cat([chosen, chosen + 1], dim=-1)).T
    below = (uniform - lower).masked_fill(lower == 0, math.inf)  # no token lies there
    above = (upper - uniform).masked_fill(upper == 1, math.inf)
    return below.minimum(above)


def _cut_distance(ranked: Tensor, count: Tensor, rank: Tensor, params: SamplingParams) -> Tensor:
    """What probability, float64 [m], would make top-k or top-p keep another `count` of tokens or
    others; logits [m, vocabulary] are ranked."""
    shares = ranked.softmax(dim=-1)
    neighbours = torch.cat([count - 1, count.clamp(max=len(rank) - 1)], dim=-1)
    last, first_out = shares.gather(-1, neighbours).T
    if params.top_p == 1.0:
        return last - first_out
    inside = ranked.masked_fill(rank >= (params.top_k or len(rank)), -math.inf).softmax(dim=-1)
    before = inside.cumsum(dim=-1) - inside
    return (last - first_out).minimum((before[:, 1:] - params.top_p).abs().amin(dim=-1))
