"""What every training job shares: settings, checks before a start, the start, one rank's part.

A job adds two things: `objective`, which says what is minimised and is compared when a run goes on,
and the loss itself.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cascade_model.config import (
    ModelConfig,
    NoiseConfig,
    Normaliser,
    OptimizerConfig,
    TrainerConfig,
    TrainingNoise,
    Weight,
)
from cascade_model.errors import CheckpointMismatch
from cascade_model.settings import (
    check,
    to_dict,
)
from cascade_model.shard_cache import CacheConfig
from jobs.cli import dump
from jobs.launch import launch, require_room, require_workers, run_folder, with_absolute_paths

if TYPE_CHECKING:
    from cascade_model.corpus import Corpus
    from cascade_model.lease import Owner
    from cascade_model.networks import Network
    from cascade_model.trainer import LossFn


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
class TrainingConfig:
    """What to train on, what, for how long and where."""

    corpus: str
    """Folder or URL that `cascade prepare` wrote."""
    output: str
    """Run folder: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, model/, summary.json.
    A run that is there goes on from its newest complete checkpoint; one in use is refused."""
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
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    num_workers: int = 2
    """Ranks on Ray Train; 0 trains in this process, without Ray."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    use_gpu: bool = False
    """One GPU per rank."""
    max_failures: int = 2
    """Restarts after a rank died, each from the newest complete checkpoint; -1: no limit."""


def start(
    config: TrainingConfig, train: Callable[..., dict[str, Any]], objective: dict[str, Any]
) -> dict[str, Any]:
    """Check the settings, train what is left to train, print and return the run's summary.

    `train(config, device, owner)` is one rank's part. Nothing is written before all is checked.
    """
    from cascade_model.commit import replace_file
    from cascade_model.lease import hold

    summary = check_start(config, objective)
    if summary is None:
        require_room(config.num_workers, config.use_gpu)
        folder = run_folder(config.output)
        with hold(folder) as owner:
            replace_file(folder / "config.yaml", dump(config).encode())
            summary = launch(
                partial(train, owner=owner),
                with_absolute_paths(config),
                folder=folder,
                num_workers=config.num_workers,
                use_gpu=config.use_gpu,
                max_failures=config.max_failures,
            )
    print_summary(summary)
    return summary


def check_start(config: TrainingConfig, objective: dict[str, Any]) -> dict[str, Any] | None:
    """Find the user's mistakes here, before any worker starts and without writing anything.

    Returns the summary of a run that is finished already.
    """
    from cascade_model import checkpoint
    from cascade_model.commit import require_writable
    from cascade_model.corpus import Corpus
    from cascade_model.manifest import MANIFEST
    from cascade_model.trainer import facts_of, finished_summary, sequences_per_rank, tell

    require_workers(config.num_workers)
    folder = run_folder(config.output)
    require_writable(folder)
    check(
        not (folder / MANIFEST).exists(),
        f"output={config.output} holds a corpus; choose a folder of the run's own",
    )
    sequences_per_rank(config.trainer, max(config.num_workers, 1))
    corpus = Corpus.open(config.corpus)
    shape = starting_config(config, corpus)
    if shape.infill == "psm" and corpus.manifest.infill is None:
        tell(
            f"initial_model={config.initial_model} can fill holes (infill=psm) and no document of "
            f"corpus={config.corpus} is rearranged, so it may unlearn that"
        )
    noise = noise_of(shape, corpus, config.noise, config.trainer.sequences_per_step)
    check_weight(config.weight, noise)
    corpus.batch(0, 1, noise)
    found = checkpoint.newest(folder / "checkpoints", tell)
    if found is not None:
        facts = facts_of(shape, corpus, noise, objective, config.trainer)
        checkpoint.require_same(found, facts)
    return finished_summary(folder, found, config.trainer)


def fit(
    config: TrainingConfig,
    device: str,
    objective: dict[str, Any],
    loss_fn: "LossFn",
    owner: "Owner | None",
) -> dict[str, Any]:
    """One rank's part, inside its process group (or alone)."""
    import torch

    from cascade_model.corpus import Corpus
    from cascade_model.trainer import Trainer
    from cascade_model.weights import read_published

    corpus = Corpus.open(config.corpus, cache=config.cache)
    model = starting_model(config, corpus)
    start = config.initial_model
    return Trainer(
        model=model,
        corpus=corpus,
        noise=noise_of(model.config, corpus, config.noise, config.trainer.sequences_per_step),
        loss_fn=loss_fn,
        objective=objective,
        optimizer=config.optimizer,
        trainer=config.trainer,
        folder=Path(config.output).absolute(),
        settings=to_dict(config),
        owner=owner,
        published=None if start is None else read_published(start),
        device=torch.device(device),
    ).fit()


def check_weight(weight: Weight, noise: NoiseConfig) -> None:
    """The complement of a rate near 1 is one near 0, whose weight 1/t has no finite variance."""
    is_pair = isinstance(noise, TrainingNoise) and noise.complement
    check(
        not is_pair or weight != "elbo" or noise.max_rate <= 0.999,
        f"noise.complement=True with weight=elbo weighs 1 / (1 - t), and noise.max_rate="
        f"{noise.max_rate} comes too near 1; use weight=unit, or noise.max_rate=0.999",
    )


def starting_config(config: TrainingConfig, corpus: "Corpus") -> ModelConfig:
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
        return dataclasses.replace(shape, **infilling_of(corpus))
    values = dataclasses.asdict(config.model)
    values["block_size"] = config.model.block_size or corpus.block_size
    return ModelConfig(
        vocab_size=manifest.vocab_size,
        mask_id=manifest.mask_id,
        pad_id=manifest.pad_id,
        eos_id=manifest.eos_id,
        tokenizer_sha256=manifest.tokenizer_sha256,
        **infilling_of(corpus),
        **values,
    )


def infilling_of(corpus: "Corpus") -> dict[str, Any]:
    """What a model learns of filling holes from a corpus, as settings of its configuration: nothing
    where no document is rearranged, and then a model that could do it before keeps its word."""
    entry = corpus.manifest.infill
    return {} if entry is None else {"infill": entry.mode, "infill_ids": entry.ids}


def starting_model(config: TrainingConfig, corpus: "Corpus") -> "Network":
    """The initial weights, equal on every rank: loaded, or drawn from `trainer.seed`."""
    from cascade_model.networks import build_network
    from cascade_model.weights import load_model

    shape = starting_config(config, corpus)
    if config.initial_model is not None:
        model = load_model(config.initial_model)[0]
        model.config = shape
        return model
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
        size = shape.block_size
        check(
            corpus.block_size % size == 0,
            f"model.block_size={size} does not divide the corpus's block size {corpus.block_size}; "
            f"use a divisor, or prepare the corpus with --noise.block-size {size}",
        )
        changes["block_size"] = size
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
    if first is not None and last is not None:
        print(f"loss per maskable token: {first:.4f} -> {last:.4f} nats")
    print(f"model: {summary['model']}")
