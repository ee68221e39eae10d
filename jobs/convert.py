"""Make a published checkpoint a model folder: to decode, as a teacher, or as a starting point.

A diffusion checkpoint keeps what it records: who sees whom, shift, block size, mask token, types of
weights. An autoregressive one becomes a start of block diffusion: rows for the mask and the padding
token are added to the vocabulary and never emitted, so a converted model at `block_size=1
logits=shifted first_place=clean` predicts exactly what the checkpoint did. A larger `block_size`
only changes who sees whom; the weights then need training.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cascade_model.config import ModelConfig
from cascade_model.errors import CheckpointMismatch, InputError
from cascade_model.settings import check, to_dict
from jobs.cli import command

if TYPE_CHECKING:
    from torch import Tensor

    from cascade_model.families import Checkpoint
    from cascade_model.tokenizer import Tokenizer
    from cascade_model.weights import Published


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """Turn a published checkpoint into a model folder of ours."""

    source: str
    """Hugging Face folder of a known family (safetensors), GGUF file, or model folder."""
    output: str
    """Model folder to write; a model there is replaced."""
    block_size: int | None = None
    """Tokens per diffusion block, a power of two; 1 with shifted logits keeps a model
    autoregressive, for a teacher. None: what the checkpoint says, 8 for an autoregressive one."""
    attention: Literal["block_causal", "bidirectional"] | None = None
    """Who sees whom; none: what the checkpoint says."""
    logits: Literal["aligned", "shifted"] | None = None
    """shifted: row i-1 predicts token i, as in an autoregressive checkpoint. None: what the
    checkpoint says."""
    first_place: Literal["clean", "noisy", "own"] | None = None
    """With shifted logits, the row that predicts a block's first token; none: what the checkpoint
    says."""
    clean_half: Literal["block_causal", "token_causal"] | None = None
    """What a committed token sees: its whole block and all before, or only the tokens before it.
    None: what the checkpoint says, block_causal for an autoregressive one."""
    mask_id: int | None = None
    """The mask token, where the checkpoint records none."""
    eos_id: int | None = None
    """The token that ends a text, where the checkpoint records none."""
    pad_id: int | None = None
    """The padding token; none: the recorded one, else the end of text."""
    max_sequence_length: int | None = None
    """Longest prompt plus completion; none: what the checkpoint says."""
    infill: Literal["none", "tokens", "psm"] = "none"
    """tokens: with tokens of prefix, suffix and middle, for training on a corpus that was prepared
    with an infill_rate. psm: the checkpoint was trained on rearranged documents (StarCoder,
    Qwen2.5-Coder), with such tokens of its own. none: what the model folder says."""
    ignore_settings: tuple[str, ...] = ()
    """Fields of the checkpoint's config.json that are known to change no number."""
    seed: int = 0
    """Seed of the noise on new embedding rows."""

    def __post_init__(self) -> None:
        size = self.block_size
        check(
            size is None or (size >= 1 and size & (size - 1) == 0),
            f"block_size={size} must be a power of two; use 4, 8, 16 or 32",
        )

    @property
    def choices(self) -> dict[str, Any]:
        """The settings of `ModelConfig` that were given."""
        names = ("block_size", "attention", "logits", "first_place", "clean_half", "mask_id")
        names += ("eos_id", "pad_id", "max_sequence_length")
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """What a model folder is written from."""

    config: ModelConfig
    state: "dict[str, Tensor]"
    tokenizer: "Tokenizer"
    published: "Published | None"
    chat_template: str | None
    rows_added: int = 0


# What an autoregressive checkpoint becomes unless something else is chosen.
_START = {
    "attention": "block_causal",
    "block_size": 8,
    "logits": "shifted",
    "first_place": "clean",
    "clean_half": "block_causal",
}


def run(config: ConvertConfig) -> dict[str, Any]:
    """Read, add the special rows, write the model folder with the source's chat template; returns a
    summary."""
    from cascade_model.commit import require_writable
    from cascade_model.networks import network_with
    from cascade_model.weights import save_model

    require_writable(config.output)
    made = with_infilling(convert(config), config)
    shape = made.config
    model = network_with(shape, made.state, config.source)
    save_model(
        config.output, model, made.tokenizer, made.published, chat_template=made.chat_template
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"wrote {config.output}: {parameters:,} parameters, {shape.attention} attention, block "
        f"size {shape.block_size}, {shape.logits} logits, {made.rows_added} vocabulary rows added"
    )
    return {"model": config.output, "parameters": parameters, "rows_added": made.rows_added}


def convert(config: ConvertConfig) -> Converted:
    """The new config and its tensors, from a model folder of ours or a published checkpoint."""
    if (Path(config.source) / "manifest.json").is_file():
        return _from_model_folder(config)
    from cascade_model.families import read_checkpoint
    from cascade_model.own_template import own_template
    from cascade_model.weights import Published

    read = read_checkpoint(
        config.source, dtype=None, overrides=config.choices, ignore=config.ignore_settings
    )
    if read.tokenizer is None:
        raise CheckpointMismatch(
            f"source={config.source} has no tokenizer.json; add the checkpoint's own"
        )
    made = Converted(
        config=read.config,
        state=read.state,
        tokenizer=read.tokenizer,
        published=Published(config=read.published, dtypes=read.dtypes),
        chat_template=own_template(config.source),
    )
    return _from_autoregressive(config, read, made) if read.family.is_autoregressive else made


def _from_model_folder(config: ConvertConfig) -> Converted:
    """The same weights with other choices; an autoregressive folder becomes a start."""
    from cascade_model.networks import own_state
    from cascade_model.own_template import own_template
    from cascade_model.weights import load_model, read_published, require_text

    model, tokenizer = load_model(config.source, dtype=None)
    start = _START if model.config.is_autoregressive else {}
    return Converted(
        config=ModelConfig.from_dict(to_dict(model.config) | start | config.choices),
        state=own_state(model),
        tokenizer=require_text(tokenizer, config.source),
        published=read_published(config.source),
        chat_template=own_template(config.source),
    )


def _from_autoregressive(config: ConvertConfig, read: "Checkpoint", made: Converted) -> Converted:
    """Special tokens and their rows are added."""
    tokenizer = made.tokenizer.with_specials()
    state, added = _grow(read, made.tokenizer, tokenizer, config)
    ids = {
        "vocab_size": read.rows + added,
        "mask_id": tokenizer.mask_id,
        "pad_id": tokenizer.pad_id,
        "eos_id": tokenizer.eos_id,
        "tokenizer_sha256": tokenizer.sha256,
    }
    return dataclasses.replace(
        made,
        config=dataclasses.replace(read.config, **(_START | ids | config.choices)),
        state=state,
        tokenizer=tokenizer,
        rows_added=added,
    )


def _grow(
    read: "Checkpoint", original: "Tokenizer", tokenizer: "Tokenizer", config: ConvertConfig
) -> "tuple[dict[str, Tensor], int]":
    """Rows for tokens beyond the checkpoint's own, and fresh ones for mask and padding.

    A new row is the mean embedding plus noise, scaled to the typical norm of a row's difference
    from the mean: an unused row near zero makes gradients explode (LLaDA2.0 report, section 7.1).
    """
    rows = read.rows
    if original.vocab_size > rows:
        raise InputError(
            f"source={config.source} has a tokenizer of {original.vocab_size} tokens but "
            f"{rows} embedding rows; use the checkpoint's own tokenizer"
        )
    fresh = [i for i in (tokenizer.pad_id, tokenizer.mask_id) if i >= original.vocab_size]
    added = max(0, tokenizer.vocab_size - rows)
    state = {}
    while read.state:  # one after the other, so that memory holds no second copy
        name, tensor = read.state.popitem()
        state[name] = tensor.float()  # to be trained
    for name in ("embed.weight", "head.weight"):
        if name in state:
            state[name] = _with_rows(state[name][:rows], rows + added, fresh, config.seed)
    return state, added


def with_infilling(made: Converted, config: ConvertConfig) -> Converted:
    """With the tokens of prefix, suffix and middle: their rows are drawn where they are new."""
    if config.infill == "none":
        return made
    tokenizer = made.tokenizer.with_infill()
    fresh = [i for i in tokenizer.infill_ids if i >= made.tokenizer.vocab_size]
    check(
        config.infill == "tokens" or not fresh,
        f"infill=psm and source={config.source} has no tokens of prefix, suffix and middle, so it "
        "was not trained with them; use infill=tokens and train it",
    )
    check(
        not fresh or "head.bias" not in made.state,
        f"infill=tokens adds rows to the vocabulary and source={config.source} has a head with "
        "biases, which cannot be grown; use another checkpoint",
    )
    rows = max(made.config.vocab_size, tokenizer.vocab_size)
    changes: dict[str, Any] = {"vocab_size": rows, "tokenizer_sha256": tokenizer.sha256}
    if config.infill == "psm":
        changes |= {"infill": "psm", "infill_ids": tokenizer.infill_ids}
    tables = {
        name: _with_rows(made.state[name], rows, fresh, config.seed)
        for name in ("embed.weight", "head.weight")
        if name in made.state and fresh
    }
    return dataclasses.replace(
        made,
        config=dataclasses.replace(made.config, **changes),
        state=made.state | tables,
        tokenizer=tokenizer,
        rows_added=made.rows_added + rows - made.config.vocab_size,
    )


def _with_rows(table: "Tensor", rows: int, fresh: list[int], seed: int) -> "Tensor":
    """Extend [v, d] to [rows, d]; every added row and every `fresh` one is drawn anew."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    mean = table.mean(dim=0)
    spread = (table - mean).norm(dim=1).median()
    grown = torch.cat([table, table.new_empty(rows - len(table), table.shape[1])])
    for row in sorted({*range(len(table), rows), *fresh}):
        noise = torch.randn(table.shape[1], generator=generator, dtype=table.dtype)
        grown[row] = mean + noise / noise.norm() * spread
    return grown


main = command(ConvertConfig, run)

if __name__ == "__main__":
    raise SystemExit(main())
