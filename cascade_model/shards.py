"""Shards: Arrow IPC files (uncompressed, bounded record batches) written once and checked whole.

A shard is opened only through the manifest: size and SHA-256 first, then schema, Arrow's full
validation, row ids, token ids and starts. Anything else is refused by name before a value is used.
"""

import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from cascade_model.commit import Folder
from cascade_model.errors import CorpusMismatch
from cascade_model.schema import (
    Geometry,
    Rows,
    ShardEntry,
    bitmap_of,
    rows_of,
    shard_schema,
    unpacked,
)

BATCH_TOKENS = 1 << 18
"""Tokens in a record batch, at most (one sequence at least)."""


def batch_rows(geometry: Geometry) -> int:
    """Rows of a record batch."""
    return max(1, BATCH_TOKENS // geometry.sequence_length)


def arrow_writer(
    schema: pa.Schema, batches: Iterable[list[pa.Array]]
) -> Callable[[BinaryIO], None]:
    """A function that writes an IPC file, one record batch per list of columns."""

    def write(file: BinaryIO) -> None:
        with pa.ipc.new_file(pa.PythonFile(file, mode="w"), schema) as writer:
            for columns in batches:
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))

    return write


def read_arrow(folder: Folder, name: str, size: int, sha256: str) -> pa.ipc.RecordBatchFileReader:
    """Open an IPC file after its size and hash agree; `CorpusMismatch` otherwise."""
    where = folder.path(name)
    try:
        found = folder.size(name)
        if found != size:
            raise CorpusMismatch(
                f"shard {where} has {found} bytes but its record says {size}; it was cut or "
                "changed, prepare the corpus again or copy it anew"
            )
        actual = folder.sha256_of(name)
    except OSError as error:
        raise CorpusMismatch(
            f"shard {where} cannot be read ({type(error).__name__}); prepare the corpus again or "
            "copy it anew"
        ) from None
    if actual != sha256:
        raise CorpusMismatch(
            f"shard {where} has sha256 {actual[:12]} but its record says {sha256[:12]}; it was "
            "damaged or exchanged, prepare the corpus again or copy it anew"
        )
    source = pa.memory_map(where) if folder.is_local else pa.BufferReader(folder.read_bytes(name))
    try:
        return pa.ipc.open_file(source)
    except (pa.ArrowInvalid, OSError):
        raise CorpusMismatch(f"shard {where} is no Arrow file; prepare the corpus again") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stored:
    """A checked record batch: views of the file, so that a shard that is open costs no memory."""

    tokens: np.ndarray
    thresholds: np.ndarray
    start_offsets: np.ndarray
    document_starts: np.ndarray
    is_maskable: np.ndarray
    """uint8 [n, bitmap_bytes], as it lies there; unpacked for the rows that are asked for."""
    is_masked: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


class Shard:
    """A checked shard; rows are read from a memory map (local) or from memory (remote)."""

    def __init__(self, folder: Folder, entry: ShardEntry, geometry: Geometry) -> None:
        """Open and check; `CorpusMismatch` names the file and what differs."""
        self._where = folder.path(entry.object)
        self._geometry = geometry
        reader = read_arrow(folder, entry.object, entry.bytes, entry.sha256)
        self._require(
            reader.schema.equals(shard_schema(geometry)),
            "has other columns than the manifest's sequence length, block size and vocabulary ask",
        )
        self._batches: list[_Stored] = []
        self._first: list[int] = []
        position = 0
        for index in range(reader.num_record_batches):
            batch = self._checked(reader.get_batch(index), entry.first_sequence + position)
            self._first.append(position)
            self._batches.append(batch)
            position += len(batch)
        self._require(position == entry.rows, f"has {position} rows, the manifest {entry.rows}")

    def _require(self, condition: bool, what: str) -> None:
        if not condition:
            raise CorpusMismatch(f"shard {self._where} {what}; prepare the corpus again")

    def _checked(self, batch: pa.RecordBatch, first: int) -> _Stored:
        """A record batch whose meaning was checked."""
        try:
            batch.validate(full=True)
        except pa.ArrowInvalid:
            self._require(False, "holds arrays that Arrow refuses")
        self._require(all(c.null_count == 0 for c in batch.columns), "holds empty cells")
        rows = rows_of(batch, self._geometry)
        expected = np.arange(first, first + len(rows), dtype=np.uint64)
        self._require(
            bool(np.array_equal(rows.sequence_ids, expected)), "has other sequence ids than listed"
        )
        self._require(
            rows.tokens.size == 0 or int(rows.tokens.max()) < self._geometry.vocab_size,
            f"holds token ids outside the vocabulary of {self._geometry.vocab_size}",
        )
        self._require(self._starts_are_sound(batch, rows), "has document starts off the block grid")
        self._require(
            not bool(np.any(rows.is_masked & ~rows.is_maskable)), "masks places that must stay"
        )
        return _Stored(
            tokens=rows.tokens,
            thresholds=rows.thresholds,
            start_offsets=rows.start_offsets,
            document_starts=rows.document_starts,
            is_maskable=bitmap_of(batch, "is_maskable", self._geometry),
            is_masked=bitmap_of(batch, "is_masked", self._geometry),
        )

    def _starts_are_sound(self, batch: pa.RecordBatch, rows: Rows) -> bool:
        """Each row's starts begin at 0, go up, lie on the block grid; one document id for each."""
        starts, offsets = rows.document_starts.astype(np.int64), rows.start_offsets
        ids = batch.column("document_ids").offsets.to_numpy()
        if np.any(np.diff(offsets) < 1) or not np.array_equal(ids - ids[0], offsets):
            return False
        rising = np.diff(starts) > 0
        rising[offsets[1:-1] - 1] = True  # from one row's last to the next row's first
        return bool(
            np.all(starts[offsets[:-1]] == 0)
            and rising.all()
            and np.all(starts % self._geometry.block_size == 0)
            and np.all(starts < self._geometry.sequence_length)
        )

    def gather(self, places: np.ndarray, into: dict[str, np.ndarray], at: np.ndarray) -> None:
        """Copy rows at `places` (sorted, within the shard) to the rows `at` of the arrays `into`.

        `into` maps tokens, is_maskable, thresholds, is_masked, is_start to arrays [n, ...].
        """
        low = 0
        while low < len(places):
            index = bisect.bisect_right(self._first, int(places[low])) - 1
            batch, first = self._batches[index], self._first[index]
            high = int(np.searchsorted(places, first + len(batch)))
            inside, target = places[low:high] - first, at[low:high]
            for name in ("tokens", "thresholds"):
                into[name][target] = getattr(batch, name)[inside]
            for name in ("is_maskable", "is_masked"):
                into[name][target] = unpacked(getattr(batch, name)[inside], self._geometry)
            self._mark_starts(batch, inside, into["is_start"], target)
            low = high

    def _mark_starts(self, batch: _Stored, inside, is_start: np.ndarray, target) -> None:
        counts = batch.start_offsets[inside + 1] - batch.start_offsets[inside]
        total = int(counts.sum())
        within = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        values = batch.document_starts[np.repeat(batch.start_offsets[inside], counts) + within]
        is_start[np.repeat(target, counts), values] = True
