"""Which masked positions a denoising step commits, and which tokens they get.

Small pure rules behind one loop (`sampler`). Their laws: at least one position a step, never the
mask token, everything by the last step, ties go to the left. Quotas follow LLaDA's even schedule
(32 positions in 5 steps: 7, 7, 6, 6, 6); the confidence threshold is that of Fast-dLLM
(arXiv 2505.22618), with the quota as its floor, as SDAR and LLaDA2 have it.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cascade_model.config import SamplingParams
from cascade_model.noise import TOKEN, counters, key_of, philox4x32

Rule = Callable[[Tensor, int, SamplingParams], Tensor]


def quota(num_masked: int, steps_left: int) -> int:
    """How many positions a step must commit at least, so that all are filled by the last one."""
    return -(-num_masked // max(steps_left, 1))


def confidence_threshold(confidence: Tensor, count: int, params: SamplingParams) -> Tensor:
    """All positions at or above the threshold, or the `count` most confident where fewer are."""
    return top_k(confidence, count, params) | (confidence >= params.confidence_threshold)


def top_k(confidence: Tensor, count: int, params: SamplingParams) -> Tensor:
    """The `count` most confident positions."""
    order = torch.argsort(confidence, descending=True, stable=True)
    chosen = torch.zeros_like(confidence, dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen


def sequential(confidence: Tensor, count: int, params: SamplingParams) -> Tensor:
    """The `count` leftmost positions."""
    return torch.arange(len(confidence), device=confidence.device) < count


RULES: dict[str, Rule] = {
    "confidence_threshold": confidence_threshold,
    "top_k": top_k,
    "sequential": sequential,
}


def choose(confidence: Tensor, steps_left: int, params: SamplingParams) -> Tensor:
    """The positions to commit, bool [m], from the confidence [m] of the masked ones."""
    return RULES[params.rule](confidence, quota(len(confidence), steps_left), params)


def draw_tokens(logits: Tensor, params: SamplingParams, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A token for each row and its confidence: logits [m, vocabulary] -> int64 [m], float [m].

    Temperature 0 takes the most probable token. Otherwise `uniform` (float64 [m], in [0, 1)) picks
    from softmax(logits / temperature), cut to the smallest set that reaches `top_p`. The confidence
    is the token's probability without temperature and cut, as in LLaDA. Banned ids (-inf) have
    probability 0 and are never drawn.
    """
    probabilities = logits.softmax(dim=-1)
    if params.temperature == 0.0:
        tokens = logits.argmax(dim=-1)
    else:
        tokens = _by_inverse(_cut(logits, params), uniform)
    return tokens, probabilities.gather(-1, tokens[:, None])[:, 0]


def uniforms(
    params: SamplingParams, choice: int, block: int, step: int, places: list[int]
) -> np.ndarray:
    """One number in [0, 1) for each place of a block, float64 [m].

    Keyed by (seed, choice, block, step, place): the same whatever else is decoded beside it.
    """
    words = counters(places, block, (TOKEN << 24) + step, choice)
    drawn = philox4x32(words, key_of(params.seed)).astype(np.uint64)
    high, low = drawn[..., 0] >> np.uint64(5), drawn[..., 1] >> np.uint64(6)
    return (high * np.uint64(2**26) + low) / float(2**53)


def _cut(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities at the temperature, float64, everything outside the nucleus at 0."""
    probabilities = (logits.double() / params.temperature).softmax(dim=-1)
    if params.top_p >= 1.0:
        return probabilities
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
    outside = ranked.cumsum(dim=-1) - ranked >= params.top_p
    return torch.zeros_like(ranked).scatter(-1, order, ranked.masked_fill(outside, 0.0))


def _by_inverse(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative probability passes `uniform`; one of probability 0 never
    is, because the comparison is strict and the total is the cumulative sum's own last value."""
    cumulative = probabilities.cumsum(dim=-1)
    wanted = uniform[:, None].to(cumulative.device) * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, wanted, right=True)[:, 0]
    last = (probabilities > 0).long().cumsum(dim=-1).argmax(dim=-1)
    return torch.minimum(found, last)
