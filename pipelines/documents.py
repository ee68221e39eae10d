"""Documents of a part, one after the other; a broken one becomes a dead letter, not an error.

Pieces are read without looking at their neighbours: a JSONL range owns the lines that begin in it.
A record must fit into memory, a file need not: compressed files are unpacked as a stream.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import pyarrow as pa

from pipelines.pieces import (
    EXCERPT,
    Dead,
    Part,
    Piece,
    compression_of,
    decoded,
    is_sound,
    open_source,
    whole,
)
from pipelines.tables import table_rows

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""May stand at the beginning of a file, and is no part of its text."""

Message = dict[str, str]
"""A turn of a conversation: role and content."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One record of the source: its text or conversation, or the reason why there is none."""

    row: int
    """Place within the part, dead ones counted."""
    path: str
    where: str
    """Place within the file, for people, with the record's own id where it has one."""
    text: str | None
    """All contents, where it is a conversation."""
    messages: list[Message] | None = None
    reason: str = ""
    excerpt: str = ""


def read_documents(
    part: Part, text_column: str, messages_column: str | None = None, id_column: str | None = None
) -> Iterator[Document]:
    """The part's records in order; `InputError` when a file is damaged as a whole, `Unfinished`
    when it cannot be read now. With `messages_column` the records are conversations."""
    columns = {
        "text": None if messages_column else text_column,
        "messages": messages_column,
        "id": id_column,
    }
    row = 0
    for piece in part.pieces:
        for where, values in _records(piece, columns):
            yield _document(row, piece.path, where, values, messages_column is not None)
            row += 1


def _document(
    row: int, path: str, where: str, values: "dict[str, Any] | Dead", is_chat: bool
) -> Document:
    found = values if isinstance(values, Dead) else _content(values, is_chat)
    name = None if isinstance(values, Dead) else values.get("id")
    if name is not None and not isinstance(name, Dead):
        where = f"{where}, id {name if is_sound(str(name)) else ascii(name)}"
    if isinstance(found, Dead):
        reason, excerpt = found.reason, found.excerpt
        return Document(row=row, path=path, where=where, text=None, reason=reason, excerpt=excerpt)
    if isinstance(found, str):
        return Document(row=row, path=path, where=where, text=found)
    text = "\n\n".join(message["content"] for message in found)
    return Document(row=row, path=path, where=where, text=text, messages=found)


def _content(values: dict[str, Any], is_chat: bool) -> "str | list[Message] | Dead":
    """What a record holds, checked."""
    value = values["messages" if is_chat else "text"]
    if isinstance(value, Dead):
        return value
    shown = values.get("shown", "")
    if value is None:
        return Dead("missing_messages" if is_chat else "missing_text", shown)
    if is_chat:
        return _conversation(value, shown)
    if not isinstance(value, str):
        return Dead("text_is_no_string", shown)
    return value if is_sound(value) else Dead("lone_surrogate", shown)


def _conversation(value: Any, shown: str) -> "list[Message] | Dead":
    is_sequence = isinstance(value, list) and all(isinstance(turn, dict) for turn in value)
    if not is_sequence or not value:
        return Dead("broken_messages", shown)
    turns = [{key: turn.get(key) for key in ("role", "content")} for turn in value]
    if not all(isinstance(text, str) for turn in turns for text in turn.values()):
        return Dead("broken_messages", shown)
    if not all(is_sound(text) for turn in turns for text in turn.values()):
        return Dead("lone_surrogate", shown)
    return turns


def _records(
    piece: Piece, columns: dict[str, str | None]
) -> "Iterator[tuple[str, dict[str, Any] | Dead]]":
    if piece.format == "jsonl":
        return _jsonl(piece, columns)
    if piece.format == "text":
        return _text(piece)
    return cast(Iterator[tuple[str, Any]], table_rows(piece, columns))


def _text(piece: Piece) -> Iterator[tuple[str, dict[str, Any]]]:
    with open_source(piece.url) as file:
        yield "whole file", {"text": decoded(file.read().removeprefix(BYTE_ORDER_MARK))}


def _jsonl(
    piece: Piece, columns: dict[str, str | None]
) -> "Iterator[tuple[str, dict[str, Any] | Dead]]":
    for position, line in _lines(piece):
        if not line.strip():
            continue
        record = json_object(line)
        if isinstance(record, Dead):
            yield f"byte {position}", record
        else:
            values = {role: record.get(name) for role, name in columns.items() if name}
            yield f"byte {position}", values | {"shown": line.decode()[:EXCERPT]}


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Lines that begin in [start, stop) with their byte positions (uncompressed ones)."""
    with open_source(piece.url) as raw, whole(piece.url, "compressed file"):
        compression = compression_of(piece.url)
        if compression:
            position = 0
            unpacked = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), compression)
            lines: Iterator[bytes] = io.BufferedReader(cast(Any, unpacked), 1 << 20)
        else:
            data, position = _whole_lines(raw, piece)
            lines = iter(data.split(b"\n"))
            del data
        for line in lines:
            size = len(line) + (0 if compression else 1)
            yield position, line.removeprefix(BYTE_ORDER_MARK) if position == 0 else line
            position += size


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
