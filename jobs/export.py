"""Write a model for other people: safetensors, config, tokenizer and a model card.

A model that came from a published checkpoint is written in its family's layout, for other programs:
one that was only converted bit for bit as it was, a trained one with its new weights, and one that
was trained from autoregressive into block diffusion as A2D (`families.exporting`). A model of our
own has no published layout and keeps this project's.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade_model.errors import CheckpointMismatch, InputError
from cascade_model.settings import check
from jobs.cli import command

if TYPE_CHECKING:
    from cascade_model.commit import Folder


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Turn a model into a folder to publish."""

    model: str
    """Model folder to export, or the run folder that holds it."""
    output: str
    """Folder to write; it must not exist or be empty. A URL only for a model of our own."""
    like: str | None = None
    """Folder whose published config is used: the one this model was trained from. None: the
    model's own."""
    run: str | None = None
    """Run folder that the card tells of; none: the one that the model lies in, if it does."""
    evaluation: str | None = None
    """JSON that `cascade evaluate --output` wrote for this model, for the card; that of another one
    is refused."""
    licence: str | None = None
    """Licence of the weights, as an SPDX name (apache-2.0), for the card."""
    title: str | None = None
    """Name on the card; none: that of the output folder."""


def run(config: ExportConfig) -> dict[str, Any]:
    """Read and write; returns a summary."""
    from cascade_model.commit import Folder, require_writable
    from cascade_model.families import export
    from cascade_model.own_template import own_template
    from cascade_model.weights import TEMPLATE, load_model, read_published, require_text, save_model
    from jobs.model_card import CARD, card

    require_writable(config.output)
    folder = _model_folder(Folder(config.model))
    evaluation = _evaluation(config.evaluation, folder)
    origin = _origin(config.run, folder)
    published = read_published(config.like or folder.url)
    _require_free(Folder(config.output), is_published=published is not None)
    model, tokenizer = load_model(folder.url, dtype=None)
    family = model.config.family if published else None
    told = card(
        model.config,
        title=config.title or Path(config.output).name,
        origin=origin,
        licence=config.licence,
        evaluation=evaluation,
        layout=family,
    )
    cards, template = {CARD: told.encode()}, own_template(folder.url)
    if published is None:
        text = require_text(tokenizer, folder.url)
        save_model(config.output, model, text, card=cards, chat_template=template)
    else:
        cards |= {} if template is None else {TEMPLATE: template.encode()}
        layout, types = published.config, published.dtypes
        export(model, config.output, layout, dtypes=types, tokenizer=tokenizer, card=cards)
    print(f"wrote {config.output}: {family or 'our own'} layout, with its card in {CARD}")
    return {"output": config.output, "family": model.config.family}


def _model_folder(folder: "Folder") -> "Folder":
    """The model folder itself, or that of a run."""
    inside = folder / "model"
    is_run = not folder.exists("config.json") and inside.exists("config.json")
    return inside if is_run else folder


def _origin(run: str | None, model: "Folder") -> Any:
    """What the card can tell of the training."""
    from cascade_model.commit import Folder
    from cascade_model.run_record import SUMMARY
    from jobs.model_card import Origin

    if run is not None:
        return Origin.of_run(Folder(run))
    above = Folder(model.url.rpartition("/")[0] or "/")
    has_one = model.url.endswith("/model") and above.exists(SUMMARY)
    return Origin.of_run(above) if has_one else Origin()


def _evaluation(path: str | None, model: "Folder") -> dict[str, Any] | None:
    """What was measured, of these weights and no others."""
    from cascade_model.weights import weights_digest

    if path is None:
        return None
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        _, weights = found["nats_per_token"], found["weights"]
    except (OSError, ValueError, TypeError, KeyError):
        raise InputError(
            f"evaluation={path} is no JSON of this version's `cascade evaluate --output`; write one"
        ) from None
    own = weights_digest(model.url)
    if weights != own:
        whose = "a checkpoint" if weights is None else f"the weights {str(weights)[:12]}"
        raise CheckpointMismatch(
            f"evaluation={path} was measured on {whose} and model={model.url} has {own[:12]}; run "
            f"`cascade evaluate --model {model.url} --output {path}` first"
        )
    return found


def _require_free(output: "Folder", is_published: bool) -> None:
    """Refuse a place that cannot be written whole, before the weights are read."""
    check(
        output.is_local or not is_published,
        f"output={output.url} is in a store, where a published layout cannot appear whole; write "
        "to a local folder and copy it",
    )
    check(
        not output.list(),
        f"output={output.url} exists and is no empty folder; choose another folder or empty it",
    )


main = command(ExportConfig, run)

if __name__ == "__main__":
    raise SystemExit(main())
