"""Write a network back in its family's published layout, for other programs to read.

A network that is still what was published is written bit-equal: same names, shapes and types. One
that was made from an autoregressive checkpoint and trained into block diffusion is written as A2D,
the published layout of such models, with its mask token's row. Choices of decoding for which a
layout has no field (A2D's block size) stand in a field of our own, which other programs ignore.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from cascade_model.config import ModelConfig
from cascade_model.errors import CheckpointMismatch, InputError
from cascade_model.families.family import Family
from cascade_model.families.reading import DECODING, OVERRIDES, decoding_of, published_dtype
from cascade_model.families.registry import family_named, recognise
from cascade_model.families.table import Table
from cascade_model.networks import Network, own_state
from cascade_model.settings import to_dict
from cascade_model.tensor_files import DTYPES, WEIGHTS
from cascade_model.tokenizer import Tokenizer
from cascade_model.whole_folder import whole_folder


def export(
    network: Network,
    folder: str | Path,
    published: Mapping[str, Any],
    *,
    dtypes: Mapping[str, str] | None = None,
    tokenizer: Tokenizer | None = None,
    card: Mapping[str, bytes] | None = None,
) -> None:
    """Write config.json, model.safetensors and tokenizer.json, whole or not at all.

    `published` is the original config.json and `dtypes` the types of tensors that differ from the
    one it names (`Checkpoint`); `card` are files for people, by name. Raises `InputError` when the
    folder holds something, or when the network has no published layout, and `CheckpointMismatch`
    when it is not that of `published`.
    """
    family, config = published_layout(network.config, published)
    settings = family.settings(config, "the published config", list(config))
    _require_same_network(network.config, settings, family)
    decoding = decoding_of(network.config, config, tokenizer)
    config = {name: value for name, value in config.items() if name != DECODING}
    config |= {DECODING: decoding} if decoding else {}
    table = Table(family, network.config, settings["vocab_size"])
    tensors = table.published(own_state(network))
    types = dict.fromkeys(tensors, published_dtype(published)) | dict(dtypes or {})
    converted = {
        name: tensor.to(DTYPES[types[name]]).contiguous() for name, tensor in tensors.items()
    }
    with whole_folder(folder, lambda _: False, "empty folder") as work:
        save_file(converted, work / WEIGHTS, metadata={"format": "pt"})
        (work / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (work / WEIGHTS).chmod((work / "config.json").stat().st_mode)
        if tokenizer is not None:
            (work / "tokenizer.json").write_bytes(_within(tokenizer, table.rows))
        for name, data in (card or {}).items():
            (work / name).write_bytes(data)


def published_layout(
    config: ModelConfig, published: Mapping[str, Any]
) -> tuple[Family, dict[str, Any]]:
    """The family to write a network as, and its config.json."""
    family = recognise(published, "the published config")
    plain = {name: value for name, value in published.items() if name != "auto_map"}
    if not family.is_autoregressive or config.is_autoregressive:
        return family, plain
    if not family.successor:
        raise InputError(
            f"model is block diffusion (block_size={config.block_size}, logits={config.logits}) "
            f"made from {family.name}, for which no layout is published; keep the model folder"
        )
    successor = family_named(family.successor)
    changes = {
        "model_type": successor.model_type,
        "architectures": list(successor.architectures),
        "vocab_size": config.vocab_size,
        "mask_token_id": config.mask_id,
    }
    return successor, plain | changes


def _within(tokenizer: Tokenizer, rows: int) -> bytes:
    """The tokenizer.json, without the special tokens whose rows are cut."""
    if tokenizer.vocab_size <= rows:
        return tokenizer.to_bytes()
    document = json.loads(tokenizer.to_bytes())
    tokens = document.get("added_tokens") or []
    document["added_tokens"] = [token for token in tokens if token["id"] < rows]
    return json.dumps(document, indent=2, ensure_ascii=False).encode()


def _require_same_network(config: ModelConfig, settings: dict[str, Any], family: Family) -> None:
    """Raise `CheckpointMismatch` unless the published config describes this network.

    An autoregressive model may have more rows than were published: they are never emitted.
    """
    rows = config.vocab_size
    if family.is_autoregressive:
        rows = min(rows, settings["vocab_size"])
    own = to_dict(config) | {"vocab_size": rows, "family": family.name, "experts": config.experts}
    for name in sorted(set(settings) - set(OVERRIDES)):
        if own[name] != settings[name]:
            raise CheckpointMismatch(
                f"model has {name}={own[name]} and the published config makes it {settings[name]}; "
                "use the config of the checkpoint that this model was made from"
            )
