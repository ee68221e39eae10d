"""The schedule is a function of tokens; the optimiser decays matrices only."""

import pytest
import torch

from cascade_model.config import OptimizerConfig
from cascade_model.optim import learning_rate, make_optimizer, set_learning_rate

CONFIG = OptimizerConfig(peak_lr=1.0, warmup_rate=0.1, decay_rate=0.4, final_lr_rate=0.25)


def test_rate_rises_stays_and_falls():
    assert learning_rate(50, 1000, CONFIG) == pytest.approx(0.5)
    assert learning_rate(100, 1000, CONFIG) == 1.0
    assert learning_rate(600, 1000, CONFIG) == 1.0
    assert learning_rate(800, 1000, CONFIG) == pytest.approx(0.625)
    assert learning_rate(1000, 1000, CONFIG) == pytest.approx(0.25)


def test_first_step_moves_the_weights():
    assert learning_rate(1, 1000, CONFIG) > 0


def test_rate_never_exceeds_the_peak():
    rates = [learning_rate(tokens, 977, CONFIG) for tokens in range(1, 978)]
    assert max(rates) == 1.0
    assert min(rates) > 0


def test_schedule_without_warmup_and_decay_is_constant():
    flat = OptimizerConfig(peak_lr=0.5, warmup_rate=0.0, decay_rate=0.0)
    assert {learning_rate(tokens, 10, flat) for tokens in range(1, 11)} == {0.5}


def test_norms_and_biases_are_not_decayed():
    model = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(model, CONFIG)
    decays = {
        tuple(p.shape): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]
    }
    assert decays == {(2, 3): CONFIG.weight_decay, (2,): 0.0}


def test_rate_reaches_every_group():
    optimizer = make_optimizer(torch.nn.Linear(3, 2), CONFIG)
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]
