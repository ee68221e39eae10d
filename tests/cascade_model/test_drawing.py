"""Draws: their distribution, their cuts and their keys."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_model.drawing import (
    by_gumbel,
    by_inverse,
    draw_tokens,
    keep_most_probable,
    position_noise,
    uniforms,
    vocabulary_uniforms,
)
from cascade_model.noise import TOKEN
from cascade_model.sampling import SamplingParams

PLACES = list(range(4000))


def grid(count: int) -> torch.Tensor:
    return torch.from_numpy((np.arange(count) + 0.5) / count)


def test_temperature_zero_takes_the_best_token():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    for draw in ("inverse", "gumbel"):
        params = SamplingParams(temperature=0.0, token_draw=draw)
        assert draw_tokens(logits, params, 0, 0, 0, [0]).tolist() == [1]


@pytest.mark.parametrize("draw", ["inverse", "gumbel"])
def test_both_draws_follow_the_tempered_distribution(draw):
    logits = torch.tensor([[1.0, 0.0, -1.0, float("-inf")]]).expand(4000, -1)
    params = SamplingParams(temperature=2.0, token_draw=draw)
    tokens = draw_tokens(logits, params, 0, 0, 0, PLACES)
    found = torch.bincount(tokens, minlength=4) / 4000
    wanted = (logits[0] / 2).softmax(-1)
    error = (wanted * (1 - wanted) / 4000).sqrt()
    assert ((found - wanted).abs() <= 4 * error + 1e-9).all()


def test_gumbel_is_the_published_form():
    """LLaDA: arg-max of exp(logits) / (-ln U)^temperature."""
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    uniform = torch.rand(50, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    published = (logits.exp() / (-uniform.log()) ** 0.7).argmax(-1)
    assert by_gumbel(logits / 0.7, uniform).equal(published)


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
def test_tokens_of_probability_zero_are_never_drawn(number):
    shares = torch.tensor([[0.0, 0.5, 0.5, 0.0]], dtype=torch.float64)
    token = by_inverse(shares, torch.tensor([number], dtype=torch.float64))
    assert token.item() in (1, 2)


@settings(deadline=None)
@given(st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=9), st.integers(1, 9))
def test_the_largest_number_below_one_gives_the_last_possible_token(weights, zeros):
    """Whatever the sum is rounded to, and also where the weights are no distribution."""
    shares = torch.tensor([[*weights, *[0.0] * zeros]], dtype=torch.float64)
    sums = shares.cumsum(-1)[0]
    token = by_inverse(shares, torch.tensor([1 - 2**-53], dtype=torch.float64)).item()
    assert sums[token] == sums[-1]
    assert token == 0 or sums[token - 1] < sums[-1]


def test_the_inverse_gives_every_token_its_share():
    shares = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).expand(1000, -1)
    assert torch.bincount(by_inverse(shares, grid(1000))).tolist() == [600, 300, 100]


def test_cuts_keep_the_smallest_set_that_reaches_top_p_and_the_best_k():
    logits = torch.tensor([[0.1, 0.6, 0.3]]).log()
    kept = keep_most_probable(logits, 0, 0.7).softmax(-1)
    torch.testing.assert_close(kept, torch.tensor([[0.0, 2 / 3, 1 / 3]]))
    assert keep_most_probable(logits, 1, 1.0).softmax(-1).tolist() == [[0.0, 1.0, 0.0]]
    assert keep_most_probable(logits, 0, 1.0) is logits
    assert keep_most_probable(logits, 9, 1e-9).softmax(-1).tolist() == [[0.0, 1.0, 0.0]]


def test_random_numbers_are_keyed_by_seed_choice_block_step_and_place():
    def numbers(seed=1, choice=2, block=3, step=4, places=(0, 5)):
        return tuple(uniforms(TOKEN, seed, choice, block, step, list(places)))

    base = numbers()
    assert base == numbers()
    assert all(0 <= number < 1 for number in base)
    assert numbers(places=(5,)) == base[1:]
    others = [numbers(seed=2), numbers(choice=3), numbers(block=4), numbers(step=5)]
    assert len({base, *others, numbers(seed=-1)}) == 6


def test_numbers_of_a_vocabulary_do_not_depend_on_what_stands_beside():
    table = vocabulary_uniforms(1, 2, 3, 4, [0, 7], 50)
    assert table.shape == (2, 50)
    assert len(np.unique(table)) == 100
    assert (vocabulary_uniforms(1, 2, 3, 4, [7], 50) == table[1:]).all()
    assert (vocabulary_uniforms(1, 2, 3, 4, [7], 20) == table[1:, :20]).all()


def test_position_noise_is_standard_gumbel():
    noise = position_noise(1, 0, 0, 0, PLACES)
    assert abs(noise.mean() - np.euler_gamma) < 4 * (np.pi / np.sqrt(6 * 4000))
    assert abs(noise.var() - np.pi**2 / 6) < 0.2
