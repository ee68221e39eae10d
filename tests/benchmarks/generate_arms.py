"""The arms of `bench-generate`, each a process of its own with the same rows and threads.

    python -m tests.benchmarks.generate_arms ARM MODEL PROMPTS FOLDER THREADS

`job` is `cascade generate` itself, whose worker notes when it is ready and what it used. The others
decode in this process: `engine` gives all rows to one scheduler; `drained` gives it a fixed batch,
and the next when all of that is done; `loop` takes the rows of a batch through `sampler.sample`,
one after the other. Each leaves FOLDER/told.json: seconds, tokens, CPU, a digest of the texts.
"""

import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cascade_model.sampling import SamplingParams
from pipelines.answers import longest_first
from pipelines.completions import PartRecord
from pipelines.generation import PartWorker, Work
from pipelines.prompt_rows import Columns, Prompt, read_part
from pipelines.prompts import Part, plan
from pipelines.row_settings import Decoding

COMMON = SamplingParams(temperature=1.0, seed=11, stop_at_eos=False)
BATCH = 32
"""Rows of a fixed batch, and the engine's places in every arm."""
ROWS_PER_SHARD = 64
_FOLDER = "CASCADE_BENCH_FOLDER"


class TimedWorker(PartWorker):
    """A worker that notes when it is ready, and its CPU time since then."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self._began = cpu_seconds()
        self._told = Path(os.environ[_FOLDER])
        (self._told / "ready").write_text(str(time.time()))

    def answer(self, part: Part) -> PartRecord:
        """The part; the CPU time so far is left behind it."""
        record = super().answer(part)
        (self._told / f"cpu-{part.index}").write_text(str(cpu_seconds() - self._began))
        return record


def cpu_seconds() -> float:
    """CPU time of this process, all its threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def rows_of(prompts: Path) -> list[Prompt]:
    """The rows as the job reads them."""
    parts, _ = plan([str(prompts)], 1000)
    common = Decoding(params=COMMON)
    rows = (row for part in parts for row in read_part(part, Columns(), common))
    return [row for row in rows if isinstance(row, Prompt)]


def job(model: Path, prompts: Path, folder: Path, threads: int) -> dict[str, Any]:
    """`cascade generate`; its seconds count from when the worker is ready to the manifest."""
    from jobs import generate
    from pipelines import generation

    os.environ[_FOLDER] = str(folder)
    generation.PartWorker = TimedWorker  # type: ignore[misc]
    began, output = time.time(), folder / "out"
    words = ["--model", str(model), "--input", str(prompts), "--output", str(output)]
    words += ["--threads-per-worker", str(threads), "--engine.max-sequences", str(BATCH)]
    words += ["--rows-per-shard", str(ROWS_PER_SHARD), "--sampling.stop-at-eos", "False"]
    words += [
        "--sampling.temperature",
        str(COMMON.temperature),
        "--sampling.seed",
        str(COMMON.seed),
    ]
    if generate.main(words):
        raise SystemExit("the job failed")
    ready = float((folder / "ready").read_text())
    shards = sorted(output.glob("completions-*.jsonl"))
    rows = [json.loads(line) for shard in shards for line in shard.read_text().splitlines()]
    return {
        "seconds": (output / "manifest.json").stat().st_mtime - ready,
        "start": ready - began,
        "tokens": sum(row["num_tokens"] for row in rows),
        "cpu": max(float(path.read_text()) for path in folder.glob("cpu-*")),
        "client_cpu": cpu_seconds(),
        "digest": digest([row["completion"] for row in rows]),
    }


def decoded(arm: str, model: Path, prompts: Path, threads: int) -> dict[str, Any]:
    """One of the arms that decode here; reading and loading are not counted, nor is the text."""
    import torch

    from cascade_model.engine_config import EngineConfig
    from cascade_model.llm import LLM
    from cascade_model.sampler import plan_completion, sample
    from cascade_model.scheduler import Scheduler
    from cascade_model.text_stream import TextStream

    torch.set_num_threads(threads)
    rows = rows_of(prompts)
    with LLM.load(model, EngineConfig(max_sequences=BATCH)) as llm:
        tokens = [llm.prompt_tokens(row.text) for row in rows]
        found: list[list[int]] = [[] for _ in rows]
        scheduler: Scheduler = llm.engine.scheduler

        def together(places: Sequence[int]) -> None:
            for place in places:
                made = plan_completion(llm.config, tokens[place], rows[place].decoding.params)
                scheduler.submit(made, lambda block, own=found[place]: own.extend(block.tokens))
            while scheduler.step():
                pass

        began, cpu = time.perf_counter(), cpu_seconds()
        if arm == "engine":
            together(longest_first(rows))
        for start in range(0, len(rows), BATCH) if arm != "engine" else ():
            batch = range(start, min(start + BATCH, len(rows)))
            if arm == "drained":
                together(batch)
                continue
            for place in batch:
                for block in sample(llm.model, tokens[place], rows[place].decoding.params):
                    found[place].extend(block.tokens)
        seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
        texts = []
        for own in found:
            stream = TextStream(llm.tokenizer.decode)
            texts.append(stream.push(own, passes=0, steps=0, finish_reason="length").text)
    tokens_made = sum(map(len, found))
    return {"seconds": seconds, "tokens": tokens_made, "cpu": cpu, "digest": digest(texts)}


def digest(texts: Sequence[str]) -> str:
    """Tells whether two arms wrote the same."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def main(words: Sequence[str]) -> None:
    """Run an arm and leave what it tells."""
    arm, (model, prompts, folder), threads = words[0], map(Path, words[1:4]), int(words[4])
    folder.mkdir(parents=True, exist_ok=True)
    told = job(model, prompts, folder, threads) if arm == "job" else None
    told = told or decoded(arm, model, prompts, threads)
    (folder / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    from tests.benchmarks import generate_arms

    # By its own name, not as __main__, so that the actor finds the same class elsewhere.
    generate_arms.main(sys.argv[1:])
