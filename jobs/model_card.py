"""The README.md of an exported model: what it is, what it was trained on, how well, how to use it.

Only what stands in files is told: the model's config, and of its run folder the summary, the
settings and the facts of the newest checkpoint. What nobody recorded is said to be unknown.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from cascade_model.commit import Folder
from cascade_model.config import ModelConfig
from cascade_model.errors import InputError
from cascade_model.settings import shown

CARD = "README.md"
_UNKNOWN = "not recorded"


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What a run folder tells of the model that came out of it."""

    summary: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Of the newest checkpoint: corpus, noise, objective."""
    sources: Mapping[str, float] = field(default_factory=dict)
    """Names of the corpus's sources and their shares of the samples, where there are several."""

    @classmethod
    def of_run(cls, run: Folder) -> "Origin":
        """Read a run folder; `InputError` when it is none."""
        from cascade_model.checkpoint import newest
        from cascade_model.metrics import tell
        from cascade_model.run_record import SUMMARY

        try:
            summary = json.loads(run.read_bytes(SUMMARY))
        except (OSError, ValueError):
            raise InputError(
                f"run={run.url} has no {SUMMARY} that can be read; give the folder of a run "
                "that has ended, or leave it out"
            ) from None
        found = newest(run / "checkpoints", tell)
        facts = found.facts if found else {}
        return cls(summary=summary, facts=facts, sources=_sources(facts))


def _sources(facts: Mapping[str, Any]) -> dict[str, float]:
    """What the corpus of a run says of its sources, if it still lies where it was."""
    from cascade_model.corpus import Corpus
    from pipelines.sources import ONLY_SOURCE

    try:
        corpus = Corpus.open(facts["settings"]["corpus"])
    except (InputError, OSError, KeyError):
        return {}
    if corpus.digest != facts["corpus_digest"]:
        return {}
    shares = {each.name: each.share / 1024 for each in corpus.manifest.splits["train"].sources}
    return {} if list(shares) == [ONLY_SOURCE] else shares


def card(
    config: ModelConfig,
    *,
    title: str,
    origin: Origin,
    licence: str | None = None,
    evaluation: Mapping[str, Any] | None = None,
    layout: str | None = None,
) -> str:
    """The whole README.md. `evaluation` is what `cascade evaluate` wrote, `layout` the published
    family whose layout the files have; none: this project's own."""
    parts = [
        _front_matter(licence),
        f"# {title}\n",
        _section("What it is", _model_rows(config, layout)),
        _section("How it was trained", _training_rows(origin)),
        _section("How good it is", _quality_rows(origin, evaluation)),
        f"## Licence\n\n{licence or 'Not stated by whoever exported it.'}\n",
        _usage(config),
    ]
    return "\n".join(parts)


def _front_matter(licence: str | None) -> str:
    tags = ["text-generation", "block-diffusion", "diffusion-language-model"]
    values = {"license": licence or "unknown", "library_name": "cascade-lm", "tags": tags}
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n"


def _model_rows(config: ModelConfig, layout: str | None) -> dict[str, Any]:
    from cascade_model.footprint import parameter_count

    kind = "autoregressive" if config.is_autoregressive else f"{config.attention} diffusion"
    return {
        "kind": kind,
        "parameters": f"{parameter_count(config):,}",
        "shape": f"{config.num_layers} layers of {config.hidden_size}, {config.num_heads} heads",
        "block size": config.block_size,
        "logits": config.logits,
        "first place of a block": config.first_place,
        "clean half": config.clean_half,
        "vocabulary": f"{config.vocab_size:,} tokens, mask {config.mask_id}, end {config.eos_id}",
        "longest text": f"{config.max_sequence_length:,} tokens",
        "tokenizer (SHA-256)": config.tokenizer_sha256 or _UNKNOWN,
        "layout of the files": layout or "cascade-lm",
    }


def _training_rows(origin: Origin) -> dict[str, Any]:
    facts, summary = origin.facts, origin.summary
    objective, settings = facts.get("objective", {}), facts.get("settings", {})
    noise, optimizer = facts.get("noise", {}), settings.get("optimizer", {})
    rows: dict[str, Any] = {
        "objective": objective.get("name", _UNKNOWN),
        "corpus (digest)": facts.get("corpus_digest", _UNKNOWN),
        "steps": summary.get("steps", _UNKNOWN),
        "tokens": f"{summary['tokens']:,}" if "tokens" in summary else _UNKNOWN,
        "sequences per step": facts.get("sequences_per_step", _UNKNOWN),
        "peak learning rate": optimizer.get("peak_lr", _UNKNOWN),
        "started from": _start(facts),
    }
    if origin.sources:
        told = [f"{name} ({share:.0%})" for name, share in origin.sources.items()]
        rows["sources of the corpus"] = ", ".join(told)
    if noise:
        rows["mask rates"] = f"{noise['min_rate']} to {noise['max_rate']}, one per {noise['per']}"
    for name in ("weight", "normaliser", "outcomes", "alpha", "temperature", "teacher", "targets"):
        if name in objective:
            told = "teacher (digest)" if name == "teacher" else name
            rows[told] = objective[name]
    return rows if facts or summary else {"": "No run folder was given."}


def _start(facts: Mapping[str, Any]) -> str:
    """The model that a run began with, by name and weights; not the place where it lay."""
    place = facts.get("settings", {}).get("initial_model")
    if not place:
        return "fresh weights"
    *_, above, name = ["", *place.rstrip("/").split("/")]
    called = f"{above}/{name}" if name == "model" else name
    return f"{called} (weights {shown(facts.get('initial_weights', _UNKNOWN))})"


def _quality_rows(origin: Origin, evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    summary = origin.summary
    rows: dict[str, Any] = {}
    if summary.get("last_loss") is not None:
        rows["training loss, last"] = f"{summary['last_loss']:.4f} nats per counted token"
    if summary.get("held_out_loss") is not None:
        rows["held-out bound at the end of the run"] = f"{summary['held_out_loss']:.4f} nats/token"
    if evaluation is not None:
        kind = "negative log likelihood" if evaluation["is_exact"] else "bound (NELBO)"
        value, error = evaluation["nats_per_token"], evaluation["standard_error"]
        rows[f"held-out {kind}"] = f"{value:.4f} ± {error:.4f} nats/token"
        rows["  per byte"] = f"{evaluation['nats_per_byte']:.4f} nats"
        rows["  measured on"] = (
            f"{evaluation['num_tokens']:,} tokens of corpus {evaluation['corpus_digest']}"
        )
    return rows or {"": "Not measured."}


def _section(title: str, rows: Mapping[str, Any]) -> str:
    if list(rows) == [""]:
        return f"## {title}\n\n{rows['']}\n"
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *lines]) + "\n"


def _usage(config: ModelConfig) -> str:
    decoding = "one token after the other" if config.is_autoregressive else "block by block"
    return f"""## How to use it

With [cascade-lm](https://pypi.org/project/cascade-lm/); text is written {decoding}.

```python
from cascade_model.llm import LLM

with LLM.load("FOLDER") as llm:
    print(llm.generate(["Once upon a time"])[0].text)
```

```bash
cascade generate --model FOLDER --input prompts.jsonl --output completions
cascade serve --model FOLDER --port 8000
```
"""
