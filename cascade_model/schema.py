"""The data contract: the shape and the columns of a shard's row, and of the tables beside it.

A sequence is L tokens cut from packed documents. Each document is its tokens plus one EOS, padded
with PAD to a multiple of the block size B, so that the block grid restarts at every document. The
bitmaps are bits in little order (numpy `packbits(bitorder="little")`), one bit per token.
Record batches hold `batch_rows` sequences each, the last one of a shard the rest, so that the batch
of a row is known without reading anything.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cascade_model.config import NoiseConfig

SPLITS: tuple[str, ...] = ("train", "held_out")
BATCH_TOKENS = 1 << 16
"""Places in a record batch, at most (one sequence at least). A record batch is what is checked, and
fetched from a store, at once: larger ones make a sequence read at random dearer, smaller ones make
the list of them longer."""
BITMAP_BLOCK = 32
"""Block size from which the thresholds of the blocks take no more room than a bitmap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """What every row of a corpus has in common."""

    sequence_length: int
    block_size: int
    vocab_size: int
    rates_per_row: int = 0
    """Thresholds stored for a sequence; see `rates_per_row`."""

    @property
    def num_blocks(self) -> int:
        """Blocks in a sequence."""
        return self.sequence_length // self.block_size

    @property
    def bitmap_bytes(self) -> int:
        """Bytes of a bitmap over a sequence."""
        return (self.sequence_length + 7) // 8

    @property
    def token_dtype(self) -> np.dtype:
        """uint16 where the vocabulary fits, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)


def rates_per_row(noise: NoiseConfig, sequence_length: int) -> int:
    """Thresholds stored per sequence: 1, L / B, or 0 where the reader recomputes them.

    One rate per sequence costs next to nothing. A rate per block is stored while it takes no more
    room than the bitmap beside it: 32 bits for B tokens against B bits.
    """
    if noise.per == "sequence":
        return 1
    return sequence_length // noise.block_size if noise.block_size >= BITMAP_BLOCK else 0


def batch_rows(geometry: Geometry) -> int:
    """Rows of a record batch."""
    return max(1, BATCH_TOKENS // geometry.sequence_length)


def packed_schema(geometry: Geometry, metadata: dict[str, str] | None = None) -> pa.Schema:
    """Columns of packed sequences before they are numbered and masked."""
    return pa.schema(
        [
            ("tokens", fixed(pa.from_numpy_dtype(geometry.token_dtype), geometry.sequence_length)),
            ("document_starts", ragged(pa.uint32())),
            ("document_ids", ragged(pa.uint64())),
            ("span_starts", ragged(pa.uint32())),
            ("span_stops", ragged(pa.uint32())),
            pa.field("is_maskable", pa.binary(geometry.bitmap_bytes), nullable=False),
        ],
        metadata=metadata,
    )


def shard_schema(geometry: Geometry, metadata: dict[str, str] | None = None) -> pa.Schema:
    """Columns of a pre-masked shard: sequence_id, the packed columns, draw 0 of the recipe.

    The column of thresholds is there where the geometry stores any.
    """
    width = geometry.rates_per_row
    rates = [pa.field("thresholds", fixed(pa.uint32(), width), nullable=False)] if width else []
    return pa.schema(
        [
            pa.field("sequence_id", pa.uint64(), nullable=False),
            *packed_schema(geometry),
            *rates,
            pa.field("is_masked", pa.binary(geometry.bitmap_bytes), nullable=False),
        ],
        metadata=metadata,
    )


def draw_schema(geometry: Geometry, metadata: dict[str, str] | None = None) -> pa.Schema:
    """Columns of a further draw's bitmaps, row by row those of the shard they belong to."""
    return pa.schema(
        [
            pa.field("sequence_id", pa.uint64(), nullable=False),
            pa.field("is_masked", pa.binary(geometry.bitmap_bytes), nullable=False),
        ],
        metadata=metadata,
    )


def documents_schema() -> pa.Schema:
    """Columns of a part's table of documents, a row each, by rising document_id."""
    columns = {
        "document_id": pa.uint64(),  # part index << 32 | row within the part
        "path": pa.string(),
        "where": pa.string(),
        "bytes": pa.uint32(),  # UTF-8, of the cleaned text
        "tokens": pa.uint32(),
        "split": pa.uint8(),  # index into SPLITS
    }
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


def documents_name(part: int) -> str:
    """Name of a part's table of documents."""
    return f"documents-{part:05d}.arrow"


RAGGED = ("document_starts", "document_ids", "span_starts", "span_stops")
"""Columns with an entry for each document start; all four have the same offsets."""


def fixed(kind: pa.DataType, length: int) -> pa.DataType:
    """Type of a list of `length` values, none of them empty."""
    return pa.list_(pa.field("item", kind, nullable=False), length)


def ragged(kind: pa.DataType) -> pa.DataType:
    """Type of a list of any length without empty cells."""
    return pa.list_(pa.field("item", kind, nullable=False))
