"""Sequences as arrays, and as the columns of a record batch: written and read, no file touched.

What is read are views of the batch, except for bitmaps that are asked for bit by bit.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cascade_model.schema import RAGGED, Geometry, fixed, ragged


@dataclass(frozen=True, kw_only=True, slots=True)
class Starts:
    """Where documents start or go on in n sequences, and which bytes of them lie there."""

    start_offsets: np.ndarray
    """int32 [n + 1]: row i's starts are document_starts[start_offsets[i]:start_offsets[i + 1]]."""
    document_starts: np.ndarray
    """uint32: places where a document starts or goes on; each row's first is 0."""
    document_ids: np.ndarray
    """uint64, one per start: part index << 32 | row of the document within its part."""
    span_starts: np.ndarray
    """uint32, one per start: first byte of the document's cleaned text (UTF-8) that lies here. Of a
    document that is rearranged to learn infilling, bytes are counted in the order as it stands."""
    span_stops: np.ndarray
    """uint32, one per start: the byte after the last one; EOS and PAD have none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed(Starts):
    """n packed sequences as arrays."""

    tokens: np.ndarray
    """uint16 or uint32 [n, L]; PAD places hold pad_id."""
    is_maskable: np.ndarray
    """bool [n, L]: false at PAD."""

    def __len__(self) -> int:
        return len(self.tokens)

    def slice(self, start: int, stop: int) -> "Packed":
        """Rows start..stop."""
        offsets = self.start_offsets[start : stop + 1]
        ragged = slice(int(offsets[0]), int(offsets[-1]))
        return Packed(
            tokens=self.tokens[start:stop],
            start_offsets=offsets - offsets[0],
            document_starts=self.document_starts[ragged],
            document_ids=self.document_ids[ragged],
            span_starts=self.span_starts[ragged],
            span_stops=self.span_stops[ragged],
            is_maskable=self.is_maskable[start:stop],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows(Packed):
    """n sequences of a shard: packed, numbered, and masked by draw 0."""

    sequence_ids: np.ndarray
    """uint64 [n]."""
    thresholds: np.ndarray
    """uint32 [n, rates_per_row]: mask rates times 2^32 in draw 0, as far as they are stored."""
    is_masked: np.ndarray
    """bool [n, L]: draw 0's masked places; false wherever is_maskable is."""


def packed_columns(packed: Packed) -> list[pa.Array]:
    """The columns of `packed_schema`."""
    offsets = pa.array(packed.start_offsets.astype(np.int32))
    return [
        _fixed_column(packed.tokens),
        _ragged_column(offsets, packed.document_starts.astype(np.uint32)),
        _ragged_column(offsets, packed.document_ids.astype(np.uint64)),
        _ragged_column(offsets, packed.span_starts.astype(np.uint32)),
        _ragged_column(offsets, packed.span_stops.astype(np.uint32)),
        _bitmap_column(packed.is_maskable),
    ]


def rows_columns(rows: Rows) -> list[pa.Array]:
    """The columns of `shard_schema`."""
    return [
        pa.array(rows.sequence_ids.astype(np.uint64)),
        *packed_columns(rows),
        *([_fixed_column(rows.thresholds.astype(np.uint32))] if rows.thresholds.shape[1] else []),
        _bitmap_column(rows.is_masked),
    ]


def draw_columns(sequence_ids: np.ndarray, is_masked: np.ndarray) -> list[pa.Array]:
    """The columns of `draw_schema`, of uint64 [n] and bool [n, L]."""
    return [pa.array(sequence_ids.astype(np.uint64)), _bitmap_column(is_masked)]


def _fixed_column(values: np.ndarray) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    kind = fixed(flat.type, values.shape[1])
    return pa.FixedSizeListArray.from_arrays(flat, type=kind)


def _ragged_column(offsets: pa.Array, values: np.ndarray) -> pa.Array:
    flat = pa.array(values)
    return pa.ListArray.from_arrays(offsets, flat, type=ragged(flat.type))


def _bitmap_column(bits: np.ndarray) -> pa.Array:
    packed = np.packbits(bits, axis=1, bitorder="little")
    buffers = [None, pa.py_buffer(packed.tobytes())]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(packed.shape[1]), len(bits), buffers)


def packed_of(batch: pa.RecordBatch, geometry: Geometry) -> Packed:
    """The arrays of one record batch (tokens are views, bitmaps are unpacked)."""
    return Packed(**_packed_fields(batch, geometry))


def rows_of(batch: pa.RecordBatch, geometry: Geometry) -> Rows:
    """The arrays of one record batch of a shard."""
    return Rows(
        **_packed_fields(batch, geometry),
        sequence_ids=batch.column("sequence_id").to_numpy(zero_copy_only=True),
        thresholds=thresholds_of(batch, geometry),
        is_masked=unpacked(bitmap_of(batch, "is_masked", geometry), geometry),
    )


def _packed_fields(batch: pa.RecordBatch, geometry: Geometry) -> dict[str, np.ndarray]:
    return {
        "tokens": tokens_of(batch, geometry),
        "start_offsets": offsets_of(batch, "document_starts"),
        **{name: flat_of(batch, name) for name in RAGGED},
        "is_maskable": unpacked(bitmap_of(batch, "is_maskable", geometry), geometry),
    }


def tokens_of(batch: pa.RecordBatch, geometry: Geometry) -> np.ndarray:
    """The tokens as they lie in the file: a view [n, L]."""
    return flat_of(batch, "tokens").reshape(-1, geometry.sequence_length)


def thresholds_of(batch: pa.RecordBatch, geometry: Geometry) -> np.ndarray:
    """The stored thresholds: a view, uint32 [n, rates_per_row]."""
    if geometry.rates_per_row == 0:
        return np.empty((batch.num_rows, 0), dtype=np.uint32)
    return flat_of(batch, "thresholds").reshape(-1, geometry.rates_per_row)


def offsets_of(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """Where each row of a ragged column begins in `flat_of` it, int32 [n + 1], from 0."""
    offsets = batch.column(name).offsets.to_numpy(zero_copy_only=True)
    return offsets - offsets[0]


def flat_of(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """All values of a list column without empty cells, one row after the other: a view."""
    column = batch.column(name)
    values = column.values.to_numpy(zero_copy_only=True)
    if pa.types.is_fixed_size_list(column.type):
        width = column.type.list_size
        return values[column.offset * width : (column.offset + len(column)) * width]
    offsets = column.offsets
    return values[offsets[0].as_py() : offsets[-1].as_py()]


def bitmap_of(batch: pa.RecordBatch, name: str, geometry: Geometry) -> np.ndarray:
    """A bitmap column as it lies in the file: a view, uint8 [n, bitmap_bytes]."""
    column, width = batch.column(name), geometry.bitmap_bytes
    raw = np.frombuffer(column.buffers()[1], dtype=np.uint8)
    return raw[column.offset * width : (column.offset + len(column)) * width].reshape(-1, width)


def unpacked(bitmap: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The bits of a bitmap, bool [n, L]."""
    bits = np.unpackbits(bitmap, axis=1, bitorder="little", count=geometry.sequence_length)
    return bits.view(np.bool_)
