"""GGUF files of autoregressive models, through `transformers`, which dequantises them."""

import json
from pathlib import Path
from typing import Any

import torch

from cascade_model.errors import CheckpointMismatch
from cascade_model.tensor_files import LoadedTensors
from cascade_model.tokenizer import Tokenizer


def read_gguf(file: Path, dtype: torch.dtype) -> tuple[dict[str, Any], LoadedTensors, Tokenizer]:
    """Config, weights and tokenizer from one file; `CheckpointMismatch` when it is none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=dtype, **arguments)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **arguments)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointMismatch(
            f"source={file} cannot be read as GGUF ({error}); give a Llama or Qwen type file"
        ) from None
    text = tokenizer.backend_tokenizer.to_str(pretty=True)
    tensors = LoadedTensors(dict(model.state_dict()))
    config = json.loads(json.dumps(model.config.to_dict(), default=str))
    config.pop("quantization_config", None)  # the weights are no longer quantised
    return config, tensors, Tokenizer(text.encode(), str(file))


def gguf_template(file: Path) -> str | None:
    """The chat template in a file's metadata, or None; `CheckpointMismatch` when it is no GGUF."""
    from gguf import GGUFReader

    try:
        found = GGUFReader(file).get_field("tokenizer.chat_template")
    except (ValueError, OSError, IndexError) as error:
        raise CheckpointMismatch(f"source={file} cannot be read as GGUF ({error})") from None
    return None if found is None else found.contents()
