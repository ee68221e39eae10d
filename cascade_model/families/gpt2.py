"""GPT-2 (Radford et al., 2019): learned positions; matrices are stored [in, out]."""

from typing import Any

from cascade_model.config import ModelConfig
from cascade_model.families.family import Family, Parameter, renamed, transposed
from cascade_model.families.fields import Fields

_TOP = {
    "transformer.wte.weight": "embed.weight",
    "transformer.wpe.weight": "position_embed.weight",
    "transformer.ln_f.weight": "final_norm.weight",
    "transformer.ln_f.bias": "final_norm.bias",
}
_HEAD = {"lm_head.weight": "head.weight"}
_NORMS = {"ln_1": "attention_norm", "ln_2": "mlp_norm"}
_MATRICES = {
    "attn.c_attn": "qkv",
    "attn.c_proj": "o_proj",
    "mlp.c_fc": "up_proj",
    "mlp.c_proj": "down_proj",
}


def _parameters(config: ModelConfig) -> list[Parameter]:
    table = renamed(_TOP | ({} if config.tied_head else _HEAD))
    for n in range(config.num_layers):
        theirs, ours = f"transformer.h.{n}", f"layers.{n}"
        for norm, own in _NORMS.items():
            table += renamed({f"{theirs}.{norm}.{k}": f"{ours}.{own}.{k}" for k in _KINDS})
        for matrix, own in _MATRICES.items():
            table.append(transposed(f"{theirs}.{matrix}.weight", f"{ours}.{own}.weight"))
            table += renamed({f"{theirs}.{matrix}.bias": f"{ours}.{own}.bias"})
    return table


_KINDS = ("weight", "bias")


def _settings(fields: Fields) -> dict[str, Any]:
    fields.only("activation_function", "gelu_new")
    fields.only("add_cross_attention", False, None)
    fields.only("reorder_and_upcast_attn", False, None)
    fields.only("scale_attn_by_inverse_layer_idx", False, None)
    fields.only("scale_attn_weights", True, None)
    fields.inert("gradient_checkpointing", "n_ctx", "summary_activation", "summary_type")
    fields.inert("summary_first_dropout", "summary_proj_to_labels", "summary_use_proj")
    heads, width = fields.whole("n_head"), fields.whole("n_embd")
    return {
        "network": "gpt2",
        "vocab_size": fields.whole("vocab_size"),
        "hidden_size": width,
        "num_layers": fields.whole("n_layer"),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "intermediate_size": fields.whole("n_inner", 4 * width),
        "norm_eps": fields.number("layer_norm_epsilon", 1e-5),
        "max_sequence_length": fields.whole("n_positions"),
        "tied_head": fields.flag("tie_word_embeddings", True),
        "attention": "block_causal",
        "block_size": 1,
        "logits": "shifted",
        "first_place": "clean",
        "clean_half": "token_causal",
    }


FAMILIES = (
    Family(
        name="gpt2",
        model_type="gpt2",
        architectures=("GPT2LMHeadModel",),
        read_settings=_settings,
        parameters=_parameters,
        is_autoregressive=True,
        constants=(".attn.bias", ".attn.masked_bias"),  # causal masks of older files
        prefix="transformer.",
    ),
)
