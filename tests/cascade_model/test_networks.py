"""The network that a config asks for, made of given tensors."""

import re

import pytest
import torch

from cascade_model.dit import DiT
from cascade_model.errors import CheckpointMismatch
from cascade_model.gpt2 import GPT2
from cascade_model.model import Transformer
from cascade_model.networks import (
    build_network,
    fill,
    network_with,
    own_state,
    require_same_tensors,
    shapes_of,
)
from tests.tiny_models import tiny_config

SHAPES = {
    "transformer": {"qkv_bias": True},
    "dit": {"num_kv_heads": 4, "tied_head": False},
    "gpt2": {"num_kv_heads": 4},
}


@pytest.mark.parametrize(
    ("network", "kind"), [("transformer", Transformer), ("dit", DiT), ("gpt2", GPT2)]
)
def test_the_config_names_the_network(network, kind):
    model = build_network(tiny_config(network=network, **SHAPES[network]))
    assert isinstance(model, kind)


@pytest.mark.parametrize("network", SHAPES)
def test_a_network_is_made_of_the_given_tensors_themselves(network):
    config = tiny_config(network=network, **SHAPES[network])
    model = build_network(config)
    model.init_weights(0)
    state = own_state(model.to(torch.bfloat16))
    made = network_with(config, state, "here")
    assert {n: t.data_ptr() for n, t in own_state(made).items()} == {
        n: t.data_ptr() for n, t in state.items()
    }
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in made.parameters())
    assert (made.head.weight is made.embed.weight) == config.tied_head


def test_a_router_s_bias_stays_out_of_training():
    from cascade_model.config import ExpertsConfig

    experts = ExpertsConfig(
        num_experts=4, experts_per_token=2, intermediate_size=8, router_bias=True
    )
    config = tiny_config(experts=experts)
    made = network_with(config, own_state(build_network(config)), "here")
    frozen = [name for name, p in made.named_parameters() if not p.requires_grad]
    assert frozen == ["layers.0.mlp.router_bias", "layers.1.mlp.router_bias"]


def test_shapes_need_no_memory():
    with torch.device("meta"):
        shapes = shapes_of(build_network(tiny_config()))
    assert shapes["embed.weight"] == (16, 16)
    assert "head.weight" not in shapes


def test_missing_surplus_and_mis_shaped_tensors_are_named():
    state = own_state(build_network(tiny_config()))
    state["layers.9.q_proj.weight"] = state.pop("layers.1.q_proj.weight")
    state["final_norm.weight"] = torch.ones(3)
    found = (
        "model here lacks the tensors layers.1.q_proj.weight and has the unknown "
        "layers.9.q_proj.weight and has final_norm.weight of shape [3] where its config makes it "
        "[16]; use weights and a config that belong together"
    )
    for attempt in (network_with, lambda c, s, w: fill(build_network(c), s, w)):
        with pytest.raises(CheckpointMismatch, match=re.escape(found)):
            attempt(tiny_config(), state, "here")


def test_only_the_first_few_are_named():
    with pytest.raises(CheckpointMismatch, match=r"lacks the tensors 0, 1, 2, 3, 4, and 3 more;"):
        require_same_tensors({str(n): (1,) for n in range(8)}, {}, "here")
