"""LLaDA-8B, LLaDA 1.5 and iLLaDA (arXiv 2502.09992): OLMo's names, bidirectional, aligned.

`ff_proj` is the gate, `up_proj` the other input of the gated SiLU, `ff_out` of a layer its output;
the `ff_out` of the model is the head.
"""

from typing import Any

from cascade_model.config import ModelConfig
from cascade_model.families.family import Family, Parameter, renamed
from cascade_model.families.fields import Fields

_TOP = {
    "model.transformer.wte.weight": "embed.weight",
    "model.transformer.ln_f.weight": "final_norm.weight",
}
_HEAD = {"model.transformer.ff_out.weight": "head.weight"}
_LAYER = {
    f"model.transformer.blocks.{{}}.{theirs}.weight": f"layers.{{}}.{ours}.weight"
    for theirs, ours in {
        "attn_norm": "attention_norm",
        "q_proj": "q_proj",
        "k_proj": "k_proj",
        "v_proj": "v_proj",
        "attn_out": "o_proj",
        "ff_norm": "mlp_norm",
        "ff_proj": "mlp.gate_proj",
        "up_proj": "mlp.up_proj",
        "ff_out": "mlp.down_proj",
    }.items()
}
_BIASES = {
    f"model.transformer.blocks.{{}}.{p}_proj.bias": f"layers.{{}}.{p}_proj.bias" for p in "qkv"
}


def _parameters(config: ModelConfig) -> list[Parameter]:
    top = _TOP | ({} if config.tied_head else _HEAD)
    layer = _LAYER | (_BIASES if config.qkv_bias else {})
    return [*renamed(top), *renamed(layer, config.num_layers)]


def _settings(fields: Fields) -> dict[str, Any]:
    _refuse_other_networks(fields)
    heads, width = fields.whole("n_heads"), fields.whole("d_model")
    is_single = fields.flag("multi_query_attention", False)
    vocabulary = fields.whole("vocab_size")
    return {
        "vocab_size": fields.whole("embedding_size", vocabulary),
        "hidden_size": width,
        "num_layers": fields.whole("n_layers"),
        "num_heads": heads,
        "num_kv_heads": fields.whole("n_kv_heads", 1 if is_single else heads),
        "head_dim": width // heads,
        "intermediate_size": fields.whole("mlp_hidden_size", _default_mlp(fields, width)),
        "rope_theta": fields.rope_theta(),
        "norm_eps": fields.number("rms_norm_eps", 1e-5),
        "max_sequence_length": fields.whole("max_sequence_length"),
        "qkv_bias": fields.flag("include_qkv_bias", False),
        "tied_head": fields.flag("weight_tying", True),
        "attention": "bidirectional",
        "block_size": 32,
        "logits": "aligned",
    }


def _default_mlp(fields: Fields, width: int) -> int:
    return int(fields.number("mlp_ratio", 4) * width)


def _refuse_other_networks(fields: Fields) -> None:
    """The published code knows many more networks than the published checkpoints are."""
    fields.exactly("block_type", "llama")
    fields.exactly("layer_norm_type", "rms")
    fields.exactly("activation_type", "silu")
    fields.exactly("rope", True)
    fields.exactly("include_bias", False)
    fields.only("rope_full_precision", True)
    fields.only("layer_norm_with_affine", True)
    fields.only("block_group_size", 1)
    for name in (
        "alibi",
        "attention_layer_norm",
        "bias_for_layer_norm",
        "input_emb_norm",
        "scale_logits",
    ):
        fields.only(name, False, None)
    fields.inert("alibi_bias_max", "attention_layer_norm_with_affine", "flash_attention")
    fields.inert("init_cutoff_factor", "init_device", "init_fn", "init_std", "precision")


FAMILIES = (
    Family(
        name="llada",
        model_type="llada",
        architectures=("LLaDAModelLM",),
        read_settings=_settings,
        parameters=_parameters,
        ids={"mask": (126336,), "eos": (126081,), "stop": (126348,)},
        constants=("rotary_emb.inv_freq",),
    ),
)
