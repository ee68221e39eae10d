"""Make an autoregressive checkpoint a starting point: of block diffusion, or as a teacher.

Rows for the mask and the padding token are added to the vocabulary and never emitted, so a
converted model at `block_size=1 logits=shifted first_place=clean` predicts exactly what the
checkpoint did. A larger `block_size` only changes who sees whom; the weights then need training.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cascade_model.config import ModelConfig, check, to_dict
from cascade_model.errors import CheckpointMismatch, InputError
from jobs.cli import command

if TYPE_CHECKING:
    from torch import Tensor

    from cascade_model.families import ARCheckpoint
    from cascade_model.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """Turn an autoregressive checkpoint into a model folder of ours."""

    source: str
    """Hugging Face folder (Llama, Qwen2 or Qwen3 type, safetensors), GGUF file, or model folder."""
    output: str
    """Model folder to write; a model there is replaced."""
    block_size: int = 8
    """Tokens per diffusion block, a power of two; 1 with shifted logits keeps the model
    autoregressive, for a teacher."""
    logits: Literal["aligned", "shifted"] = "shifted"
    """shifted keeps row i-1 predicting token i, as the checkpoint does; aligned must be learnt."""
    first_place: Literal["clean", "noisy", "own"] = "clean"
    """With shifted logits, the row that predicts a block's first token."""
    clean_half: Literal["block_causal", "token_causal"] = "block_causal"
    """What a committed token sees: its whole block and all before, or only the tokens before it."""
    max_sequence_length: int | None = None
    """Longest prompt plus completion; none: what the checkpoint says."""
    seed: int = 0
    """Seed of the noise on the new embedding rows."""

    def __post_init__(self) -> None:
        check(
            self.block_size >= 1 and self.block_size & (self.block_size - 1) == 0,
            f"block_size={self.block_size} must be a power of two; use 4, 8, 16 or 32",
        )


def run(config: ConvertConfig) -> dict[str, Any]:
    """Read, add the special rows, write the model folder; returns a summary."""
    from cascade_model.commit import require_writable
    from cascade_model.model import Transformer
    from cascade_model.weights import fill, save_model

    require_writable(config.output)
    shape, state, tokenizer, added = read_source(config)
    model = Transformer(shape)
    fill(model, state, config.source)
    save_model(config.output, model, tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"wrote {config.output}: {parameters:,} parameters, block size {shape.block_size}, "
        f"{shape.logits} logits, {added} vocabulary rows added"
    )
    return {"model": config.output, "parameters": parameters, "rows_added": added}


def read_source(
    config: ConvertConfig,
) -> "tuple[ModelConfig, dict[str, Tensor], Tokenizer, int]":
    """The new config, its tensors, the tokenizer, and how many rows were added."""
    if (Path(config.source) / "manifest.json").is_file():
        from cascade_model.weights import load_model, own_state

        model, tokenizer = load_model(config.source)
        return (
            _new_config(config, to_dict(model.config), tokenizer),
            own_state(model),
            tokenizer,
            0,
        )
    from cascade_model.families import read_ar

    checkpoint = read_ar(config.source)
    if checkpoint.tokenizer is None:
        raise CheckpointMismatch(
            f"source={config.source} has no tokenizer.json; add the checkpoint's own"
        )
    tokenizer = checkpoint.tokenizer.with_specials()
    state, added = _grow(checkpoint, tokenizer, config)
    shape = checkpoint.shape | {"vocab_size": checkpoint.shape["vocab_size"] + added}
    return _new_config(config, shape, tokenizer), state, tokenizer, added


def _new_config(
    config: ConvertConfig, shape: dict[str, Any], tokenizer: "Tokenizer"
) -> ModelConfig:
    """The network's shape with this conversion's choices."""
    choices = {
        "block_size": config.block_size,
        "logits": config.logits,
        "first_place": config.first_place,
        "clean_half": config.clean_half,
        "mask_id": tokenizer.mask_id,
        "pad_id": tokenizer.pad_id,
        "eos_id": tokenizer.eos_id,
        "tokenizer_sha256": tokenizer.sha256,
    }
    if config.max_sequence_length is not None:
        choices["max_sequence_length"] = config.max_sequence_length
    return ModelConfig(**(shape | choices))


def _grow(
    checkpoint: "ARCheckpoint", tokenizer: "Tokenizer", config: ConvertConfig
) -> "tuple[dict[str, Tensor], int]":
    """Rows for tokens beyond the checkpoint's own, and fresh ones for mask and padding.

    A new row is the mean embedding plus noise, scaled to the typical norm of a row's difference
    from the mean: an unused row near zero makes gradients explode (LLaDA2.0 report, section 7.1).
    """
    rows = checkpoint.shape["vocab_size"]
    original = checkpoint.tokenizer
    assert original is not None
    if original.vocab_size > rows:
        raise InputError(
            f"source={config.source} has a tokenizer of {original.vocab_size} tokens but "
            f"{rows} embedding rows; use the checkpoint's own tokenizer"
        )
    fresh = [i for i in (tokenizer.pad_id, tokenizer.mask_id) if i >= original.vocab_size]
    added = max(0, tokenizer.vocab_size - rows)
    state = dict(checkpoint.state)
    for name in ("embed.weight", "head.weight"):
        if name in state:
            state[name] = _with_rows(state[name], rows + added, fresh, config.seed)
    return state, added


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
