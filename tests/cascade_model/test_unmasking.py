"""The rules: schedules, thresholds, draws and their keys."""

import numpy as np
import pytest
import torch

from cascade_model.config import SamplingParams
from cascade_model.unmasking import RULES, choose, draw_tokens, quota, uniforms


def schedule(masked: int, steps: int) -> list[int]:
    counts = []
    for left in range(steps, 0, -1):
        counts.append(quota(masked, left))
        masked -= counts[-1]
    return counts


def test_the_even_schedule_of_llada():
    assert schedule(32, 5) == [7, 7, 6, 6, 6]
    assert schedule(8, 8) == [1] * 8


def test_top_k_takes_the_most_confident_and_ties_go_left():
    confidence = torch.tensor([0.5, 0.9, 0.9, 0.9])
    params = SamplingParams(rule="top_k")
    assert choose(confidence, 2, params).tolist() == [False, True, True, False]


def test_sequential_takes_the_leftmost():
    params = SamplingParams(rule="sequential")
    assert choose(torch.tensor([0.1, 0.9, 0.9]), 2, params).tolist() == [True, True, False]


def test_the_threshold_commits_all_sure_positions():
    params = SamplingParams(confidence_threshold=0.8)
    chosen = choose(torch.tensor([0.81, 0.1, 0.95, 0.8]), 4, params)
    assert chosen.tolist() == [True, False, True, True]


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("masked", [1, 2, 7])
@pytest.mark.parametrize("steps_left", [1, 3, 7])
def test_every_rule_commits_at_least_one_and_everything_in_the_last_step(rule, masked, steps_left):
    params = SamplingParams(rule=rule, confidence_threshold=1.0)
    chosen = choose(torch.full((masked,), 0.2), steps_left, params)
    assert chosen.sum() >= 1
    assert steps_left > 1 or chosen.all()


def test_temperature_zero_takes_the_best_token_whatever_the_numbers():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    for number in (0.0, 0.999):
        uniform = torch.tensor([number], dtype=torch.float64)
        tokens, confidence = draw_tokens(logits, SamplingParams(), uniform)
        assert tokens.tolist() == [1]
        torch.testing.assert_close(confidence, logits.softmax(-1)[:, 1])


def test_draws_follow_the_tempered_distribution_and_confidence_does_not():
    logits = torch.tensor([[1.0, 0.0, -1.0, float("-inf")]]).expand(4000, -1)
    uniform = torch.from_numpy((np.arange(4000) + 0.5) / 4000)
    tokens, confidence = draw_tokens(logits, SamplingParams(temperature=2.0), uniform)
    found = torch.bincount(tokens, minlength=4) / 4000
    torch.testing.assert_close(found, (logits[0] / 2).softmax(-1), rtol=0, atol=1e-3)
    torch.testing.assert_close(confidence, logits.softmax(-1).gather(1, tokens[:, None])[:, 0])


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
def test_banned_tokens_are_never_drawn(number):
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]])
    uniform = torch.tensor([number], dtype=torch.float64)
    tokens, _ = draw_tokens(logits, SamplingParams(temperature=1.0), uniform)
    assert tokens.item() in (1, 2)


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log().expand(1000, -1)
    uniform = torch.from_numpy((np.arange(1000) + 0.5) / 1000)
    tokens, _ = draw_tokens(logits, SamplingParams(temperature=1.0, top_p=0.7), uniform)
    counts = torch.bincount(tokens, minlength=3)
    assert counts[2] == 0
    assert abs(counts[0] / 1000 - 2 / 3) < 2e-3


def test_random_numbers_are_keyed_by_seed_choice_block_step_and_place():
    def numbers(seed=1, choice=2, block=3, step=4, places=(0, 5)):
        return tuple(uniforms(SamplingParams(seed=seed), choice, block, step, list(places)))

    base = numbers()
    assert base == numbers()
    assert all(0 <= number < 1 for number in base)
    assert numbers(places=(5,)) == base[1:]
    others = [numbers(seed=2), numbers(choice=3), numbers(block=4), numbers(step=5)]
    assert len({base, *others, numbers(seed=-1)}) == 6
