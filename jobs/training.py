"""What every training job shares: settings, checks before a start, the start, one rank's part.

A job adds two things: `objective`, which says what is minimised and is compared when a run goes on,
and the loss itself.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from cascade_model.commit import Folder
from cascade_model.config import ModelConfig, NoiseConfig, TrainingNoise, Weight
from cascade_model.settings import check, to_dict
from jobs import torchrun
from jobs.cli import dump
from jobs.earlier import Earlier, newest_checkpoint
from jobs.launch import Placement, launch, require_room, with_absolute_paths
from jobs.ranks import Started
from jobs.run_folder import run_folder
from jobs.starting import initial_weights_of, require_length, starting_config, starting_model
from jobs.training_settings import HeldOutChoices, ModelShape, NoiseChoices, TrainingConfig

__all__ = [
    "HeldOutChoices",
    "ModelShape",
    "NoiseChoices",
    "TrainingConfig",
    "check_start",
    "fit",
    "start",
]

if TYPE_CHECKING:
    from cascade_model.corpus import Corpus
    from cascade_model.lease import Owner
    from cascade_model.networks import Network
    from cascade_model.progress import Beside
    from cascade_model.trainer import LossFn
    from cascade_model.window import HeldOut


def start(
    config: TrainingConfig, train: Callable[..., dict[str, Any]], objective: dict[str, Any]
) -> dict[str, Any]:
    """Check the settings, train what is left to train, print and return the run's summary.

    `train(config, device, started)` is one rank's part. Nothing is written before all is checked.
    Under `torchrun` every process comes here; the first one checks and holds the folder for all.
    """
    placement = placement_of(config)
    if config.num_workers == 0:
        torchrun.join(placement)
    with torchrun.one_voice():
        return _start(config, train, objective, placement)


def _start(
    config: TrainingConfig,
    train: Callable[..., dict[str, Any]],
    objective: dict[str, Any],
    placement: Placement,
) -> dict[str, Any]:
    """`start`, with all ranks of this command there."""
    from cascade_model import parallel
    from cascade_model.metrics import tell

    # Ranks here tell of damaged checkpoints themselves; what those on Ray say stays in its logs.
    teller = tell if config.num_workers else None
    earlier = parallel.on_first_rank(lambda: check_start(config, objective, teller))
    if earlier is not None and earlier.summary is not None:
        if parallel.rank() == 0:
            print(earlier)
            print_summary(earlier.summary)
        return earlier.summary
    require_room(placement)
    folder = run_folder(config.output)
    with contextlib.ExitStack() as held:
        owner = parallel.on_first_rank(lambda: _take(folder, config, earlier, held))
        settings = with_absolute_paths(config)
        summary = launch(train, settings, folder=folder, placement=placement, owner=owner)
    if parallel.rank() == 0:
        rate = summary["tokens_per_second"]
        print(f"trained {summary['tokens']:,} tokens at {rate:,.0f} tokens/s")
        print_summary(summary)
    return summary


def placement_of(config: TrainingConfig) -> Placement:
    """Where and on how many ranks, checked."""
    names = [f.name for f in dataclasses.fields(Placement)]
    return Placement(**{name: getattr(config, name) for name in names})


def _take(
    folder: Folder,
    config: TrainingConfig,
    earlier: Earlier | None,
    held: contextlib.ExitStack,
) -> "Owner":
    """Hold the folder for this run, tell what changes in it, and write its settings there."""
    from cascade_model.lease import hold
    from cascade_model.metrics import tell

    owner = held.enter_context(hold(folder))
    if earlier is not None and earlier.changes:
        tell(str(earlier))
    folder.replace("config.yaml", dump(config).encode())
    return owner


def check_start(
    config: TrainingConfig,
    objective: dict[str, Any],
    teller: Callable[[str], None] | None = None,
) -> Earlier | None:
    """Find the user's mistakes here, before any worker starts and without writing anything.

    Returns what an earlier start has left, if there is a checkpoint; damaged ones are told to
    `teller`, if there is one.
    """
    from cascade_model import checkpoint
    from cascade_model.commit import require_writable
    from cascade_model.corpus import Corpus
    from cascade_model.manifest import MANIFEST
    from cascade_model.metrics import tell
    from cascade_model.phases import require_phases
    from cascade_model.run_record import facts_of, finished_summary

    folder = run_folder(config.output)
    require_writable(folder.url)
    check(
        not folder.exists(MANIFEST),
        f"output={config.output} holds a corpus; choose a folder of the run's own",
    )
    require_shares(config)
    corpus = Corpus.open(config.corpus)
    shape = starting_config(config, corpus)
    if shape.infill == "psm" and corpus.manifest.infill is None:
        tell(
            f"initial_model={config.initial_model} can fill holes (infill=psm) and no document of "
            f"corpus={config.corpus} is rearranged, so it may unlearn that"
        )
    require_length(config, shape, corpus)
    noise = noise_of(shape, corpus, config.noise, config.trainer.sequences_per_step)
    check_weight(config.weight, noise)
    check(
        config.trainer.attention == "grouped" or config.use_gpu,
        f"trainer.attention={config.trainer.attention} needs GPUs; use "
        "trainer.attention=grouped, or use_gpu=True",
    )
    if config.trainer.evaluate_every is not None:
        Corpus.open(config.corpus, split="held_out")
    require_phases(config.trainer, shape, corpus.block_size, corpus.sequence_length)
    corpus.batch(0, 1, noise)
    found = newest_checkpoint(folder, teller)
    if found is None:
        return None
    given = shape, corpus, noise, objective, config.trainer
    checkpoint.require_same(found, facts_of(*given, initial_weights_of(config)))
    return Earlier.of(found, finished_summary(folder, found, config.trainer), config)


def require_shares(config: TrainingConfig) -> None:
    """Raise `InputError` unless a step can be shared by every number of ranks the run may have."""
    from cascade_model import feed, parallel
    from cascade_model.sharding import require_replicas

    sizes = placement_of(config).sizes if config.num_workers else [parallel.world_size()]
    feed.require_shares(config.trainer, sizes)
    for size in sizes:
        require_replicas(config.trainer, size)


def fit(
    config: TrainingConfig,
    device: str,
    objective: dict[str, Any],
    loss_fn: "LossFn",
    started: Started,
    **more: Any,
) -> dict[str, Any]:
    """One rank's part, inside its process group (or alone); `more` are fields of the trainer."""
    import torch

    from cascade_model import parallel
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
        folder=run_folder(config.output),
        settings=to_dict(config),
        owner=started.owner,
        published=None if start is None else read_published(start),
        chat_template=template_text(corpus, start),
        device=torch.device(device),
        on_save=started.on_save,
        stop_wanted=started.stop_wanted,
        held_out=held_out_of(config),
        collective_timeout_s=config.collective_timeout_s,
        beside=beside_of(config),
        initial_weights=parallel.on_first_rank(lambda: initial_weights_of(config)),
        **more,
    ).fit()


def template_text(corpus: "Corpus", start: str | None) -> str | None:
    """The chat template that the trained model brings: the one that the corpus' chats were written
    with; where it has none, that of the model it started from."""
    from cascade_model.chat_template import ChatTemplate
    from cascade_model.own_template import own_template

    name = corpus.manifest.chat_template
    if name is not None:
        return ChatTemplate.of(name, corpus.tokenizer()).text
    return None if start is None else own_template(start)


def beside_of(config: TrainingConfig) -> "Beside":
    """What the stage's loss computes beside the masked tokens, of those stages that can."""
    from cascade_model.progress import Beside

    return Beside(
        has_next_tokens=getattr(config, "ar_weight", 0.0) > 0,
        teacher=teacher_config(config),
        has_targets=getattr(config, "targets", None) is not None,
        has_entropy=getattr(config, "entropy_weight", 0.0) > 0,
    )


def teacher_config(config: TrainingConfig) -> ModelConfig | None:
    """The shape of a teacher that runs beside the student."""
    from cascade_model.weights import read_config

    path = getattr(config, "teacher", None)
    return None if path is None else read_config(path)


def held_out_of(config: TrainingConfig) -> "Callable[[Network], HeldOut] | None":
    """What a run measures while it trains, if it does: the bound, under its own outcomes."""
    if config.trainer.evaluate_every is None:
        return None
    from cascade_model.corpus import Corpus
    from cascade_model.evaluation import held_out

    return partial(
        held_out,
        corpus=Corpus.open(config.corpus, split="held_out", cache=config.cache),
        draws=config.held_out.draws,
        max_sequences=config.held_out.sequences,
        sequences_per_forward=config.trainer.sequences_per_forward,
        outcomes=getattr(config, "outcomes", "text"),
    )


def check_weight(weight: Weight, noise: NoiseConfig) -> None:
    """The complement of a rate near 1 is one near 0, whose weight 1/t has no finite variance."""
    is_pair = isinstance(noise, TrainingNoise) and noise.complement
    check(
        not is_pair or weight != "elbo" or noise.max_rate <= 0.999,
        f"noise.complement=True with weight=elbo weighs 1 / (1 - t), and noise.max_rate="
        f"{noise.max_rate} comes too near 1; use weight=unit, or noise.max_rate=0.999",
    )


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
    """What came out of a run, in two lines."""
    first, last = summary["first_loss"], summary["last_loss"]
    if first is not None and last is not None:
        print(f"loss per maskable token: {first:.4f} -> {last:.4f} nats")
    print(f"model: {summary['model']}")
