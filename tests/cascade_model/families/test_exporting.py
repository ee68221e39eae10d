"""A checkpoint that is read and exported is the same checkpoint, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cascade_model.errors import CheckpointMismatch, InputError
from cascade_model.families import export, read_checkpoint, read_description
from cascade_model.networks import build_network, network_with, own_state
from cascade_model.tokenizer import byte_tokenizer
from tests.cascade_model.families import published_cases as published
from tests.cascade_model.families.published_cases import DATA


def exported(folder, checkpoint, output, **arguments):
    network = network_with(checkpoint.config, checkpoint.state, str(folder))
    export(network, output, checkpoint.published, dtypes=checkpoint.dtypes, **arguments)
    return published.file_contents(output / "model.safetensors")


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("system", published.SYSTEMS)
def test_the_round_trip_is_bit_equal(tmp_path, system):
    found = exported(DATA / system, published.read(system), tmp_path / "out")
    assert found == published.file_contents(DATA / system / "model.safetensors")
    original = config_of(DATA / system)
    original.pop("auto_map", None)
    written = config_of(tmp_path / "out")
    told = written.pop("cascade_decoding", {})  # ids that the checkpoint itself does not record
    assert set(told) <= {"mask_id", "eos_id"}
    assert written == original
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kept", [None, torch.float32])
def test_every_tensor_keeps_its_published_type(tmp_path, kept):
    folder = published.copied("llada2", tmp_path / "llada2", dtype="bfloat16")
    tensors = load_file(folder / "model.safetensors")
    wide = ("mlp.gate.expert_bias",)
    save_file(
        {n: t if n.endswith(wide) else t.to(torch.bfloat16) for n, t in tensors.items()},
        folder / "model.safetensors",
    )
    checkpoint = read_checkpoint(folder, dtype=kept, overrides=published.SILENT)
    assert set(checkpoint.dtypes) == {"model.layers.1.mlp.gate.expert_bias"}
    found = exported(folder, checkpoint, tmp_path / "out")
    assert found == published.file_contents(folder / "model.safetensors")


def test_merged_experts_stay_merged(tmp_path):
    tensors = load_file(DATA / "llada2/model.safetensors")
    for kind in ("gate_proj", "up_proj", "down_proj"):
        each = [tensors.pop(f"model.layers.1.mlp.experts.{e}.{kind}.weight") for e in range(8)]
        tensors[f"model.layers.1.mlp.experts.{kind}"] = torch.stack(each)
    folder = published.copied("llada2", tmp_path / "merged", model_type="llada2_moe_veomni")
    save_file(tensors, folder / "model.safetensors")
    checkpoint = read_checkpoint(folder, overrides=published.SILENT)
    found = exported(folder, checkpoint, tmp_path / "out")
    assert found == published.file_contents(folder / "model.safetensors")


def test_the_tokenizer_goes_along(tmp_path):
    exported(DATA / "sdar", published.read("sdar"), tmp_path / "out", tokenizer=byte_tokenizer())
    assert (tmp_path / "out/tokenizer.json").read_bytes() == byte_tokenizer().to_bytes()


def test_an_exported_checkpoint_is_read_again(tmp_path):
    checkpoint = published.read("llada")
    exported(DATA / "llada", checkpoint, tmp_path / "out")
    again = read_checkpoint(tmp_path / "out")
    assert again.config == checkpoint.config
    assert all(torch.equal(again.state[name], checkpoint.state[name]) for name in again.state)


def test_block_diffusion_made_from_an_autoregressive_model_is_exported_as_a2d(tmp_path):
    choices = {"block_size": 4, "clean_half": "block_causal"}
    checkpoint = read_checkpoint(DATA / "ar/qwen3", overrides=choices)
    exported(DATA / "ar/qwen3", checkpoint, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert (config["model_type"], config["vocab_size"]) == ("a2d-qwen3", 385)
    again = read_checkpoint(tmp_path / "out")
    assert (again.family.name, again.config.mask_id) == ("a2d-qwen3", 384)
    for axis in ("attention", "block_size", "logits", "first_place", "clean_half"):
        assert getattr(again.config, axis) == getattr(checkpoint.config, axis)
    assert torch.equal(again.state["embed.weight"], checkpoint.state["embed.weight"])


def test_block_diffusion_made_from_gpt2_has_no_published_layout(tmp_path):
    checkpoint = read_checkpoint(DATA / "ar/gpt2", overrides={"block_size": 4})
    with pytest.raises(InputError, match=r"block_size=4, logits=shifted\) made from gpt2"):
        exported(DATA / "ar/gpt2", checkpoint, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("system", "changes", "message"),
    [
        ("llada", {"embedding_size": 380}, r"vocab_size=384 and the published config makes it 380"),
        ("llada", {"rope_theta": 9.0}, r"rope_theta=500000.0 and the published config makes it 9"),
        ("ar/llama", {"vocab_size": 400}, r"vocab_size=385 and the published config makes it 400"),
        ("llada2", {"routed_scaling_factor": 1.5}, r"experts=.* makes it .*weight_scale=1.5"),
    ],
)
def test_a_config_of_another_network_is_refused(tmp_path, system, changes, message):
    network = build_network(published.read(system).config)
    with pytest.raises(CheckpointMismatch, match=message):
        export(network, tmp_path / "out", config_of(DATA / system) | changes)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"exists and is no empty folder; choose another folder"):
        exported(DATA / "llada", published.read("llada"), tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("system", "changes", "name"),
    [
        (
            "llada",
            {"weight_tying": True, "n_kv_heads": 2, "include_qkv_bias": True},
            "model.transformer.blocks.1.k_proj.bias",
        ),
        (
            "llada_moe",
            {"moe_layer_freq": [0, 1], "shared_expert_intermediate_size": 24,
             "moe_router_enable_expert_bias": True},
            "model.layers.1.shared_expert.up_proj.weight",
        ),
        (
            "llada2",
            {"use_qkv_bias": True, "tie_word_embeddings": True, "num_shared_experts": 2},
            "model.layers.0.attention.query_key_value.bias",
        ),
        ("ar/gpt2", {"tie_word_embeddings": False, "n_inner": 20}, "lm_head.weight"),
    ],
)  # fmt: skip
def test_variants_that_are_not_among_the_recorded_ones_go_both_ways(
    tmp_path, system, changes, name
):
    config = config_of(DATA / system) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    overrides = {"mask_id": 383, "eos_id": 381}
    network = build_network(read_description(tmp_path, overrides=overrides).config)
    network.init_weights(0)
    export(network, tmp_path / "out", config)
    assert name in load_file(tmp_path / "out/model.safetensors")
    again = read_checkpoint(tmp_path / "out", overrides=overrides)
    expected = own_state(network)
    assert again.state.keys() == expected.keys()
    assert all(torch.equal(again.state[each], expected[each]) for each in expected)
