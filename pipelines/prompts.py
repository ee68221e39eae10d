"""Files of prompts, cut into parts that can be read alone.

JSONL is cut at bytes, Parquet at rows, Arrow (and with it a Hugging Face dataset) at record
batches.
"""

import hashlib
import itertools
import sys
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cascade_model.errors import InputError
from pipelines.documents import BYTE_ORDER_MARK, json_object
from pipelines.pieces import Piece, compression_of, open_arrow, open_source, whole
from pipelines.row_groups import row_group
from pipelines.tables import arrow_kind, cells, table_rows

ARROW = (".arrow", ".arrows", ".ipc", ".feather")
_PROBED = 100
"""Rows at the head of a JSONL file in which one of the columns must be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Rows `first_row`..`first_row + num_rows` of the whole input, all in one file."""

    index: int
    url: str
    first_row: int
    num_rows: int
    start: int
    """JSONL: byte where the part begins. Parquet: row within the file. Arrow: where the record
    batch with its first row begins, a number in a file, a byte in a stream."""
    skip: int = 0
    """Arrow: rows of that batch before the first one."""
    sha256: str = ""
    """JSONL: of its rows as `raw_rows` gives them, a line feed behind each; empty for tables."""


@dataclass(frozen=True, slots=True)
class _Cut:
    """Where a part of a file begins; the names are those of `Part`."""

    start: int
    skip: int = 0
    sha256: str = ""


def plan(urls: Sequence[str], rows_per_part: int) -> tuple[list[Part], str]:
    """Cut the input into parts; also a digest of its files' bytes and of where they end, as no part
    crosses a file (SHA-256 over the SHA-256 of each). Reads each file once."""
    parts: list[Part] = []
    seen, row = hashlib.sha256(), 0
    for url in urls:
        own = hashlib.sha256()
        cuts, count = _scan(url, rows_per_part, own)
        seen.update(own.digest())
        for number, cut in enumerate(cuts):
            size = min(rows_per_part, count - number * rows_per_part)
            parts.append(
                Part(
                    index=len(parts),
                    url=url,
                    first_row=row,
                    num_rows=size,
                    start=cut.start,
                    skip=cut.skip,
                    sha256=cut.sha256,
                )
            )
            row += size
    if not parts:
        raise InputError(f"input={', '.join(urls)} holds no rows; give a file with prompts")
    return parts, seen.hexdigest()


class LinesHash:
    """SHA-256 of rows of JSONL, a line feed behind each."""

    def __init__(self) -> None:
        self._hash, self.count = hashlib.sha256(), 0

    def add(self, row: bytes) -> None:
        """The next row."""
        self._hash.update(row)
        self._hash.update(b"\n")
        self.count += 1

    def hexdigest(self) -> str:
        """Of all rows so far."""
        return self._hash.hexdigest()


def is_parquet(url: str) -> bool:
    """Parquet by its name."""
    return url.endswith(".parquet")


def is_arrow(url: str) -> bool:
    """Arrow by its name; what is neither Arrow nor Parquet is JSONL."""
    return url.endswith(ARROW)


def _scan(url: str, rows_per_part: int, seen: Any) -> tuple[list[_Cut], int]:
    """Where each part of a file begins, and the file's number of rows; its bytes go to `seen`."""
    if compression_of(url):
        raise InputError(f"input={url} is compressed; unpack it, so that it can be cut into parts")
    if is_parquet(url) or is_arrow(url):
        with open_source(url) as file:
            while piece := file.read(1 << 20):
                seen.update(piece)
        return (_cut_parquet if is_parquet(url) else _cut_arrow)(url, rows_per_part)
    cuts, count, place = [], 0, 0
    start, rows = 0, LinesHash()
    with open_source(url) as file:
        for line in file:
            seen.update(line)
            if content := _content(line, place):
                if rows.count == rows_per_part:
                    cuts.append(_Cut(start, sha256=rows.hexdigest()))
                    rows = LinesHash()
                start = start if rows.count else place
                rows.add(content)
                count += 1
            place += len(line)
    if rows.count:
        cuts.append(_Cut(start, sha256=rows.hexdigest()))
    return cuts, count


def _cut_parquet(url: str, rows_per_part: int) -> tuple[list[_Cut], int]:
    with open_source(url) as file, whole(url, "Parquet file"):
        count = pq.ParquetFile(file).metadata.num_rows
    return [_Cut(start) for start in range(0, count, rows_per_part)], count


def _cut_arrow(url: str, rows_per_part: int) -> tuple[list[_Cut], int]:
    batches = [(start, rows) for start, rows in _arrow_batches(url) if rows]
    ends = list(itertools.accumulate(rows for _, rows in batches))
    count = ends[-1] if ends else 0
    cuts = []
    for row in range(0, count, rows_per_part):
        place = bisect_right(ends, row)
        start, rows = batches[place]
        cuts.append(_Cut(start, skip=row - (ends[place] - rows)))
    return cuts, count


def _arrow_batches(url: str) -> list[tuple[int, int]]:
    """Where each record batch begins, and its number of rows. A stream with dictionaries counts as
    one batch, as each needs those before it."""
    with whole(url, "Arrow file"), open_arrow(url) as file:
        if arrow_kind(url) == "arrow_file":
            reader = pa.ipc.open_file(file)
            return [(i, reader.get_batch(i).num_rows) for i in range(reader.num_record_batches)]
        schema, found = pa.ipc.read_schema(file), []
        while True:
            start = file.tell()
            try:
                message = pa.ipc.read_message(file)
            except EOFError:
                return found
            if message.type != "record batch":
                file.seek(0)
                return [(0, sum(batch.num_rows for batch in pa.ipc.open_stream(file)))]
            found.append((start, pa.ipc.read_record_batch(message, schema).num_rows))


def require_columns(
    urls: Sequence[str], prompt: str, messages: str, settings: Sequence[str] = ()
) -> None:
    """Raise `InputError`, naming the columns that are there, for a file without the right ones: one
    of prompt and messages, and in a table those of settings, which lines of JSON may leave out."""
    for url in urls:
        names = _column_names(url)
        if names and not {prompt, messages} & set(names):
            raise InputError(
                f"prompt_column={prompt} and messages_column={messages} are not in {url}, which "
                f"has {names}; name one of these"
            )
        missing = [name for name in settings if name not in names]
        if missing and (is_parquet(url) or is_arrow(url)):
            raise InputError(
                f"setting_columns has {missing[0]}, which is not in {url} with {names}; leave it "
                "out"
            )


def may_have_setting(urls: Sequence[str], name: str, params: str, settings: Sequence[str]) -> bool:
    """Whether rows may have a value of their own for a setting, in the column of params or in one
    of their own; for lines of JSON as far as the first tell."""
    return name in settings or any(params in _column_names(url) for url in urls)


def _column_names(url: str) -> list[str]:
    """Columns of a table, or of the first rows of a JSONL file; none if none can be read."""
    if is_arrow(url):
        with whole(url, "Arrow file"), open_arrow(url) as file:
            if arrow_kind(url) == "arrow_file":
                return pa.ipc.open_file(file).schema.names
            return pa.ipc.read_schema(file).names
    with open_source(url) as file:
        if is_parquet(url):
            with whole(url, "Parquet file"):
                return pq.ParquetFile(file).schema_arrow.names
        lines = (_content(line, place) for place, line in enumerate(file))
        rows = map(json_object, itertools.islice(filter(None, lines), _PROBED))
        return list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))


def raw_rows(part: Part, columns: Collection[str]) -> Iterator[bytes | dict[str, Any]]:
    """The part's rows as they stand: a JSONL line without white space, or a table's cells of those
    columns that are there (`Dead` for a text that is none)."""
    if is_arrow(part.url):
        yield from _arrow_rows(part, columns)
        return
    with open_source(part.url) as file:
        if is_parquet(part.url):
            with whole(part.url, "Parquet file"):
                yield from _parquet_rows(file, part, columns)
            return
        file.seek(part.start)
        place, left = part.start, part.num_rows
        for line in file:
            if left == 0:
                return
            if content := _content(line, place):
                left -= 1
                yield content
            place += len(line)


def _content(line: bytes, place: int) -> bytes:
    """A line without what stands around it; empty for a blank one, which is no row."""
    return (line if place else line.removeprefix(BYTE_ORDER_MARK)).strip()


def _parquet_rows(file: Any, part: Part, columns: Collection[str]) -> Iterator[dict[str, Any]]:
    """Only the columns and the row groups that hold the part are read."""
    parquet, place = pq.ParquetFile(file), 0
    names = [name for name in parquet.schema_arrow.names if name in columns]
    for group in range(parquet.num_row_groups):
        size = parquet.metadata.row_group(group).num_rows
        low, high = max(part.start - place, 0), min(part.start + part.num_rows - place, size)
        if low < high:
            table = row_group(part.url, parquet, group, names).slice(low, high - low)
            values = {name: cells(table.column(name)) for name in names}
            for _ in range(low, high):
                yield {name: next(each) for name, each in values.items()}
        place += size


def _arrow_rows(part: Part, columns: Collection[str]) -> Iterator[dict[str, Any]]:
    """From the batch with the first row on, no further than the last."""
    there = {name: name for name in _column_names(part.url) if name in columns}
    behind = Piece(
        path=part.url,
        url=part.url,
        format=arrow_kind(part.url),
        start=part.start,
        stop=sys.maxsize,
        bytes=0,
    )
    rows = table_rows(behind, {**there})
    for _, values in itertools.islice(rows, part.skip, part.skip + part.num_rows):
        yield values
