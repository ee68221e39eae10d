"""LLaDA2.0 and 2.1 (arXiv 2512.15745, 2602.08676): Ling's mixture of experts, block-causal.

Queries, keys and values are one matrix; head norms come before a rotary turn of half of each head.
The router scores by sigmoid, chooses groups first, and its bias moves the choice only. dFactory
trains the same model with merged experts (`llada2_moe_veomni`).
"""

from functools import partial
from typing import Any

from cascade_model.config import ExpertsConfig, ModelConfig
from cascade_model.families.experts import expert_layers
from cascade_model.families.family import Family, Parameter, fused_rows, renamed
from cascade_model.families.fields import Fields

_TOP = {"model.word_embeddings.weight": "embed.weight", "model.norm.weight": "final_norm.weight"}
_HEAD = {"lm_head.weight": "head.weight"}
_LAYER = {
    f"model.layers.{{}}.{theirs}.weight": f"layers.{{}}.{ours}.weight"
    for theirs, ours in {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "mlp_norm",
        "attention.dense": "o_proj",
        "attention.query_layernorm": "q_norm",
        "attention.key_layernorm": "k_norm",
    }.items()
}


def _parameters(config: ModelConfig, *, is_merged: bool) -> list[Parameter]:
    top = _TOP | ({} if config.tied_head else _HEAD)
    feed_forwards = expert_layers(
        config, bias="mlp.gate.expert_bias", shared="mlp.shared_experts", is_merged=is_merged
    )
    layers = renamed(_LAYER, config.num_layers)
    return [*renamed(top), *layers, *_fused_attention(config), *feed_forwards]


def _fused_attention(config: ModelConfig) -> list[Parameter]:
    """All query heads, then key heads, then value heads."""
    rows = tuple(
        heads * config.head_dim
        for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    )
    table = []
    for n in range(config.num_layers):
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            ours = tuple(f"layers.{n}.{p}_proj.{kind}" for p in "qkv")
            table.append(
                fused_rows(f"model.layers.{n}.attention.query_key_value.{kind}", ours, rows)
            )
    return table


def _settings(fields: Fields) -> dict[str, Any]:
    _refuse_other_networks(fields)
    heads, width = fields.whole("num_attention_heads"), fields.whole("hidden_size")
    head_dim = fields.whole("head_dim", width // heads)
    return {
        "vocab_size": fields.whole("vocab_size"),
        "hidden_size": width,
        "num_layers": fields.whole("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": fields.whole("num_key_value_heads"),
        "head_dim": head_dim,
        "intermediate_size": fields.whole("intermediate_size"),
        "rope_theta": fields.rope_theta(),
        "rotary_dim": _rotary_dim(fields, head_dim),
        "norm_eps": fields.number("rms_norm_eps", 1e-5),
        "max_sequence_length": fields.whole("max_position_embeddings"),
        "qk_norm": True,
        "qkv_bias": fields.flag("use_qkv_bias", False),
        "tied_head": fields.flag("tie_word_embeddings", False),
        "experts": _experts(fields),
        "attention": "block_causal",
        "block_size": fields.whole("block_size", 32),
        "logits": "aligned",
    }


def _experts(fields: Fields) -> ExpertsConfig:
    """The published router has its bias and divides by the sum, whatever the flags say."""
    inner, chosen = fields.whole("moe_intermediate_size"), fields.whole("num_experts_per_tok")
    return ExpertsConfig(
        num_experts=fields.whole("num_experts"),
        experts_per_token=chosen,
        intermediate_size=inner,
        first_dense_layers=fields.optional("first_k_dense_replace") or 0,
        shared_intermediate_size=inner * (fields.optional("num_shared_experts") or 0),
        router="sigmoid_groups",
        num_groups=fields.whole("n_group", 8),
        groups_per_token=fields.whole("topk_group", 4),
        renormalise=chosen > 1,
        weight_scale=fields.number("routed_scaling_factor", 2.5),
        router_bias=True,
    )


def _rotary_dim(fields: Fields, head_dim: int) -> int:
    """From the factor, which the code reads; `rotary_dim` says the same or is refused."""
    turned = int(head_dim * fields.number("partial_rotary_factor", 0.5))
    fields.only("rotary_dim", turned, None)
    return turned


def _refuse_other_networks(fields: Fields) -> None:
    fields.only("hidden_act", "silu")
    fields.exactly("use_bias", False)
    fields.only("use_qk_norm", True, None)
    fields.only("use_rmsnorm", True, None)
    fields.only("norm_head", False, None)
    fields.only("norm_softmax", False, None)
    fields.only("norm_topk_prob", True, None)
    fields.only("score_function", "sigmoid", None)
    fields.only("moe_router_enable_expert_bias", True, None)
    fields.only("router_dtype", "fp32", None)
    fields.only("using_split_qkv_in_self_attention", False, None)
    fields.no_window()


def _family(name: str, model_type: str, is_merged: bool) -> Family:
    return Family(
        name=name,
        model_type=model_type,
        architectures=("LLaDA2MoeModelLM",),
        read_settings=_settings,
        parameters=partial(_parameters, is_merged=is_merged),
        ids={"mask": (156895,), "eos": (156892,)},
        eos_is_pad=True,
        constants=("rotary_emb.inv_freq",),
    )


FAMILIES = (
    _family("llada2", "llada2_moe", is_merged=False),
    _family("llada2_merged", "llada2_moe_veomni", is_merged=True),
)
