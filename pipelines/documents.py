"""Documents of a part, one after the other; a broken one becomes a dead letter, not an error.

Pieces are read without looking at their neighbours: a JSONL range owns the lines that begin in it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from cascade_model.errors import InputError, Unfinished

EXCERPT = 200
"""Characters of a broken record that its dead letter keeps."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""May stand before the first line of a file, and is no part of it."""
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A range of one file: bytes (jsonl, text), row groups (parquet) or record batches (hf)."""

    path: str
    """As recorded."""
    url: str
    """Where it is read."""
    format: str
    start: int
    stop: int
    bytes: int
    """Size in the plan's arithmetic."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Pieces that are read, packed and committed together: the unit of work and of retry."""

    index: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One record of the source: its text, or the reason why there is none."""

    row: int
    """Place within the part, dead ones counted."""
    path: str
    where: str
    """Place within the file, for people."""
    text: str | None
    reason: str = ""
    excerpt: str = ""


def read_documents(part: Part, text_column: str) -> Iterator[Document]:
    """The part's records in order; `InputError` when a file is damaged as a whole, `Unfinished`
    when it cannot be read now."""
    row = 0
    for piece in part.pieces:
        for where, value in _records(piece, text_column):
            text, reason = (value, "") if isinstance(value, str) else (None, value.reason)
            excerpt = "" if isinstance(value, str) else value.excerpt
            yield Document(
                row=row, path=piece.path, where=where, text=text, reason=reason, excerpt=excerpt
            )
            row += 1


@dataclass(frozen=True, slots=True)
class Dead:
    """Why a record cannot be used."""

    reason: str
    excerpt: str


def _records(piece: Piece, column: str) -> Iterator[tuple[str, "str | Dead"]]:
    if piece.format == "jsonl":
        return _jsonl(piece, column)
    if piece.format == "parquet":
        return _parquet(piece, column)
    if piece.format == "hf":
        return _dataset(piece, column)
    return _text(piece)


def _text(piece: Piece) -> Iterator[tuple[str, "str | Dead"]]:
    with open_source(piece.url) as file:
        yield "whole file", decoded(file.read())


def _jsonl(piece: Piece, column: str) -> Iterator[tuple[str, "str | Dead"]]:
    for position, line in _lines(piece):
        if line.strip():
            yield f"byte {position}", _json_text(line, column)


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Lines that begin in [start, stop) with their byte positions (uncompressed ones)."""
    with open_source(piece.url) as raw, whole(piece.url, "compressed file"):
        compression = compression_of(piece.url)
        if compression:
            data = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), compression).read()
            position = 0
        else:
            data, position = _whole_lines(raw, piece)
    for line in data.split(b"\n"):
        yield position, line.removeprefix(BYTE_ORDER_MARK) if position == 0 else line
        position += len(line) + 1


def _whole_lines(file: BinaryIO, piece: Piece) -> tuple[bytes, int]:
    """The bytes of the lines that begin in the range, and where the first of them begins."""
    position = piece.start
    if piece.start:
        file.seek(piece.start - 1)
        position += len(file.readline()) - 1
    if position >= piece.stop:
        return b"", position
    data = file.read(piece.stop - position)
    return (data if data.endswith(b"\n") else data + file.readline()), position


def _json_text(line: bytes, column: str) -> "str | Dead":
    record = json_object(line)
    if isinstance(record, Dead):
        return record
    text, shown = record.get(column), line.decode()[:EXCERPT]
    if text is None:
        return Dead("missing_text", shown)
    if not isinstance(text, str):
        return Dead("text_is_no_string", shown)
    return text if is_sound(text) else Dead("lone_surrogate", shown)


def json_object(line: bytes) -> "dict[str, Any] | Dead":
    """A line of JSONL as a mapping."""
    text = decoded(line)
    if isinstance(text, Dead):
        return text
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return Dead("broken_json", text[:EXCERPT])
    return record if isinstance(record, dict) else Dead("not_an_object", text[:EXCERPT])


def is_sound(text: str) -> bool:
    """Whether a text can be written at all: JSON may hold halves of characters (\\ud800)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def decoded(data: bytes) -> "str | Dead":
    """Bytes as the text that they spell."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return _no_utf8(error)


def _no_utf8(error: UnicodeDecodeError) -> Dead:
    around = error.object[max(0, error.start - 40) : error.start + 40]
    return Dead("invalid_utf8", around.decode("utf-8", "backslashreplace"))


def _parquet(piece: Piece, column: str) -> Iterator[tuple[str, "str | Dead"]]:
    with open_source(piece.url) as file, whole(piece.url, "Parquet file"):
        parquet = pq.ParquetFile(file)
        tables = [
            parquet.read_row_group(i, columns=[column]) for i in range(piece.start, piece.stop)
        ]
    for group, table in enumerate(tables, piece.start):
        for row, value in enumerate(_texts(table.column(column))):
            yield f"row group {group} row {row}", value


def _dataset(piece: Piece, column: str) -> Iterator[tuple[str, "str | Dead"]]:
    with whole(piece.url, "Arrow stream"), open_arrow_stream(piece.url) as reader:
        batches = [
            batch.column(column) if index >= piece.start else None
            for index, batch in zip(range(piece.stop), reader, strict=False)
        ]
    for index, batch in enumerate(batches):
        for row, value in enumerate(_texts(batch)) if batch is not None else ():
            yield f"batch {index} row {row}", value


def cells(column: "pa.ChunkedArray | pa.Array") -> Iterator[Any]:
    """Values of a column, one by one: Arrow does not vouch that its texts are UTF-8."""
    for cell in column:
        try:
            yield cell.as_py()
        except UnicodeDecodeError as error:
            yield _no_utf8(error)


def _texts(column: "pa.ChunkedArray | pa.Array") -> Iterator["str | Dead"]:
    for value in cells(column):
        yield Dead("missing_text", "") if value is None else value


def require_column(schema: pa.Schema, column: str, url: str) -> None:
    """Refuse a table without the text column, or with one that holds no text."""
    if column not in schema.names:
        raise InputError(
            f"source.text_column={column} is not in {url}, which has {schema.names}; name one of "
            "these"
        )
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError(
            f"source.text_column={column} of {url} holds {kind}, not text; name a text column"
        )


def compression_of(url: str) -> str | None:
    """Arrow's name of a file's compression, by its suffix."""
    return next((name for suffix, name in _COMPRESSED.items() if url.endswith(suffix)), None)


def open_source(url: str) -> BinaryIO:
    """Open a source file; `Unfinished` when it cannot be read now."""
    try:
        fs, place = fsspec.core.url_to_fs(url)
        return cast(BinaryIO, fs.open(place, "rb"))
    except OSError as error:
        raise _unreadable(url, error) from None


def _unreadable(url: str, error: OSError) -> Unfinished:
    return Unfinished(
        f"source file {url} cannot be read ({type(error).__name__}); check path and rights, then "
        "run the same command again"
    )


@contextmanager
def open_arrow_stream(url: str) -> Iterator[pa.ipc.RecordBatchStreamReader]:
    """Read an Arrow stream file, from a memory map where it is local."""
    fs, place = fsspec.core.url_to_fs(url)
    if isinstance(fs, LocalFileSystem):
        with pa.memory_map(place) as file:
            yield pa.ipc.open_stream(file)
    else:
        with open_source(url) as file:
            yield pa.ipc.open_stream(file)


@contextmanager
def whole(url: str, kind: str) -> Iterator[None]:
    """Turn a reader's complaint about a damaged file into one sentence."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        # Arrow's own complaints have no number; those of a disk or a network do.
        if isinstance(error, OSError) and error.errno is not None:
            raise _unreadable(url, error) from None
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(
            f"source file {url} is a damaged {kind} ({reason}); mend it or leave it out"
        ) from None
