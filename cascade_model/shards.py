"""Shards: Arrow IPC files (uncompressed, bounded record batches), written once, checked by batch.

The manifest vouches for a shard's list of record batches (offset, length and SHA-256 of each, kept
in the shard's record), so one of them can be read and checked without the rest of the file: a
reader of a terabyte pays for what it touches. Bytes are used in this order: SHA-256, Arrow's own
full validation, then what they mean (`stored`); anything else is refused by name.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NoReturn

import pyarrow as pa

from cascade_model.commit import RECORD_SUFFIX, Folder, Record
from cascade_model.errors import CorpusMismatch
from cascade_model.manifest import CURE, ShardEntry
from cascade_model.settings import digest
from cascade_model.shard_cache import ShardCache, WrongBytes, require_hash

_MAGIC = 8
"""Bytes before the schema of an IPC file: ARROW1 and two of padding."""


def arrow_writer(
    schema: pa.Schema,
    batches: Iterable[list[pa.Array]],
    found: list[list[Any]] | None = None,
) -> Callable[[BinaryIO], None]:
    """A function that writes an IPC file, one record batch per list of columns.

    [offset, length, sha256] of each record batch is added to `found`.
    """

    def write(file: BinaryIO) -> None:
        with pa.ipc.new_file(pa.PythonFile(file, mode="w"), schema) as writer:
            for columns in batches:
                batch = pa.RecordBatch.from_arrays(columns, schema=schema)
                writer.write_batch(batch)
                if found is not None:
                    message = batch.serialize()  # the bytes that the file has just got
                    sha256 = hashlib.sha256(memoryview(message)).hexdigest()
                    found.append([file.tell() - message.size, message.size, sha256])

    return write


def write_shard(
    folder: Folder,
    name: str,
    schema: pa.Schema,
    batches: Iterable[list[pa.Array]],
    facts: dict[str, Any],
) -> Record:
    """Commit a shard; its record's facts are `facts`, its columns and its list of record batches.

    All record batches but the last must have `batch_rows` rows, which readers rely on; `ValueError`
    where they differ.
    """
    found: list[list[Any]] = []
    columns = [f"{field.name}: {field.type}" for field in schema]
    # The commit makes the record after writing, when the list is full.
    facts = {**facts, "schema": columns, "batches": found}
    return folder.commit(name, arrow_writer(schema, _even(batches), found), facts)


def _even(batches: Iterable[list[pa.Array]]) -> Iterator[list[pa.Array]]:
    """The record batches, none larger than those before it and only the last one smaller."""
    rows: list[int] = []
    for columns in batches:
        rows.append(len(columns[0]))
        if len(set(rows[:-1])) > 1 or rows[-1] > rows[0]:
            raise ValueError(f"record batch {len(rows) - 1} has {rows[-1]} rows after {rows[:-1]}")
        yield columns


def entry_of(record: Record) -> ShardEntry:
    """The manifest's line for a committed shard, whose facts hold rows, tokens, first_sequence."""
    return ShardEntry(
        name=record.name,
        object=record.object,
        bytes=record.bytes,
        sha256=record.sha256,
        batches_sha256=digest(record.facts["batches"]),
        **{key: record.facts[key] for key in ("rows", "tokens", "first_sequence")},
    )


def read_arrow(folder: Folder, name: str, size: int, sha256: str) -> pa.ipc.RecordBatchFileReader:
    """Open a whole IPC file after its size and hash agree; `CorpusMismatch` otherwise.

    Of a store its record batches are fetched one by one, so that memory does not hold the file.
    """
    where = folder.path(name)
    try:
        require_size(where, folder.size(name), size)
        actual = folder.sha256_of(name)
    except OSError as error:
        refuse(where, f"cannot be read ({type(error).__name__})")
    if actual != sha256:
        refuse(
            where,
            f"has sha256 {actual[:12]} but its record says {sha256[:12]}; it was damaged or "
            "exchanged",
        )
    try:
        is_local = folder.is_local
        source = pa.memory_map(where) if is_local else pa.PythonFile(folder.open(name), mode="r")
        return pa.ipc.open_file(source)
    except (pa.ArrowException, OSError):
        refuse(where, "is no Arrow file")


def refuse(where: str, what: str) -> NoReturn:
    """Raise the `CorpusMismatch` of a shard."""
    raise CorpusMismatch(f"shard {where} {what}; {CURE}")


def require_size(where: str, found: int, expected: int) -> None:
    """Refuse a file that was cut or has grown."""
    if found != expected:
        refuse(where, f"has {found} bytes but its record says {expected}; it was cut or exchanged")


class BatchFile:
    """An IPC file of a finished corpus, read one record batch at a time."""

    def __init__(
        self,
        folder: Folder,
        entry: ShardEntry,
        schema: pa.Schema,
        cache: ShardCache | None = None,
    ) -> None:
        """Open by the manifest's entry; `CorpusMismatch` names the file and what differs.

        Ranges are fetched through `cache`; without one a local file is mapped into memory.
        """
        self.where = folder.path(entry.object)
        self._folder, self._entry, self._schema, self._cache = folder, entry, schema, cache
        self._ranges = self._listed()
        self.identity: tuple[int, ...] = ()
        """Of a mapped file: which one, how large and since when; none for one in a store."""
        self._mapped = self._map() if folder.is_local and cache is None else None
        if self._ranges:
            self._require_columns()

    def __len__(self) -> int:
        return len(self._ranges)

    def read(self, index: int, *, is_checked: bool = False) -> pa.RecordBatch:
        """A record batch whose bytes, and Arrow's own rules, were checked.

        `is_checked` says that this was done before, which holds for a mapped file as long as it
        stays open. `CorpusMismatch` names the file and the range that differs.
        """
        offset, length, sha256 = self._ranges[index]
        data = self._range(offset, length, sha256, is_checked)
        try:
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(data), self._schema)
            if not is_checked:
                batch.validate(full=True)
        except (pa.ArrowException, OSError, ValueError, TypeError):
            refuse(self.where, f"holds arrays that Arrow refuses at bytes {offset}+{length}")
        if not is_checked and any(column.null_count for column in batch.columns):
            refuse(self.where, f"holds empty cells at bytes {offset}+{length}")
        return batch

    def _listed(self) -> list[tuple[int, int, str]]:
        """The record's list of record batches, which the manifest vouches for."""
        try:
            data = self._read_list() if self._cache is None else self._cached_list(self._cache)
            listed = [(int(start), int(size), str(sha)) for start, size, sha in json.loads(data)]
        except OSError as error:
            refuse(self.where, f"has a record that cannot be read ({type(error).__name__})")
        except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
            refuse(self.where, "has a damaged record")
        if hashlib.sha256(data).hexdigest() != self._entry.batches_sha256:
            refuse(self.where, "has a record that is not the one the manifest vouches for")
        ends = [_MAGIC, *(start + size for start, size, _ in listed)]
        rising = all(start >= end for (start, _, _), end in zip(listed, ends, strict=False))
        if not rising or min(ends) < _MAGIC or ends[-1] > self._entry.bytes:
            refuse(self.where, "lists record batches outside of the file")
        return listed

    def _read_list(self) -> bytes:
        """The list in the spelling that `digest` hashes."""
        facts = json.loads(self._folder.read_bytes(self._entry.name + RECORD_SUFFIX))["facts"]
        return json.dumps(facts["batches"], separators=(",", ":")).encode()

    def _cached_list(self, cache: ShardCache) -> bytes:
        try:
            return cache.get(self._entry.batches_sha256, self._read_list)
        except WrongBytes:
            refuse(self.where, "has a record that is not the one the manifest vouches for")

    def _map(self) -> pa.Buffer:
        """The file in memory as far as it is touched; its size is right, so no page is missing."""
        try:
            with open(self.where, "rb") as file:
                found = os.fstat(file.fileno())
                require_size(self.where, found.st_size, self._entry.bytes)
                self.identity = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
                return pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            refuse(self.where, f"cannot be read ({type(error).__name__})")

    def _require_columns(self) -> None:
        """The file's own schema, before its first record batch."""
        try:
            header = pa.py_buffer(self._fetch(0, self._ranges[0][0]))
            schema = pa.ipc.read_schema(header.slice(_MAGIC))
        except (pa.ArrowException, OSError, ValueError, IndexError) as error:
            refuse(self.where, f"cannot be read as an Arrow file ({type(error).__name__})")
        if not schema.equals(self._schema):
            refuse(self.where, "has other columns than the manifest's geometry asks for")

    def _range(self, offset: int, length: int, sha256: str, is_checked: bool) -> pa.Buffer:
        """The bytes of a record batch, with the hash that its record says."""
        try:
            if self._cache is not None:
                found = self._cache.get(sha256, lambda: bytes(self._fetch(offset, length)))
                return pa.py_buffer(found)
            found = self._fetch(offset, length)
            if not (is_checked and self._mapped):
                require_hash(found, sha256)
            return pa.py_buffer(found)
        except OSError as error:
            refuse(self.where, f"cannot be read ({type(error).__name__})")
        except WrongBytes as error:
            refuse(
                self.where,
                f"has sha256 {error.actual[:12]} at bytes {offset}+{length} but its record says "
                f"{sha256[:12]}; it was cut, damaged or exchanged",
            )

    def _fetch(self, offset: int, length: int) -> Any:
        """Bytes of the file, unchecked."""
        if self._mapped is not None:
            return self._mapped.slice(offset, length)
        return self._folder.read_range(self._entry.object, offset, length)
