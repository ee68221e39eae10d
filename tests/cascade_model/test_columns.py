"""Rows survive the trip through Arrow."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from cascade_model.columns import Packed, Rows, draw_columns, rows_columns, rows_of
from cascade_model.schema import Geometry, draw_schema, shard_schema

GEOMETRY = Geometry(sequence_length=12, block_size=4, vocab_size=300, rates_per_row=3)


def rows(count: int = 5) -> Rows:
    rng = np.random.default_rng(0)
    is_maskable = rng.random((count, 12)) < 0.8
    return Rows(
        tokens=rng.integers(0, 300, (count, 12)).astype(np.uint16),
        start_offsets=np.arange(0, 2 * count + 1, 2, dtype=np.int32),
        document_starts=np.tile(np.array([0, 8], np.uint32), count),
        document_ids=np.arange(2 * count, dtype=np.uint64),
        span_starts=np.tile(np.array([7, 0], np.uint32), count),
        span_stops=np.tile(np.array([19, 4], np.uint32), count),
        is_maskable=is_maskable,
        sequence_ids=np.arange(count, dtype=np.uint64),
        thresholds=rng.integers(0, 2**32, (count, 3)).astype(np.uint32),
        is_masked=is_maskable & (rng.random((count, 12)) < 0.5),
    )


def test_rows_come_back_from_arrow_as_they_were():
    original, schema = rows(), shard_schema(GEOMETRY)
    batch = pa.RecordBatch.from_arrays(rows_columns(original), schema=schema)
    batch.validate(full=True)
    for view in (batch, pa.concat_batches([batch, batch]).slice(5)):
        found = rows_of(view, GEOMETRY)
        for field in dataclasses.fields(Rows):
            assert np.array_equal(getattr(found, field.name), getattr(original, field.name))


def test_a_slice_keeps_each_rows_starts():
    part = rows().slice(2, 4)
    assert len(part) == 2
    assert part.start_offsets.tolist() == [0, 2, 4]
    assert part.document_ids.tolist() == [4, 5, 6, 7]
    assert isinstance(part, Packed)


@pytest.mark.parametrize("rates", [0, 1])
def test_rows_with_few_or_no_thresholds_come_back_too(rates):
    geometry = dataclasses.replace(GEOMETRY, rates_per_row=rates)
    original = dataclasses.replace(rows(), thresholds=rows().thresholds[:, :rates])
    schema = shard_schema(geometry)
    assert ("thresholds" in schema.names) == bool(rates)
    batch = pa.RecordBatch.from_arrays(rows_columns(original), schema=schema)
    assert np.array_equal(rows_of(batch, geometry).thresholds, original.thresholds)


def test_a_further_draw_has_the_ids_and_bitmaps_of_its_shard():
    original = rows()
    columns = draw_columns(original.sequence_ids, original.is_masked)
    batch = pa.RecordBatch.from_arrays(columns, schema=draw_schema(GEOMETRY))
    shard = pa.RecordBatch.from_arrays(rows_columns(original), schema=shard_schema(GEOMETRY))
    assert batch.column("is_masked").equals(shard.column("is_masked"))
    assert batch.column("sequence_id").equals(shard.column("sequence_id"))
