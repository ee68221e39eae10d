"""Files of prompts, cut into parts that can be read alone; broken rows come out with a reason."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from cascade_model.errors import InputError
from pipelines.documents import BYTE_ORDER_MARK, json_object
from pipelines.pieces import EXCERPT, Dead, compression_of, is_sound, open_source, whole
from pipelines.tables import cells

_PROBED = 100
"""Rows at the head of a JSONL file in which one of the columns must be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Names of the input's columns."""

    prompt: str = "prompt"
    """Text to continue."""
    messages: str = "messages"
    """A chat ([{role, content}, ...]); used where the prompt column is missing."""
    suffix: str = "suffix"
    """Text that follows the completion of a prompt; may be missing."""
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
    suffix: str | None = None
    """What follows the completion."""


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
    if compression_of(url):
        raise InputError(f"input={url} is compressed; unpack it, so that it can be cut into parts")
    with open_source(url) as file:
        if is_parquet(url):
            while piece := file.read(1 << 20):
                seen.update(piece)
            file.seek(0)
            with whole(url, "Parquet file"):
                count = pq.ParquetFile(file).metadata.num_rows
            return list(range(0, count, rows_per_part)), count
        starts, count, place = [], 0, 0
        for line in file:
            seen.update(line)
            if _content(line, place):
                if count % rows_per_part == 0:
                    starts.append(place)
                count += 1
            place += len(line)
        return starts, count


def is_parquet(url: str) -> bool:
    """Parquet by its name; everything else is JSONL."""
    return url.endswith(".parquet")


def require_columns(urls: Sequence[str], columns: Columns) -> None:
    """Raise `InputError`, naming the columns that are there, for a file without the right ones."""
    for url in urls:
        names = _column_names(url)
        if names and not {columns.prompt, columns.messages} & set(names):
            raise InputError(
                f"prompt_column={columns.prompt} and messages_column={columns.messages} are not in "
                f"{url}, which has {names}; name one of these"
            )


def _column_names(url: str) -> list[str]:
    """Columns of a Parquet file, or of the first rows of a JSONL file; none if none can be read."""
    with open_source(url) as file:
        if is_parquet(url):
            with whole(url, "Parquet file"):
                return pq.ParquetFile(file).schema_arrow.names
        lines = (_content(line, place) for place, line in enumerate(file))
        rows = map(json_object, itertools.islice(filter(None, lines), _PROBED))
        return list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))


def read_part(
    part: Part, columns: Columns, chat: Callable[[Any], str]
) -> Iterator[Prompt | DeadRow]:
    """The part's rows in order; a broken one comes as a `DeadRow`.

    `InputError` when the file is no longer what was planned.
    """
    for offset, raw in enumerate(_raw_rows(part, columns)):
        row = part.first_row + offset
        try:
            yield _prompt(row, raw, columns, chat)
        except DeadRowError as error:
            yield DeadRow(row=row, reason=str(error), input=_shown(raw))


def _raw_rows(part: Part, columns: Columns) -> Iterator[bytes | dict[str, Any]]:
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


def _parquet_rows(file: Any, part: Part, columns: Columns) -> Iterator[dict[str, Any]]:
    """The part's rows; only the columns and the row groups that hold them are read."""
    parquet, place = pq.ParquetFile(file), 0
    wanted = {columns.prompt, columns.messages, columns.suffix, columns.id}
    names = [name for name in parquet.schema_arrow.names if name in wanted]
    for group in range(parquet.num_row_groups):
        size = parquet.metadata.row_group(group).num_rows
        low, high = max(part.start - place, 0), min(part.start + part.num_rows - place, size)
        if low < high:
            table = parquet.read_row_group(group, columns=names).slice(low, high - low)
            values = {name: cells(table.column(name)) for name in names}
            for _ in range(low, high):
                yield {name: next(each) for name, each in values.items()}
        place += size


def _prompt(
    row: int, raw: bytes | dict[str, Any], columns: Columns, chat: Callable[[Any], str]
) -> Prompt:
    values = json_object(raw) if isinstance(raw, bytes) else raw
    if isinstance(values, Dead):
        raise DeadRowError(values.reason)
    text, messages, suffix, given = (
        _alive(values.get(name))
        for name in (columns.prompt, columns.messages, columns.suffix, columns.id)
    )
    if text is None and messages is not None:
        if suffix:
            raise DeadRowError("suffix_of_a_chat")
        text = _chat_text(messages, chat)
    if text is None:
        raise DeadRowError("missing_prompt")
    if not isinstance(text, str):
        raise DeadRowError("prompt_is_no_string")
    if not isinstance(suffix, str | None):
        raise DeadRowError("suffix_is_no_string")
    if not text and not suffix:
        raise DeadRowError("empty_prompt")
    name = str(row if given is None else given)
    if not all(map(is_sound, (text, suffix or "", name))):
        raise DeadRowError("lone_surrogate")
    return Prompt(row=row, id=name, text=text, suffix=suffix)


def _alive(value: Any) -> Any:
    if isinstance(value, Dead):
        raise DeadRowError(value.reason)
    return value


def _chat_text(messages: Any, chat: Callable[[Any], str]) -> str:
    is_chat = isinstance(messages, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    )
    if not is_chat or not messages:
        raise DeadRowError("broken_messages")
    try:
        return chat(messages)
    except InputError:
        raise DeadRowError("chat_template_fails") from None


def _shown(raw: bytes | dict[str, Any]) -> str:
    text = raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else repr(raw)
    return text[:EXCERPT]
