"""Operations counted by hand against those that torch counts while it computes."""

import dataclasses
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cascade_model.attention import clean_mask, dense, training_mask
from cascade_model.config import ExpertsConfig, NoiseConfig
from cascade_model.distillation import Online, distillation_loss
from cascade_model.flops import (
    GPUS,
    cpu_speed,
    device_peak,
    gpu_of,
    is_last_trimmed,
    training_flops,
)
from cascade_model.loss import diffusion_loss
from cascade_model.networks import build_network
from cascade_model.progress import Beside, work_of
from cascade_model.training_config import AuxiliaryConfig
from tests.tiny_models import batch_of, tiny_config

LENGTH, BLOCK, N = 32, 4, 2
AR = {"block_size": 1, "logits": "shifted", "clean_half": "token_causal"}
SHAPES = {
    "aligned": {},
    "shifted, clean first places": {"logits": "shifted"},
    "shifted, noisy first places": {"logits": "shifted", "first_place": "noisy"},
    "token-causal clean half": {"clean_half": "token_causal"},
    "bidirectional": {"attention": "bidirectional"},
    "autoregressive": AR,
    "experts": {
        "experts": ExpertsConfig(
            num_experts=4,
            experts_per_token=2,
            intermediate_size=8,
            first_dense_layers=1,
            shared_intermediate_size=12,
        )
    },
    "gpt2": {"network": "gpt2", "num_kv_heads": 4},
    "untied head": {"tied_head": False},
}


def dense_training(segments, block_size, clean_half):
    """The oracle's attention, told apart by its rows: with `Keep` there are no clean queries."""
    mask = training_mask(segments, block_size, clean_half)

    def attend(q, k, v):
        return dense(mask[:, :, : q.shape[2]])(q, k, v)

    return attend


def counted_by_torch(config, is_masked, loss=partial(diffusion_loss, outcomes="all")):
    """Operations of one forward and backward pass on the dense path, by module: in all, and those
    of the attention's products."""
    model = build_network(config)
    model.init_weights(0)
    model.training_attention = dense_training
    clean = torch.randint(0, 13, (N, LENGTH), generator=torch.Generator().manual_seed(0))
    batch = batch_of(clean, block_size=config.block_size, is_masked=is_masked)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss(model, batch).sum.backward()
    by_op = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in by_op.items() if "bmm" in str(op))
    return counter.get_total_flops(), attention


def dense_pairs(config):
    """Query-key pairs of the dense path per data token, over all layers."""
    layers = config.num_layers
    if config.is_autoregressive or config.attention == "bidirectional":
        return layers * LENGTH
    last = 2 * LENGTH if is_last_trimmed(config) else 4 * LENGTH
    return (layers - 1) * 4 * LENGTH + last


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_counts_are_those_of_torch_but_for_the_pairs_nobody_sees(changes, monkeypatch):
    """Torch counts every pair of the dense path, masked or not, so the attention's part is in the
    ratio of the pairs. A fused projection of queries, keys and values makes the clean rows' last
    queries as well, which nobody uses. Everything else agrees to the operation."""
    monkeypatch.setattr("cascade_model.training_input.grouped_clean", dense_clean)
    config = tiny_config(**({"max_sequence_length": LENGTH} | changes))
    is_masked = torch.rand(N, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.5
    all_rows = N * (LENGTH - 1)  # nothing predicts a first token
    rows = all_rows if config.is_autoregressive else supervised_rows(config, is_masked)
    found = training_flops(config, sequence_length=LENGTH, mask_rate=rows / (N * LENGTH))
    head = 2.0 * config.hidden_size * config.vocab_size * rows / (N * LENGTH)
    found = dataclasses.replace(found, head=head)
    total, attention = counted_by_torch(config, is_masked)
    tokens = N * LENGTH
    per_pair = 4 * config.num_heads * config.head_dim
    assert attention == 3 * tokens * per_pair * dense_pairs(config)
    assert total - attention == 3 * tokens * (found.linear + found.head + unused_queries(config))


def test_the_next_token_term_adds_its_head_rows_and_the_clean_queries(monkeypatch):
    monkeypatch.setattr("cascade_model.training_input.grouped_clean", dense_clean)
    config = tiny_config(clean_half="token_causal", max_sequence_length=LENGTH)
    is_masked = torch.rand(N, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.5
    loss = partial(diffusion_loss, outcomes="all", auxiliary=AuxiliaryConfig(ar_weight=0.3))
    total, attention = counted_by_torch(config, is_masked, loss)
    tokens, rate = N * LENGTH, int(is_masked.sum()) / (N * LENGTH)
    found = training_flops(config, sequence_length=LENGTH, mask_rate=rate, has_next_tokens=True)
    per_pair = 4 * config.num_heads * config.head_dim
    assert attention == 3 * tokens * per_pair * config.num_layers * 4 * LENGTH
    first_tokens = 2 * config.hidden_size * config.vocab_size * N  # which nothing predicts
    assert total - attention == 3 * (tokens * (found.linear + found.head) - first_tokens)


def test_a_running_teacher_is_counted_forward_with_the_logits_it_is_asked_for(monkeypatch):
    monkeypatch.setattr("cascade_model.training_input.grouped_clean", dense_clean)
    student, shape = tiny_config(), tiny_config(**AR, num_layers=3)
    teacher = build_network(shape).requires_grad_(False)
    teacher.init_weights(1)
    is_masked = torch.rand(N, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.5
    loss = partial(distillation_loss, reference=Online(teacher, []), alpha=0.5)
    with_teacher, pairs = counted_by_torch(student, is_masked, loss)
    alone, own_pairs = counted_by_torch(student, is_masked, diffusion_loss)
    rate = int(is_masked.sum()) / (N * LENGTH)
    noise = NoiseConfig(block_size=BLOCK, min_rate=rate, max_rate=rate)
    flops = [work_of(student, noise, LENGTH, it)[1] for it in (Beside(teacher=shape), Beside())]
    useful = 4 * shape.num_heads * shape.head_dim * shape.num_layers * (LENGTH + 1) / 2
    linear = (with_teacher - pairs) - (alone - own_pairs)
    assert flops[0] - flops[1] == pytest.approx(useful + linear / (N * LENGTH), rel=1e-9)


def unused_queries(config):
    """Operations per token of the last layer's queries of the clean rows."""
    is_fused = config.network != "transformer"
    products = 2 * config.hidden_size * config.num_heads * config.head_dim
    return products if is_fused and is_last_trimmed(config) else 0


def supervised_rows(config, is_masked):
    if config.logits == "shifted" and config.first_place != "own":
        is_masked = is_masked.clone()
        is_masked[:, 0] = False
    return int(is_masked.sum())


def dense_clean(segments, block_size, clean_half):
    return dense(clean_mask(segments, block_size, clean_half))


@pytest.mark.parametrize("clean_half", ["block_causal", "token_causal"])
@pytest.mark.parametrize("block", [1, 4, LENGTH])
def test_useful_pairs_are_those_of_the_mask(block, clean_half):
    """Brute force: the attention's part is the number of True in the mask of the doubled input."""
    config = tiny_config(block_size=block, clean_half=clean_half, num_layers=3)
    mask = training_mask(torch.zeros(1, LENGTH, dtype=torch.int32), block, clean_half)[0, 0]
    pairs = 2 * int(mask.sum()) + int(mask[:LENGTH].sum())  # the last layer has no clean queries
    found = training_flops(config, sequence_length=LENGTH)
    per_pair = 4 * config.num_heads * config.head_dim
    assert found.attention * LENGTH == per_pair * pairs


def test_an_autoregressive_pass_is_half_of_the_doubled_one():
    """In a deep model; the head and the last layer's trimmed rows are the rest."""
    shape = {"num_layers": 40, "logits": "shifted", "clean_half": "token_causal"}
    doubled = training_flops(tiny_config(**shape, block_size=2), sequence_length=4096)
    alone = training_flops(tiny_config(**shape, block_size=1), sequence_length=4096)
    assert alone.linear / doubled.linear == 0.5
    assert alone.attention / doubled.attention == pytest.approx(0.5, rel=1e-3)
    assert alone.head == 2 * doubled.head


def test_another_block_size_replaces_the_models_own():
    config = tiny_config(block_size=BLOCK)
    for size in (1, 8, LENGTH):
        other = dataclasses.replace(config, block_size=size)
        assert training_flops(config, sequence_length=LENGTH, block_size=size) == training_flops(
            other, sequence_length=LENGTH
        )


def test_parts_add_up():
    found = training_flops(tiny_config(), sequence_length=LENGTH)
    assert found.total == 3 * found.forward == found.forward + found.backward
    assert found.forward == found.linear + found.attention + found.head


def test_a_dit_computes_its_conditioning_beside_the_tokens():
    """Torch counts it too; it is computed once for all, however long the sequences are."""
    config = tiny_config(network="dit", num_kv_heads=4, tied_head=False, conditioning_size=8)
    is_masked = torch.ones(N, LENGTH, dtype=torch.bool)
    found = training_flops(config, sequence_length=LENGTH, mask_rate=1.0)
    total, attention = counted_by_torch(config, is_masked)
    width, conditioning = config.hidden_size, config.conditioning_size
    inner = config.num_layers * 6 * width + 2 * width
    forward = 2 * (256 * conditioning + conditioning**2 + conditioning * inner)
    backward = 2 * forward - 2 * 256 * conditioning  # the sinusoids want no gradient
    tokens = found.linear + found.head + unused_queries(config)
    beside = total - attention - 3 * N * LENGTH * tokens
    assert beside == forward + backward


def test_peaks_of_known_gpus_and_the_speed_of_this_cpu():
    peaks = {
        name: gpu.bfloat16
        for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA L40S", "NVIDIA L4")
        if (gpu := gpu_of(name))
    }
    assert list(peaks.values()) == [989.4e12, 756e12, 362e12, 121e12]
    assert gpu_of("NVIDIA A100-SXM4-80GB") is GPUS["A100"]
    for name in ("Voodoo 3", "NVIDIA RTX A1000 Laptop GPU", "NVIDIA A16", "NVIDIA H100X"):
        assert gpu_of(name) is None
    for name in GPUS:
        assert gpu_of(f"NVIDIA {name}") is GPUS[name]
    assert device_peak("meta", "float32") is None
    assert device_peak("cpu", "float32") is None
    here = cpu_speed("float32")
    assert 1e9 < here < 1e14
    assert cpu_speed("float32") == here  # measured once
