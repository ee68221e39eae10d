"""`make bench-generate`: the batch job against the engine alone and against fixed batches.

Random weights: the figures say what the job costs, not how good a text is. All arms have the same
rows, weights and threads, run in turns as processes of their own, and must write the same texts;
each figure is the median of its rounds.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.fault_runs import ROOT
from tests.benchmarks.report import Row, publish

SHAPE = {"hidden_size": 256, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4, "head_dim": 64,
         "intermediate_size": 768, "max_sequence_length": 1024}  # fmt: skip
ARMS = ("engine", "job", "drained", "loop")


def write_model(folder: Path) -> None:
    """Random weights over bytes."""
    from cascade_model.model import Transformer
    from cascade_model.tokenizer import byte_tokenizer
    from cascade_model.weights import save_model
    from tests.tiny_models import text_config

    tokenizer = byte_tokenizer()
    network = Transformer(text_config(tokenizer, **SHAPE))
    network.init_weights(0)
    save_model(folder, network, tokenizer)


def write_prompts(target: Path, count: int, seed: int = 3) -> None:
    """Cuts of the standard library (PSF licence), 8 to 400 characters, each to be continued by 8 to
    40 tokens."""
    chance = random.Random(seed)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in files[:30])
    with target.open("w") as file:
        for _ in range(count):
            size, place = chance.randint(8, 400), chance.randrange(len(text) - 400)
            row = {"prompt": text[place : place + size]}
            file.write(json.dumps({**row, "params": {"max_tokens": chance.randint(8, 40)}}) + "\n")


def run_arm(arm: str, folder: Path, number: int, threads: int) -> dict[str, Any]:
    """What an arm tells."""
    own = folder / f"{arm}-{number}"
    command = [sys.executable, "-m", "tests.benchmarks.generate_arms", arm]
    command += [str(folder / "model"), str(folder / "prompts.jsonl"), str(own), str(threads)]
    settings = {**os.environ, "OMP_NUM_THREADS": str(threads), "RAY_TMPDIR": str(folder)}
    settings.pop("RAY_ADDRESS", None)
    subprocess.run(command, cwd=ROOT, env=settings, check=True, stdout=sys.stderr)
    return json.loads((own / "told.json").read_text())


def rows(count: int, rounds: int, threads: int) -> Iterator[Row]:
    """All figures."""
    told: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory(prefix="bench", dir="/tmp") as temporary:
        folder = Path(temporary)
        write_model(folder / "model")
        write_prompts(folder / "prompts.jsonl", count)
        for number in range(rounds):
            for arm in ARMS:
                told[arm].append(run_arm(arm, folder, number, threads))
                print(f"{number + 1}/{rounds} {arm}: {told[arm][-1]}", file=sys.stderr, flush=True)
    if len({each["digest"] for found in told.values() for each in found}) != 1:
        raise SystemExit("the arms wrote different texts")
    speed = {
        arm: statistics.median(each["tokens"] / each["seconds"] for each in found)
        for arm, found in told.items()
    }
    names = {
        "engine": "the engine alone, all rows at once",
        "job": "the job, from a ready worker to the manifest",
        "drained": "fixed batches in the engine, each to its end",
        "loop": "fixed batches through the plain sampling loop",
    }
    for arm in ARMS:
        yield Row(f"generate: {names[arm]}", speed[arm], "tokens/s")
    yield Row("generate: job / engine", speed["job"] / speed["engine"], "x", 0.95)
    yield Row("generate: job / plain loop", speed["job"] / speed["loop"], "x", 1.5)
    yield Row("generate: job / fixed batches in the engine", speed["job"] / speed["drained"], "x")

    def of_job(name: str) -> float:
        return statistics.median(each[name] for each in told["job"])

    yield Row("generate: start-up of the job, to a ready worker", of_job("start"), "s")
    yield Row("generate: seconds of the job behind it", of_job("seconds"), "s")
    yield Row("generate: CPU of the worker", of_job("cpu"), "s")
    engine_cpu = statistics.median(each["cpu"] for each in told["engine"])
    yield Row("generate: CPU of the engine alone", engine_cpu, "s")
    yield Row("generate: CPU of the client, start-up included", of_job("client_cpu"), "s")


def main() -> int:
    """Print the table, write build/bench/generate.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    found = list(rows(given.prompts, given.rounds, given.threads))
    return publish("generate", found, **vars(given))


if __name__ == "__main__":
    raise SystemExit(main())
