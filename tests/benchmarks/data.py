"""bench-data: tokens per CPU-second of `prepare` in process, beside the usual tokenise loop.

    make bench-data

The text is the demo's (the standard library), the tokenizer one that was trained on it. The
baseline is the loop of most recipes, `datasets.map(batched=True)` with transformers' fast
tokenizer, writing Arrow: it has the text in memory, and neither packs nor masks. Both run on one
thread, in turns; a row is the median of all rounds.
"""

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np

from cascade_model import noise
from cascade_model.corpus import Corpus
from jobs.cli import parse
from pipelines.config import PrepareConfig
from pipelines.documents import read_documents
from pipelines.prepare import prepare
from pipelines.sources import make_plan
from tests.benchmarks.report import Row, publish

RECIPE = Path(__file__).parents[2] / "jobs/recipes/demo/prepare.yaml"


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Processor time of this process, all its threads together."""
    began = time.process_time()
    work()
    return time.process_time() - began


def texts_of(config: PrepareConfig) -> list[str]:
    """Every document, as the baseline gets it."""
    parts = make_plan(config.source, config.part_bytes).parts
    documents = (d for part in parts for d in read_documents(part, config.source.text_column))
    return [document.text for document in documents if document.text]


def baseline(texts: list[str], tokenizer: Path, target: Path) -> Callable[[], Any]:
    """The plain loop; the dataset and the tokenizer are made before the clock starts."""
    from datasets import Dataset, disable_progress_bars
    from transformers import PreTrainedTokenizerFast

    disable_progress_bars()
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
    data = Dataset.from_dict({"text": texts})
    return lambda: data.map(
        lambda batch: {"input_ids": fast(batch["text"])["input_ids"]},
        batched=True,
        remove_columns=["text"],
        load_from_cache_file=False,
        cache_file_name=str(target),
    )


def mask_all(corpus: Corpus) -> None:
    """What round 2 draws for a split: ranks, thresholds and bits of draw 0."""
    recipe, total = corpus.manifest.noise, corpus.num_sequences
    num_blocks = corpus.sequence_length // recipe.block_size
    for start in range(0, total, 4096):
        ids = np.arange(start, min(start + 4096, total), dtype=np.uint64)
        rates = noise.thresholds(recipe, 0, noise.rank_of(ids, total, recipe, 0), num_blocks)
        noise.mask_bits(recipe, 0, ids, rates, corpus.sequence_length)


def main(rounds: int = 3) -> int:
    """Both in turns, then the table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        flags = ["--config", str(RECIPE), "--output", str(folder / "first"), "--runner", "local"]
        first = parse(PrepareConfig, flags)
        prepare(first)  # trains the tokenizer
        tokenizer = folder / "first/tokenizer.json"
        texts = texts_of(first)
        ours, theirs, masking = [], [], []
        for number in range(rounds):
            output = str(folder / f"corpus-{number}")
            config = dataclasses.replace(first, output=output, tokenizer=str(tokenizer))
            ours.append(cpu_seconds(lambda config=config: prepare(config)))
            theirs.append(cpu_seconds(baseline(texts, tokenizer, folder / f"{number}.arrow")))
            corpus = Corpus.open(output)
            masking.append(cpu_seconds(lambda corpus=corpus: mask_all(corpus)))
        counts = corpus.manifest.counts
    speeds = [counts["tokens"] / seconds for seconds in ours]
    plain = [counts["tokens"] / seconds for seconds in theirs]
    ratio = statistics.median(a / b for a, b in zip(speeds, plain, strict=True))
    share = statistics.median(m / s for m, s in zip(masking, ours, strict=True))
    rows = [
        Row(
            "prepare: read, tokenise, pack, mask, write", statistics.median(speeds), "tokens/CPU-s"
        ),
        Row(
            "datasets.map(batched=True): tokenise, write", statistics.median(plain), "tokens/CPU-s"
        ),
        Row("prepare / datasets.map", ratio, "x"),
        Row("share of masking in prepare", 100 * share, "%"),
    ]
    size = {"text_bytes": counts["bytes"], "tokens": counts["tokens"], "rounds": rounds}
    return publish("data", rows, **size, tokenizer="BPE 2048", threads=1)


if __name__ == "__main__":
    raise SystemExit(main(*map(int, sys.argv[1:])))
