"""bench-data: what `prepare` takes, beside two usual ways to tokens on disk.

    make bench-data                                   # 60 MB of text, and 600 MB for memory
    python -m tests.benchmarks.data --small           # a trial in two minutes, without bars

One corpus of real text (`data_corpus`), one vocabulary, Parquet in. `prepare` reads, tokenises,
packs, masks and writes in one process; `datasets.map(num_proc=2)` and datatrove with two tasks
neither mask nor check what they wrote. Figures are tokens by second of processor time, children
included and imports not, in turns, the median of the rounds. `--peers FOLDER` is where datatrove
was installed.
"""

import argparse
import importlib.metadata
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cascade_model import noise
from cascade_model.commit import Folder
from cascade_model.corpus import Corpus, read_manifest
from cascade_model.fast_tokenizer import REFERENCE
from cascade_model.tokenizer import train_tokenizer
from tests.benchmarks import reader
from tests.benchmarks.cpu_clock import Spent, cpu_seconds, spent
from tests.benchmarks.data_corpus import texts, write_corpus, write_salted
from tests.benchmarks.report import Row, publish

MODULE = "tests.benchmarks.data_arms"
THREADS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAY_AUTH_MODE": "token"}
_LARGER = 4


class Bench:
    """One size of the benchmark: its files, and arms that are run in turns."""

    def __init__(self, folder: Path, peers: str | None, is_small: bool) -> None:
        self.folder, self.peers, self.is_small = folder, peers, is_small
        self.rounds = 1 if is_small else 3
        size = 3_000_000 if is_small else 60_000_000
        self.copies = 4 if is_small else 10
        self.corpus = folder / "corpus"
        self.bytes = write_corpus(self.corpus, size)
        self.tokenizer = folder / "tokenizer.json"
        self.vocab_size = 4096 if is_small else 32768
        if not self.tokenizer.exists():
            train_tokenizer(texts(size // 10), self.vocab_size).save(self.tokenizer)

    def run(self, arm: str, corpus: Path, **settings: Any) -> Spent:
        """One run of an arm into a folder that is removed again."""
        return self.keep(arm, corpus, lambda folder: None, **settings)[0]

    def keep(
        self, arm: str, corpus: Path, look: Callable[[Path], Any], **settings: Any
    ) -> tuple[Spent, Any]:
        """The same, and what `look` finds in the folder before it goes."""
        with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            output = Path(temporary) / "output"
            given = {"corpus": str(corpus), "output": str(output)}
            given |= {"tokenizer": str(self.tokenizer), **settings}
            paths = {"PYTHONPATH": self.peers} if arm == "datatrove" and self.peers else {}
            return spent(MODULE, arm, given, THREADS | paths), look(output)

    def bar(self, value: float) -> float | None:
        """A bar holds for the real size only."""
        return None if self.is_small else value


def per_cpu(each: Spent) -> float:
    """Tokens by second of processor time."""
    return each.tokens / each.cpu


def ratio(ours: list[Spent], theirs: list[Spent]) -> float:
    """Median of the ratios of tokens by second of processor time, round by round."""
    return statistics.median(per_cpu(a) / per_cpu(b) for a, b in zip(ours, theirs, strict=True))


def mask_seconds(output: Path) -> float:
    """Processor time of what draws draw 0 of the training split: ranks, thresholds and bits."""
    corpus = Corpus(Folder(output), read_manifest(Folder(output)), "train")
    recipe, total = corpus.manifest.noise, corpus.num_sequences
    num_blocks = corpus.sequence_length // recipe.block_size

    def mask() -> None:
        for start in range(0, total, 256):
            ids = np.arange(start, min(start + 256, total), dtype=np.uint64)
            rates = noise.thresholds(recipe, 0, noise.rank_of(ids, total, recipe, 0), num_blocks)
            noise.mask_bits(recipe, 0, ids, rates, corpus.sequence_length)

    return cpu_seconds(mask)


def engine_of(output: Path) -> dict[str, Any]:
    """The engine that the corpus was tokenised with."""
    return read_manifest(Folder(output)).tokenizer_engine


def tokenising_rows(bench: Bench) -> Iterator[Row]:
    """In process, with the fast engine and with the reference one, against both others."""
    runs: dict[str, list[Spent]] = {"fast": [], "reference": [], "datasets": [], "datatrove": []}
    shares = []
    engine: dict[str, Any] = {}
    for _ in range(bench.rounds):
        made, (masking, engine) = bench.keep(
            "ours", bench.corpus, lambda folder: (mask_seconds(folder), engine_of(folder))
        )
        runs["fast"].append(made)
        shares.append(masking / made.cpu)
        reference = {"tokenizer_engine": "reference"}
        runs["reference"].append(bench.run("ours", bench.corpus, **reference))
        runs["datasets"].append(bench.run("datasets", bench.corpus))
        if bench.peers:
            runs["datatrove"].append(bench.run("datatrove", bench.corpus))
    is_fast = engine["name"] != REFERENCE
    names = {
        "fast": f"prepare in process, {engine['name']} {engine['version']}",
        "reference": "prepare in process, reference engine",
        "datasets": "datasets.map(batched=True, num_proc=2)",
        "datatrove": f"datatrove {_version(bench.peers)}, 2 tasks",
    }
    for arm in filter(runs.get, runs):
        made = runs[arm]
        yield Row(names[arm], statistics.median(map(per_cpu, made)), "tokens/CPU-s")
        yield Row(f"{names[arm]}: processor", statistics.median(s.cpu for s in made), "CPU-s")
        yield Row(f"{names[arm]}: wall", statistics.median(s.wall for s in made), "s")
    for other in filter(runs.get, ("datasets", "datatrove")):
        bar = bench.bar(4.0) if is_fast else bench.bar(1.3)
        yield Row(f"prepare / {other}", ratio(runs["fast"], runs[other]), "x", bar=bar)
        same = ratio(runs["reference"], runs[other])
        yield Row(f"prepare with the reference engine / {other}", same, "x")
        counted = statistics.median(s.tokens for s in runs[other]) / runs["fast"][0].tokens
        yield Row(f"tokens of {other} / of prepare", counted, "x")
    share = 100 * statistics.median(shares)
    yield Row("share of masking in prepare", share, "%", bar=bench.bar(10.0), is_limit=True)


def _version(peers: str | None) -> str:
    found = importlib.metadata.distributions(path=[peers]) if peers else ()
    return next((each.version for each in found if each.name == "datatrove"), "")


def ray_rows(bench: Bench) -> Iterator[Row]:
    """A line through two corpus sizes for each runner: its slope is the cost of further tokens.

    The smaller one keeps every worker busy already, so that starting them is no part of the slope.
    """
    larger = bench.folder / "larger"
    write_salted(bench.corpus, larger, _LARGER)
    slopes: dict[str, list[float]] = {"local": [], "ray": []}
    fixed: dict[str, list[float]] = {"local": [], "ray": []}
    for _ in range(bench.rounds):
        for runner in slopes:
            small = bench.run("ours", bench.corpus, runner=runner)
            large = bench.run("ours", larger, runner=runner)
            slope = (large.cpu - small.cpu) / (large.tokens - small.tokens)
            slopes[runner].append(slope)
            fixed[runner].append(small.cpu - slope * small.tokens)
    shutil.rmtree(larger)
    for runner, name in (("local", "in process"), ("ray", "on Ray")):
        further = 1e9 * statistics.median(slopes[runner])
        yield Row(f"{name}: a further token", further, "CPU-ns")
        yield Row(f"{name}: fixed", statistics.median(fixed[runner]), "CPU-s")
    over = statistics.median(a / b for a, b in zip(slopes["ray"], slopes["local"], strict=True))
    bar = bench.bar(1.3)
    yield Row("a further token on Ray / in process", over, "x", bar=bar, is_limit=True)


def memory_rows(bench: Bench) -> Iterator[Row]:
    """Peak memory of one corpus and of one so many times larger."""
    large = bench.folder / "salted"
    size = write_salted(bench.corpus, large, bench.copies)
    few = bench.run("ours", bench.corpus)
    many = bench.run("ours", large)
    shutil.rmtree(large)
    yield Row(f"peak memory, {bench.bytes / 1e6:.0f} MB of text", few.peak, "MiB")
    yield Row(f"peak memory, {size / 1e6:.0f} MB of text", many.peak, "MiB")
    growth = many.peak / few.peak
    yield Row("peak memory, large / small", growth, "x", bar=bench.bar(1.15), is_limit=True)


def main() -> int:
    """The table; the text and the tokenizer stay in build/bench/data for the next time."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--peers")
    flags = parser.parse_args()
    folder = Path("build/bench/data-small" if flags.small else "build/bench/data").absolute()
    bench = Bench(folder, flags.peers, flags.small)
    rows = [*tokenising_rows(bench), *ray_rows(bench), *memory_rows(bench)]
    if not flags.small:
        rows += [replace(row, name=f"reader, {row.name}") for row in reader.rows()]
    config = {"text_bytes": bench.bytes, "rounds": bench.rounds, "small": flags.small}
    return publish("data", rows, **config, tokenizer=f"BPE {bench.vocab_size}")


if __name__ == "__main__":
    raise SystemExit(main())
