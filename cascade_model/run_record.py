"""What a run says of itself: the facts that it is bound to, and its end."""

import json
from typing import Any

from cascade_model.checkpoint import Checkpoint
from cascade_model.commit import Folder
from cascade_model.config import ModelConfig, NoiseConfig
from cascade_model.corpus import Corpus
from cascade_model.metrics import speed
from cascade_model.phases import phase_starts
from cascade_model.settings import to_dict
from cascade_model.training_config import TrainerConfig

SUMMARY = "summary.json"
MODEL = "model"


def facts_of(
    model: ModelConfig,
    corpus: Corpus,
    noise: NoiseConfig,
    objective: dict[str, Any],
    trainer: TrainerConfig,
    initial_weights: str | None = None,
) -> dict[str, Any]:
    """What a checkpoint must share with the run that goes on from it.

    `initial_weights` is the digest of the model that the run began with; none if it drew its own.
    A run with a block-size schedule keeps its number of steps, which the phases' borders depend on.
    """
    return {
        "model": to_dict(model),
        "corpus_digest": corpus.digest,
        "noise": to_dict(noise),
        "objective": objective,
        "sequences_per_step": trainer.sequences_per_step,
        "block_sizes": phase_starts(trainer),
        "initial_weights": initial_weights or f"drawn from trainer.seed={trainer.seed}",
    }


def finished_summary(
    folder: Folder, found: Checkpoint | None, trainer: TrainerConfig
) -> dict[str, Any] | None:
    """The summary of a run that has taken all its steps and said so; none if something is left."""
    total = trainer.num_steps * trainer.sequences_per_step
    if found is None or found.samples < total or not (folder / MODEL).exists("manifest.json"):
        return None
    try:
        summary = json.loads(folder.read_bytes(SUMMARY))
    except (FileNotFoundError, ValueError):
        return None
    return summary if summary.get("steps") == found.step else None


def write_summary(
    folder: Folder, facts: dict[str, Any], lines: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write the summary of a run that has ended, and return it.

    `lines` are all its metrics, so that speed and losses do not depend on interruptions.
    """
    seconds, tokens_per_second = speed(lines)
    losses = [line["loss"] for line in lines if line["loss"] is not None]
    evaluated = [line for line in lines if line.get("held_out_loss") is not None]
    summary = {
        "run": folder.url,
        "model": (folder / MODEL).url,
        **facts,
        "seconds": seconds,
        "tokens_per_second": tokens_per_second,
        "skipped_steps": sum(line.get("skipped_steps", 0) for line in lines),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "held_out_loss": evaluated[-1]["held_out_loss"] if evaluated else None,
    }
    folder.replace(SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
    return summary
