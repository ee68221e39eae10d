"""LLaDA-MoE (arXiv 2509.24389): Llama's names, a mixture of experts, bidirectional, aligned.

The router takes the largest softmax probabilities as they are: the published code ignores
`norm_topk_prob`. Its model_type is LLaDA's, so only the class name tells them apart.
"""

from typing import Any

from cascade_model.config import ExpertsConfig, ModelConfig
from cascade_model.families import llama
from cascade_model.families.experts import expert_layers
from cascade_model.families.family import Family, Parameter
from cascade_model.families.fields import Fields


def _parameters(config: ModelConfig) -> list[Parameter]:
    feed_forwards = expert_layers(config, bias="mlp.expert_bias", shared="shared_expert")
    return [*llama.outer_parameters(config), *feed_forwards]


def _settings(fields: Fields) -> dict[str, Any]:
    fields.only("clip_qkv", None)
    fields.only("moe_router_score_function", "softmax", None)
    fields.only("norm_topk_prob", None, False)
    fields.only("partial_rotary_factor", 1, None)
    fields.only("routed_scaling_factor", 1, None)
    fields.only("router_num_group", None)
    fields.only("router_topk_group", None)
    outer = llama.outer_settings(fields)
    shared = fields.optional("shared_expert_intermediate_size")
    inner = fields.whole("expert_intermediate_size")
    return outer | {
        "intermediate_size": fields.whole("dense_intermediate_size", inner),
        "qk_norm": fields.flag("qk_layernorm", False),
        "experts": ExpertsConfig(
            num_experts=fields.whole("num_experts"),
            experts_per_token=fields.whole("num_experts_per_tok"),
            intermediate_size=inner,
            first_dense_layers=_first_dense(fields, outer["num_layers"]),
            shared_intermediate_size=shared or 0,
            router="softmax",
            router_bias=fields.flag("moe_router_enable_expert_bias", False),
        ),
        "attention": "bidirectional",
        "block_size": 32,
        "logits": "aligned",
    }


def _first_dense(fields: Fields, num_layers: int) -> int:
    """`moe_layer_freq` has one number a layer, 0 for dense; ours are dense first."""
    kinds = fields.optional("moe_layer_freq") or [1] * num_layers
    first = kinds.count(0) if isinstance(kinds, list) else 0
    if kinds != [0] * first + [1] * (num_layers - first):
        fields.refuse("moe_layer_freq", "0 for the first layers and then 1 for each")
    return first


FAMILIES = (
    Family(
        name="llada_moe",
        model_type="llada",
        architectures=("LLaDAMoEModelLM",),
        read_settings=_settings,
        parameters=_parameters,
        ids={"mask": (156895,), "eos": (156892,)},
        eos_is_pad=True,
        constants=("rotary_emb.inv_freq",),
    ),
)
