"""The data contract survives the trip through Arrow and JSON."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest

from cascade_model.config import NoiseConfig
from cascade_model.errors import CorpusMismatch
from cascade_model.schema import (
    DocumentsEntry,
    Geometry,
    Manifest,
    Packed,
    Rows,
    ShardEntry,
    SourceEntry,
    SplitEntry,
    batch_rows,
    documents_schema,
    draw_columns,
    draw_schema,
    rates_per_row,
    rows_columns,
    rows_of,
    shard_schema,
)

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


def manifest() -> Manifest:
    shard = ShardEntry(
        name="a", object="a", rows=1, tokens=9, bytes=3, sha256="00", batches_sha256="11",
        first_sequence=0,
    )  # fmt: skip
    source = SourceEntry(name="s", first_sequence=0, num_sequences=1, num_tokens=9, share=1024)
    table = DocumentsEntry(name="d", object="d", bytes=2, sha256="22", rows=1)
    split = SplitEntry(
        num_sequences=1,
        num_tokens=9,
        num_bytes=20,
        num_documents=1,
        shards=(shard,),
        sources=(source,),
    )
    return Manifest(
        sequence_length=12,
        block_size=4,
        vocab_size=300,
        mask_id=2,
        pad_id=1,
        eos_id=0,
        tokenizer_sha256="ab",
        noise=NoiseConfig(block_size=4),
        prepare={"part_bytes": 1},
        sources=({"path": "é", "bytes": 1, "sha256": "cd"},),
        counts={"documents": 1},
        splits={"train": split},
        documents=(table,),
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


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_tokens_take_two_bytes_where_the_vocabulary_fits(vocab_size, dtype):
    geometry = Geometry(sequence_length=8, block_size=4, vocab_size=vocab_size)
    assert geometry.token_dtype == np.dtype(dtype)


def test_the_manifest_comes_back_from_json_with_its_digest():
    found = Manifest.from_json(manifest().to_json(), "here")
    assert found == manifest()
    assert json.loads(manifest().to_json())["digest"] == found.digest


def test_the_digest_does_not_depend_on_an_attempts_own_object_names():
    data = manifest().to_json()
    other = Manifest.from_json(data.replace(b'"object": "a"', b'"object": "a~1"'), "here")
    assert other != manifest()
    assert other.digest == manifest().digest
    other = Manifest.from_json(data.replace(b'"object": "d"', b'"object": "d~1"'), "here")
    assert other != manifest()
    assert other.digest == manifest().digest


def test_an_edited_manifest_is_refused():
    with pytest.raises(CorpusMismatch, match="edited or damaged"):
        Manifest.from_json(manifest().to_json().replace(b'"mask_id": 2', b'"mask_id": 3'), "here")


def test_a_manifest_of_another_format_names_both_versions():
    data = manifest().to_json().replace(b'"format_version": 2', b'"format_version": 1')
    with pytest.raises(CorpusMismatch, match="version 1 but this program reads 2"):
        Manifest.from_json(data, "here")


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"digest": 1, "format_version": 2}', b"\xff"]
)
def test_a_broken_manifest_is_one_sentence(data):
    with pytest.raises(CorpusMismatch, match="damaged"):
        Manifest.from_json(data, "here")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"per": "sequence", "block_size": 4}, 1),
        ({"per": "sequence", "block_size": 64}, 1),
        ({"per": "block", "block_size": 16}, 0),
        ({"per": "block", "block_size": 32}, 8),
        ({"per": "block", "block_size": 256}, 1),
    ],
)
def test_thresholds_are_stored_where_they_take_no_more_room_than_the_bitmap(settings, expected):
    noise = NoiseConfig(**settings)
    assert rates_per_row(noise, 256) == expected
    if noise.per == "block":
        assert (4 * 256 // noise.block_size <= 256 // 8) == (expected > 0)


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


def test_the_documents_table_has_no_empty_cells():
    assert not any(field.nullable for field in documents_schema())


def test_record_batches_are_bounded_in_tokens():
    assert batch_rows(Geometry(sequence_length=4096, block_size=8, vocab_size=300)) == 16
    assert batch_rows(Geometry(sequence_length=2**20, block_size=8, vocab_size=300)) == 1
