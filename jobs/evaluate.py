"""Measure a model on a corpus's held-out split: bound or likelihood, unigram, untrained model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cascade_model.config import ModelConfig, Outcomes
from cascade_model.errors import CheckpointMismatch, InputError
from jobs.cli import command

if TYPE_CHECKING:
    from cascade_model.evaluation import Bound
    from cascade_model.networks import Network


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Held-out bound of a model, in nats per token and per byte, with two values beside it."""

    model: str
    """A model folder, a checkpoint (`.../checkpoints/step_...`) or a run folder."""
    corpus: str
    """Folder or URL that `cascade prepare` wrote; its held-out split is used."""
    output: str | None = None
    """JSON file for the same values and the digest of the weights; none: print only."""
    measure: Literal["bound", "sequential"] = "bound"
    """bound: over random masks (NELBO). sequential: the likelihood of decoding each block from left
    to right, without noise; a pass for each place of a block."""
    outcomes: Outcomes = "text"
    """What can be predicted: text leaves out mask and padding, all_but_mask the mask alone (MDLM),
    all nothing (LLaDA)."""
    max_sequences: int = 256
    """Held-out sequences to use at most, the same ones for every model and draw."""
    draws: int = 4
    """Noise draws of each sequence; more give a smaller error."""
    strata: int = 32
    """Neighbouring sequences over whose blocks the mask rates are stratified; at least 8."""
    sequences_per_forward: int = 16
    untrained: bool = True
    """Measure a model of the same shape with fresh weights too."""
    use_gpu: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("max_sequences", 1),
            ("draws", 1),
            ("strata", 8),
            ("sequences_per_forward", 1),
        ):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)} must be at least {least}")


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Measure, print the table, write the JSON, return its content."""
    import torch

    from cascade_model.commit import require_writable
    from cascade_model.corpus import Corpus
    from cascade_model.evaluation import as_dict, bound, sequential, unigram_baseline, untrained
    from cascade_model.weights import weights_digest

    if config.use_gpu and not torch.cuda.is_available():
        raise InputError("use_gpu=True and this machine has no CUDA device; use use_gpu=False")
    if config.output is not None:
        require_writable(Path(config.output).parent)
    held_out = Corpus.open(config.corpus, split="held_out")
    model = open_model(config.model).to("cuda" if config.use_gpu else "cpu")
    folder = model_folder(config.model)

    def measure(model: "Network") -> "Bound":
        shared: dict[str, Any] = {
            "max_sequences": config.max_sequences,
            "sequences_per_forward": config.sequences_per_forward,
            "outcomes": config.outcomes,
        }
        if config.measure == "sequential":
            return sequential(model, held_out, **shared)
        return bound(model, held_out, draws=config.draws, strata=config.strata, **shared)

    unigram = unigram_baseline(Corpus.open(config.corpus), held_out, config.max_sequences)
    trained = measure(model)
    report = {
        "model": config.model,
        "weights": None if folder is None else weights_digest(folder),
        "corpus": config.corpus,
        "corpus_digest": held_out.digest,
        "measure": config.measure,
        "outcomes": config.outcomes,
        **as_dict(trained),
        "unigram_nats_per_token": unigram,
        "below_unigram": unigram - trained.nats_per_token,
        "untrained": as_dict(measure(untrained(model))) if config.untrained else None,
    }
    print(table(report))
    if config.output is not None:
        _write(Path(config.output), report)
    return report


def open_model(path: str) -> "Network":
    """The model of a model folder, a checkpoint or a run folder, in float32 on the CPU.

    Raises `InputError` when the path is none of them, `CheckpointMismatch` when it is damaged.
    """
    from cascade_model import checkpoint
    from cascade_model.commit import Folder
    from cascade_model.metrics import tell
    from cascade_model.weights import load_model

    folder, whole = Path(path), model_folder(path)
    if whole is not None:
        return load_model(whole)[0]
    if (folder / "COMMIT").exists():
        return _from_checkpoint(checkpoint.verify(folder))
    if (folder / "checkpoints").exists():
        found = checkpoint.newest(Folder(folder / "checkpoints"), tell)
        if found is None:
            raise CheckpointMismatch(f"model={path} has no complete checkpoint; train further")
        return _from_checkpoint(found)
    raise InputError(f"model={path} is no model folder, checkpoint or run folder; check the path")


def model_folder(path: str) -> str | None:
    """The model folder that a path names, or that a run holds; none for a checkpoint, whose weights
    have no digest of their own."""
    from cascade_model.tensor_files import WEIGHTS

    folder = Path(path)
    if "://" in path or (folder / WEIGHTS).exists():
        return path
    return str(folder / "model") if (folder / "model" / WEIGHTS).exists() else None


def table(report: dict[str, Any]) -> str:
    """The values as an aligned table."""
    kind = "negative log likelihood" if report["is_exact"] else "bound (NELBO)"
    rows = [
        ("held-out " + kind, _nats(report)),
        ("  per byte", f"{report['nats_per_byte']:.4f} nats/byte"),
        ("unigram, add-one", f"{report['unigram_nats_per_token']:.4f} nats/token"),
        ("  model below unigram by", f"{report['below_unigram']:.4f} nats/token"),
    ]
    if report["untrained"]:
        rows.append(("untrained model", _nats(report["untrained"])))
    counted = f"{report['num_tokens']:,} tokens, {report['num_sequences']} sequences"
    rows.append(("measured on", f"{counted}, {report['draws']} draws"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}   {value}" for name, value in rows)


def _nats(values: dict[str, Any]) -> str:
    return f"{values['nats_per_token']:.4f} ± {values['standard_error']:.4f} nats/token"


def _from_checkpoint(found: Any) -> "Network":
    from cascade_model import checkpoint
    from cascade_model.networks import build_network

    model = build_network(ModelConfig.from_dict(found.facts["model"]))
    checkpoint.load_weights(found, model)
    return model


def _write(path: Path, report: dict[str, Any]) -> None:
    """Whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(path.name + ".tmp")
        draft.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise InputError(
            f"output={path} cannot be written ({error.strerror}); choose another path"
        ) from None


main = command(EvaluateConfig, run)

if __name__ == "__main__":
    raise SystemExit(main())
