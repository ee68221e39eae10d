"""Ten kinds of line that hold no document, for `prepare`."""

from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.fault_runs import finished
from tests.benchmarks.poison import Kind, judged, lines_of, poisoned_lines, table_rows
from tests.benchmarks.report import Row

KINDS: tuple[Kind, ...] = (
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


def _document(row: int) -> dict:
    return {"text": f"Row {row} says that {row * row} is a square."}


def write_poisoned(target: Path, rows: int, poison: int, seed: int) -> set[tuple[str, str]]:
    """Write the file; returns (place, reason) of every poison row."""
    planted = set()
    with target.open("wb") as file:
        for reason, line in poisoned_lines(KINDS, _document, rows, poison, seed):
            if reason:
                planted.add((f"byte {file.tell()}", reason))
            file.write(line)
    return planted


def poison_rows(folder: Path, rows: int = 100_000, poison: int = 1_000) -> Iterator[Row]:
    """The rows of the table."""
    folder.mkdir()
    source = folder / "rows.jsonl"
    planted = write_poisoned(source, rows, poison, seed=10)

    def run(name: str, most_dead: float) -> tuple[bool, int]:
        output = folder / name / "corpus"
        words = ["--source.paths", str(source), "--output", str(output), "--runner", "local"]
        words += ["--tokenizer", "bytes", "--max-dead-rate", str(most_dead)]
        is_green = not finished(folder / name / "events", words)
        letters = [(d["where"], d["reason"]) for d in lines_of(output, "dead_letter-*.jsonl")]
        whole = ("documents", rows - poison)
        return judged(output, is_green=is_green, letters=letters, planted=planted, whole=whole)

    yield from table_rows(run, len(KINDS), rows, poison)
