"""An autoregressive checkpoint, read as it is, answers as the published code does."""

import json

import pytest

from cascade_model.families import read_checkpoint
from cascade_model.networks import network_with
from cascade_model.sampler import sample
from cascade_model.sampling import SamplingParams
from tests.cascade_model.families.published_cases import DATA

CASES = [
    case for case in json.loads((DATA / "ar/cases.json").read_text()) if case["kind"] == "sample"
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_greedy_decoding_equals_the_published_code(case):
    settings, prompt = case["settings"], case["input_ids"][0]
    folder = DATA / "ar" / case["weights"]
    read = read_checkpoint(folder, overrides={"eos_id": settings["eos_id"]})
    network = network_with(read.config, read.state, str(folder)).eval()
    params = SamplingParams(max_tokens=settings["max_new_tokens"])
    tokens = [token for block in sample(network, prompt, params) for token in block.tokens]
    assert prompt + tokens == case["expected"]["output_ids"][0]
