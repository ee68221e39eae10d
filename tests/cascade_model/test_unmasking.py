"""The rules: what each scores and takes, and the laws of every choice."""

import math

import numpy as np
import pytest
import torch

from cascade_model.sampling import SamplingParams
from cascade_model.unmasking import (
    RULES,
    Drawn,
    choose,
    leftmost,
    margin,
    negative_entropy,
    probability,
    sure,
)

SHARES = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]], dtype=torch.float64)
BEST = torch.tensor([0, 0])


def chosen(rule: str, scores: list[float], least: int = 1, most: int = 99, **settings):
    params = SamplingParams(rule=rule, **settings)
    values = np.array(scores)
    return choose(values, values, least, most, params).tolist()


def test_scores_are_what_their_names_say():
    logits = SHARES.log() + 3.0
    entropy = [sum(p * math.log(p) for p in row) for row in SHARES.tolist()]
    wanted = {
        probability: [0.7, 0.4],
        margin: [0.5, 0.05],
        negative_entropy: entropy,
        leftmost: [0.0, -1.0],
    }
    for score, values in wanted.items():
        torch.testing.assert_close(
            score(Drawn(logits, BEST)), torch.tensor(values, dtype=torch.float64)
        )


def test_banned_tokens_do_not_disturb_the_entropy():
    logits = torch.cat([SHARES.log(), torch.full((2, 2), float("-inf"))], dim=1)
    plain = negative_entropy(Drawn(SHARES.log(), BEST))
    torch.testing.assert_close(negative_entropy(Drawn(logits, BEST)), plain)


def test_the_schedules_share_goes_to_the_best_and_ties_go_left():
    assert chosen("low_confidence", [0.5, 0.9, 0.9, 0.9], least=2) == [False, True, True, False]


def test_the_threshold_commits_all_sure_positions_or_the_least():
    settings = {"confidence_threshold": 0.8}
    scores = [0.81, 0.1, 0.95, 0.8]
    assert chosen("confidence_threshold", scores, **settings) == [True, False, True, True]
    low = [0.1, 0.2, 0.3]
    assert chosen("confidence_threshold", low, 2, **settings) == [False, True, True]


def test_a_threshold_is_rounded_as_the_scores_are():
    params = SamplingParams(confidence_threshold=0.9)
    scores = np.array([0.9, np.nextafter(np.float32(0.9), np.float32(0))], dtype=np.float32)
    assert choose(scores, scores[::-1], 1, 99, params).tolist() == [True, True]
    assert sure(scores, params).tolist() == [True, False]


@pytest.mark.parametrize("seed", range(40))
def test_bars_that_are_met_exactly_are_passed_in_float32(seed):
    """The plain formulas on float32 tensors, with bars put where a score or a sum lies."""
    drawn = torch.rand(9, generator=torch.Generator().manual_seed(seed))
    falling, rank = drawn.sort(descending=True).values, torch.arange(1, 10)
    entropy = drawn.sort().values
    before = entropy.cumsum(0) - entropy
    for place in range(9):
        at = falling[place].item()
        params = SamplingParams(confidence_threshold=at)
        assert sure(falling.numpy(), params).tolist() == (falling >= at).tolist()
        params = SamplingParams(rule="factor", factor=0.1 + at)
        bars = 1 - params.factor / (rank + 1)
        scores = (rank <= place).float()
        scores[place] = bars[place]
        assert sure(scores.numpy(), params).tolist() == (scores >= bars).tolist()
        bound = before[place].item()
        params = SamplingParams(rule="entropy_bound", entropy_bound=bound)
        assert sure(-entropy.numpy(), params).tolist() == (before <= bound).tolist()


def test_the_factor_rule_compares_the_rth_best_with_its_own_bar():
    # f = 1: bars 2/3, 3/4, 4/5 from the second on; the first is always taken.
    assert chosen("factor", [0.1, 0.68, 0.74], factor=1.0) == [False, True, True]
    assert chosen("factor", [0.3, 0.2, 0.1], factor=1.0) == [True, False, False]
    assert chosen("factor", [0.70, 0.66, 0.9], factor=1.0) == [True, False, True]


def test_the_entropy_bound_adds_up_what_comes_before():
    # Entropies 0.05, 0.06, 0.3: before the third stand 0.11, above 0.1.
    assert chosen("entropy_bound", [-0.3, -0.05, -0.06], entropy_bound=0.1) == [False, True, True]
    assert chosen("entropy_bound", [-0.3, -0.2], entropy_bound=0.0) == [False, True]


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("masked", [1, 2, 7])
@pytest.mark.parametrize("least", [1, 3, 7])
def test_every_rule_commits_the_least_and_never_more_than_the_most(rule, masked, least):
    generator = torch.Generator().manual_seed(masked)
    scores = torch.rand(masked, generator=generator).tolist()
    assert sum(chosen(rule, scores, least, confidence_threshold=1.0)) >= min(least, masked)
    assert sum(chosen(rule, scores, 1, 2, confidence_threshold=0.0)) <= 2


def test_noise_on_the_order_changes_who_fills_the_share_and_not_who_is_sure():
    scores, order = np.array([0.95, 0.3, 0.2]), np.array([0.0, 1.0, 2.0])
    params = SamplingParams(confidence_threshold=0.9)
    assert choose(scores, order, 1, 99, params).tolist() == [True, False, True]
