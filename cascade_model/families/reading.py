"""Read a published checkpoint: its config, its tensors under our names, its tokenizer.

Nothing in the folder is run: `auto_map` and Python files are passed over, pickles refused.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade_model.config import ModelConfig
from cascade_model.errors import CheckpointMismatch, InputError
from cascade_model.families.family import Family
from cascade_model.families.gguf import read_gguf
from cascade_model.families.registry import recognise
from cascade_model.families.special_ids import Records, added_tokens, end_ids, special_ids
from cascade_model.families.table import Table
from cascade_model.networks import require_same_tensors
from cascade_model.tensor_files import DTYPES, TensorFiles, TensorSource, kept
from cascade_model.tokenizer import Tokenizer

# What a caller may decide about a checkpoint: how it is decoded, never the network's shape.
OVERRIDES = (
    "attention",
    "block_size",
    "logits",
    "first_place",
    "clean_half",
    "mask_id",
    "eos_id",
    "pad_id",
    "stop_ids",
    "max_sequence_length",
)
DECODING = "cascade_decoding"
"""Field of an exported config.json: such settings, where its layout has no field of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """A published checkpoint without its weights."""

    config: ModelConfig
    """Of an autoregressive model: with one vocabulary row more, the mask token it does not have."""
    tokenizer: Tokenizer | None
    """None where the folder has no tokenizer.json."""
    family: Family
    published: dict[str, Any]
    """The checkpoint's own config.json."""
    rows: int
    """Rows of the published vocabulary."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint(Description):
    """A published checkpoint, ready for `networks.network_with(config, state, where)`."""

    state: dict[str, Tensor]
    """Tensors under our parameter names, in memory of their own."""
    dtypes: dict[str, str] = field(default_factory=dict)
    """Types ("F32") of published tensors that are not of the type that the config names."""


def read_description(
    source: str | Path, *, overrides: Mapping[str, Any] | None = None, ignore: Sequence[str] = ()
) -> Description:
    """Everything but the weights of a local published folder. Raises as `read_checkpoint`."""
    folder = Path(source)
    published = _read_config(folder)
    has_tokenizer = (folder / "tokenizer.json").is_file()
    tokenizer = Tokenizer.from_file(folder) if has_tokenizer else None
    records = Records.of_folder(folder, published, tokenizer)
    return _describe(published, tokenizer, records, str(source), overrides or {}, ignore)


def read_checkpoint(
    source: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    overrides: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
) -> Checkpoint:
    """Read a published folder, or a GGUF file of an autoregressive model.

    `dtype` none keeps each tensor's own. `overrides` are settings of `ModelConfig` that the
    checkpoint does not record or records otherwise (mask_id, block_size, ...); `ignore` names
    fields of config.json that are known to change no number.

    Raises `InputError` for a type or setting that our networks do not have, a mask token that is
    unknown or outside the vocabulary, and pickled weights; `CheckpointMismatch` for files and
    tensors that are missing, damaged or do not fit the config.
    """
    path = Path(source)
    tensors: TensorSource
    if path.is_dir():
        about = read_description(path, overrides=overrides, ignore=ignore)
        tensors = TensorFiles(path, f"source={source}")
    elif path.suffix == ".gguf" and path.is_file():
        published, tensors, tokenizer = read_gguf(path, dtype or torch.float32)
        records = Records(config=published)
        about = _describe(published, tokenizer, records, str(path), overrides or {}, ignore)
    else:
        raise InputError(
            f"source={source} is neither a folder with config.json nor a .gguf file; check the path"
        )
    table = Table(about.family, about.config, about.rows)
    names = _names_in_files(table, tensors, f"source={source}")
    return Checkpoint(
        **{each.name: getattr(about, each.name) for each in dataclasses.fields(about)},
        state=_read_state(table, tensors, names, dtype, torch.device(device)),
        dtypes=_other_dtypes(about.published, tensors, names),
    )


def read_dtypes(source: str | Path) -> dict[str, str]:
    """`Checkpoint.dtypes` of a published folder, without its weights. Raises as `TensorFiles`."""
    about, tensors = read_description(source), TensorFiles(Path(source), f"source={source}")
    table = Table(about.family, about.config, about.rows)
    names = _names_in_files(table, tensors, f"source={source}")
    return _other_dtypes(about.published, tensors, names)


def _describe(
    published: dict[str, Any],
    tokenizer: Tokenizer | None,
    records: Records,
    where: str,
    overrides: Mapping[str, Any],
    ignore: Sequence[str],
) -> Description:
    family = recognise(published, where)
    settings = family.settings(published, where, ignore)
    chosen = _recorded(published, where)
    chosen |= {name: value for name, value in overrides.items() if value is not None}
    unknown = sorted(set(chosen) - set(OVERRIDES))
    if unknown:
        raise InputError(
            f"source={where}: {unknown[0]}={chosen[unknown[0]]} cannot be overridden; only "
            f"{', '.join(OVERRIDES)} can"
        )
    rows = settings["vocab_size"]
    if "mask_id" in settings:  # a rule of the family
        chosen = {"mask_id": settings["mask_id"]} | chosen
    if family.is_autoregressive and "mask_id" not in chosen:
        ids = {"vocab_size": rows + 1, "mask_id": rows} | end_ids(
            family, records, rows, chosen, where
        )
    else:
        ids = special_ids(family, records, rows, chosen, where)
    digest = "" if tokenizer is None else tokenizer.sha256
    config = ModelConfig(**(settings | chosen | ids), tokenizer_sha256=digest)
    return Description(
        config=config, tokenizer=tokenizer, family=family, published=published, rows=rows
    )


def _recorded(published: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What an export of ours wrote beside the layout's own fields."""
    found = published.get(DECODING, {})
    if not isinstance(found, dict):
        raise CheckpointMismatch(f"source={where} has a damaged {DECODING} in its config.json")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}


def decoding_of(
    config: ModelConfig, published: Mapping[str, Any], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """The settings of a network that its published config.json would be read back without."""
    where = "the published config"
    plain = {name: value for name, value in published.items() if name != DECODING}
    names = set(OVERRIDES)
    if recognise(plain, where).is_autoregressive:
        names -= {"mask_id", "pad_id"}  # rows of our own, which an export cuts
    records = Records(config=plain, tokens=added_tokens(tokenizer))
    needed: dict[str, Any] = {}
    for name in (None, "mask_id", "eos_id"):  # those that may be missing, and must then be told
        needed |= {} if name is None else {name: getattr(config, name)}
        try:
            read = _describe(plain, None, records, where, needed, list(plain)).config
            break
        except InputError:
            continue
    else:
        raise InputError(f"{where} cannot be read back; keep the model folder")
    values = {name: getattr(config, name) for name in OVERRIDES if name in names}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if name in needed or getattr(read, name) != value
    }


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise CheckpointMismatch(
            f"source={folder} has no readable config.json; give a Hugging Face model folder"
        )
    return config


def _names_in_files(table: Table, tensors: TensorSource, where: str) -> dict[str, str]:
    """The table's names and what they are called in the files, after everything was compared."""
    called = table.names_of([n for n in tensors.headers if not table.is_passed_over(n)])
    found = {name: tensors.headers[file].shape for name, file in called.items()}
    missing_constants = {n: table.shapes[n] for n in table.constants if n not in found}
    require_same_tensors(table.shapes, found | missing_constants, where)
    for name, file in called.items():
        kind = tensors.headers[file].dtype
        if kind not in DTYPES:
            raise InputError(
                f"{where} has {name} of type {kind}; only {', '.join(DTYPES)} can be read, choose "
                "a checkpoint that is not quantised"
            )
    return called


def _read_state(
    table: Table,
    tensors: TensorSource,
    names: Mapping[str, str],
    dtype: torch.dtype | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """Every parameter under our name; a mask token of our own is a row of zeros, never emitted."""
    state = {}
    for parameter in table.parameters:
        if not parameter.ours:
            continue
        with tensors.read([names[name] for name in parameter.theirs]) as theirs:
            for ours, tensor in zip(parameter.ours, parameter.read(theirs), strict=True):
                state[ours] = table.with_rows(ours, kept(tensors, tensor, dtype, device))
    return state


def _other_dtypes(
    published: Mapping[str, Any], tensors: TensorSource, names: Mapping[str, str]
) -> dict[str, str]:
    """Types of tensors that are not of the type that the config names."""
    types = {name: tensors.headers[file].dtype for name, file in names.items()}
    return {name: kind for name, kind in types.items() if kind != published_dtype(published)}


def published_dtype(published: Mapping[str, Any]) -> str:
    """The type of weights that a config names, as safetensors spells it; float32 if none."""
    named = str(published.get("dtype") or published.get("torch_dtype") or "float32")
    spelled = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
    return spelled.get(named.removeprefix("torch."), "F32")
