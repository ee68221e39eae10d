"""A family is recognised by its model_type and its class name together."""

import json

import pytest

from cascade_model.errors import InputError
from cascade_model.families.registry import FAMILIES, family_named, recognise
from tests.cascade_model.families.published_cases import DATA


def test_llada_and_llada_moe_share_a_model_type_and_are_told_apart():
    configs = [json.loads((DATA / s / "config.json").read_text()) for s in ("llada", "llada_moe")]
    assert {config["model_type"] for config in configs} == {"llada"}
    assert [recognise(config, "").name for config in configs] == ["llada", "llada_moe"]


def test_an_unknown_kind_is_refused_with_the_list_of_known_ones():
    config = {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    with pytest.raises(InputError) as caught:
        recognise(config, "here")
    sentence = str(caught.value)
    assert "model_type='mamba' and architectures=['MambaForCausalLM']" in sentence
    assert all(family.architectures[0] in sentence for family in FAMILIES)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
        {"model_type": "llada"},
        {"model_type": "dream", "architectures": ["DreamModel"]},
    ],
)
def test_a_class_or_type_that_does_not_fit_is_refused(config):
    with pytest.raises(InputError, match="can be read, choose such a checkpoint"):
        recognise(config, "here")


def test_a_config_without_class_names_is_taken_where_its_type_is_unique():
    assert recognise({"model_type": "llama", "architectures": None}, "").name == "llama"


def test_names_are_unique():
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    assert all(family_named(family.name) is family for family in FAMILIES)
