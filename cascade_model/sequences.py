"""Sequences by id, gathered from the shards: what was written, and nothing computed."""

import bisect
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cascade_model.columns import unpacked
from cascade_model.commit import Folder
from cascade_model.draws import masked_in
from cascade_model.manifest import Manifest
from cascade_model.open_shards import OpenShards, Rows
from cascade_model.schema import batch_rows, shard_schema
from cascade_model.shard_cache import ShardCache
from cascade_model.stored import Stored, fault_of, stored_of

Piece = tuple[int, tuple[int, int]]
"""A document's id, and its first byte and the byte after the last one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceRows:
    """Sequences as they lie in the shards, bitmaps unpacked (draw 0 of the corpus's recipe)."""

    sequence_ids: np.ndarray
    """uint64 [n]."""
    tokens: np.ndarray
    """uint16 or uint32 [n, L]."""
    is_maskable: np.ndarray
    """bool [n, L]."""
    thresholds: np.ndarray
    """uint32 [n, rates_per_row] of draw 0."""
    is_masked: np.ndarray
    """bool [n, L] of draw 0."""
    is_start: np.ndarray
    """bool [n, L]: a document starts or goes on here; the first place is always one."""


class Sequences:
    """The sequences of a split."""

    def __init__(
        self, folder: Folder, manifest: Manifest, split: str, cache: ShardCache | None
    ) -> None:
        self._manifest, self._split, self._geometry = manifest, split, manifest.geometry
        self._firsts = [shard.first_sequence for shard in manifest.splits[split].shards]
        self._compared: set[int] = set()
        self._num_sequences = manifest.splits[split].num_sequences
        self._shards = OpenShards(
            folder,
            manifest.splits[split].shards,
            shard_schema(self._geometry),
            batch_rows(self._geometry),
            self._stored,
            cache,
        )

    def rows(self, sequence_ids: np.ndarray) -> SequenceRows:
        """Sequences by id, in the order asked for; `IndexError` outside the split."""
        ids = np.asarray(sequence_ids, dtype=np.uint64)
        if ids.size and int(ids.max()) >= self._num_sequences:
            raise IndexError(f"sequence {int(ids.max())} of {self._num_sequences}")
        geometry, count = self._geometry, len(ids)
        length = geometry.sequence_length
        tokens = np.empty((count, length), dtype=geometry.token_dtype)
        thresholds = np.empty((count, geometry.rates_per_row), dtype=np.uint32)
        maskable, masked = (np.empty((count, geometry.bitmap_bytes), np.uint8) for _ in range(2))
        starts = _Starts(length)

        def take(stored: Stored, row: Rows, at: Rows) -> None:
            tokens[at] = stored.tokens[row]
            maskable[at] = stored.is_maskable[row]
            masked[at] = stored.is_masked[row]
            if geometry.rates_per_row:
                thresholds[at] = stored.thresholds[row]
            starts.take(stored, row, at)

        self._shards.visit(ids, take)
        return SequenceRows(
            sequence_ids=ids,
            tokens=tokens,
            is_maskable=unpacked(maskable, geometry),
            thresholds=thresholds,
            is_masked=unpacked(masked, geometry),
            is_start=starts.marks(count),
        )

    def pieces(self, sequence_ids: np.ndarray) -> list[list[Piece]]:
        """The pieces of documents in each sequence, uint64 [n], in their order."""
        found: list[list[Piece]] = [[] for _ in sequence_ids]

        def take(stored: Stored, row: Rows, at: Rows) -> None:
            for one, place in zip(_listed(row), _listed(at), strict=True):
                mine = slice(*stored.bounds[one : one + 2])
                spans = zip(stored.span_starts[mine], stored.span_stops[mine], strict=True)
                ids = stored.document_ids[mine].tolist()
                found[place] = [
                    (document, (int(start), int(stop)))
                    for document, (start, stop) in zip(ids, spans, strict=True)
                ]

        self._shards.visit(sequence_ids, take)
        return found

    def _stored(
        self, batch: pa.RecordBatch, first: int, count: int, is_checked: bool
    ) -> Stored | str:
        """A record batch as arrays, or what is wrong with it.

        Of each shard's masks, the first and the last row of the first record batch that is touched
        are computed again, which tells another recipe or order; `verification` does it for all.
        """
        geometry, mask_id = self._geometry, self._manifest.mask_id
        fault = None if is_checked else fault_of(batch, geometry, mask_id, first, count)
        if fault:
            return fault
        stored, shard = stored_of(batch, geometry), bisect.bisect_right(self._firsts, first)
        if shard in self._compared:
            return stored
        ends = [0, count - 1]
        ids = np.array([first, first + count - 1], dtype=np.uint64)
        maskable = unpacked(stored.is_maskable[ends], geometry)
        rates, masked = masked_in(self._manifest, self._split, 0, ids, maskable)
        if not (
            np.array_equal(unpacked(stored.is_masked[ends], geometry), masked)
            and np.array_equal(stored.thresholds[ends], rates[:, : geometry.rates_per_row])
        ):
            return "has another mask than its recipe"
        self._compared.add(shard)
        return stored


class _Starts:
    """Where documents start in the sequences that are gathered."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._values: list[np.ndarray] = [np.empty(0, np.uint32)]
        self._rows: list[int] = []
        self._counts: list[int] = []

    def take(self, stored: Stored, row: Rows, at: Rows) -> None:
        """Row `at` of the result, or several, is the record batch's `row`."""
        if not (isinstance(row, int) and isinstance(at, int)):
            for one, place in zip(_listed(row), _listed(at), strict=True):
                self.take(stored, one, place)
        else:
            low, high = stored.bounds[row], stored.bounds[row + 1]
            self._values.append(stored.document_starts[low:high])
            self._rows.append(at)
            self._counts.append(high - low)

    def marks(self, count: int) -> np.ndarray:
        """bool [count, L]: true at each start."""
        is_start = np.zeros((count, self._length), dtype=bool)
        places = np.concatenate(self._values)
        is_start[np.repeat(np.array(self._rows, dtype=np.int64), self._counts), places] = True
        return is_start


def _listed(rows: Rows) -> list[int]:
    return [rows] if isinstance(rows, int) else rows.tolist()
