"""The table, the curves and the samples of bench-conversion."""

import json
import statistics
from pathlib import Path

import torch

from cascade_model.commit import Folder
from cascade_model.corpus import Corpus
from cascade_model.evaluation import bound
from cascade_model.metrics import read_metrics
from cascade_model.networks import Network
from cascade_model.sampling import SamplingParams
from cascade_model.weights import load_model, require_text
from tests.benchmarks.report import Row, publish
from tests.benchmarks.text import held_out
from tests.benchmarks.text_arms import THRESHOLDS, ours
from tests.benchmarks.text_quality import entropy, nats_per_token, repetition

SEQUENCES = 256
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 16, 64, 64
OUTPUT = Path("build/bench")


def report(
    arms: dict[str, Path], after: dict[str, str], parent: Path, corpus: Path, **config: object
) -> int:
    """Measure what the arms made, print it and write build/bench/conversion*.{json,png}.

    `arms` maps names to finished run folders, `after` a second stage to its first. An arm's
    figures are kept in its folder: delete `measured.json` to measure it again.
    """
    split = Corpus.open(str(corpus), split="held_out")
    pieces = held_out(str(corpus), PROMPTS, PROMPT_TOKENS + NEW_TOKENS)
    cells = {"parent, untouched": _measured(parent, parent, split, pieces, Path(corpus).parent)}
    for name, folder in arms.items():
        cells[name] = _measured(folder / "model", parent, split, pieces, folder)
    draw_curves(arms, after, cells["parent, untouched"]["bound"], OUTPUT / "conversion.png")
    for name, found in cells.items():
        print(f"--- {name}\n{found['sample']}")
    rows = [
        Row(f"conversion.{name}: {figure}", value, "")
        for name, found in cells.items()
        for figure, value in found.items()
        if figure != "sample"
    ]
    return publish("conversion", rows, threads=torch.get_num_threads(), **config)


def _measured(
    model: Path, parent: Path, split: Corpus, pieces: list[list[int]], keep: Path
) -> dict:
    """The figures of one model, taken once."""
    kept = keep / "measured.json"
    if not kept.is_file():
        kept.write_text(json.dumps(measure(model, parent, split, pieces), indent=1) + "\n")
    return json.loads(kept.read_text())


def measure(model: Path, parent: Path, split: Corpus, pieces: list[list[int]]) -> dict:
    """The held-out value and the text that a model writes at each threshold."""
    network, tokenizer = load_model(str(model))
    network.eval()
    scorer = load_model(str(parent))[0].eval()
    value = bound(network, split, draws=2, max_sequences=SEQUENCES, sequences_per_forward=8)
    found: dict = {"bound": value.nats_per_token, "standard error": value.standard_error}
    thresholds = (1.0,) if network.config.is_autoregressive else THRESHOLDS
    for threshold in thresholds:
        written = write_text(network, scorer, pieces, threshold)
        found |= {f"{key} at {threshold:g}": figure for key, figure in written.items()}
    texts = ours(network, _params(network, THRESHOLDS[1]))([pieces[0][:PROMPT_TOKENS]], NEW_TOKENS)
    decode = require_text(tokenizer, str(model)).decode
    found["sample"] = decode(pieces[0][:PROMPT_TOKENS]) + " >>> " + decode(texts.texts[0])
    return found


def _params(network: Network, threshold: float) -> SamplingParams:
    if network.config.is_autoregressive:
        return SamplingParams()
    return SamplingParams(confidence_threshold=threshold)


def write_text(
    network: Network, scorer: Network, pieces: list[list[int]], threshold: float
) -> dict[str, float]:
    """Tokens per forward, and what the text is worth (`text_quality`), over all prompts."""
    prompts = [piece[:PROMPT_TOKENS] for piece in pieces]
    written = ours(network, _params(network, threshold))(prompts, NEW_TOKENS)
    pairs = zip(prompts, written.texts, strict=True)
    return {
        "tokens/forward": sum(map(len, written.texts)) / written.passes,
        "nats under parent": statistics.mean(nats_per_token(scorer, *pair) for pair in pairs),
        "entropy": statistics.mean(map(entropy, written.texts)),
        "repetition-4": statistics.mean(map(repetition, written.texts)),
    }


def draw_curves(arms: dict[str, Path], after: dict[str, str], parent: float, target: Path) -> None:
    """Held-out nats against tokens seen, a line an arm, the parent's likelihood beside them. A
    second stage (`after`) begins where its first one ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    curves = {name: _curve(folder) for name, folder in arms.items()}
    for name, lines in curves.items():
        seen = curves[after[name]][-1]["tokens"] if name in after else 0
        tokens = [(seen + line["tokens"]) / 1000 for line in lines]
        values = [line["held_out_loss"] for line in lines]
        errors = [line["held_out_standard_error"] for line in lines]
        axes.errorbar(tokens, values, yerr=errors, label=name, capsize=2)
    axes.axhline(parent, color="grey", linestyle="--", label="parent, untouched (exact)")
    axes.set(xlabel="thousand tokens seen", ylabel="held-out nats per token")
    figure.legend(loc="outside right upper")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)


def _curve(run: Path) -> list[dict]:
    """The lines of a run's metrics that have a held-out value."""
    return [line for line in read_metrics(Folder(str(run))) if line.get("held_out_loss")]
