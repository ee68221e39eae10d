"""The table of parameters is what the models say, and the models have all that the engine has."""

import dataclasses
from pathlib import Path

import pytest

from cascade_model.sampling import SamplingParams
from jobs.diffusion_fields import DiffusionFields
from jobs.openai_requests import NEUTRAL, ChatRequest, CompletionRequest
from jobs.parameters import ROUTES, parameter_table

DOCUMENT = Path(__file__).parents[2] / "jobs" / "PARAMETERS.md"


def test_the_document_is_the_one_that_the_models_make():
    assert DOCUMENT.read_text() == parameter_table()


def test_every_parameter_of_every_route_is_in_the_table_with_what_it_does():
    told = {line.split("`")[1]: line for line in parameter_table().splitlines() if "| `" in line}
    for model in ROUTES.values():
        for name in model.model_fields:
            assert len(told[name].split("|")[3].strip()) > 10, name
    assert NEUTRAL.keys() <= told.keys()


def test_a_change_of_a_bound_changes_the_table(monkeypatch):
    """The control: the table follows the model and not a text of its own."""
    before = parameter_table()
    described = {"description": "Another sentence altogether.", "type": "boolean"}

    def changed(cls, *_, **__):
        schema = before_schema()
        return {**schema, "properties": {**schema["properties"], "echo": described}}

    before_schema = CompletionRequest.model_json_schema
    monkeypatch.setattr(CompletionRequest, "model_json_schema", classmethod(changed))
    assert parameter_table() != before


def test_every_setting_of_the_engine_is_a_field_or_openais():
    openais = {"max_tokens", "temperature", "top_p", "seed", "logprobs"}
    not_told = {"report_margin"}  # only the engine's own answers have room for it
    settings = {each.name for each in dataclasses.fields(SamplingParams)}
    assert settings == DiffusionFields.model_fields.keys() | openais | not_told


@pytest.mark.parametrize("model", [CompletionRequest, ChatRequest])
def test_every_field_of_denoising_reaches_the_engine(model):
    other = {
        "rule": "margin",
        "schedule": "cosine",
        "cache": "dual",
        "token_draw": "gumbel",
        "suppress_eos": "token",
        "stop_at_eos": False,
        "stop_ids": [3],
        "steps_per_block": 7,
        "min_steps_per_block": 2,
        "max_steps": 99,
        "block_length": 8,
        "top_k": 5,
        "max_post_steps": 3,
    }
    messages = [{"role": "user", "content": "a"}]
    base = {
        "model": "m",
        **({"prompt": "a"} if model is CompletionRequest else {"messages": messages}),
    }
    for name in DiffusionFields.model_fields:
        value = other.get(name, 0.25)
        params = model.model_validate({**base, name: value}).sampling(4, 0)
        expected = tuple(value) if isinstance(value, list) else value
        assert getattr(params, name) == expected
        assert getattr(params, name) != getattr(SamplingParams(), name)
