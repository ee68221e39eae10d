"""The figures of a text against values worked out by hand, and against the model itself."""

import math

import pytest
import torch

from cascade_model.attention import grouped_clean
from cascade_model.model import never_emitted
from tests.benchmarks.engine import block_model
from tests.benchmarks.text_quality import entropy, nats_per_token, repetition


def test_the_entropy_is_that_of_the_texts_own_tokens():
    assert entropy([7] * 9) == 0.0
    assert entropy([1, 2, 3, 4]) == pytest.approx(math.log(4))
    assert entropy([1, 1, 2, 3]) == pytest.approx(1.5 * math.log(2))
    assert entropy([1, 2, 1, 3]) == entropy([1, 1, 2, 3])


def test_repetition_counts_the_grams_that_came_before():
    assert repetition([1, 2, 3, 4, 5, 6]) == 0.0
    assert repetition([5] * 8) == pytest.approx(4 / 5)  # of five 4-grams the first is new
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([1, 2, 1, 2, 1], n=2) == pytest.approx(2 / 4)
    assert repetition([1, 2, 3]) == 0.0


def test_a_texts_nats_are_the_mean_of_the_parents_own_predictions():
    parent = block_model(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16,
                         intermediate_size=64, block_size=1, logits="shifted")  # fmt: skip
    prompt, text = [5, 9, 2], [11, 4, 4, 7]
    tokens = torch.tensor([[*prompt, *text]])
    attend = grouped_clean(torch.zeros_like(tokens, dtype=torch.int32), 1, "block_causal")
    with torch.no_grad():
        logits = parent(
            tokens, torch.arange(7)[None], attend, lambda hidden, head: head(hidden[0]).double()
        )
    logits[:, never_emitted(parent.config)] = float("-inf")
    rows = torch.arange(len(prompt) - 1, 6)
    expected = -logits.log_softmax(-1)[rows, text].mean()
    assert nats_per_token(parent, prompt, text) == pytest.approx(float(expected), abs=1e-5)
