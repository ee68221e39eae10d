"""Files of prompts, cut into parts that can be read alone; broken rows come out with a reason."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from cascade_model.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Names of the input's columns."""

    prompt: str = "prompt"
    """Text to continue."""
    messages: str = "messages"
    """A chat ([{role, content}, ...]); used where the prompt column is missing."""
    id: str = "id"
    """Carried to the output; where it is missing, the row's number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Rows `first_row`..`first_row + num_rows` of the whole input, all in one file."""

    index: int
    url: str
    first_row: int
    num_rows: int
    start: int
    """JSONL: byte where the part begins. Parquet: row within the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One row to answer."""

    row: int
    id: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadRow:
    """One row that cannot be answered, with the beginning of what it held."""

    row: int
    reason: str
    input: str


class DeadRowError(ValueError):
    """Raised while a row is read; the message is the reason."""


def plan(urls: Sequence[str], rows_per_part: int) -> tuple[list[Part], str]:
    """Cut the input into parts; also the SHA-256 of its bytes. Reads each file once."""
    parts: list[Part] = []
    seen, row = hashlib.sha256(), 0
    for url in urls:
        starts, count = _scan(url, rows_per_part, seen)
        for number, start in enumerate(starts):
            size = min(rows_per_part, count - number * rows_per_part)
            parts.append(Part(index=len(parts), url=url, first_row=row, num_rows=size, start=start))
            row += size
    if not parts:
        raise InputError(f"input={', '.join(urls)} holds no rows; give a file with prompts")
    return parts, seen.hexdigest()


def _scan(url: str, rows_per_part: int, seen: Any) -> tuple[list[int], int]:
    """Where each part of a file begins, and the file's number of rows; its bytes go to `seen`."""
    try:
        with _opened(url) as file:
            if is_parquet(url):
                while piece := file.read(1 << 20):
                    seen.update(piece)
                file.seek(0)
                count = pq.ParquetFile(file).metadata.num_rows
                return list(range(0, count, rows_per_part)), count
            starts, count, place = [], 0, 0
            for line in file:
                seen.update(line)
                if line.strip():
                    if count % rows_per_part == 0:
                        starts.append(place)
                    count += 1
                place += len(line)
            return starts, count
    except (OSError, pa.ArrowInvalid) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"input={url} cannot be read ({reason}); check the path") from None


def _opened(url: str) -> Any:
    """The file for reading bytes; seekable."""
    return fsspec.open(url, "rb")


def is_parquet(url: str) -> bool:
    """Parquet by its name; everything else is JSONL."""
    return url.endswith(".parquet")


def read_part(
    part: Part, columns: Columns, chat: Callable[[Any], str]
) -> Iterator[Prompt | DeadRow]:
    """The part's rows in order; a broken one comes as a `DeadRow`."""
    for offset, raw in enumerate(_raw_rows(part)):
        row = part.first_row + offset
        try:
            yield _prompt(row, raw, columns, chat)
        except DeadRowError as error:
            yield DeadRow(row=row, reason=str(error), input=_shown(raw))


def _raw_rows(part: Part) -> Iterator[bytes | dict[str, Any]]:
    with _opened(part.url) as file:
        if is_parquet(part.url):
            yield from _parquet_rows(file, part.start, part.num_rows)
            return
        file.seek(part.start)
        left = part.num_rows
        for line in file:
            if left == 0:
                return
            if line.strip():
                left -= 1
                yield line


def _parquet_rows(file: Any, start: int, num_rows: int) -> Iterator[dict[str, Any]]:
    """Rows `start`..`start + num_rows`; only the row groups that hold them are read."""
    parquet, place = pq.ParquetFile(file), 0
    for group in range(parquet.num_row_groups):
        size = parquet.metadata.row_group(group).num_rows
        low, high = max(start - place, 0), min(start + num_rows - place, size)
        if low < high:
            yield from parquet.read_row_group(group).slice(low, high - low).to_pylist()
        place += size


def _prompt(
    row: int, raw: bytes | dict[str, Any], columns: Columns, chat: Callable[[Any], str]
) -> Prompt:
    values = _parsed(raw) if isinstance(raw, bytes) else raw
    text, messages = values.get(columns.prompt), values.get(columns.messages)
    if text is None and messages is not None:
        text = _chat_text(messages, chat)
    if text is None:
        raise DeadRowError(f"no column {columns.prompt} or {columns.messages}")
    if not isinstance(text, str):
        raise DeadRowError(f"{columns.prompt} is not text")
    if not text:
        raise DeadRowError(f"{columns.prompt} is empty")
    given = values.get(columns.id)
    return Prompt(row=row, id=str(row if given is None else given), text=text)


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise DeadRowError("not UTF-8") from None
    except (ValueError, RecursionError):
        raise DeadRowError("not JSON") from None
    if not isinstance(values, dict):
        raise DeadRowError("not a JSON object")
    return values


def _chat_text(messages: Any, chat: Callable[[Any], str]) -> str:
    is_chat = isinstance(messages, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    )
    if not is_chat or not messages:
        raise DeadRowError("messages are not a list of {role, content} texts")
    return chat(messages)


def _shown(raw: bytes | dict[str, Any]) -> str:
    text = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else repr(raw)
    return text.strip()[:200]
