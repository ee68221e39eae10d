"""Which masked positions a denoising step commits.

A rule is a score of each position and a choice by scores; both are small pure functions. The laws
of `choose`: at least one position a step, never fewer than the schedule asks, everything by the
last step, ties go to the left. What a score is made of is drawn in `drawing`; the mask token is
banned before that.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade_model.sampling import SamplingParams

Score = Callable[[Tensor, Tensor], Tensor]
Choice = Callable[[Tensor, SamplingParams], Tensor]


def probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of the drawn token, without temperature and cuts, as in LLaDA: float [m]."""
    picked = logits.gather(-1, tokens[:, None])[:, 0]
    return (picked - logits.logsumexp(dim=-1)).exp()


def margin(logits: Tensor, tokens: Tensor) -> Tensor:
    """Best minus second best probability (Dream's `topk_margin`)."""
    best = logits.topk(2, dim=-1).values
    shares = (best - logits.logsumexp(dim=-1, keepdim=True)).exp()
    return shares[:, 0] - shares[:, 1]


def negative_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Sum of p log p over the vocabulary (Dream's `entropy`)."""
    logs = logits.log_softmax(dim=-1)
    return torch.where(logs.isneginf(), 0.0, logs.exp() * logs).sum(dim=-1)


def leftmost(logits: Tensor, tokens: Tensor) -> Tensor:
    """Higher the further left."""
    return -torch.arange(len(logits), dtype=logits.dtype, device=logits.device)


def nothing(scores: Tensor, params: SamplingParams) -> Tensor:
    """No position beyond what the schedule asks."""
    return torch.zeros_like(scores, dtype=torch.bool)


def above_threshold(scores: Tensor, params: SamplingParams) -> Tensor:
    """Scores of at least the threshold (Fast-dLLM, arXiv 2505.22618; SDAR's dynamic rule)."""
    return scores >= params.confidence_threshold


def by_factor(scores: Tensor, params: SamplingParams) -> Tensor:
    """The r-th best while its score is at least 1 - factor/(r + 1) (Fast-dLLM, section 3.3)."""
    order = scores.argsort(descending=True, stable=True)
    rank = torch.arange(1, len(scores) + 1, device=scores.device)
    holds = (scores[order] >= 1 - params.factor / (rank + 1)).cumprod(dim=0).bool()
    return torch.zeros_like(holds).scatter(0, order, holds)


def within_entropy(scores: Tensor, params: SamplingParams) -> Tensor:
    """Lowest entropy first, while those before add up to at most the bound (EB-Sampler,
    arXiv 2505.24857); scores are negative entropies."""
    order = scores.argsort(descending=True, stable=True)
    entropy = -scores[order]
    holds = entropy.cumsum(dim=0) - entropy <= params.entropy_bound
    return torch.zeros_like(holds).scatter(0, order, holds)


@dataclass(frozen=True, slots=True)
class Rule:
    """How positions are scored, and which are taken beyond the schedule's share."""

    score: Score | None
    """None: uniform randomness."""
    choice: Choice
    is_log: bool = False
    """Whether the score is one of logarithms already, to which noise can be added as it is."""


RULES: dict[str, Rule] = {
    "confidence_threshold": Rule(probability, above_threshold),
    "low_confidence": Rule(probability, nothing),
    "margin": Rule(margin, nothing),
    "entropy": Rule(negative_entropy, nothing, is_log=True),
    "random": Rule(None, nothing),
    "sequential": Rule(leftmost, nothing),
    "factor": Rule(probability, by_factor),
    "entropy_bound": Rule(negative_entropy, within_entropy, is_log=True),
    "first_hitting": Rule(None, nothing),
}


def choose(scores: Tensor, order: Tensor, least: int, most: int, params: SamplingParams) -> Tensor:
    """The positions to commit, bool [m], from the scores [m] of the masked ones.

    `order` [m] ranks them (the scores, or these with noise); the `least` first are always among
    them and at most the `most` first.
    """
    ranking = order.argsort(descending=True, stable=True)
    place = torch.empty_like(ranking)
    place[ranking] = torch.arange(len(ranking), device=ranking.device)
    return (RULES[params.rule].choice(scores, params) | (place < least)) & (place < most)
