"""Each estimator is unbiased for its own stated target; the exact cases of the reference."""

import itertools
import math

import numpy as np
import pytest
import torch

from cascade_model.batch import TrainBatch
from cascade_model.loss import diffusion_loss
from cascade_model.objective import LossParts
from tests.cascade_model import toy_oracle as oracle
from tests.cascade_model.toy_oracle import BLOCKS, LENGTH, MASK, WHOLE, ToyCorpus, paired, toy_model


@pytest.mark.parametrize(
    "rows",
    [oracle.rate_rows, oracle.axis_rows, lambda: [oracle.short_row()], oracle.likelihood_rows],
)
def test_each_estimator_is_within_three_standard_errors_of_its_target(rows):
    for row in rows():
        assert abs(row.z) < 3, oracle.render([row])
        assert row.standard_error < 0.05 * abs(row.exact)


def test_a_wrong_target_is_found_out():
    row = oracle.rate_rows()[4]
    whole = oracle.expected(BLOCKS, oracle.by_one, per="block") / LENGTH
    assert abs((row.estimate - whole) / row.standard_error) > 3


def test_rates_and_exact_counts_have_one_expectation():
    """Case 4: Eq. 3 and Eq. 6 of LLaDA for any loss of (mask, place), here random, L = 3."""
    losses = np.random.default_rng(0).normal(size=(2, 2, 2, 3))
    by_rates = by_counts = 0.0
    for mask in itertools.product([0, 1], repeat=3):
        total = float((losses[mask] * np.array(mask)).sum())
        count = sum(mask)
        if count:
            by_counts += total * 3 / count / math.comb(3, count) / 3
        for rate, share in oracle.rates_in(0.0, 1.0):
            chance = rate**count * (1 - rate) ** (3 - count)
            by_rates += share * chance * total / rate
    assert by_rates == pytest.approx(by_counts, rel=1e-12)


@pytest.mark.parametrize("kind", [WHOLE, BLOCKS])
def test_rates_from_zero_give_the_exact_count_bound_of_the_network(kind):
    per = "block" if kind is BLOCKS else "sequence"
    units = [(0, 1), (2, 3)] if kind is BLOCKS else [(0, 1, 2, 3)]
    exact = sum(oracle.exact_count_bound(kind, unit) for unit in units)
    found = oracle.expected(kind, oracle.by_rate, (0.0, 1.0), per=per)
    assert found == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_at_a_fixed_rate_the_weighted_count_of_masked_tokens_is_the_length(rate):
    count = 0.0
    for mask in itertools.product([False, True], repeat=LENGTH):
        chance = math.prod(rate if m else 1 - rate for m in mask)
        count += chance * sum(mask) / rate
    assert count == pytest.approx(LENGTH, rel=1e-12)


def test_a_complementary_pair_uses_every_label_once():
    """Case 7, through the reader, prompts left alone."""
    corpus = ToyCorpus(maskable=(False, True, True, True), count=64)
    batch = corpus.batch(0, 128, paired(3))
    first, second = batch.is_masked[::2], batch.is_masked[1::2]
    assert np.array_equal(first ^ second, batch.is_maskable[::2])
    assert (first.sum(axis=1) + second.sum(axis=1) == 3).all()
    assert (batch.sequence_ids[::2] == batch.sequence_ids[1::2]).all()
    rates = batch.thresholds.astype(np.int64)
    assert (rates[::2] + rates[1::2] == 2**32).all()


def whole_loss(sequences: list[tuple[int, ...]], **kind) -> list[float]:
    """The loss of each sequence on its own, everything masked at rate 1."""
    model = toy_model(**kind)
    found = []
    for tokens in sequences:
        clean = torch.tensor([tokens])
        parts: LossParts = diffusion_loss(
            model, TrainBatch.of(clean, torch.ones_like(clean, dtype=torch.bool), block_size=1)
        )
        found.append(float(parts.sum.detach()))
    return found


@pytest.mark.parametrize(
    ("kind", "given"),
    [({}, ()), ({"logits": "shifted"}, (1,)), ({"logits": "shifted", "first_place": "own"}, ())],
)
def test_block_size_one_at_rate_one_is_a_chain_rule(kind, given):
    """exp(-loss) over all sequences of 3 adds up to one: a likelihood, in float64."""
    outcomes = [i for i in range(8) if i not in (MASK, oracle.PAD)]
    every = [given + rest for rest in itertools.product(outcomes, repeat=3 - len(given))]
    losses = whole_loss(every, block_size=1, **kind)
    assert sum(math.exp(-nats) for nats in losses) == pytest.approx(1, rel=1e-12)


def test_the_table_can_be_rendered():
    row = oracle.row_of("1/t", "bound", 2.0, 2.5, 0.25)
    assert (
        oracle.render([row]).splitlines()[-1]
        == "| 1/t | bound | 2.00000 | 2.50000 | 0.25000 | +2.00 |"
    )
