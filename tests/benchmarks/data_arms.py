"""The arms of bench-data, each a process of its own: Parquet in, tokens on disk.

    python -m tests.benchmarks.data_arms ARM '{"corpus": ..., "output": ..., "tokenizer": ...}'

An arm imports what it needs, says so by its processor time so far, works, and prints a line of
JSON: tokens (EOS included), seconds, and the processor time before the work.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LENGTH = 1024
EOS = "<|endoftext|>"
Work = Callable[[], int]


def ours(corpus: str, output: str, tokenizer: str, **settings: Any) -> Work:
    """`prepare`: read, tokenise, pack, mask, write; `settings` go over the ones here."""
    from pipelines.config import PrepareConfig, SourceConfig
    from pipelines.prepare import prepare

    config = PrepareConfig(
        **{
            "output": output,
            "source": SourceConfig(paths=(corpus,), format="parquet"),
            "tokenizer": tokenizer,
            "sequence_length": LENGTH,
            "runner": "local",
            "dedup": "none",
            **settings,
        }
    )
    return lambda: prepare(config).counts["tokens"]


def datasets_map(corpus: str, output: str, tokenizer: str) -> Work:
    """The usual recipe: load, tokenise in two processes, put together and cut, all as Arrow."""
    from datasets import disable_progress_bars, load_dataset
    from transformers import PreTrainedTokenizerFast

    disable_progress_bars()
    fast = PreTrainedTokenizerFast(tokenizer_file=tokenizer, eos_token=EOS)
    eos = [fast.eos_token_id]

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        ids = fast(batch["text"], add_special_tokens=False)["input_ids"]
        return {"input_ids": [each + eos for each in ids]}

    def cut(batch: dict[str, Any]) -> dict[str, Any]:
        joined = [token for ids in batch["input_ids"] for token in ids]
        whole = len(joined) // LENGTH * LENGTH
        return {"input_ids": [joined[i : i + LENGTH] for i in range(0, whole, LENGTH)]}

    def work() -> int:
        files = sorted(map(str, Path(corpus).glob("*.parquet")))
        data = load_dataset("parquet", data_files=files, split="train", cache_dir=output)
        settings = {"batched": True, "num_proc": 2, "load_from_cache_file": False}
        tokens = data.map(encode, remove_columns=["text"], **settings)
        tokens.map(cut, **settings)
        lengths = (column.offsets for column in tokens.data.column("input_ids").chunks)
        return sum(offsets[-1].as_py() - offsets[0].as_py() for offsets in lengths)

    return work


def datatrove(corpus: str, output: str, tokenizer: str) -> Work:
    """Its tokenizer pipeline with two tasks; documents in their order, no packing."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    def work() -> int:
        steps = [
            ParquetReader(corpus, glob_pattern="*.parquet", text_key="text"),
            DocumentTokenizer(
                f"{output}/tokens",
                tokenizer_name_or_path=tokenizer,
                eos_token=EOS,
                shuffle_documents=False,
            ),
        ]
        LocalPipelineExecutor(steps, tasks=2, workers=2, logging_dir=f"{output}/logs").run()
        return sum(path.stat().st_size for path in Path(output).glob("tokens/*.ds")) // 2

    return work


ARMS = {"ours": ours, "datasets": datasets_map, "datatrove": datatrove}


def main(arm: str, settings: str) -> int:
    """Make ready, work, tell."""
    work = ARMS[arm](**json.loads(settings))
    before, began = time.process_time(), time.perf_counter()
    tokens = work()
    seconds = time.perf_counter() - began
    print(json.dumps({"tokens": tokens, "seconds": seconds, "before": before}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
