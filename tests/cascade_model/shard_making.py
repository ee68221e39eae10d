"""Small shards for the tests: rows, a committed file, and the manifest's line for it."""

import numpy as np

from cascade_model.columns import Rows, rows_columns
from cascade_model.commit import Folder
from cascade_model.manifest import ShardEntry
from cascade_model.schema import Geometry, shard_schema
from cascade_model.shards import entry_of, write_shard

GEOMETRY = Geometry(sequence_length=8, block_size=4, vocab_size=300, rates_per_row=2)
MASK_ID = 299
FIRST = 10
"""Sequence id of the first row."""
ROWS_PER_BATCH = 4


def rows(count: int = 6, geometry: Geometry = GEOMETRY, seed: int = 1) -> Rows:
    """Sequences of two documents each (one where there is one block), with random bitmaps."""
    rng = np.random.default_rng(seed)
    shape = (count, geometry.sequence_length)
    starts = np.array([0, geometry.block_size][: geometry.num_blocks], np.uint32)
    each = len(starts)
    is_maskable = rng.random(shape) < 0.8
    return Rows(
        tokens=rng.integers(0, 299, shape).astype(geometry.token_dtype),
        start_offsets=np.arange(0, each * count + 1, each, dtype=np.int32),
        document_starts=np.tile(starts, count),
        document_ids=np.arange(each * count, dtype=np.uint64),
        span_starts=np.zeros(each * count, np.uint32),
        span_stops=rng.integers(0, 40, each * count).astype(np.uint32),
        is_maskable=is_maskable,
        sequence_ids=np.arange(FIRST, FIRST + count, dtype=np.uint64),
        thresholds=rng.integers(0, 2**32, (count, geometry.rates_per_row)).astype(np.uint32),
        is_masked=is_maskable & (rng.random(shape) < 0.5),
    )


def write(
    folder: Folder, each: Rows, geometry: Geometry = GEOMETRY, *, schema=None, columns=None
) -> ShardEntry:
    """Commit a shard in record batches of four rows, with a record that is true for its bytes."""
    columns = columns or rows_columns(each)
    cuts = range(0, len(each), ROWS_PER_BATCH)
    batches = [[column[cut : cut + ROWS_PER_BATCH] for column in columns] for cut in cuts]
    facts = {"rows": len(each), "tokens": int(each.is_maskable.sum()), "first_sequence": FIRST}
    schema = schema or shard_schema(geometry)
    return entry_of(write_shard(folder, "a.arrow", schema, batches, facts))
