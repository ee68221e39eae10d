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
    Normaliser,
    OptimizerConfig,
    Outcomes,
    TrainerConfig,
    TrainingNoise,
    Weight,
    check,
    to_dict,
)
from cascade_model.errors import CheckpointMismatch
from jobs.cli import command, dump
from jobs.launch import launch, require_workers, run_folder, with_absolute_paths

if TYPE_CHECKING:
    from cascade_model.corpus import Corpus
    from cascade_model.networks import Network


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
    attention: Literal["block_causal", "bidirectional"] = "block_causal"
    """block_causal: a token sees its own block and those before it. bidirectional: its whole
    document, as in LLaDA."""
    block_size: int | None = None
    """Tokens per diffusion block; none: the corpus's. It must divide the corpus's."""
    logits: Literal["aligned", "shifted"] = "aligned"
    """aligned: row i predicts token i. shifted: row i-1 predicts token i."""
    first_place: Literal["clean", "noisy", "own"] = "clean"
    """With shifted logits, the row that predicts a block's first token."""
    clean_half: Literal["block_causal", "token_causal"] = "block_causal"
    """What a committed token sees: its whole block and all before, or only the tokens before it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseChoices:
    """What differs from the corpus's own mask recipe. Its stored masks are used as long as the
    first five settings and the padding are left alone."""

    seed: int | None = None
    per: Literal["block", "sequence"] | None = None
    """Whether each block draws a mask rate of its own or the whole sequence shares one; none: the
    corpus's, and one per sequence for a bidirectional model."""
    min_rate: float | None = None
    """Lowest mask rate."""
    max_rate: float | None = None
    """Highest mask rate."""
    strata: int | None = None
    """Sequences over which the mask rates are stratified."""
    complement: bool = False
    """Show each sequence twice running, the second time with exactly the other tokens masked."""
    padding: Literal["never", "eos"] = "never"
    """never: padding carries no loss. eos: it holds EOS, is masked and counts as text does (LLaDA's
    fine-tuning)."""
    short_rate: float = 0.0
    """Share of the steps whose sequences are cut to a random length (LLaDA: 0.01)."""


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
    noise: NoiseChoices = field(default_factory=NoiseChoices)
    weight: Weight = "elbo"
    """Weight of a masked token: elbo is 1 / mask rate, unit is 1, cart grows with the visible
    tokens nearby (Dream)."""
    normaliser: Normaliser = "maskable"
    """What the weighted sum is divided by: the tokens that could have been masked, those that were,
    or each document by its own tokens and then the mean over documents."""
    outcomes: Outcomes = "text"
    """What can be predicted: text leaves out mask and padding, all_but_mask the mask alone (MDLM),
    all nothing (LLaDA)."""
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
    check_start(config, config.noise)
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
    axes: dict[str, Any] = {
        name: getattr(config, name) for name in ("weight", "normaliser", "outcomes")
    }
    return Trainer(
        model=model,
        corpus=corpus,
        noise=noise_of(model.config, corpus, config.noise, config.trainer.sequences_per_step),
        loss_fn=lambda model, batch: diffusion_loss(model, batch, **axes),
        objective={"name": "diffusion", **axes},
        optimizer=config.optimizer,
        trainer=config.trainer,
        folder=Path(config.output).absolute(),
        settings=to_dict(config),
        device=torch.device(device),
    ).fit()


def prepare_run(config: Any) -> Path:
    """Make the run folder and write its config.yaml, once everything has been checked."""
    folder = run_folder(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
    return folder


def check_start(config: Any, choices: NoiseChoices | None = None) -> None:
    """Find the user's mistakes here, before any worker starts."""
    from cascade_model import checkpoint
    from cascade_model.corpus import Corpus
    from cascade_model.trainer import sequences_per_rank, tell

    require_workers(config.num_workers)
    folder = run_folder(config.output)
    sequences_per_rank(config.trainer, max(config.num_workers, 1))
    corpus = Corpus.open(config.corpus)
    shape = starting_config(config, corpus)
    noise = noise_of(shape, corpus, choices, config.trainer.sequences_per_step)
    check_weight(config.weight, noise)
    corpus.batch(0, 1, noise)
    found = checkpoint.newest(folder / "checkpoints", tell)
    if found is not None:
        expected = {"model": to_dict(shape), "corpus_digest": corpus.digest}
        checkpoint.require_same(found, expected)


def check_weight(weight: Weight, noise: NoiseConfig) -> None:
    """The complement of a rate near 1 is one near 0, whose weight 1/t has no finite variance."""
    is_pair = isinstance(noise, TrainingNoise) and noise.complement
    check(
        not is_pair or weight != "elbo" or noise.max_rate <= 0.999,
        f"noise.complement=True with weight=elbo weighs 1 / (1 - t), and noise.max_rate="
        f"{noise.max_rate} comes too near 1; use weight=unit, or noise.max_rate=0.999",
    )


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


def starting_model(config: Any, corpus: "Corpus") -> "Network":
    """The initial weights, equal on every rank: loaded, or drawn from `trainer.seed`."""
    from cascade_model.networks import build_network
    from cascade_model.weights import load_model

    shape = starting_config(config, corpus)
    if config.initial_model is not None:
        return load_model(config.initial_model)[0]
    model = build_network(shape)
    model.init_weights(config.trainer.seed)
    return model


def noise_of(
    shape: ModelConfig,
    corpus: "Corpus",
    choices: NoiseChoices | None = None,
    sequences_per_step: int = 1,
) -> NoiseConfig:
    """The corpus's recipe with the run's choices.

    A block-causal model's own block size replaces the corpus's; at the same size, and with the same
    rates, the stored bits are used. A bidirectional model keeps the corpus's blocks as a grid.
    """
    choices = choices or NoiseChoices()
    is_causal = shape.attention == "block_causal"
    changes = {
        name: getattr(choices, name)
        for name in ("seed", "per", "min_rate", "max_rate", "strata")
        if getattr(choices, name) is not None
    }
    if is_causal:
        changes["block_size"] = shape.block_size
    else:
        changes.setdefault("per", "sequence")
    recipe = dataclasses.replace(corpus.manifest.noise, **changes)
    if not (choices.complement or choices.padding == "eos" or choices.short_rate):
        return recipe
    return TrainingNoise.over(
        recipe,
        complement=choices.complement,
        padding=choices.padding,
        short_rate=choices.short_rate,
        short_multiple=recipe.block_size if is_causal or recipe.per == "block" else 1,
        sequences_per_batch=sequences_per_step,
    )


def print_summary(summary: dict[str, Any]) -> None:
    """The end of a run in three lines."""
    first, last = summary["first_loss"], summary["last_loss"]
    print(f"trained {summary['tokens']:,} tokens at {summary['tokens_per_second']:,.0f} tokens/s")
    print(f"loss per maskable token: {first:.4f} -> {last:.4f} nats")
    print(f"model: {summary['model']}")


main = command(PretrainConfig, run)

if __name__ == "__main__":
    raise SystemExit(main())
