"""Poison rows: kinds of line that a job cannot use, planted among many that it can.

Each must become one dead letter with its place and reason, every other line a result, and the job
must end well.
"""

import json
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.report import Row

Kind = tuple[str, Callable[[int], bytes]]
"""Reason that the dead letter must give, and the line with this number."""


def poisoned_lines(
    kinds: Sequence[Kind], good: Callable[[int], dict], rows: int, poison: int, seed: int
) -> Iterator[tuple[str | None, bytes]]:
    """(reason or none, line) of each row; all kinds occur in turns."""
    chosen = random.Random(seed).sample(range(rows), poison)
    kind_of = {row: kinds[place % len(kinds)] for place, row in enumerate(chosen)}
    for row in range(rows):
        reason, make = kind_of.get(row, (None, lambda i: json.dumps(good(i)).encode()))
        yield reason, make(row) + b"\n"


def lines_of(folder: Path, pattern: str) -> Iterator[dict]:
    """The dead letters of a folder."""
    for path in sorted(folder.glob(pattern)):
        yield from map(json.loads, path.read_text().splitlines())


def judged(
    output: Path,
    *,
    is_green: bool,
    letters: Sequence[tuple[Any, str]],
    planted: Collection[tuple[Any, str]],
    whole: tuple[str, int],
) -> tuple[bool, int]:
    """Whether a job ended well with just the planted rows set aside, and how many were.

    `letters` and `planted`: place and reason of each; `whole`: the name of a count in the manifest
    and what it must be.
    """
    manifest, (name, count) = output / "manifest.json", whole
    if not is_green or not manifest.exists():
        return False, len(letters)
    is_whole = json.loads(manifest.read_text())["counts"][name] == count
    return sorted(letters) == sorted(planted) and is_whole, len(letters)


def table_rows(
    runs: Callable[[str, float], tuple[bool, int]], kinds: int, rows: int, poison: int
) -> Iterator[Row]:
    """The rows of a table and their control: a job that may set nothing aside.

    `runs(name, most_dead)` runs the job into a folder of that name; it returns what `judged` does.
    """
    good, dead = runs("run", poison / rows)
    name = f"poison: {poison:,} rows of {kinds} kinds among {rows:,}"
    yield Row(f"{name}: dead letters", dead, f"of {poison}", bar=poison)
    yield Row(f"{name}: each with its reason, job green", int(good), "of 1", bar=1)
    bad, _ = runs("control", 0.0)
    yield Row("control: where none may be set aside the check fails", int(not bad), "of 1", bar=1)
