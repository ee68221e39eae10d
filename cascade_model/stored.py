"""A record batch of a shard as arrays, once it is known to mean what a shard must mean.

The arrays are views of the file. Nothing here reads a file; what is refused is named by the caller.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cascade_model.columns import Starts, bitmap_of, flat_of, offsets_of, thresholds_of, tokens_of
from cascade_model.schema import RAGGED, Geometry


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored(Starts):
    """n sequences as they lie in the file."""

    tokens: np.ndarray
    """uint16 or uint32 [n, L]."""
    thresholds: np.ndarray
    """uint32 [n, rates_per_row] of draw 0."""
    is_maskable: np.ndarray
    """uint8 [n, bitmap_bytes]."""
    is_masked: np.ndarray
    """uint8 [n, bitmap_bytes] of draw 0."""
    bounds: memoryview
    """`start_offsets` as Python has them, for those who look up one row at a time."""

    def __len__(self) -> int:
        return len(self.tokens)


def stored_of(batch: pa.RecordBatch, geometry: Geometry) -> Stored:
    """The arrays of a record batch that has the columns of `shard_schema`."""
    offsets = offsets_of(batch, "document_starts")
    return Stored(
        tokens=tokens_of(batch, geometry),
        thresholds=thresholds_of(batch, geometry),
        is_maskable=bitmap_of(batch, "is_maskable", geometry),
        is_masked=bitmap_of(batch, "is_masked", geometry),
        start_offsets=offsets,
        bounds=offsets.data,
        **{name: flat_of(batch, name) for name in RAGGED},
    )


def fault_of(
    batch: pa.RecordBatch, geometry: Geometry, mask_id: int, first: int, count: int
) -> str | None:
    """What is wrong with a record batch that should hold `count` sequences from id `first` on.

    None when it is sound. Arrow must have validated it: offsets are followed here.
    """
    if batch.num_rows != count:
        return f"holds {batch.num_rows} rows where the manifest has {count}"
    ids = batch.column("sequence_id").to_numpy(zero_copy_only=True)
    if not np.array_equal(ids, np.arange(first, first + count, dtype=np.uint64)):
        return "has other sequence ids than listed"
    offsets = [offsets_of(batch, name) for name in RAGGED]
    if not all(np.array_equal(offsets[0], each) for each in offsets[1:]):
        return "has documents, starts and spans that do not go together"
    rows = stored_of(batch, geometry)
    if rows.tokens.size and int(rows.tokens.max()) >= geometry.vocab_size:
        return f"holds token ids outside the vocabulary of {geometry.vocab_size}"
    if (rows.tokens == mask_id).any():
        return f"holds the mask token {mask_id} as text"
    if not _starts_are_sound(rows, geometry):
        return "has document starts off the block grid"
    if (rows.span_starts > rows.span_stops).any():
        return "has byte spans that end before they begin"
    if (rows.is_masked & ~rows.is_maskable).any():
        return "masks places that must stay"
    return None


def _starts_are_sound(rows: Stored, geometry: Geometry) -> bool:
    """Each row's starts begin at 0, go up and lie on the block grid."""
    starts, offsets = rows.document_starts.astype(np.int64), rows.start_offsets
    if np.any(np.diff(offsets) < 1):
        return False
    rising = np.diff(starts) > 0
    rising[offsets[1:-1] - 1] = True  # from one row's last to the next row's first
    return bool(
        np.all(starts[offsets[:-1]] == 0)
        and rising.all()
        and np.all(starts % geometry.block_size == 0)
        and np.all(starts < geometry.sequence_length)
    )
