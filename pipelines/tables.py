"""Parquet and Arrow files: where they can be cut, and the rows of a piece.

Rows are read in small batches, so that memory stays bounded however large a row group is. A folder
written by datasets' save_to_disk is Arrow streams, read here too: `datasets` itself would have to
read a remote one whole and knows no ranges.
"""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cascade_model.errors import InputError
from pipelines.pieces import Piece, no_utf8, open_arrow, open_source, whole

_BATCH_BYTES = 4 << 20
"""Of a row group or record batch that are turned into Python objects together."""
_FILE_MAGIC = b"ARROW1"

Range = tuple[int, int, int]
"""Start, stop and size of a piece."""


def row_groups(url: str, columns: dict[str, str | None]) -> list[Range]:
    """A piece for each row group; its size is that of its data before compression."""
    with open_source(url) as stream, whole(url, "Parquet file"):
        parquet = pq.ParquetFile(stream)
        require_columns(parquet.schema_arrow, columns, url)
        meta = parquet.metadata
        sizes = [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
    return [(i, i + 1, size) for i, size in enumerate(sizes)]


def arrow_kind(url: str) -> str:
    """arrow_file or arrow_stream, by the file's first bytes."""
    with open_source(url) as file:
        return "arrow_file" if file.read(len(_FILE_MAGIC)) == _FILE_MAGIC else "arrow_stream"


def file_batches(url: str, columns: dict[str, str | None]) -> list[Range]:
    """A piece for each record batch of an Arrow file, through its footer."""
    with whole(url, "Arrow file"), open_arrow(url) as file:
        reader = pa.ipc.open_file(file)
        require_columns(reader.schema, columns, url)
        sizes = [reader.get_batch(i).nbytes for i in range(reader.num_record_batches)]
    return [(i, i + 1, size) for i, size in enumerate(sizes)]


def stream_batches(url: str, columns: dict[str, str | None]) -> list[Range]:
    """A piece for each record batch of an Arrow stream: the bytes of its message.

    A stream with dictionaries is one piece, as each batch needs those before it.
    """
    with whole(url, "Arrow stream"), open_arrow(url) as file:
        schema = pa.ipc.read_schema(file)
        require_columns(schema, columns, url)
        ranges, start, has_dictionaries = [], file.tell(), False
        for message in _messages(file):
            has_dictionaries |= message.type != "record batch"
            stop = file.tell()
            ranges.append((start, stop, stop - start))
            start = stop
    return [(0, start, start)] if has_dictionaries else ranges


def _messages(file: pa.NativeFile) -> Iterator[pa.Message]:
    """The messages from here to the end of the stream; a cut one is an error of the reader's."""
    while True:
        try:
            yield pa.ipc.read_message(file)
        except EOFError:
            return


def table_rows(
    piece: Piece, columns: dict[str, str | None]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row of a piece stands, and its values (or `Dead`) by the columns' roles."""
    read = {"parquet": _parquet, "arrow_file": _file, "arrow_stream": _stream}[piece.format]
    wanted = {role: name for role, name in columns.items() if name}
    for place, row, batch in read(piece, list(dict.fromkeys(wanted.values()))):
        cursors = {role: cells(batch.column(name)) for role, name in wanted.items()}
        for number in range(row, row + batch.num_rows):
            values = {role: next(cursor) for role, cursor in cursors.items()}
            yield f"{place} row {number}", values


def _parquet(piece: Piece, names: list[str]) -> Iterator[tuple[str, int, pa.RecordBatch]]:
    with open_source(piece.url) as file, whole(piece.url, "Parquet file"):
        parquet = pq.ParquetFile(file)
        for group in range(piece.start, piece.stop):
            row, meta = 0, parquet.metadata.row_group(group)
            rows = _rows(meta.total_byte_size, meta.num_rows)
            batches = parquet.iter_batches(rows, row_groups=[group], columns=names)
            for batch in batches:
                yield f"row group {group}", row, batch
                row += batch.num_rows


def _file(piece: Piece, names: list[str]) -> Iterator[tuple[str, int, pa.RecordBatch]]:
    with whole(piece.url, "Arrow file"), open_arrow(piece.url) as file:
        reader = pa.ipc.open_file(file)
        for index in range(piece.start, piece.stop):
            yield from _sliced(f"batch {index}", reader.get_batch(index).select(names))


def _stream(piece: Piece, names: list[str]) -> Iterator[tuple[str, int, pa.RecordBatch]]:
    with whole(piece.url, "Arrow stream"), open_arrow(piece.url) as file:
        if piece.start == 0:
            for index, batch in enumerate(pa.ipc.open_stream(file)):
                yield from _sliced(f"batch {index}", batch.select(names))
            return
        schema = pa.ipc.read_schema(file)
        file.seek(piece.start)
        while (place := file.tell()) < piece.stop:
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(file), schema)
            yield from _sliced(f"byte {place}", batch.select(names))


def _sliced(place: str, batch: pa.RecordBatch) -> Iterator[tuple[str, int, pa.RecordBatch]]:
    for column in batch.columns:
        _as_bytes(column).validate(full=True)  # before an offset is followed
    rows = _rows(batch.nbytes, batch.num_rows)
    for row in range(0, batch.num_rows, rows):
        yield place, row, batch.slice(row, rows)


def _as_bytes(column: pa.Array) -> pa.Array:
    """The same column with bytes in place of texts, whose spelling is judged record by record."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return column.view(pa.binary() if pa.types.is_string(kind) else pa.large_binary())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = [_as_bytes(column.values)]
        outer = pa.list_ if pa.types.is_list(kind) else pa.large_list
        bare, buffers = outer(inner[0].type), column.buffers()[:2]
    elif pa.types.is_struct(kind):
        inner = [_as_bytes(column.field(place)) for place in range(kind.num_fields)]
        names = [kind.field(place).name for place in range(kind.num_fields)]
        pairs = zip(names, (each.type for each in inner), strict=True)
        bare, buffers = pa.struct(list(pairs)), column.buffers()[:1]
    else:
        return column
    return pa.Array.from_buffers(bare, len(column), buffers, offset=column.offset, children=inner)


def _rows(size: int, count: int) -> int:
    """How many of `count` rows, which have `size` bytes together, to read at a time."""
    return max(1, min(count, _BATCH_BYTES * count // max(size, 1)))


def cells(column: "pa.ChunkedArray | pa.Array") -> Iterator[Any]:
    """Values of a column, one by one: Arrow does not vouch that its texts are UTF-8."""
    for cell in column:
        try:
            yield cell.as_py()
        except UnicodeDecodeError as error:
            yield no_utf8(error)


def require_columns(schema: pa.Schema, columns: dict[str, str | None], url: str) -> None:
    """Refuse a table without one of the columns, or with one that holds something else."""
    for role, name in columns.items():
        if name is None:
            continue
        if name not in schema.names:
            raise InputError(
                f"{role}={name} is not in {url}, which has {schema.names}; name one of these"
            )
        if schema.names.count(name) > 1:
            raise InputError(f"{role}={name} is there more than once in {url}; rename one of them")
        kind = schema.field(name).type
        if role.endswith("text_column") and not _is_text(kind):
            raise InputError(f"{role}={name} of {url} holds {kind}, not text; name a text column")
        if role.endswith("messages_column") and not _is_chat(kind):
            raise InputError(
                f"{role}={name} of {url} holds {kind}, not a list of role and content; name a "
                "column of conversations"
            )


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_chat(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    item = kind.value_type
    return pa.types.is_struct(item) and all(
        item.get_field_index(name) >= 0 and _is_text(item.field(name).type)
        for name in ("role", "content")
    )
