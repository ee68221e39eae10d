"""Estimates of memory and disk against what really happens."""

import contextlib
import dataclasses
import itertools
from functools import partial

import pytest
import torch

from cascade_model.config import ExpertsConfig
from cascade_model.distillation import Online, Taught, banned_with, distillation_loss
from cascade_model.footprint import (
    checkpoint_bytes,
    footprint,
    parameter_count,
    tensors_of,
)
from cascade_model.loss import LOGITS_PER_CHUNK, diffusion_loss
from cascade_model.networks import build_network
from cascade_model.optim import make_optimizer
from cascade_model.progress import Beside
from cascade_model.stored_teaching import bucket_divergence
from cascade_model.training_config import AuxiliaryConfig, OptimizerConfig, TrainerConfig
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


def saved_for_backward(config, precision, loss=diffusion_loss):
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
        loss(model, batch)
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


def test_next_tokens_keep_what_the_last_layer_makes_of_the_clean_half():
    config = shape_of({"clean_half": "token_causal", "num_layers": 2})
    trainer = TrainerConfig(sequences_per_forward=N, sequences_per_step=N)
    for weight in (0.0, 0.3):
        loss = partial(diffusion_loss, auxiliary=AuxiliaryConfig(ar_weight=weight))
        beside = Beside(has_next_tokens=weight > 0)
        found = footprint(config, trainer, sequence_length=LENGTH, beside=beside).activations
        assert found == pytest.approx(saved_for_backward(config, "float32", loss), rel=0.1)


AUTOREGRESSIVE = {"block_size": 1, "logits": "shifted"}
BESIDE = {
    "nothing": Beside(),
    "next tokens": Beside(has_next_tokens=True),
    "entropy": Beside(has_entropy=True),
    "targets": Beside(has_targets=True),
    "teacher": Beside(teacher=shape_of({"num_layers": 2, "vocab_size": 4000} | AUTOREGRESSIVE)),
}


def targets_of(batch, sequences, places):
    """Three named tokens for each masked one, compared as those on disk are."""
    ids = torch.arange(3).expand(len(places), -1)
    given = (ids, torch.full(ids.shape, 0.2).log(), torch.full((len(places),), 0.4))
    has_teacher = torch.ones(len(places), dtype=torch.bool)
    return Taught(given, lambda logits, *told: bucket_divergence(*told, logits / 2), has_teacher)


def loss_beside(beside, student):
    """The loss that computes this beside the masked tokens' cross entropy."""
    auxiliary = AuxiliaryConfig(
        ar_weight=0.3 * beside.has_next_tokens, entropy_weight=2.0 * beside.has_entropy
    )
    if beside.teacher is None and not beside.has_targets:
        return partial(diffusion_loss, auxiliary=auxiliary)
    reference = targets_of
    if beside.teacher is not None:
        teacher = build_network(beside.teacher).requires_grad_(False)
        teacher.init_weights(1)
        reference = Online(teacher, banned_with(beside.teacher, student))
    return partial(distillation_loss, reference=reference, alpha=0.5)


def peak_of(work):
    """Bytes that the allocator had given at most while it worked, and had not before."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        work()
    found = profiler.profiler.kineto_results.events()
    moves = sorted((e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in moves))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BESIDE)
def test_a_step_with_all_that_its_loss_compares_is_covered(name, precision):
    """By no more than a third as much again, where logits are most of what there is."""
    beside = BESIDE[name]
    config = shape_of({"num_layers": 2, "vocab_size": 4000, "clean_half": "token_causal"})
    model = build_network(config)
    model.init_weights(0)
    loss = loss_beside(beside, config)
    clean = torch.randint(0, 13, (N, LENGTH), generator=torch.Generator().manual_seed(0))
    is_masked = torch.rand(N, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.5
    batch = batch_of(clean, block_size=config.block_size, is_masked=is_masked)

    def step():
        half = torch.autocast("cpu", dtype=torch.bfloat16)
        with half if precision == "bfloat16" else contextlib.nullcontext():
            found = loss(model, batch).sum
        found.backward()

    trainer = TrainerConfig(sequences_per_forward=N, sequences_per_step=N, precision=precision)
    rate = float(is_masked.float().mean())
    found = footprint(config, trainer, sequence_length=LENGTH, mask_rate=rate, beside=beside)
    there = found.parameters + found.optimizer
    there += 4 * parameter_count(beside.teacher) if beside.teacher else 0
    assert 1 < (found.on_device - there) / peak_of(step) < 1.3


def test_the_end_of_a_run_may_take_more_than_its_steps():
    """The first of many ranks then holds the whole model; a GPU does not."""
    config = shape_of({"hidden_size": 256, "intermediate_size": 1024, "num_layers": 16})
    trainer = TrainerConfig(sequences_per_step=8)
    many = footprint(config, trainer, sequence_length=16, ranks=8)
    state = many.parameters + many.gradients + many.optimizer
    assert many.export == 4 * parameter_count(config)
    assert many.on_host == state + many.staging + many.export
    one = footprint(config, trainer, sequence_length=LENGTH)
    assert one.on_host == one.on_device + one.staging


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
