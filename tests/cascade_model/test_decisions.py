"""What is told of decisions, against hand-made logits."""

import math

import pytest
import torch

from cascade_model.decisions import logprobs_of
from cascade_model.unmasking import Drawn


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
