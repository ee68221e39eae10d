"""What a record batch must mean, beyond what Arrow checks."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from cascade_model.columns import rows_columns
from cascade_model.schema import Geometry, shard_schema
from cascade_model.stored import fault_of, stored_of
from tests.cascade_model.shard_making import FIRST, GEOMETRY, MASK_ID, rows


def batch_of(each, geometry=GEOMETRY) -> pa.RecordBatch:
    batch = pa.RecordBatch.from_arrays(rows_columns(each), schema=shard_schema(geometry))
    batch.validate(full=True)
    return batch


def fault(each, first=FIRST, count=6, geometry=GEOMETRY):
    return fault_of(batch_of(each, geometry), geometry, MASK_ID, first, count)


def test_the_arrays_are_views_of_the_record_batch():
    each = rows()
    found = stored_of(batch_of(each), GEOMETRY)
    assert len(found) == 6
    assert not found.tokens.flags.owndata
    assert not found.is_masked.flags.owndata
    for name in ("tokens", "thresholds", "document_starts", "document_ids", "span_stops"):
        assert np.array_equal(getattr(found, name), getattr(each, name))
    bits = np.unpackbits(found.is_masked, axis=1, bitorder="little")
    assert np.array_equal(bits, each.is_masked)


@pytest.mark.parametrize("length", [8, 12, 4])
def test_a_sound_record_batch_has_no_fault(length):
    geometry = Geometry(sequence_length=length, block_size=4, vocab_size=300)
    assert fault(rows(geometry=geometry), geometry=geometry) is None
    assert fault(rows(0, geometry=geometry), count=0, geometry=geometry) is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokens": np.full((6, 8), 300, np.uint16)}, "outside the vocabulary of 300"),
        ({"tokens": np.full((6, 8), MASK_ID, np.uint16)}, "the mask token 299 as text"),
        ({"sequence_ids": np.arange(6, dtype=np.uint64)}, "other sequence ids"),
        ({"sequence_ids": np.array([10, 11, 13, 12, 14, 15], np.uint64)}, "other sequence ids"),
        ({"is_maskable": np.zeros((6, 8), bool)}, "masks places that must stay"),
        ({"document_starts": np.tile(np.array([0, 3], np.uint32), 6)}, "off the block grid"),
        ({"document_starts": np.tile(np.array([4, 0], np.uint32), 6)}, "off the block grid"),
        ({"document_starts": np.tile(np.array([0, 8], np.uint32), 6)}, "off the block grid"),
        ({"document_starts": np.tile(np.array([0, 0], np.uint32), 6)}, "off the block grid"),
        ({"start_offsets": np.array([0, 2, 2, 6, 8, 10, 12], np.int32)}, "off the block grid"),
        ({"span_starts": np.full(12, 50, np.uint32)}, "end before they begin"),
    ],
)
def test_every_fault_has_its_sentence(change, sentence):
    assert sentence in str(fault(dataclasses.replace(rows(), **change)))


def test_other_rows_than_the_manifests_are_a_fault():
    assert "holds 6 rows where the manifest has 7" in str(fault(rows(), count=7))
    assert "other sequence ids" in str(fault(rows(), first=FIRST + 1))


@pytest.mark.parametrize("index", [3, 4, 5])
def test_columns_that_do_not_go_together_are_a_fault(index):
    columns = rows_columns(rows())
    offsets = pa.array(np.array([0, 1, 4, 6, 8, 10, 12], np.int32))
    kind = columns[index].type
    columns[index] = pa.ListArray.from_arrays(offsets, columns[index].values, type=kind)
    batch = pa.RecordBatch.from_arrays(columns, schema=shard_schema(GEOMETRY))
    batch.validate(full=True)
    assert "do not go together" in str(fault_of(batch, GEOMETRY, MASK_ID, FIRST, 6))
