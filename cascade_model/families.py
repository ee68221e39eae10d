"""Published autoregressive checkpoints, read into our names: Llama, Qwen2 and Qwen3 types.

A folder is read from its `config.json`, `*.safetensors` and `tokenizer.json` alone; Python files
and `auto_map` in it are never run. A GGUF file goes through `transformers`, which dequantises it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cascade_model.errors import CheckpointMismatch, InputError
from cascade_model.tokenizer import Tokenizer

# Their parameter names to ours; `N` is the layer.
_LAYER_NAMES = {
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "mlp_norm.weight",
    "self_attn.q_norm.weight": "q_norm.weight",
    "self_attn.k_norm.weight": "k_norm.weight",
    "self_attn.o_proj.weight": "o_proj.weight",
    **{f"self_attn.{p}_proj.{k}": f"{p}_proj.{k}" for p in "qkv" for k in ("weight", "bias")},
    **{f"mlp.{p}_proj.weight": f"{p}_proj.weight" for p in ("gate", "up", "down")},
}
_TOP_NAMES = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "final_norm.weight",
    "lm_head.weight": "head.weight",
}
_MODEL_TYPES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True, kw_only=True, slots=True)
class ARCheckpoint:
    """An autoregressive model as published: no mask token, no block size."""

    shape: dict[str, Any]
    """Settings of `ModelConfig` that describe the network; `vocab_size` is the rows read."""
    state: dict[str, Tensor]
    """Tensors under our parameter names."""
    tokenizer: Tokenizer | None
    """None where the folder has no tokenizer.json."""


def read_ar(source: str | Path, dtype: torch.dtype = torch.float32) -> ARCheckpoint:
    """Read a Hugging Face folder, or a GGUF file, of a Llama, Qwen2 or Qwen3 type model.

    Raises `InputError` for a type or a setting that our transformer does not have, and
    `CheckpointMismatch` for files that are missing or damaged.
    """
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, dtype)
    if path.suffix == ".gguf" and path.is_file():
        return _read_gguf(path, dtype)
    raise InputError(
        f"source={source} is neither a folder with config.json nor a .gguf file; check the path"
    )


def _read_folder(folder: Path, dtype: torch.dtype) -> ARCheckpoint:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        raise CheckpointMismatch(
            f"source={folder} has no readable config.json; give a Hugging Face model folder"
        ) from None
    shape = read_shape(config, str(folder))
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        try:
            tensors |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointMismatch(
                f"source={folder} has a damaged {file.name} ({error}); copy it again"
            ) from None
    has_tokenizer = (folder / "tokenizer.json").is_file()
    return ARCheckpoint(
        shape=shape,
        state=_rename(tensors, shape, dtype, str(folder)),
        tokenizer=Tokenizer.from_file(folder) if has_tokenizer else None,
    )


def _weight_files(folder: Path) -> list[Path]:
    """One file, or the shards that the index names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        return [folder / Path(name).name for name in names]
    file = folder / "model.safetensors"
    if not file.is_file():
        raise CheckpointMismatch(
            f"source={folder} has no model.safetensors; other formats are not read, convert it"
        )
    return [file]


def _read_gguf(file: Path, dtype: torch.dtype) -> ARCheckpoint:
    """Weights, config and tokenizer from one file; `transformers` is loaded here only."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=dtype, **arguments)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **arguments)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointMismatch(
            f"source={file} cannot be read as GGUF ({error}); give a Llama or Qwen type file"
        ) from None
    shape = read_shape(model.config.to_dict(), str(file))
    text = tokenizer.backend_tokenizer.to_str(pretty=True)
    return ARCheckpoint(
        shape=shape,
        state=_rename(dict(model.state_dict()), shape, dtype, str(file)),
        tokenizer=Tokenizer(text.encode(), str(file)),
    )


def read_shape(config: dict[str, Any], where: str) -> dict[str, Any]:
    """A published config as settings of `ModelConfig`; what we do not have is refused by name."""
    _refuse_unknown(config, where)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    kind = config["model_type"]
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": hidden,
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or hidden // heads,
        "intermediate_size": config["intermediate_size"],
        "rope_theta": float(_rope(config).get("rope_theta", 10000.0)),
        "norm_eps": config["rms_norm_eps"],
        "max_sequence_length": config["max_position_embeddings"],
        "qk_norm": kind == "qwen3",
        "qkv_bias": kind == "qwen2",
        "tied_head": bool(config.get("tie_word_embeddings", False)),
    }


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings, in the old place (top level) or the new (`rope_parameters`)."""
    top = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    scaling = config.get("rope_scaling") or {}
    return top | scaling | (config.get("rope_parameters") or {})


def _refuse_unknown(config: dict[str, Any], where: str) -> None:
    rope_kind = _rope(config).get("rope_type") or _rope(config).get("type") or "default"
    wanted: list[tuple[str, Any, tuple]] = [
        ("model_type", config.get("model_type"), _MODEL_TYPES),
        ("hidden_act", config.get("hidden_act", "silu"), ("silu",)),
        ("attention_bias", config.get("attention_bias", False), (False,)),
        ("mlp_bias", config.get("mlp_bias", False), (False,)),
        ("rope_type", rope_kind, ("default",)),
        ("use_sliding_window", config.get("use_sliding_window") or False, (False,)),
    ]
    for name, value, known in wanted:
        if value not in known:
            raise InputError(
                f"source={where} has {name}={value!r}; only {', '.join(map(str, known))} can be "
                "read, choose such a checkpoint"
            )


def _rename(
    tensors: dict[str, Tensor], shape: dict[str, Any], dtype: torch.dtype, where: str
) -> dict[str, Tensor]:
    """Their names to ours; an unknown tensor is refused, a tied head's copy left out."""
    state = {}
    for name, tensor in tensors.items():
        ours = _own_name(name)
        if ours is None:
            if name.endswith("rotary_emb.inv_freq"):  # a constant that old files carry along
                continue
            raise CheckpointMismatch(
                f"source={where} has the tensor {name}, which no {', '.join(_MODEL_TYPES)} model "
                "has; choose such a checkpoint"
            )
        if not (ours == "head.weight" and shape["tied_head"]):
            state[ours] = tensor.to(dtype)
    return state


def _own_name(name: str) -> str | None:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    parts = name.removeprefix("model.layers.").split(".", 1)
    if not name.startswith("model.layers.") or len(parts) != 2 or parts[1] not in _LAYER_NAMES:
        return None
    return f"layers.{parts[0]}.{_LAYER_NAMES[parts[1]]}"
