"""What is told of decisions, against hand-made logits and against disturbed ones."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_model.decisions import (
    Key,
    choice_margin,
    editing_margin,
    logprobs_of,
    remasking_margin,
    token_margins,
    unmasking_margin,
)
from cascade_model.drawing import draw_tokens, perturbed, uniforms, vocabulary_uniforms
from cascade_model.noise import TOKEN
from cascade_model.sampling import SamplingParams
from cascade_model.unmasking import RULES, Drawn, choose

KEY = (0, 3, 1, [0])
[UNIFORM] = uniforms(TOKEN, 0, *KEY)
COMPUTED = sorted(name for name, rule in RULES.items() if not rule.is_exact)


def drawn_of(shares: list[list[float]], tokens: list[int], shift: float = 3.0) -> Drawn:
    """Rows of probabilities, as logits with a shift that must not matter; 0 is banned."""
    logits = torch.tensor(shares, dtype=torch.float64).log() + shift
    return Drawn(logits, torch.tensor(tokens))


def test_a_token_has_its_log_probability_and_the_best_come_first():
    drawn = drawn_of([[0.1, 0.6, 0.0, 0.3], [0.5, 0.2, 0.3, 0.0]], [3, 1])
    first, second = logprobs_of(drawn, [0, 1], 2)
    assert math.exp(first.logprob) == pytest.approx(0.3)
    assert math.exp(second.logprob) == pytest.approx(0.2)
    assert [token for token, _ in first.top] == [1, 3]
    assert [token for token, _ in second.top] == [0, 2]
    assert dict(first.top)[3] == first.logprob


def test_only_the_wanted_rows_are_told():
    drawn = drawn_of([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]], [0, 1, 0])
    told = logprobs_of(drawn, [1, 2], 0)
    assert [math.exp(one.logprob) for one in told] == pytest.approx([0.1, 0.2])
    assert [one.top for one in told] == [(), ()]
    assert logprobs_of(drawn, [], 2) == []


@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_of_equally_probable_tokens_the_lower_ids_come_first(count):
    [one] = logprobs_of(drawn_of([[0.1, 0.2, 0.0, 0.2, 0.2, 0.2, 0.1]], [1]), [0], count)
    assert [token for token, _ in one.top] == [1, 3, 4, 5, 0, 6][:count]


def test_banned_tokens_are_never_told_of():
    [one] = logprobs_of(drawn_of([[0.0, 0.7, 0.3, 0.0]], [1]), [0], 4)
    assert [token for token, _ in one.top] == [1, 2]
    assert sum(math.exp(value) for _, value in one.top) == pytest.approx(1)


def token_margin(shares: list[float], key: Key = KEY, **values) -> float:
    """Of the token that is drawn from these shares with UNIFORM, or another number."""
    params = SamplingParams(**values)
    drawn = drawn_of([shares], [0])
    drawn = Drawn(drawn.logits, draw_tokens(drawn.logits, params, *key))
    [margin] = token_margins(drawn, params, key)
    return float(margin)


def test_at_temperature_zero_it_is_the_lead_in_probability():
    assert token_margin([0.2, 0.5, 0.0, 0.3]) == pytest.approx(0.2)
    assert token_margin([0.4, 0.4, 0.2]) == 0
    assert token_margin([0.0, 1.0, 0.0]) == 1


@pytest.mark.parametrize(
    ("shares", "margin"),
    [
        ([0.5, 0.5], 0.5 - UNIFORM),  # no token lies left of 0
        ([0.1, 0.9], UNIFORM - 0.1),  # nor right of 1
        ([0.3, 0.1, 0.6], UNIFORM - 0.3),
        ([0.0, 0.3, 0.1, 0.6, 0.0], UNIFORM - 0.3),
        ([0.1, 0.26, 0.64], 0.36 - UNIFORM),
        ([0.0, 1.0, 0.0], math.inf),
    ],
)
def test_above_it_it_is_the_distance_to_another_tokens_interval(shares, margin):
    assert 0.343 < UNIFORM < 0.344
    assert token_margin(shares, temperature=1.0) == pytest.approx(margin)


def test_intervals_are_those_of_the_tempered_distribution():
    assert token_margin([0.2, 0.8], temperature=0.5) == pytest.approx(UNIFORM - 0.04 / 0.68)


def test_with_gumbel_noise_it_is_the_lead_of_the_best_sum():
    shares = [0.3, 0.1, 0.4, 0.2]
    noise = torch.from_numpy(vocabulary_uniforms(0, *KEY, 4))
    first, second = perturbed(torch.tensor([shares]).double().log() / 0.7, noise)[0].topk(2).values
    margin = token_margin(shares, temperature=0.7, token_draw="gumbel")
    assert margin == pytest.approx((first - second).item())


@pytest.mark.parametrize(
    ("shares", "cut", "margin"),
    [
        # Kept are 5/8 and 3/8; with the third token the first one's interval still holds.
        ([0.5, 0.3, 0.2], {"top_k": 2}, 0.5 - UNIFORM),
        ([0.5, 0.3, 0.2], {"top_k": 1}, 0.625 - UNIFORM),
        # Kept are the first two; without the first, or with the third, another token is drawn.
        ([0.32, 0.4, 0.28], {"top_k": 2}, 0.32 - 0.28),
        ([0.32, 0.4, 0.28], {"top_p": 0.6}, 0.32 - 0.28),
        ([0.32, 0.4, 0.28], {"top_p": 0.71}, 0.72 - 0.71),
        ([0.32, 0.4, 0.28], {"top_p": 0.405}, 0.405 - 0.4),
        # Top-p counts what top-k has left: 5/9 and 4/9 of the best two.
        ([0.32, 0.4, 0.28], {"top_k": 2, "top_p": 0.56}, 0.56 - 5 / 9),
        ([0.3, 0.35, 0.35], {"top_k": 2}, 0.05),
        ([0.3, 0.3, 0.4], {"top_k": 2}, 0.0),
    ],
    ids=str,
)
def test_a_cut_counts_where_it_would_give_another_token(shares, cut, margin):
    assert token_margin(shares, temperature=1.0, **cut) == pytest.approx(margin)


def test_a_cut_counts_where_the_drawn_token_would_be_lost():
    """The last token is drawn with 0.736 and the last kept; a third token would not change it."""
    key = (0, 1, 1, [0])
    margin = token_margin([0.30, 0.36, 0.34], key, temperature=1.0, top_k=2)
    assert margin == pytest.approx(0.34 - 0.30)


@pytest.mark.parametrize("block", range(6))
def test_a_cut_counts_with_gumbel_noise_too(block):
    """Two tokens, the best alone is kept: what counts is whether the other would win."""
    params = SamplingParams(temperature=1.0, top_k=1, token_draw="gumbel")
    key = (0, block, 1, [0])
    drawn = drawn_of([[0.6, 0.4]], [0])
    noise = torch.from_numpy(vocabulary_uniforms(0, *key, 2))
    first, second = perturbed(drawn.logits, noise)[0].tolist()
    [margin] = token_margins(drawn, params, key)
    assert margin == pytest.approx(max(0.6 - 0.4, first - second))


@pytest.mark.parametrize(
    ("rule", "scores", "bounds", "margin"),
    [
        ("confidence_threshold", [0.95, 0.5, 0.88], (1, 3), 0.02),
        ("confidence_threshold", [0.99, 0.5, 0.6], (1, 3), 0.09),
        ("confidence_threshold", [0.2, 0.5, 0.6], (2, 3), 0.3),  # the share takes two
        ("confidence_threshold", [0.99, 0.97, 0.96], (1, 2), 0.01),  # no more than two are taken
        ("low_confidence", [0.9, 0.5, 0.7], (2, 3), 0.2),
        ("low_confidence", [0.9, 0.5, 0.9], (1, 3), 0.0),
        ("confidence_threshold", [0.91, 0.5, 0.9], (3, 3), math.inf),  # all, whatever they score
        ("factor", [0.9, 0.7, 0.1], (1, 3), 0.7 - 2 / 3),
        ("factor", [0.9, 0.6, 0.1], (1, 3), 2 / 3 - 0.6),
        ("factor", [0.9, 0.7, 0.68], (1, 3), 0.02),  # who is second
        ("entropy", [-0.3, -0.05, -0.06], (1, 3), 0.01),
        ("entropy_bound", [-0.3, -0.05, -0.07], (1, 3), 0.02),  # 0.12 before the third
        ("sequential", [0.0, -1.0, -2.0], (1, 3), math.inf),
        ("random", [0.3, 0.2, 0.1], (1, 3), math.inf),
        ("first_hitting", [0.3, 0.2, 0.1], (1, 3), math.inf),
    ],
)
def test_positions_are_as_close_as_the_nearest_bar_or_the_lead_over_the_next(
    rule, scores, bounds, margin
):
    values = np.array(scores)
    found = choice_margin(values, values, *bounds, SamplingParams(rule=rule))
    assert found == pytest.approx(margin, abs=1e-7)  # the factor's bars are float32


def test_with_noise_the_order_has_leads_of_its_own():
    """The share takes the last place; the first one is sure, so its rank does not matter."""
    scores, order = np.array([1.0, 0.3, 0.2]), np.array([4.9, 3.0, 5.0])
    params = SamplingParams(confidence_threshold=0.65)
    assert choice_margin(scores, order, 1, 3, params) == pytest.approx(5.0 - 4.9)
    scores, order = np.array([1.0, 0.9, 0.2]), np.array([5.0, 4.9, 3.0])  # both sure
    assert choice_margin(scores, order, 1, 3, params) == pytest.approx(0.9 - 0.65)


def test_ends_of_text_that_come_last_are_apart_by_decree():
    scores = np.array([-math.inf, 0.5, -math.inf])
    params = SamplingParams(rule="low_confidence")
    assert choice_margin(scores, scores, 2, 3, params) == math.inf


@settings(deadline=None, max_examples=400)
@given(st.data(), st.sampled_from(COMPUTED), st.integers(1, 7), st.booleans())
def test_scores_that_move_less_than_the_margin_choose_the_same(data, rule, count, is_noisy):
    def numbers(low, high):
        some = st.floats(low, high).map(lambda value: round(value, 2))  # with ties
        return np.array(data.draw(st.lists(some, min_size=count, max_size=count)))

    least = data.draw(st.integers(1, count))
    most = data.draw(st.integers(least, count))
    scores = -numbers(0, 0.3) if "entropy" in rule else numbers(0, 1)
    order = numbers(-3, 3) if is_noisy else scores
    params = SamplingParams(rule=rule, confidence_threshold=0.5, entropy_bound=0.3)
    margin = choice_margin(scores, order, least, most, params)
    reach = min(margin, 1.0) / (2 * count + 1)  # two numbers are compared, or a sum with a bound
    moved = scores + reach * numbers(-1, 1)
    moved_order = order + reach * numbers(-1, 1) if is_noisy else moved
    if margin > 0:
        before = choose(scores, order, least, most, params)
        assert choose(moved, moved_order, least, most, params).tolist() == before.tolist()


def test_masking_again_has_the_distance_from_its_threshold():
    assert remasking_margin(np.array([0.9, 0.4]), 0.5) == pytest.approx(0.1)
    assert remasking_margin(np.array([]), 0.5) == math.inf


@pytest.mark.parametrize(
    ("shares", "threshold", "is_old", "margin"),
    [
        ([0.6, 0.3, 0.1], 0.5, False, 0.1),  # is rewritten: the threshold is near
        ([0.45, 0.4, 0.15], 0.2, False, 0.05),  # or another token
        ([0.4, 0.35, 0.25], 0.5, False, 0.1),  # is not: the best is below the threshold
        ([0.6, 0.3, 0.1], 0.5, True, 0.3),  # stays until another is the best
        ([0.4, 0.35, 0.25], 0.5, True, 0.15),  # and above the threshold
    ],
)
def test_editing_has_the_distance_from_another_outcome(shares, threshold, is_old, margin):
    found = editing_margin(drawn_of([shares], [0]), np.array([is_old]), threshold)
    assert found == pytest.approx(margin)


@pytest.mark.parametrize(
    ("options", "margin"),
    [
        ({"rule": "low_confidence"}, 0.6),  # what was not taken may be drawn otherwise
        ({"rule": "low_confidence", "suppress_eos": "confidence"}, 0.02),  # unless it is looked at
        ({"rule": "low_confidence", "temperature": 1.0}, 0.49 - UNIFORM),  # as by its probability
        ({"rule": "entropy", "temperature": 1.0}, 0.8 - UNIFORM),
    ],
    ids=str,
)
def test_tokens_that_are_not_taken_count_where_the_choice_looks_at_them(options, margin):
    drawn = drawn_of([[0.8, 0.1, 0.1], [0.49, 0.47, 0.04]], [0, 0])
    params = SamplingParams(**options)
    scores = np.array([0.8, 0.2])
    taken = np.array([True, False])
    key = (*KEY[:3], [0, 0])
    found = unmasking_margin(drawn, scores, scores, (1, 2), taken, params, key)
    assert found == pytest.approx(margin)
