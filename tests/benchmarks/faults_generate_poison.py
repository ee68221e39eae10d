"""Poison prompts: kinds of row that cannot be answered, among many that can.

Each must become one dead letter with its row and reason, every other row a completion, and the job
must end well.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.benchmarks.fault_runs import finished
from tests.benchmarks.report import Row

MODULE = "tests.benchmarks.fault_points_generate"
CHAT = '"messages": [{"role": "user", "content": "Hi"}]'
KINDS: tuple[tuple[str, Callable[[int], bytes]], ...] = (
    ("broken_json", lambda i: b'{"prompt": "cut in the middle of row %d' % i),
    ("broken_json", lambda i: b"[" * 100_000),
    ("invalid_utf8", lambda i: b'{"prompt": "row %d holds \xff\xfe"}' % i),
    ("not_an_object", lambda i: b'["prompt", "row %d"]' % i),
    ("missing_prompt", lambda i: b'{"text": "row %d"}' % i),
    ("prompt_is_no_string", lambda i: b'{"prompt": %d}' % i),
    ("empty_prompt", lambda i: b'{"prompt": "", "row": %d}' % i),
    ("lone_surrogate", lambda i: b'{"prompt": "row %d is half: \\ud800"}' % i),
    ("broken_messages", lambda i: b'{"messages": [{"role": "user"}], "row": %d}' % i),
    ("chat_template_fails", lambda i: b'{"messages": [{"role": "oracle", "content": "Hi"}]}'),
    ("suffix_of_a_chat", lambda i: b'{%s, "suffix": "x"}' % CHAT.encode()),
    ("bad_setting", lambda i: b'{"prompt": "a", "params": {"temperature": %d}}' % (11 + i)),
    ("bad_setting", lambda i: b'{"prompt": "a", "params": {"warmth": 1}}'),
    ("refused", lambda i: b'{"prompt": "%s"}' % (b"too long " * 40)),
    ("refused", lambda i: b'{"prompt": "a", "params": {"max_tokens": 100000}}'),
    ("refused", lambda i: b'{"prompt": "a", "suffix": "no hole can be filled"}'),
)
"""Reason that the dead letter must give, and the line with this number."""


def write_poisoned(target: Path, rows: int, poison: int, seed: int) -> set[tuple[int, str]]:
    """Write the file; returns (row, reason) of every poison row."""
    chosen = random.Random(seed).sample(range(rows), poison)
    kind_of = {row: KINDS[place % len(KINDS)] for place, row in enumerate(chosen)}
    lines = [
        kind_of[row][1](row) if row in kind_of else json.dumps({"prompt": f"Row {row}"}).encode()
        for row in range(rows)
    ]
    target.write_bytes(b"\n".join(lines) + b"\n")
    return {(row, reason) for row, (reason, _) in kind_of.items()}


def letters_of(folder: Path) -> list[tuple[int, str]]:
    """(row, reason) of every dead letter."""
    lines = [
        json.loads(line)
        for path in sorted(folder.glob("dead-*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return [(line["row"], line["reason"]) for line in lines]


def ends_well(
    folder: Path, model: Path, source: Path, planted: set[tuple[int, str]], rows: int, rate: float
) -> bool:
    """Whether the job is green, its dead letters are the planted rows and the rest completions."""
    output = folder / "out"
    words = ["--model", str(model), "--input", str(source)]
    words += ["--output", str(output), "--threads-per-worker", "1", "--num-workers", "1"]
    words += ["--max-dead-rate", str(rate), "--sampling.max-tokens", "4"]
    if finished(folder / "events", words, MODULE) or not (output / "manifest.json").exists():
        return False
    counts = json.loads((output / "manifest.json").read_text())["counts"]
    return sorted(letters_of(output)) == sorted(planted) and counts["rows_out"] == rows - len(
        planted
    )


def poison_rows(folder: Path, model: Path, rows: int = 1000, poison: int = 160) -> Iterator[Row]:
    """The rows of the table and their control: a job that may set nothing aside."""
    folder.mkdir()
    source = folder / "rows.jsonl"
    planted = write_poisoned(source, rows, poison, seed=10)
    good = ends_well(folder / "run", model, source, planted, rows, poison / rows)
    dead = len(letters_of(folder / "run/out"))
    name = f"poison: {poison:,} prompts of {len(KINDS)} kinds among {rows:,}"
    yield Row(f"{name}: dead letters", dead, f"of {poison}", bar=poison)
    yield Row(f"{name}: each with its reason, job green", int(good), "of 1", bar=1)
    bad = ends_well(folder / "control", model, source, planted, rows, 0.0)
    yield Row("control: where none may be set aside the check fails", int(not bad), "of 1", bar=1)
