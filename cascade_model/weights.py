"""A model folder: weights, configuration and tokenizer under one manifest of hashes.

`model.safetensors`, `config.json` (format version and `ModelConfig`), `tokenizer.json`, and last
`manifest.json` with the bytes and SHA-256 of each. The folder is written beside its place and
renamed, so it is whole or not there; a reader trusts only the manifest.
"""

import contextlib
import json
import os
import shutil
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import load_file, save_file

from cascade_model.commit import Folder
from cascade_model.config import ModelConfig, digest, to_dict
from cascade_model.errors import CheckpointMismatch, InputError
from cascade_model.model import Transformer
from cascade_model.tokenizer import Tokenizer

FORMAT_VERSION = 1
WEIGHTS, CONFIG, TOKENIZER, MANIFEST = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "manifest.json",
)


def save_model(folder: str | Path, model: Transformer, tokenizer: Tokenizer) -> None:
    """Write a model folder; one that stands there is replaced whole.

    Raises `CheckpointMismatch` when the tokenizer is not the one that the model's config names.
    """
    if "://" in str(folder):
        raise InputError(f"output={folder} must be a local folder; write there and copy it")
    _require_tokenizer(str(folder), model.config, tokenizer)
    target = Path(folder)
    work = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    work.mkdir(parents=True)
    try:
        save_file(own_state(model), work / WEIGHTS, metadata={"format": "pt"})
        settings = {"format_version": FORMAT_VERSION, **to_dict(model.config)}
        (work / CONFIG).write_bytes(_json(settings))
        (work / TOKENIZER).write_bytes(tokenizer.to_bytes())
        (work / WEIGHTS).chmod((work / CONFIG).stat().st_mode)  # safetensors leaves it to its owner
        local = Folder(work)
        files = {
            name: {"bytes": local.size(name), "sha256": local.sha256_of(name)}
            for name in (WEIGHTS, CONFIG, TOKENIZER)
        }
        (work / MANIFEST).write_bytes(_json({"format_version": FORMAT_VERSION, "files": files}))
        _flush(work)
        _replace(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def load_model(
    folder: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[Transformer, Tokenizer]:
    """Read a model folder (a local path or any fsspec URL) after checking every hash.

    Raises `CheckpointMismatch`, both values shown, when a file is missing, cut or altered, or when
    weights, config and tokenizer do not belong together.
    """
    files = Folder(folder)
    _verify(files)
    config = _config(files)
    tokenizer = Tokenizer(files.read_bytes(TOKENIZER), f"{folder}/{TOKENIZER}")
    _require_tokenizer(str(folder), config, tokenizer)
    model = Transformer(config)
    fill(model, _tensors(files), str(folder))
    return model.to(dtype), tokenizer


def read_config(folder: str | Path) -> ModelConfig:
    """The configuration of a model folder; its hashes are checked when weights are loaded."""
    return _config(Folder(folder))


def weights_digest(folder: str | Path) -> str:
    """SHA-256 (hex) over the recorded hashes of all files: equal for equal models only."""
    return digest(_manifest(Folder(folder))["files"])


def own_state(model: Transformer) -> dict[str, torch.Tensor]:
    """The model's tensors by name, a tied head left out."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if model.config.tied_head:
        del state["head.weight"]
    return state


def fill(model: Transformer, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Copy tensors into a model; missing, surplus and mis-shaped ones are refused by name."""
    expected = {name: tuple(value.shape) for name, value in own_state(model).items()}
    if set(expected) != set(tensors):
        missing, surplus = (
            sorted(set(expected) - set(tensors)),
            sorted(set(tensors) - set(expected)),
        )
        raise CheckpointMismatch(
            f"model {where} lacks the tensors {missing[:5]} and has the unknown {surplus[:5]}; "
            "use weights and a config that belong together"
        )
    for name, shape in expected.items():
        found = tuple(tensors[name].shape)
        if found != shape:
            raise CheckpointMismatch(
                f"model {where} has {name} of shape {list(found)} where its config makes it "
                f"{list(shape)}; use weights and a config that belong together"
            )
    model.load_state_dict(tensors, strict=False)


def _verify(files: Folder) -> None:
    """Compare every file with the manifest."""
    for name, record in _manifest(files)["files"].items():
        try:
            found = files.sha256_of(name)
        except FileNotFoundError:
            raise CheckpointMismatch(
                f"model {files.url} lacks {name}; copy the folder again"
            ) from None
        if found != record["sha256"]:
            raise CheckpointMismatch(
                f"model {files.url} has {name} with sha256 {found} but its manifest records "
                f"{record['sha256']}; copy the folder again"
            )


def _manifest(files: Folder) -> dict:
    """The manifest, of a format that this program reads."""
    try:
        manifest = json.loads(files.read_bytes(MANIFEST))
        version, entries = manifest["format_version"], manifest["files"]
        complete = {WEIGHTS, CONFIG, TOKENIZER} <= set(entries)
    except FileNotFoundError:
        raise CheckpointMismatch(
            f"model {files.url} has no {MANIFEST}, so it is no finished model folder; "
            "give the folder that `cascade pretrain` or `cascade convert` wrote"
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


def _tensors(files: Folder) -> dict[str, torch.Tensor]:
    try:
        if files.is_local:
            return load_file(files.path(WEIGHTS))
        return tensors_from_bytes(files.read_bytes(WEIGHTS))
    except SafetensorError as error:
        raise CheckpointMismatch(
            f"model {files.url} has a damaged {WEIGHTS} ({error}); copy the folder again"
        ) from None


def _require_tokenizer(where: str, config: ModelConfig, tokenizer: Tokenizer) -> None:
    if config.tokenizer_sha256 != tokenizer.sha256:
        raise CheckpointMismatch(
            f"model {where} was made with the tokenizer {config.tokenizer_sha256 or '(none)'} and "
            f"got {tokenizer.sha256}; use the tokenizer of the model's corpus"
        )


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _flush(folder: Path) -> None:
    """Bring every file, then the folder itself, to disk."""
    for path in (*sorted(folder.iterdir()), folder):
        _flush_entry(path)


def _flush_entry(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(work: Path, target: Path) -> None:
    """Put a finished folder in its place; an older model there goes, anything else is refused."""
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old.tmp")
    if target.exists() and any(target.iterdir()) and not (target / MANIFEST).is_file():
        raise InputError(
            f"output={target} exists and is no model folder; choose another folder or empty it"
        )
    with contextlib.suppress(FileNotFoundError):
        os.rename(target, old)
    os.rename(work, target)
    _flush_entry(target.parent)
    shutil.rmtree(old, ignore_errors=True)
