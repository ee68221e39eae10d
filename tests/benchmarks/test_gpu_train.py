"""The GPU's benchmark at a tiny size on the CPU: the same code, so that it does not rot."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from tests.benchmarks import gpu_train, train_arms

TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
}


def test_a_tiny_shape_gives_every_row(tmp_path):
    found = gpu_train.limits_of("cpu", sizes=(64,), copied=2**16)
    assert found.peak is None, "no maker tells it of this CPU"
    limits = dataclasses.replace(found, peak=10 * found.flops)
    settings = {"precision": "bfloat16", "recompute": True}
    case = gpu_train.Case("tiny", TINY, 64, 2, settings)
    rows = {row.name: row for row in gpu_train.all_rows((case,), tmp_path, "cpu", limits, steps=2)}
    assert {"tiny: step", "tiny: MFU", "tiny: MFU on the roofline", "tiny: step / roofline"} <= {
        *rows
    }
    assert all(row.value > 0 for row in rows.values())
    measured, least = rows["tiny: MFU"].value, rows["tiny: MFU on the roofline"].value
    assert rows["tiny: step / roofline"].value == pytest.approx(least / measured)
    assert rows["tiny: MFU"].bar == 45


def test_the_roofline_is_operations_and_bytes_at_full_speed(tmp_path):
    corpus = train_arms.corpus_of(tmp_path, 64, sequences=4)
    model = train_arms.model_of(corpus, TINY)
    work = 128 * gpu_train.training_flops(model.config, sequence_length=64).total
    bytes_moved = 32 * sum(p.numel() for p in model.parameters())
    infinite = float("inf")
    only_flops = gpu_train.Limits(work, infinite)
    only_bytes = gpu_train.Limits(infinite, bytes_moved)
    assert gpu_train.bound(model, 128, 64, only_flops) == pytest.approx(1)
    assert gpu_train.bound(model, 128, 64, only_bytes) == pytest.approx(1)


@pytest.mark.parametrize(
    ("shape", "millions"), [(train_arms.SMOLLM2, 134.5), (gpu_train.QWEN_1_5B, 1543.7)]
)
def test_the_shapes_are_the_published_ones(tmp_path, shape, millions):
    corpus = train_arms.corpus_of(tmp_path, 64, sequences=4)
    with torch.device("meta"):
        config = train_arms.config_of(corpus, shape)
        model = train_arms.Transformer(config)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_is_refused_in_one_sentence():
    words = [sys.executable, "-m", "tests.benchmarks.gpu_train"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == gpu_train.REFUSAL
