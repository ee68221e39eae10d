"""Poison rows: ten kinds of line that hold no document, among many that do.

Each must become one dead letter with its reason and place, every other line a document, and the job
must end well.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.benchmarks.fault_runs import finished
from tests.benchmarks.report import Row

KINDS: tuple[tuple[str, Callable[[int], bytes]], ...] = (
    ("broken_json", lambda i: b'{"text": "cut in the middle of row %d' % i),
    ("broken_json", lambda i: b"[" * 100_000),
    ("invalid_utf8", lambda i: b'{"text": "row %d holds \xff\xfe"}' % i),
    ("missing_text", lambda i: b'{"body": "row %d"}' % i),
    ("missing_text", lambda i: b'{"text": null, "row": %d}' % i),
    ("text_is_no_string", lambda i: b'{"text": %d}' % i),
    ("text_is_no_string", lambda i: b'{"text": ["row", "%d"]}' % i),
    ("not_an_object", lambda i: b'["text", "row %d"]' % i),
    ("not_an_object", lambda i: b'"row %d"' % i),
    ("lone_surrogate", lambda i: b'{"text": "row %d is half: \\ud800"}' % i),
)
"""Reason that the dead letter must give, and the line with this number."""


def write_poisoned(target: Path, rows: int, poison: int, seed: int) -> set[tuple[str, str]]:
    """Write the file; returns (place, reason) of every poison row."""
    chosen = random.Random(seed).sample(range(rows), poison)
    kind_of = {row: KINDS[place % len(KINDS)] for place, row in enumerate(chosen)}
    planted = set()
    with target.open("wb") as file:
        for row in range(rows):
            if row in kind_of:
                reason, make = kind_of[row]
                planted.add((f"byte {file.tell()}", reason))
                line = make(row)
            else:
                line = json.dumps(
                    {"text": f"Row {row} says that {row * row} is a square."}
                ).encode()
            file.write(line + b"\n")
    return planted


def letters_of(folder: Path) -> list[tuple[str, str]]:
    """(place, reason) of every dead letter."""
    lines = [
        json.loads(line)
        for path in sorted(folder.glob("dead_letter-*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return [(line["where"], line["reason"]) for line in lines]


def ends_well(folder: Path, source: Path, planted: set[tuple[str, str]], rows: int, rate: float):
    """Whether the job is green, its dead letters are the planted rows and the rest documents."""
    output = folder / "corpus"
    words = ["--source.paths", str(source), "--output", str(output), "--runner", "local"]
    words += ["--tokenizer", "bytes", "--max-dead-rate", str(rate)]
    if finished(folder / "events", words) or not (output / "manifest.json").exists():
        return False
    letters, counts = letters_of(output), json.loads((output / "manifest.json").read_text())
    documents = counts["counts"]["documents"]
    return sorted(letters) == sorted(planted) and documents == rows - len(planted)


def poison_rows(folder: Path, rows: int = 100_000, poison: int = 1_000) -> Iterator[Row]:
    """The row of the table and its control: a job that may set nothing aside."""
    folder.mkdir()
    source = folder / "rows.jsonl"
    planted = write_poisoned(source, rows, poison, seed=10)
    good = ends_well(folder / "run", source, planted, rows, poison / rows)
    dead = len(letters_of(folder / "run/corpus"))
    name = f"poison: {poison:,} rows of {len(KINDS)} kinds among {rows:,}"
    yield Row(f"{name}: dead letters", dead, f"of {poison}", bar=poison)
    yield Row(f"{name}: each with its reason, job green", int(good), "of 1", bar=1)
    bad = ends_well(folder / "control", source, planted, rows, 0.0)
    yield Row("control: where none may be set aside the check fails", int(not bad), "of 1", bar=1)
