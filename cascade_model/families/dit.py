"""MDLM (arXiv 2406.07524) and BD3-LM (arXiv 2503.09573): a diffusion transformer, aligned.

MDLM sees both ways; BD3-LM is block-causal. The mask is the last row of the vocabulary. Both feed
noise level 0 always (`time_conditioning` false); other checkpoints are refused, because decoding
would have to feed the level.
"""

from collections.abc import Callable
from typing import Any

import torch

from cascade_model.config import ModelConfig
from cascade_model.families.family import Family, Parameter, constant, renamed
from cascade_model.families.fields import Fields

_TOP = {
    "backbone.vocab_embed.embedding": "embed.weight",
    "backbone.output_layer.norm_final.weight": "final_norm.weight",
}
_TOP_PAIRS = {
    "backbone.sigma_map.mlp.0": "time_in",
    "backbone.sigma_map.mlp.2": "time_out",
    "backbone.output_layer.adaLN_modulation": "final_modulation",
    "backbone.output_layer.linear": "head",
}
_LAYER = {
    f"backbone.blocks.{{}}.{theirs}.weight": f"layers.{{}}.{ours}.weight"
    for theirs, ours in {
        "norm1": "attention_norm",
        "attn_qkv": "qkv",
        "attn_out": "o_proj",
        "norm2": "mlp_norm",
    }.items()
}
_LAYER_PAIRS = {
    "backbone.blocks.{}.mlp.0": "layers.{}.up_proj",
    "backbone.blocks.{}.mlp.2": "layers.{}.down_proj",
    "backbone.blocks.{}.adaLN_modulation": "layers.{}.modulation",
}
_ROPE_THETA = 10000.0


def _pairs(names: dict[str, str]) -> dict[str, str]:
    """Weight and bias of each."""
    kinds = ("weight", "bias")
    return {f"{theirs}.{k}": f"{ours}.{k}" for theirs, ours in names.items() for k in kinds}


def _parameters(config: ModelConfig) -> list[Parameter]:
    even = torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim
    return [
        *renamed(_TOP | _pairs(_TOP_PAIRS)),
        *renamed(_LAYER | _pairs(_LAYER_PAIRS), config.num_layers),
        constant("backbone.rotary_emb.inv_freq", 1.0 / _ROPE_THETA**even),
    ]


def _settings(fields: Fields) -> dict[str, Any]:
    fields.only("time_conditioning", False)
    heads, width = fields.whole("n_heads"), fields.whole("hidden_dim")
    vocabulary = fields.whole("vocab_size")
    return {
        "network": "dit",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_layers": fields.whole("n_blocks"),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "intermediate_size": 4 * width,
        "conditioning_size": fields.whole("cond_dim"),
        "rope_theta": _ROPE_THETA,
        "norm_eps": 1e-5,
        "max_sequence_length": fields.whole("model_length"),
        "tied_head": False,
        "logits": "aligned",
        "mask_id": vocabulary - 1,
    }


def _mdlm(fields: Fields) -> dict[str, Any]:
    return _settings(fields) | {"attention": "bidirectional", "block_size": 32}


def _bd3lm(fields: Fields) -> dict[str, Any]:
    fields.only("adaln", True)
    fields.only("causal", False)
    fields.only("cross_attn", True)
    fields.inert("attn_backend", "sampling_eps_max", "sampling_eps_min", "tie_word_embeddings")
    fields.inert("var_min")
    size = fields.whole("block_size")
    return _settings(fields) | {"attention": "block_causal", "block_size": size}


def _family(name: str, architecture: str, read: Callable[[Fields], dict[str, Any]]) -> Family:
    return Family(
        name=name,
        model_type=name,
        architectures=(architecture,),
        read_settings=read,
        parameters=_parameters,
        ids={"eos": (50256,)},
        constants=("sampling_eps_min", "sampling_eps_max"),
    )


FAMILIES = (_family("mdlm", "MDLM", _mdlm), _family("bd3lm", "BD3LM", _bd3lm))
