"""Sixteen kinds of prompt that cannot be answered, for `generate`."""

from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.fault_runs import finished
from tests.benchmarks.poison import Kind, judged, lines_of, poisoned_lines, table_rows
from tests.benchmarks.report import Row

MODULE = "tests.benchmarks.fault_points_generate"
CHAT = '"messages": [{"role": "user", "content": "Hi"}]'
KINDS: tuple[Kind, ...] = (
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


def _prompt(row: int) -> dict:
    return {"prompt": f"Row {row}"}


def write_poisoned(target: Path, rows: int, poison: int, seed: int) -> set[tuple[int, str]]:
    """Write the file; returns (row, reason) of every poison row."""
    lines = list(poisoned_lines(KINDS, _prompt, rows, poison, seed))
    target.write_bytes(b"".join(line for _, line in lines))
    return {(row, reason) for row, (reason, _) in enumerate(lines) if reason}


def letters_of(folder: Path) -> list[tuple[int, str]]:
    """(row, reason) of every dead letter."""
    return [(line["row"], line["reason"]) for line in lines_of(folder, "dead-*.jsonl")]


def poison_rows(folder: Path, model: Path, rows: int = 1000, poison: int = 160) -> Iterator[Row]:
    """The rows of the table."""
    folder.mkdir()
    source = folder / "rows.jsonl"
    planted = write_poisoned(source, rows, poison, seed=10)

    def run(name: str, most_dead: float) -> tuple[bool, int]:
        output = folder / name / "out"
        words = ["--model", str(model), "--input", str(source), "--output", str(output)]
        words += ["--threads-per-worker", "1", "--num-workers", "1"]
        words += ["--max-dead-rate", str(most_dead), "--sampling.max-tokens", "4"]
        is_green = not finished(folder / name / "events", words, MODULE)
        letters, whole = letters_of(output), ("rows_out", rows - poison)
        return judged(output, is_green=is_green, letters=letters, planted=planted, whole=whole)

    yield from table_rows(run, len(KINDS), rows, poison)
