"""Which masked positions a denoising step commits.

A rule is a score of each position and a choice by scores; both are small pure functions. The laws
of `choose`: at least one position a step, never fewer than the schedule asks, everything by the
last step, ties go to the left. What a score is made of is drawn in `drawing`; the mask token is
banned before that. Scores read whole rows of logits and are torch's; choices are made among the few
positions of a block, where NumPy's calls cost least.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cascade_model.sampling import SamplingParams


@dataclass(frozen=True)
class Drawn:
    """A token for each row of logits, and what scores are made of: computed once, when asked."""

    logits: Tensor
    """[m, vocabulary], without temperature and cuts; banned ids at -inf."""
    tokens: Tensor
    """int64 [m]."""

    @cached_property
    def log_total(self) -> Tensor:
        """Logarithm of each row's sum of exponentials, [m]: the bits of `logsumexp`, which looks
        for infinite rows besides, in half the calls."""
        highest = self.logits.amax(dim=-1, keepdim=True)
        return (self.logits - highest).exp_().sum(dim=-1).log_().add_(highest[:, 0])

    @cached_property
    def log_probability(self) -> Tensor:
        """Of each token, [m]."""
        return self.logits.gather(-1, self.tokens[:, None])[:, 0] - self.log_total


Score = Callable[[Drawn], Tensor]
Surplus = Callable[[np.ndarray, SamplingParams], np.ndarray]


def probability(drawn: Drawn) -> Tensor:
    """Of the drawn token, without temperature and cuts, as in LLaDA: float [m]."""
    return drawn.log_probability.exp()


def margin(drawn: Drawn) -> Tensor:
    """Best minus second best probability (Dream's `topk_margin`)."""
    best = drawn.logits.topk(2, dim=-1).values
    shares = (best - drawn.log_total[:, None]).exp()
    return shares[:, 0] - shares[:, 1]


def negative_entropy(drawn: Drawn) -> Tensor:
    """Sum of p log p over the vocabulary (Dream's `entropy`)."""
    logs = drawn.logits.log_softmax(dim=-1)
    return logs.exp().mul_(logs).masked_fill_(logs.isneginf(), 0.0).sum(dim=-1)


def leftmost(drawn: Drawn) -> Tensor:
    """Higher the further left."""
    return -torch.arange(len(drawn.tokens), dtype=drawn.logits.dtype)


def over_threshold(scores: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The score less the threshold (Fast-dLLM, arXiv 2505.22618; SDAR's dynamic rule)."""
    return scores - params.confidence_threshold


def over_factor(scores: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The r-th best score less 1 - factor/(r + 1) (Fast-dLLM, section 3.3); it falls with r."""
    order = falling(scores)
    after = np.arange(2, len(scores) + 2, dtype=np.float32)  # r + 1
    return _placed(order, scores[order] - (1 - params.factor * np.reciprocal(after)))


def within_entropy(scores: np.ndarray, params: SamplingParams) -> np.ndarray:
    """What the lower entropies leave of the bound (EB-Sampler, arXiv 2505.24857); scores are
    negative entropies."""
    order = falling(scores)
    entropy = -scores[order]
    total = entropy.cumsum(dtype=np.float64).astype(entropy.dtype)
    with np.errstate(invalid="ignore"):  # end-of-text that is committed last scores -inf
        return _placed(order, params.entropy_bound - (total - entropy))


def falling(values: np.ndarray) -> np.ndarray:
    """Indices of the values from the highest to the lowest, ties to the left."""
    return np.argsort(-values, kind="stable")


def _placed(order: np.ndarray, ranked: np.ndarray) -> np.ndarray:
    """What was found for each rank, at the places of the ranks."""
    result = np.empty_like(ranked)
    result[order] = ranked
    return result


@dataclass(frozen=True, slots=True)
class Rule:
    """How positions are scored, and which are taken beyond the schedule's share."""

    score: Score | None
    """None: uniform randomness."""
    surplus: Surplus | None = None
    """By how much each position passes the rule's bar; none: only the share is taken."""
    is_log: bool = False
    """Whether the score is one of logarithms already, to which noise can be added as it is."""
    is_exact: bool = False
    """Whether no score is computed from logits: the same on every machine."""


RULES: dict[str, Rule] = {
    "confidence_threshold": Rule(probability, over_threshold),
    "low_confidence": Rule(probability),
    "margin": Rule(margin),
    "entropy": Rule(negative_entropy, is_log=True),
    "random": Rule(None, is_exact=True),
    "sequential": Rule(leftmost, is_exact=True),
    "factor": Rule(probability, over_factor),
    "entropy_bound": Rule(negative_entropy, within_entropy, is_log=True),
    "first_hitting": Rule(None, is_exact=True),
}


def sure(scores: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The positions that the rule takes whatever the schedule asks, bool [m]."""
    surplus = RULES[params.rule].surplus
    return np.zeros(len(scores), dtype=bool) if surplus is None else surplus(scores, params) >= 0


def choose(
    scores: np.ndarray, order: np.ndarray, least: int, most: int, params: SamplingParams
) -> np.ndarray:
    """The positions to commit, bool [m], from the scores [m] of the masked ones.

    `order` [m] ranks them (the scores, or these with noise); the `least` first are always among
    them and at most the `most` first.
    """
    taken, ranking = sure(scores, params), falling(order)
    taken[ranking[:least]] = True
    taken[ranking[most:]] = False
    return taken
