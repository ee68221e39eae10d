"""Llama (and SmolLM2), Qwen2, Qwen3, and what dllm's A2D made of them: one set of names.

The autoregressive three have block size 1 and shifted logits. A2D (ZHZisZZ/dllm) keeps names and
weights and lets every token see all others; which block size and which shift a checkpoint was
trained with is recorded nowhere, so both can be overridden (default: bidirectional, aligned).
Qwen2 has biases on queries, keys and values, Qwen3 a norm on each query and key head.
"""

from typing import Any

from cascade_model.config import ModelConfig
from cascade_model.families.family import Family, Parameter, renamed
from cascade_model.families.fields import Fields

_TOP = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "final_norm.weight"}
_HEAD = {"lm_head.weight": "head.weight"}
_NORMS = {
    "model.layers.{}.input_layernorm.weight": "layers.{}.attention_norm.weight",
    "model.layers.{}.post_attention_layernorm.weight": "layers.{}.mlp_norm.weight",
}
_ATTENTION = {
    f"model.layers.{{}}.self_attn.{p}_proj.weight": f"layers.{{}}.{p}_proj.weight" for p in "qkvo"
}
_BIASES = {
    f"model.layers.{{}}.self_attn.{p}_proj.bias": f"layers.{{}}.{p}_proj.bias" for p in "qkv"
}
_HEAD_NORMS = {
    f"model.layers.{{}}.self_attn.{p}_norm.weight": f"layers.{{}}.{p}_norm.weight" for p in "qk"
}
_DENSE = {
    f"model.layers.{{}}.mlp.{p}_proj.weight": f"layers.{{}}.mlp.{p}_proj.weight"
    for p in ("gate", "up", "down")
}


def outer_parameters(config: ModelConfig) -> list[Parameter]:
    """Embedding, last norm and head, norms and attention of every layer."""
    names = dict(_NORMS | _ATTENTION)
    names |= _BIASES if config.qkv_bias else {}
    names |= _HEAD_NORMS if config.qk_norm else {}
    head = {} if config.tied_head else _HEAD
    return [*renamed(_TOP | head), *renamed(names, config.num_layers)]


def parameters(config: ModelConfig) -> list[Parameter]:
    """The whole table of a network with dense feed-forwards."""
    return [*outer_parameters(config), *renamed(_DENSE, config.num_layers)]


def outer_settings(fields: Fields) -> dict[str, Any]:
    """Everything but the feed-forward, the biases and the head norms."""
    fields.only("hidden_act", "silu")
    fields.only("attention_bias", False, None)
    fields.only("mlp_bias", False, None)
    fields.only("rope_interleaved", False, None)
    fields.inert("is_llama_config", "pretraining_tp")
    fields.no_window()
    heads, hidden = fields.whole("num_attention_heads"), fields.whole("hidden_size")
    return {
        "vocab_size": fields.whole("vocab_size"),
        "hidden_size": hidden,
        "num_layers": fields.whole("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": fields.whole("num_key_value_heads", heads),
        "head_dim": fields.whole("head_dim", hidden // heads),
        "rope_theta": fields.rope_theta(),
        "norm_eps": fields.number("rms_norm_eps"),
        "max_sequence_length": fields.whole("max_position_embeddings"),
        "tied_head": fields.flag("tie_word_embeddings", False),
    }


def settings(fields: Fields) -> dict[str, Any]:
    """A dense network of the Llama type."""
    return outer_settings(fields) | {"intermediate_size": fields.whole("intermediate_size")}


def _options(kind: str) -> dict[str, Any]:
    return {"qkv_bias": kind == "qwen2", "qk_norm": kind == "qwen3"}


_AUTOREGRESSIVE = {
    "attention": "block_causal",
    "block_size": 1,
    "logits": "shifted",
    "first_place": "clean",
    "clean_half": "token_causal",
}
_A2D = {"attention": "bidirectional", "block_size": 32, "logits": "aligned"}
_CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def _autoregressive(kind: str) -> Family:
    return Family(
        name=kind,
        model_type=kind,
        architectures=(f"{_CLASSES[kind]}ForCausalLM",),
        read_settings=lambda fields: settings(fields) | _options(kind) | _AUTOREGRESSIVE,
        parameters=parameters,
        is_autoregressive=True,
        successor=f"a2d-{kind}",
        constants=("rotary_emb.inv_freq",),
    )


def _converted(kind: str) -> Family:
    return Family(
        name=f"a2d-{kind}",
        model_type=f"a2d-{kind}",
        architectures=(f"A2D{_CLASSES[kind]}LMHeadModel",),
        read_settings=lambda fields: settings(fields) | _options(kind) | _A2D,
        parameters=parameters,
        constants=("rotary_emb.inv_freq",),
    )


FAMILIES = (*map(_autoregressive, _CLASSES), *map(_converted, _CLASSES))
