"""No field of a published config is passed over: what our networks lack is refused by name."""

import json

import pytest

from cascade_model.errors import CheckpointMismatch, InputError
from cascade_model.families.registry import recognise
from tests.cascade_model.families.published_cases import DATA, SYSTEMS


def settings(system, changes, ignore=()):
    config = json.loads((DATA / system / "config.json").read_text()) | changes
    return recognise(config, "here").settings(config, "here", ignore)


SLIDING = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("system", "field", "value"),
    [
        ("ar/llama", "hidden_act", "gelu"),
        ("ar/llama", "attention_bias", True),
        ("ar/llama", "mlp_bias", True),
        ("ar/qwen2", "use_sliding_window", True),
        ("ar/qwen2", "hidden_size", "64"),
        ("ar/qwen2", "num_hidden_layers", 0),
        ("ar/qwen3", "rms_norm_eps", -1.0),
        ("ar/qwen3", "tie_word_embeddings", "no"),
        ("a2d_qwen2", "hidden_act", "relu"),
        ("llada", "alibi", True),
        ("llada", "activation_type", "swiglu"),
        ("llada", "attention_layer_norm", True),
        ("llada", "bias_for_layer_norm", True),
        ("llada", "block_group_size", 2),
        ("llada", "block_type", "sequential"),
        ("llada", "include_bias", True),
        ("llada", "input_emb_norm", True),
        ("llada", "layer_norm_type", "default"),
        ("llada", "layer_norm_type", "gemma_rms"),
        ("llada", "layer_norm_with_affine", False),
        ("llada", "rope", False),
        ("llada", "rope_full_precision", False),
        ("llada", "scale_logits", True),
        ("llada_moe", "attention_bias", True),
        ("llada_moe", "clip_qkv", 8.0),
        ("llada_moe", "moe_layer_freq", [1, 0]),
        ("llada_moe", "moe_router_score_function", "sigmoid"),
        ("llada_moe", "norm_topk_prob", True),
        ("llada_moe", "partial_rotary_factor", 0.5),
        ("llada_moe", "routed_scaling_factor", 2.5),
        ("llada_moe", "router_num_group", 4),
        ("llada_moe", "router_topk_group", 2),
        ("llada2", "norm_head", True),
        ("llada2", "norm_softmax", True),
        ("llada2", "norm_topk_prob", False),
        ("llada2", "rotary_dim", 16),
        ("llada2", "router_dtype", "bf16"),
        ("llada2", "score_function", "softmax"),
        ("llada2", "use_bias", True),
        ("llada2", "use_qk_norm", False),
        ("llada2", "use_rmsnorm", False),
        ("llada2", "use_sliding_window", True),
        ("dream", "use_mrope", True),
        ("dream", "use_sliding_window", True),
        ("sdar", "attention_bias", True),
        ("sdar", "block_size", 0),
        ("mdlm_dit", "time_conditioning", True),
        ("bd3lm_dit", "adaln", False),
        ("bd3lm_dit", "causal", True),
        ("bd3lm_dit", "cross_attn", False),
        ("ar/gpt2", "activation_function", "relu"),
        ("ar/gpt2", "add_cross_attention", True),
        ("ar/gpt2", "scale_attn_weights", False),
        ("ar/gpt2", "scale_attn_by_inverse_layer_idx", True),
    ],
)
def test_a_value_that_our_networks_lack_is_refused(system, field, value):
    with pytest.raises(InputError, match=rf"source=here has {field}=.*; only .* can be read"):
        settings(system, {field: value})


@pytest.mark.parametrize("system", SYSTEMS)
def test_an_unknown_field_is_refused_unless_it_says_nothing(system):
    for value in (None, False, [], {}, ""):
        settings(system, {"novel_gate": value})
    with pytest.raises(InputError, match=r"novel_gate=0.5, which is not known .*--ignore-settings"):
        settings(system, {"novel_gate": 0.5})
    assert settings(system, {"novel_gate": 0.5}, ["novel_gate"]) == settings(system, {})


def test_every_rotary_scaling_is_refused_and_both_spellings_are_read():
    plain = {"rope_theta": 7.0, "rope_type": "default"}
    new = settings("ar/llama", {"rope_theta": None, "rope_parameters": plain})
    assert new["rope_theta"] == 7.0
    for scaling in ({"rope_type": "llama3", "factor": 8.0}, {"type": "linear", "factor": 2.0}):
        for place in ("rope_scaling", "rope_parameters"):
            with pytest.raises(InputError, match=r"rope_type='(llama3|linear)'; only default"):
                settings("ar/llama", {place: scaling})
    with pytest.raises(InputError, match=r"rope_parameters.partial_rotary_factor=0.5"):
        settings("ar/llama", {"rope_parameters": plain | {"partial_rotary_factor": 0.5}})


def test_a_window_in_some_layers_is_refused():
    with pytest.raises(InputError, match=r"layer_types='sliding_attention'; only full_attention"):
        settings("ar/qwen3", {"layer_types": SLIDING})
    assert settings("ar/qwen3", {"sliding_window": 4096}) == settings("ar/qwen3", {})


@pytest.mark.parametrize("field", ["hidden_size", "rms_norm_eps", "vocab_size"])
def test_a_missing_field_is_named(field):
    with pytest.raises(CheckpointMismatch, match=rf"has no {field} in its config.json"):
        settings("dream", {field: None})


def test_llada_with_grouped_heads_and_a_tied_head_is_read():
    found = settings("llada", {"n_kv_heads": 2, "weight_tying": True, "include_qkv_bias": True})
    assert (found["num_kv_heads"], found["tied_head"], found["qkv_bias"]) == (2, True, True)
    single = settings("llada", {"n_kv_heads": None, "multi_query_attention": True})
    assert single["num_kv_heads"] == 1
    assert settings("llada", {"mlp_hidden_size": None})["intermediate_size"] == 256


def test_dense_layers_and_a_shared_expert_of_llada_moe_are_read():
    changes = {"moe_layer_freq": [0, 1], "shared_expert_intermediate_size": 24}
    experts = settings("llada_moe", changes)["experts"]
    assert (experts.first_dense_layers, experts.shared_intermediate_size) == (1, 24)


def test_the_published_router_of_llada2_divides_where_it_chooses_several():
    one = settings("llada2", {"num_experts_per_tok": 1})["experts"]
    assert not one.renormalise
    assert settings("llada2", {})["experts"].renormalise
