"""Pretrain a block-diffusion model on a prepared corpus, on Ray Train workers or in this process.

With `model.block_size=1` and `model.logits=shifted` the same job trains an autoregressive model.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cascade_model.config import (
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    TrainerConfig,
    to_dict,
)
from cascade_model.errors import CheckpointMismatch
from jobs.cli import command, dump
from jobs.launch import launch, require_room, require_workers, run_folder, with_absolute_paths

if TYPE_CHECKING:
    from cascade_model.corpus import Corpus
    from cascade_model.model import Transformer


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The model's own choices; vocabulary and special tokens come from the corpus."""

    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 64
    intermediate_size: int = 768
    rope_theta: float = 10000.0
    max_sequence_length: int = 1024
    """Longest prompt plus completion, in tokens."""
    qk_norm: bool = False
    tied_head: bool = True
    block_size: int | None = None
    """Tokens per diffusion block; none: the corpus's. It must divide the corpus's."""
    logits: Literal["aligned", "shifted"] = "aligned"
    """aligned: row i predicts token i. shifted: row i-1 predicts token i."""
    first_place: Literal["clean", "noisy", "own"] = "clean"
    """With shifted logits, the row that predicts a block's first token."""
    clean_half: Literal["block_causal", "token_causal"] = "block_causal"
    """What a committed token sees: its whole block and all before, or only the tokens before it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """Train a model from scratch, or go on from `initial_model`, on a prepared corpus."""

    corpus: str
    """Folder or URL that `cascade prepare` wrote."""
    output: str
    """Run folder: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, model/, summary.json.
    A run that is there already goes on from its newest complete checkpoint."""
    model: ModelShape = field(default_factory=ModelShape)
    initial_model: str | None = None
    """Model folder to start from; its shape then replaces `model`."""
    weight: Literal["elbo", "unit"] = "elbo"
    """Weight of a masked token: elbo is 1 / mask rate, unit is 1."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    num_workers: int = 2
    """Ranks on Ray Train; 0 trains in this process, without Ray."""
    use_gpu: bool = False
    """One GPU per rank."""
    max_failures: int = 2
    """Restarts after a rank died, each from the newest complete checkpoint; -1: no limit."""


def run(config: PretrainConfig) -> dict[str, Any]:
    """Check the settings, train, and return the run's summary."""
    check_start(config)
    folder = prepare_run(config)
    summary = launch(
        train,
        with_absolute_paths(config),
        folder=folder,
        num_workers=config.num_workers,
        use_gpu=config.use_gpu,
        max_failures=config.max_failures,
    )
    print_summary(summary)
    return summary


def train(config: PretrainConfig, device: str) -> dict[str, Any]:
    """One rank's part, inside its process group (or alone)."""
    import torch

    from cascade_model.corpus import Corpus
    from cascade_model.loss import diffusion_loss
    from cascade_model.trainer import Trainer

    corpus = Corpus.open(config.corpus)
    model = starting_model(config, corpus)
    return Trainer(
        model=model,
        corpus=corpus,
        noise=noise_of(model.config, corpus),
        loss_fn=lambda model, batch: diffusion_loss(model, batch, weight=config.weight),
        objective={"name": "diffusion", "weight": config.weight},
        optimizer=config.optimizer,
        trainer=config.trainer,
        folder=Path(config.output).absolute(),
        settings=to_dict(config),
        device=torch.device(device),
    ).fit()


def prepare_run(config: Any) -> Path:
    """Make the run folder and write its config.yaml, once everything has been checked."""
    require_room(config.num_workers, config.use_gpu)
    folder = run_folder(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
    return folder


def check_start(config: Any) -> None:
    """Find the user's mistakes here, before any worker starts."""
    from cascade_model import checkpoint
    from cascade_model.corpus import Corpus
    from cascade_model.trainer import sequences_per_rank, tell

    require_workers(config.num_workers)
    folder = run_folder(config.output)
    sequences_per_rank(config.trainer, max(config.num_workers, 1))
    corpus = Corpus.open(config.corpus)
    shape = starting_config(config, corpus)
    corpus.batch(0, 1, noise_of(shape, corpus))
    found = checkpoint.newest(folder / "checkpoints", tell)
    if found is not None:
        expected = {"model": to_dict(shape), "corpus_digest": corpus.digest}
        checkpoint.require_same(found, expected)


def starting_config(config: Any, corpus: "Corpus") -> ModelConfig:
    """The model's configuration: of `initial_model`, or of `model` and the corpus."""
    manifest = corpus.manifest
    if config.initial_model is not None:
        from cascade_model.weights import read_config

        shape = read_config(config.initial_model)
        if shape.tokenizer_sha256 != manifest.tokenizer_sha256:
            raise CheckpointMismatch(
                f"initial_model={config.initial_model} was made with the tokenizer "
                f"{shape.tokenizer_sha256} and the corpus {config.corpus} with "
                f"{manifest.tokenizer_sha256}; prepare the corpus with the model's tokenizer"
            )
        return shape
    values = dataclasses.asdict(config.model)
    values["block_size"] = config.model.block_size or corpus.block_size
    return ModelConfig(
        vocab_size=manifest.vocab_size,
        mask_id=manifest.mask_id,
        pad_id=manifest.pad_id,
        eos_id=manifest.eos_id,
        tokenizer_sha256=manifest.tokenizer_sha256,
        **values,
    )


def starting_model(config: Any, corpus: "Corpus") -> "Transformer":
    """The initial weights, equal on every rank: loaded, or drawn from `trainer.seed`."""
    from cascade_model.model import Transformer
    from cascade_model.weights import load_model

    shape = starting_config(config, corpus)
    if config.initial_model is not None:
        return load_model(config.initial_model)[0]
    model = Transformer(shape)
    model.init_weights(config.trainer.seed)
    return model


def noise_of(shape: ModelConfig, corpus: "Corpus") -> NoiseConfig:
    """The corpus's recipe at the model's block size; at the same size the stored bits are used."""
    return dataclasses.replace(corpus.manifest.noise, block_size=shape.block_size)


def print_summary(summary: dict[str, Any]) -> None:
    """The end of a run in three lines."""
    first, last = summary["first_loss"], summary["last_loss"]
    print(f"trained {summary['tokens']:,} tokens at {summary['tokens_per_second']:,.0f} tokens/s")
    print(f"loss per maskable token: {first:.4f} -> {last:.4f} nats")
    print(f"model: {summary['model']}")


main = command(PretrainConfig, run)

if __name__ == "__main__":
    raise SystemExit(main())
