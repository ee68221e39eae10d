"""A model folder: weights, configuration and tokenizer under one manifest of hashes.

`model.safetensors`, `config.json` (format version and `ModelConfig`), `tokenizer.json`, for a model
that came from a published checkpoint `published.json` (its own config and types, to export it
again), for one that knows chats `chat_template.jinja`, and last `manifest.json` with the bytes and
SHA-256 of each. The folder is whole or not there; a reader trusts only the manifest. A folder as a
published family has it is read too.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save_file

from cascade_model.commit import Folder
from cascade_model.config import ModelConfig
from cascade_model.errors import CheckpointMismatch, InputError
from cascade_model.families import read_checkpoint, read_description, read_dtypes
from cascade_model.networks import Network, network_with, own_state
from cascade_model.settings import digest, shown, to_dict
from cascade_model.tensor_files import WEIGHTS, LoadedTensors, TensorFiles, TensorSource, kept
from cascade_model.tokenizer import Tokenizer
from cascade_model.whole_folder import whole_folder

FORMAT_VERSION = 1
CONFIG, TOKENIZER, PUBLISHED, TEMPLATE, MANIFEST = (
    "config.json",
    "tokenizer.json",
    "published.json",
    "chat_template.jinja",
    "manifest.json",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """What a published checkpoint was, besides its weights: all that an export needs."""

    config: dict[str, Any]
    """Its own config.json."""
    dtypes: dict[str, str] = field(default_factory=dict)
    """Types of tensors that are not of the type that the config names."""


def save_model(
    folder: str | Path,
    model: Network,
    tokenizer: Tokenizer,
    published: Published | None = None,
    card: Mapping[str, bytes] | None = None,
    chat_template: str | None = None,
) -> None:
    """Write a model folder, local or at any fsspec URL; one that stands there is replaced whole.

    `chat_template` is the text of the Jinja template that the model's chats are written with.
    `card` are files for people, by name: they come with the folder, but the manifest does not name
    them, so that they may be edited.
    Raises `CheckpointMismatch` when the tokenizer is not the one that the model's config names.
    """
    _require_tokenizer(str(folder), model.config, tokenizer)
    with whole_folder(folder, _is_model_folder, "model folder", seal=MANIFEST) as work:
        save_file(own_state(model), work / WEIGHTS, metadata={"format": "pt"})
        settings = {"format_version": FORMAT_VERSION, **to_dict(model.config)}
        (work / CONFIG).write_bytes(_json(settings))
        (work / TOKENIZER).write_bytes(tokenizer.to_bytes())
        if published is not None:
            (work / PUBLISHED).write_bytes(_json(to_dict(published)))
        if chat_template is not None:
            (work / TEMPLATE).write_bytes(chat_template.encode())
        (work / WEIGHTS).chmod((work / CONFIG).stat().st_mode)  # safetensors leaves it to its owner
        local = Folder(work)
        files = {
            name: {"bytes": local.size(name), "sha256": local.sha256_of(name)}
            for name in local.list()
        }
        (work / MANIFEST).write_bytes(_json({"format_version": FORMAT_VERSION, "files": files}))
        for name, data in (card or {}).items():
            (work / name).write_bytes(data)


def load_model(
    folder: str | Path,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Network, Tokenizer | None]:
    """Read a model folder (a local path or any fsspec URL) after checking every hash, or a local
    folder of a published family. `dtype` none keeps each tensor's own.

    The tokenizer is none where a published folder has no tokenizer.json. Raises
    `CheckpointMismatch`, both values shown, when a file is missing, cut or altered, or when
    weights, config and tokenizer do not belong together, and what `read_checkpoint` raises.
    """
    files = Folder(folder)
    if is_published(files):
        read = read_checkpoint(folder, dtype=dtype, device=device)
        return network_with(read.config, read.state, str(folder)), read.tokenizer
    _verify(files)
    config = _config(files)
    tokenizer = Tokenizer(files.read_bytes(TOKENIZER), f"{folder}/{TOKENIZER}")
    _require_tokenizer(str(folder), config, tokenizer)
    tensors = _tensors(files, dtype, torch.device(device))
    return network_with(config, tensors, str(folder)), tokenizer


def require_text(tokenizer: Tokenizer | None, folder: str | Path) -> Tokenizer:
    """The tokenizer of a loaded model, for those who need text."""
    if tokenizer is None:
        raise CheckpointMismatch(
            f"model {folder} has no {TOKENIZER}, so it cannot read or write text; add the "
            "checkpoint's own"
        )
    return tokenizer


def read_config(folder: str | Path) -> ModelConfig:
    """The configuration of a model folder; its hashes are checked when weights are loaded."""
    files = Folder(folder)
    return read_description(folder).config if is_published(files) else _config(files)


def read_published(folder: str | Path) -> Published | None:
    """What a model folder records of the published checkpoint it came from."""
    files = Folder(folder)
    if is_published(files):
        return Published(config=read_description(folder).published, dtypes=read_dtypes(folder))
    if PUBLISHED not in _manifest(files)["files"]:
        return None
    return Published(**json.loads(files.read_bytes(PUBLISHED)))


def vouched_bytes(files: Folder, name: str) -> bytes | None:
    """A file of a model folder of ours, or None where its manifest names none; raises
    `CheckpointMismatch` where it is not what the manifest says."""
    record = _manifest(files)["files"].get(name)
    if record is None:
        return None
    _require_recorded(files, name, record)
    return files.read_bytes(name)


def weights_digest(folder: str | Path) -> str:
    """SHA-256 (hex) over the hashes of all files: equal for equal models only."""
    files = Folder(folder)
    if not is_published(files):
        return digest(_manifest(files)["files"])
    endings = (".safetensors", ".json")
    names = [name for name in files.list() if name.endswith(endings)]
    return digest({name: files.sha256_of(name) for name in names})


def is_published(files: Folder) -> bool:
    """Whether a local folder is one of a published family: a config.json that is not ours."""
    if not files.is_local or MANIFEST in files.list() or CONFIG not in files.list():
        return False
    try:
        return "model_type" in json.loads(files.read_bytes(CONFIG))
    except (ValueError, TypeError):
        return False


def _is_model_folder(old: Folder) -> bool:
    """Whether what stands there is a model and nothing else: a corpus has a manifest too. On a
    store, also one whose writer was killed, which had taken the manifest away first."""
    try:
        if MANIFEST in old.list():
            return WEIGHTS in json.loads(old.read_bytes(MANIFEST))["files"]
        config = {} if old.is_local else json.loads(old.read_bytes(CONFIG))
        return "format_version" in config and "model_type" not in config
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def _verify(files: Folder) -> None:
    """Compare every file with the manifest."""
    for name, record in _manifest(files)["files"].items():
        _require_recorded(files, name, record)


def _require_recorded(files: Folder, name: str, record: Mapping[str, Any]) -> None:
    try:
        found = files.sha256_of(name)
    except FileNotFoundError:
        raise CheckpointMismatch(f"model {files.url} lacks {name}; copy the folder again") from None
    if found != record["sha256"]:
        raise CheckpointMismatch(
            f"model {files.url} has {name} with sha256 {shown(found)} but its manifest "
            f"records {shown(record['sha256'])}; copy the folder again"
        )


def _manifest(files: Folder) -> dict:
    """The manifest, of a format that this program reads; `InputError` where there is no folder."""
    try:
        manifest = json.loads(files.read_bytes(MANIFEST))
        version, entries = manifest["format_version"], manifest["files"]
        complete = {WEIGHTS, CONFIG, TOKENIZER} <= set(entries)
    except FileNotFoundError:
        if not files.is_there():
            raise InputError(
                f"model {files.url} does not exist; check the path, or give what `cascade "
                "pretrain` or `cascade convert` wrote, or a published checkpoint"
            ) from None
        cure = "give what `cascade pretrain` or `cascade convert` wrote, or a published checkpoint"
        if files.exists(f"model/{MANIFEST}"):
            cure = f"it is a run; give {files.url}/model"
        raise CheckpointMismatch(
            f"model {files.url} has no {MANIFEST}, so it is no finished model folder; {cure}"
        ) from None
    except (ValueError, KeyError, TypeError):
        manifest, version, complete = {}, "damaged", False
    if version != FORMAT_VERSION or not complete:
        raise CheckpointMismatch(
            f"model {files.url} has a manifest of format {version} and this program reads "
            f"{FORMAT_VERSION}; use the version that wrote it, or copy the folder again"
        )
    return manifest


def _config(files: Folder) -> ModelConfig:
    _manifest(files)
    try:
        settings = json.loads(files.read_bytes(CONFIG))
        del settings["format_version"]
        return ModelConfig.from_dict(settings)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        raise CheckpointMismatch(
            f"model {files.url} has a damaged {CONFIG}; copy the folder again"
        ) from None


def _tensors(
    files: Folder, dtype: torch.dtype | None, device: torch.device
) -> dict[str, torch.Tensor]:
    """All tensors, one at a time, in memory of their own."""
    source: TensorSource
    if files.is_local:
        source = TensorFiles(Path(files.url), f"model {files.url}")
    else:
        source = LoadedTensors(_from_store(files))
    tensors = {}
    for name in source.headers:
        with source.read([name]) as (tensor,):
            tensors[name] = kept(source, tensor, dtype, device)
    return tensors


def _from_store(files: Folder) -> Mapping[str, torch.Tensor]:
    try:
        return tensors_from_bytes(files.read_bytes(WEIGHTS))
    except SafetensorError as error:
        raise CheckpointMismatch(
            f"model {files.url} has a damaged {WEIGHTS} ({error}); copy the folder again"
        ) from None


def _require_tokenizer(where: str, config: ModelConfig, tokenizer: Tokenizer) -> None:
    if config.tokenizer_sha256 != tokenizer.sha256:
        raise CheckpointMismatch(
            f"model {where} was made with the tokenizer "
            f"{shown(config.tokenizer_sha256) or '(none)'} and got "
            f"{shown(tokenizer.sha256)}; use the tokenizer of the model's corpus"
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointMismatch(
            f"model {where} has {config.vocab_size} rows for tokens and its tokenizer gives ids up "
            f"to {tokenizer.vocab_size - 1}; use the tokenizer that belongs to these weights"
        )


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
