"""The schedule is a function of tokens; the optimiser decays matrices only."""

import math

import pytest
import torch

from cascade_model.errors import InputError
from cascade_model.optim import learning_rate, make_optimizer, set_learning_rate
from cascade_model.training_config import OptimizerConfig

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


@pytest.mark.parametrize(
    ("name", "last", "beyond"),
    [
        ("beta1", 0.0, -0.1),
        ("beta1", 0.999, 1.0),
        ("beta2", 0.0, -0.1),
        ("beta2", 0.9999, 1.0),
        ("eps", 1e-30, 0.0),
        ("eps", 1.0, math.inf),
        ("weight_decay", 0.0, -0.1),
        ("weight_decay", 10.0, math.inf),
        ("final_lr_rate", 0.0, -0.1),
        ("final_lr_rate", 1.0, 1.1),
        ("final_lr_rate", 0.5, math.nan),
    ],
)
def test_what_no_optimiser_can_have_is_refused_by_name(name, last, beyond):
    """The last value that is taken gives an optimiser whose step moves weights to numbers."""
    layer = torch.nn.Linear(2, 1)
    layer.weight.grad = torch.tensor([[1.0, 0.0]])  # one weight without a gradient
    adam = make_optimizer(layer, OptimizerConfig(**{name: last}))
    adam.step()
    assert torch.isfinite(layer.weight).all()
    with pytest.raises(InputError, match=rf"optimizer\.{name}={beyond} must be .*; use"):
        OptimizerConfig(**{name: beyond})


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
