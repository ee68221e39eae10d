"""Estimates of memory and disk against what really happens."""

import contextlib
import dataclasses

import pytest
import torch

from cascade_model.config import ExpertsConfig, OptimizerConfig, TrainerConfig
from cascade_model.footprint import (
    checkpoint_bytes,
    footprint,
    parameter_count,
    tensors_of,
)
from cascade_model.loss import LOGITS_PER_CHUNK, diffusion_loss
from cascade_model.networks import build_network
from cascade_model.optim import make_optimizer
from tests.tiny_models import batch_of, tiny_config

EXPERTS = ExpertsConfig(num_experts=4, experts_per_token=2, intermediate_size=96, router_bias=True)
SHAPES = {
    "transformer": {},
    "untied": {"tied_head": False},
    "token-causal": {"clean_half": "token_causal", "logits": "shifted"},
    "bidirectional": {"attention": "bidirectional"},
    "autoregressive": {"block_size": 1, "logits": "shifted"},
    "experts": {"experts": EXPERTS},
    "gpt2": {"network": "gpt2", "num_kv_heads": 4},
    "dit": {"network": "dit", "num_kv_heads": 4, "tied_head": False},
}
N, LENGTH = 3, 192


def shape_of(changes):
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 160, "num_layers": 4}
    return tiny_config(**({"max_sequence_length": LENGTH} | sizes | changes))


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_parameters_and_moments_are_counted_exactly(changes):
    config = shape_of(changes)
    model = build_network(config)
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())
    adam = make_optimizer(model, OptimizerConfig())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    adam.step()
    found = footprint(config, TrainerConfig(), sequence_length=LENGTH)
    moments = [v for held in adam.state.values() for k, v in held.items() if k != "step"]
    assert found.optimizer == sum(v.nbytes for v in moments)
    assert found.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert found.parameters == sum(p.nbytes for p in model.parameters())
    steps = 4 * len(adam.state)
    assert checkpoint_bytes(config) == found.parameters + found.optimizer + steps
    assert found.staging == found.parameters + found.optimizer


def saved_for_backward(config, precision):
    """Bytes that autograd keeps of one forward pass, weights left out, each storage once."""
    model = build_network(config)
    model.init_weights(0)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    clean = torch.randint(0, 13, (N, LENGTH), generator=torch.Generator().manual_seed(0))
    is_masked = torch.rand(N, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.5
    batch = batch_of(clean, block_size=config.block_size, is_masked=is_masked)
    half = torch.autocast("cpu", dtype=torch.bfloat16)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        half if precision == "bfloat16" else contextlib.nullcontext(),
    ):
        diffusion_loss(model, batch)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_activations_are_those_that_autograd_keeps(changes, precision):
    """Of the transformer within a tenth, of the other networks within a third."""
    config = shape_of(changes)
    trainer = TrainerConfig(sequences_per_forward=N, sequences_per_step=N, precision=precision)
    found = footprint(config, trainer, sequence_length=LENGTH)
    real = saved_for_backward(config, precision)
    is_plain = config.network == "transformer" and config.experts is None
    casts = found.gathered  # of the weights
    assert found.activations + casts == pytest.approx(real, rel=0.1 if is_plain else 0.35)


def test_recomputation_keeps_the_inputs_of_all_layers_and_one_layer_whole():
    deep = shape_of({"num_layers": 12})
    kept = footprint(deep, TrainerConfig(), sequence_length=LENGTH).activations
    again = footprint(deep, TrainerConfig(recompute=True), sequence_length=LENGTH).activations
    rows = 2 * LENGTH * 16 * deep.hidden_size * 4
    assert again - 12 * rows < kept / 11
    assert again < kept / 4


def test_shards_add_up_to_the_whole_and_replicas_hold_it_each():
    config = shape_of({"hidden_size": 60, "intermediate_size": 161})
    alone = footprint(config, TrainerConfig(), sequence_length=LENGTH)
    trainer = TrainerConfig(sequences_per_step=32)
    for ranks in (2, 4):
        found = footprint(config, trainer, sequence_length=LENGTH, ranks=ranks)
        assert alone.parameters <= ranks * found.parameters < alone.parameters * 1.1
        assert found.gathered > 0
    pair = dataclasses.replace(trainer, replicas=2)
    two = footprint(config, trainer, sequence_length=LENGTH, ranks=2)
    replicas = footprint(config, pair, sequence_length=LENGTH, ranks=4)
    assert replicas.parameters == two.parameters
    whole = footprint(config, pair, sequence_length=LENGTH, ranks=2)
    assert (whole.parameters, whole.gathered) == (alone.parameters, 0)


def test_logits_stop_growing_at_a_chunk():
    config = shape_of({"vocab_size": 100_000})
    few = footprint(config, TrainerConfig(sequences_per_forward=1), sequence_length=64)
    many = footprint(config, TrainerConfig(sequences_per_forward=32), sequence_length=4096)
    assert few.logits == 3 * 4 * 32 * 100_000
    assert many.logits == 3 * 4 * LOGITS_PER_CHUNK


def test_a_large_model_is_described_without_being_made():
    config = shape_of({"hidden_size": 4096, "intermediate_size": 14336, "num_layers": 64})
    assert parameter_count(config) > 10**10
    assert len(tensors_of(config)) > 500
