"""`make bench-text`: the speed of a converted model, measured with the text that it writes.

Passes alone say little: a model that is sure of nonsense needs few. So every arm writes on from the
same beginnings of held-out documents, greedily, and its tokens per forward and per second stand
beside the likelihood of its text under the autoregressive parent, its entropy and its repetition
(`text_quality`). The parent's own greedy text and the documents' true continuation are the
yardsticks. Arms take turns prompt by prompt, with the same threads and dtype.

The confidence rule is run in two ways. By default a block's first token is committed alone, from
the pass that writes the block before it: two passes a block at least. "first step whole" predicts
the whole block in that pass: one at least (`BlockCausal.is_first_alone`).
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from cascade_model.corpus import Corpus
from cascade_model.networks import Network
from cascade_model.weights import load_model, require_text
from tests.benchmarks.report import Row, publish
from tests.benchmarks.text_arms import PARENT, PUBLISHED, Write, Written, arms_of
from tests.benchmarks.text_quality import entropy, nats_per_token, repetition

TOGETHER = 8
TRUTH = "the document itself"
HOW = """{path} is missing; `make smollm2-long` makes the converted model, its parent and the corpus
(one to two hours on 2 cores), or name others: make bench-text MODEL=... PARENT=... CORPUS=..."""


@dataclass(slots=True)
class Tally:
    """One arm's run."""

    texts: list[list[int]] = field(default_factory=list)
    passes: int = 0
    rows: int = 0
    seconds: float = 0.0
    """One prompt after the other."""
    seconds_together: float = 0.0
    tokens_together: int = 0


def held_out(url: str, number: int, length: int) -> list[list[int]]:
    """The first `length` tokens of `number` held-out sequences, each of one document, spread evenly
    over the split."""
    corpus = Corpus.open(url, split="held_out")
    rows = corpus.rows(np.arange(corpus.num_sequences, dtype=np.uint64))
    is_one = rows.is_maskable[:, :length].all(axis=1) & ~rows.is_start[:, 1:length].any(axis=1)
    found = np.flatnonzero(is_one)
    if length > corpus.sequence_length or len(found) < number:
        raise SystemExit(
            f"{url} holds {len(found)} held-out sequences of {corpus.sequence_length} tokens from "
            f"one document, and {number} of {length} are wanted; use fewer or shorter ones"
        )
    chosen = found[np.arange(number) * len(found) // number]
    return rows.tokens[chosen, :length].tolist()


def run_in_turns(
    arms: dict[str, Write], prompts: list[list[int]], new_tokens: int
) -> dict[str, Tally]:
    """Each prompt alone by every arm in turn, then each full group of prompts together."""
    tallies = {name: Tally() for name in arms}
    for write in arms.values():
        write(prompts[:1], min(8, new_tokens))
    for start in range(0, len(prompts), TOGETHER):
        group = prompts[start : start + TOGETHER]
        for prompt in group:
            for name, write in arms.items():
                seconds, written = timed(write, [prompt], new_tokens)
                tally = tallies[name]
                tally.seconds += seconds
                tally.texts += written.texts
                tally.passes += written.passes
                tally.rows += written.rows
        if len(group) == TOGETHER:
            for name, write in arms.items():
                tallies[name].seconds_together += timed(write, group, new_tokens)[0]
                tallies[name].tokens_together += TOGETHER * new_tokens
        print(f"{start + len(group)} of {len(prompts)} prompts", flush=True)
    return tallies


def timed(write: Write, prompts: list[list[int]], count: int) -> tuple[float, Written]:
    began = time.perf_counter()
    written = write(prompts, count)
    return time.perf_counter() - began, written


def cost(tallies: dict[str, Tally], name: str) -> Iterator[Row]:
    """What an arm's texts took."""
    tally, parent = tallies[name], tallies[PARENT]
    tokens = sum(map(len, tally.texts))
    yield Row("tokens/forward", tokens / tally.passes, "")
    yield Row("rows/forward", tally.rows / tally.passes, "")
    yield Row("alone", tokens / tally.seconds, "tokens/s")
    yield Row("/ parent", parent.seconds / tally.seconds, "x")
    yield Row("/ transformers", tallies[PUBLISHED].seconds / tally.seconds, "x")
    if tally.tokens_together:
        together = tally.tokens_together / tally.seconds_together
        yield Row(f"{TOGETHER} together", together, "tokens/s")
        ratio = parent.seconds_together / tally.seconds_together
        yield Row(f"{TOGETHER} together / parent", ratio, "x")


def worth(scorer: Network, prompts: list[list[int]], texts: list[list[int]]) -> Iterator[Row]:
    """What an arm's texts are worth, means over them."""
    nats = [nats_per_token(scorer, *pair) for pair in zip(prompts, texts, strict=True)]
    yield Row("nats under parent", statistics.mean(nats), "nats/token")
    if len(nats) > 1:
        yield Row("standard error", statistics.stdev(nats) / len(nats) ** 0.5, "nats/token")
    yield Row("entropy", statistics.mean(map(entropy, texts)), "nats")
    yield Row("repetition-4", 100 * statistics.mean(map(repetition, texts)), "%")


def table(cells: dict[str, list[Row]]) -> str:
    """Arms down, figures across."""
    columns = list(dict.fromkeys(row.name for rows in cells.values() for row in rows))
    width = max(map(len, cells))
    lines = [" " * width + "  " + "  ".join(columns)]
    for name, rows in cells.items():
        shown = {row.name: f"{row.value:.4g}" for row in rows}
        padded = [shown.get(column, "-").rjust(len(column)) for column in columns]
        lines.append(f"{name.ljust(width)}  {'  '.join(padded)}")
    return "\n".join(lines)


def require_folders(paths: Sequence[str]) -> None:
    for path in paths:
        if "://" not in path and not (Path(path) / "manifest.json").is_file():
            raise SystemExit(HOW.format(path=path))


def show_samples(samples: dict[str, str]) -> None:
    """Print them and write build/bench/text_samples.json."""
    for name, text in samples.items():
        print(f"--- {name}\n{text}")
    target = Path("build/bench/text_samples.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(samples, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/smollm2/long/model")
    parser.add_argument("--parent", default="runs/smollm2/parent")
    parser.add_argument("--corpus", default="runs/smollm2/corpus")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    require_folders([options.model, options.parent, options.corpus])
    pieces = held_out(options.corpus, options.prompts, options.prompt_tokens + options.new_tokens)
    prompts = [piece[: options.prompt_tokens] for piece in pieces]
    truth = [piece[options.prompt_tokens :] for piece in pieces]
    dtype = getattr(torch, options.dtype)
    (model, tokenizer), (parent, _) = (
        load_model(folder, dtype) for folder in (options.model, options.parent)
    )

    arms = arms_of(model.eval(), parent.eval(), options.parent, dtype)
    tallies = run_in_turns(arms, prompts, options.new_tokens)
    scorer = load_model(options.parent)[0].eval()
    cells = {TRUTH: list(worth(scorer, prompts, truth))}
    for name, tally in tallies.items():
        cells[name] = [*cost(tallies, name), *worth(scorer, prompts, tally.texts)]
    pairs = zip(tallies[PARENT].texts, tallies[PUBLISHED].texts, strict=True)
    same = statistics.mean(a == b for a, b in pairs)
    cells[PUBLISHED].append(Row("same text as ours", 100 * same, "%"))

    decode = require_text(tokenizer, options.model).decode
    firsts = {name: tally.texts[0] for name, tally in tallies.items()}
    samples = {"prompt": prompts[0], TRUTH: truth[0]} | firsts
    show_samples({name: decode(text) for name, text in samples.items()})
    print(f"\n{table(cells)}\n")
    rows = [
        replace(row, name=f"text.{name}: {row.name}")
        for name, rows in cells.items()
        for row in rows
    ]
    settings = {key: value for key, value in vars(options).items() if key != "dtype"}
    return publish("text", rows, threads=torch.get_num_threads(), dtype=options.dtype, **settings)


if __name__ == "__main__":
    raise SystemExit(main())
