"""Published checkpoints give the published logits; what cannot be read is refused by name."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from cascade_model.errors import CheckpointMismatch, InputError
from cascade_model.families import read_checkpoint, read_description
from tests.cascade_model.families import published_cases as published
from tests.cascade_model.families.published_cases import DATA


@pytest.mark.parametrize(
    ("system", "case"),
    published.cases(),
    ids=[f"{system}-{case['name']}" for system, case in published.cases()],
)
def test_logits_equal_the_published_code(system, case, record_property):
    network, checkpoint = published.network_of(published.folder_of(system, case["weights"]))
    found, real = published.logits(network, case)
    expected = published.expected_logits(system, case)
    error = (found[..., : checkpoint.rows] - expected)[real].abs().max().item()
    record_property("max_logit_error", error)
    assert error <= 1e-3


AXES = {
    "llada": ("bidirectional", "aligned", "clean", 32),
    "llada_moe": ("bidirectional", "aligned", "clean", 32),
    "llada2": ("block_causal", "aligned", "clean", 32),
    "llada21": ("block_causal", "aligned", "clean", 32),
    "dream": ("bidirectional", "shifted", "own", 32),
    "sdar": ("block_causal", "aligned", "clean", 4),
    "fast_dllm_v2": ("block_causal", "shifted", "clean", 8),
    "a2d_llama": ("bidirectional", "aligned", "clean", 32),
    "mdlm_dit": ("bidirectional", "aligned", "clean", 32),
    "bd3lm_dit": ("block_causal", "aligned", "clean", 4),
    "ar/llama": ("block_causal", "shifted", "clean", 1),
    "ar/gpt2": ("block_causal", "shifted", "clean", 1),
}


@pytest.mark.parametrize("system", AXES)
def test_the_axes_of_each_family_are_recorded(system):
    config = published.read(system).config
    assert (config.attention, config.logits, config.first_place, config.block_size) == AXES[system]
    assert config.is_autoregressive == system.startswith("ar/")


def test_an_override_changes_decoding_and_nothing_else():
    choices = {"block_size": 4, "attention": "block_causal", "logits": "shifted", "mask_id": 5}
    config = read_checkpoint(DATA / "a2d_qwen3", overrides=choices).config
    assert {name: getattr(config, name) for name in choices} == choices
    with pytest.raises(InputError, match=r"num_layers=3 cannot be overridden; only attention"):
        read_checkpoint(DATA / "llada", overrides={"num_layers": 3})


def test_a_model_without_a_mask_token_gets_a_row_that_is_never_emitted():
    checkpoint = published.read("ar/qwen2")
    assert (checkpoint.rows, checkpoint.config.vocab_size, checkpoint.config.mask_id) == (
        384,
        385,
        384,
    )
    assert checkpoint.state["embed.weight"].shape[0] == 385
    assert not checkpoint.state["embed.weight"][384].any()


def test_the_dtype_is_chosen_or_that_of_each_tensor(tmp_path):
    folder = published.copied("sdar", tmp_path / "sdar")
    tensors = load_file(folder / "model.safetensors")
    mixed = {n: t.to(torch.float16 if "norm" in n else torch.bfloat16) for n, t in tensors.items()}
    save_file(mixed, folder / "model.safetensors")
    kept = read_checkpoint(folder, dtype=None)
    assert {t.dtype for t in kept.state.values()} == {torch.float16, torch.bfloat16}
    wide = read_checkpoint(folder)
    assert {t.dtype for t in wide.state.values()} == {torch.float32}
    assert set(kept.dtypes.values()) == {"F16", "BF16"}


def cut_into_shards(system: str, folder, count: int = 3) -> dict[str, str]:
    tensors = load_file(DATA / system / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors[name] for name in names[number::count]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "config.json").write_bytes((DATA / system / "config.json").read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize("system", ["llada", "llada2", "llada_moe"])
def test_shards_named_by_an_index_are_joined(tmp_path, system):
    cut_into_shards(system, tmp_path)
    overrides = published.OVERRIDES.get(system)
    joined = read_checkpoint(tmp_path, overrides=overrides)
    whole = read_checkpoint(DATA / system, overrides=overrides)
    assert joined.config == whole.config
    assert joined.state.keys() == whole.state.keys()
    assert all(torch.equal(joined.state[name], whole.state[name]) for name in whole.state)


def test_experts_merged_into_one_tensor_are_the_same_network(tmp_path):
    tensors = load_file(DATA / "llada2/model.safetensors")
    for kind in ("gate_proj", "up_proj", "down_proj"):
        each = [tensors.pop(f"model.layers.1.mlp.experts.{e}.{kind}.weight") for e in range(8)]
        tensors[f"model.layers.1.mlp.experts.{kind}"] = torch.stack(each)
    folder = published.copied("llada2", tmp_path / "merged", model_type="llada2_moe_veomni")
    save_file(tensors, folder / "model.safetensors")
    merged = read_checkpoint(folder, overrides=published.SILENT)
    apart = published.read("llada2")
    assert all(torch.equal(merged.state[name], apart.state[name]) for name in apart.state)


def test_gpt2_is_read_with_and_without_the_prefix_of_its_names(tmp_path):
    folder = published.copied("ar/gpt2", tmp_path / "gpt2")
    tensors = load_file(folder / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    short |= {f"h.{n}.attn.bias": torch.ones(1, 1, 4, 4) for n in range(2)}
    save_file(short, folder / "model.safetensors")
    with_prefix, without = published.read("ar/gpt2"), read_checkpoint(folder)
    assert all(torch.equal(without.state[n], with_prefix.state[n]) for n in with_prefix.state)


def test_missing_surplus_and_mis_shaped_tensors_are_all_named(tmp_path):
    folder = published.copied("dream", tmp_path / "dream")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    tensors["model.extra.weight"] = torch.zeros(3)
    tensors["model.norm.weight"] = torch.zeros(5)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointMismatch) as caught:
        read_checkpoint(folder)
    sentence = str(caught.value)
    assert "lacks the tensors model.layers.1.self_attn.k_proj.bias" in sentence
    assert "has the unknown model.extra.weight" in sentence
    assert "model.norm.weight of shape [5] where its config makes it [64]" in sentence


def test_constants_and_a_tied_head_s_copy_are_passed_over(tmp_path):
    folder = published.copied("a2d_qwen2", tmp_path / "tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors")
    assert "head.weight" not in read_checkpoint(folder, overrides={"mask_id": 3}).state


def test_quantised_weights_are_refused(tmp_path):
    folder = published.copied("sdar", tmp_path / "sdar")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=rf"{name} of type F8_E4M3; only F64, F32, F16, BF16"):
        read_checkpoint(folder)


def test_code_in_the_folder_is_never_run(tmp_path):
    folder = published.copied("llada", tmp_path / "llada")
    (folder / "modeling_llada.py").write_text("raise SystemExit('run')\n")
    (folder / "configuration_llada.py").write_text("raise SystemExit('run')\n")
    assert read_checkpoint(folder).family.name == "llada"


def test_a_path_that_is_neither_folder_nor_gguf_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"neither a folder with config.json nor"):
        read_checkpoint(tmp_path / "nothing")


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointMismatch, match=r"no readable config.json"):
        read_checkpoint(tmp_path)


def test_a_description_needs_no_weights(tmp_path):
    (tmp_path / "config.json").write_bytes((DATA / "sdar/config.json").read_bytes())
    assert read_description(tmp_path).config == published.read("sdar").config


PROGRAM = """
import sys, torch
from pathlib import Path
from cascade_model.families import read_checkpoint
from cascade_model.networks import network_with
def peak():  # not ru_maxrss, which starts at the parent's
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
read_checkpoint(sys.argv[1])
before = peak()
read = read_checkpoint(sys.argv[2], dtype=getattr(torch, sys.argv[3]))
network = network_with(read.config, read.state, "")
weights = sum(p.numel() * p.element_size() for p in network.parameters()) / 2**20
print(weights, peak() - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reading_needs_about_the_memory_of_the_model(tmp_path, dtype):
    small = DATA / "sdar"
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 6}
    shape = sizes | {"vocab_size": 8192, "head_dim": 64}
    folder = published.copied("sdar", tmp_path / "large", **shape)
    from cascade_model.families.registry import recognise
    from cascade_model.families.table import Table

    config = read_description(folder).config
    table = Table(recognise({"model_type": "sdar"}, ""), config, config.vocab_size)
    tensors = {name: torch.zeros(shape) for name, shape in table.shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(small), str(folder), dtype],
        capture_output=True, text=True, check=True, cwd=DATA.parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    weights, added = map(float, result.stdout.split())
    largest = max(t.numel() * 4 for t in tensors.values()) / 2**20
    assert weights > 80 if dtype == "float32" else weights > 40
    assert added < weights + 3 * largest
