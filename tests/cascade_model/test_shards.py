"""A shard is read whole and true, or refused by name."""

import dataclasses
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from cascade_model.commit import Folder
from cascade_model.errors import CorpusMismatch
from cascade_model.schema import Geometry, Rows, ShardEntry, rows_columns, rows_of, shard_schema
from cascade_model.shards import Shard, arrow_writer, batch_rows, read_arrow

GEOMETRY = Geometry(sequence_length=8, block_size=4, vocab_size=300)


def rows(count=6, first=10) -> Rows:
    rng = np.random.default_rng(1)
    is_maskable = np.ones((count, 8), dtype=bool)
    return Rows(
        tokens=rng.integers(0, 300, (count, 8)).astype(np.uint16),
        start_offsets=np.arange(0, 2 * count + 1, 2, dtype=np.int32),
        document_starts=np.tile(np.array([0, 4], np.uint32), count),
        document_ids=np.arange(2 * count, dtype=np.uint64),
        is_maskable=is_maskable,
        sequence_ids=np.arange(first, first + count, dtype=np.uint64),
        thresholds=rng.integers(0, 2**32, (count, 2)).astype(np.uint32),
        is_masked=rng.random((count, 8)) < 0.5,
    )


def write(folder: Folder, each: Rows, split_at=4, schema=None) -> ShardEntry:
    """Commit a shard of two record batches, with a record that is true for its bytes."""
    columns = rows_columns(each)
    cuts = [[c[:split_at] for c in columns], [c[split_at:] for c in columns]]
    record = folder.commit("a.arrow", arrow_writer(schema or shard_schema(GEOMETRY), cuts))
    return ShardEntry(
        name="a.arrow",
        object=record.object,
        rows=len(each),
        tokens=1,
        bytes=record.bytes,
        sha256=record.sha256,
        first_sequence=10,
    )


def gathered(shard: Shard, places):
    count = len(places)
    into = {
        "tokens": np.zeros((count, 8), np.int64),
        "is_maskable": np.zeros((count, 8), bool),
        "thresholds": np.zeros((count, 2), np.uint32),
        "is_masked": np.zeros((count, 8), bool),
        "is_start": np.zeros((count, 8), bool),
    }
    shard.gather(np.array(places), into, np.arange(count))
    return into


@pytest.mark.parametrize("url", ["local", "memory://shards/a"])
def test_rows_are_gathered_across_record_batches(tmp_path, url):
    folder, original = Folder(tmp_path if url == "local" else url), rows()
    into = gathered(Shard(folder, write(folder, original), GEOMETRY), [0, 3, 4, 4, 5])
    assert np.array_equal(into["tokens"], original.tokens[[0, 3, 4, 4, 5]])
    assert np.array_equal(into["is_masked"], original.is_masked[[0, 3, 4, 4, 5]])
    assert into["is_start"].sum(axis=0).tolist() == [5, 0, 0, 0, 5, 0, 0, 0]


def test_a_shard_cut_in_the_middle_is_refused(tmp_path):
    folder = Folder(tmp_path)
    entry = write(folder, rows())
    path = tmp_path / "a.arrow"
    path.write_bytes(path.read_bytes()[: entry.bytes // 2])
    with pytest.raises(CorpusMismatch, match=rf"a\.arrow has {entry.bytes // 2} bytes but its"):
        Shard(folder, entry, GEOMETRY)


def test_a_shard_with_one_flipped_bit_is_refused_wherever_the_bit_is(tmp_path):
    folder = Folder(tmp_path)
    entry = write(folder, rows())
    path = tmp_path / "a.arrow"
    original = path.read_bytes()
    for place in range(0, len(original), 97):
        path.write_bytes(original[:place] + bytes([original[place] ^ 1]) + original[place + 1 :])
        with pytest.raises(CorpusMismatch, match=r"a\.arrow has sha256"):
            Shard(folder, entry, GEOMETRY)


def test_a_missing_shard_is_named(tmp_path):
    folder = Folder(tmp_path)
    entry = write(folder, rows())
    (tmp_path / "a.arrow").unlink()
    with pytest.raises(CorpusMismatch, match=r"a\.arrow cannot be read"):
        Shard(folder, entry, GEOMETRY)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokens": np.full((6, 8), 300, np.uint16)}, "outside the vocabulary of 300"),
        ({"sequence_ids": np.arange(6, dtype=np.uint64)}, "other sequence ids"),
        ({"is_maskable": np.zeros((6, 8), bool)}, "masks places that must stay"),
        ({"document_starts": np.tile(np.array([0, 3], np.uint32), 6)}, "off the block grid"),
        ({"document_starts": np.tile(np.array([4, 0], np.uint32), 6)}, "off the block grid"),
        ({"document_starts": np.tile(np.array([0, 8], np.uint32), 6)}, "off the block grid"),
    ],
)
def test_a_shard_that_is_wrong_only_in_meaning_is_refused(tmp_path, change, sentence):
    folder = Folder(tmp_path)
    entry = write(folder, dataclasses.replace(rows(), **change))
    with pytest.raises(CorpusMismatch, match=sentence):
        Shard(folder, entry, GEOMETRY)


def test_a_shard_of_another_geometry_or_row_count_is_refused(tmp_path):
    folder = Folder(tmp_path)
    entry = write(folder, rows())
    with pytest.raises(CorpusMismatch, match="other columns"):
        Shard(folder, entry, dataclasses.replace(GEOMETRY, block_size=8))
    with pytest.raises(CorpusMismatch, match="has 6 rows, the manifest 7"):
        Shard(folder, dataclasses.replace(entry, rows=7), GEOMETRY)


def test_a_file_that_is_no_arrow_file_is_refused(tmp_path):
    folder = Folder(tmp_path)
    record = folder.commit("a.arrow", b"not arrow at all")
    entry = dataclasses.replace(
        write(Folder(tmp_path / "other"), rows()), bytes=record.bytes, sha256=record.sha256
    )
    with pytest.raises(CorpusMismatch, match="is no Arrow file"):
        Shard(folder, entry, GEOMETRY)


def test_bad_offsets_inside_a_valid_file_are_refused_before_use(tmp_path):
    each, schema = rows(), shard_schema(GEOMETRY)
    columns = rows_columns(each)
    offsets = pa.array(np.array([0, 2, 10**6, 6, 8, 10, 12], np.int32)).buffers()[1]
    starts = columns[2]
    columns[2] = pa.Array.from_buffers(starts.type, 6, [None, offsets], children=[starts.values])
    folder = Folder(tmp_path)
    record = folder.commit("a.arrow", arrow_writer(schema, [columns]))
    entry = ShardEntry(
        name="a.arrow",
        object="a.arrow",
        rows=6,
        tokens=1,
        bytes=record.bytes,
        sha256=record.sha256,
        first_sequence=10,
    )
    with pytest.raises(CorpusMismatch, match=r"a\.arrow holds arrays"):
        Shard(folder, entry, GEOMETRY)


def test_record_batches_are_bounded_in_tokens():
    assert batch_rows(Geometry(sequence_length=4096, block_size=8, vocab_size=300)) == 64
    assert batch_rows(Geometry(sequence_length=2**20, block_size=8, vocab_size=300)) == 1


def wide_rows(geometry: Geometry, count: int) -> Rows:
    """Sequences of one document each, with random bitmaps."""
    rng = np.random.default_rng(2)
    shape = (count, geometry.sequence_length)
    is_maskable = rng.random(shape) < 0.8
    return Rows(
        tokens=rng.integers(0, 300, shape).astype(np.uint16),
        start_offsets=np.arange(count + 1, dtype=np.int32),
        document_starts=np.zeros(count, np.uint32),
        document_ids=np.arange(count, dtype=np.uint64),
        is_maskable=is_maskable,
        sequence_ids=np.arange(10, 10 + count, dtype=np.uint64),
        thresholds=rng.integers(0, 2**32, (count, geometry.num_blocks)).astype(np.uint32),
        is_masked=is_maskable & (rng.random(shape) < 0.5),
    )


def write_wide(folder: Folder, each: Rows, geometry: Geometry) -> ShardEntry:
    columns = rows_columns(each)
    record = folder.commit("a.arrow", arrow_writer(shard_schema(geometry), [columns]))
    return ShardEntry(
        name="a.arrow",
        object=record.object,
        rows=len(each),
        tokens=1,
        bytes=record.bytes,
        sha256=record.sha256,
        first_sequence=10,
    )


def test_bitmaps_come_out_right_where_the_length_is_no_multiple_of_eight(tmp_path):
    geometry = Geometry(sequence_length=12, block_size=4, vocab_size=300)
    folder, original = Folder(tmp_path), wide_rows(geometry, 9)
    shard = Shard(folder, write_wide(folder, original, geometry), geometry)
    places = [0, 2, 2, 8]
    into = {
        "tokens": np.zeros((4, 12), np.int64),
        "is_maskable": np.zeros((4, 12), bool),
        "thresholds": np.zeros((4, 3), np.uint32),
        "is_masked": np.zeros((4, 12), bool),
        "is_start": np.zeros((4, 12), bool),
    }
    shard.gather(np.array(places), into, np.array([3, 0, 1, 2]))
    for name in ("tokens", "is_maskable", "thresholds", "is_masked"):
        assert np.array_equal(into[name][[3, 0, 1, 2]], getattr(original, name)[places])


def kept_bytes(make) -> int:
    """Bytes that a result holds on to."""
    tracemalloc.start()
    try:
        kept = make()
        size = tracemalloc.get_traced_memory()[0]
        del kept
        return size
    finally:
        tracemalloc.stop()


def test_an_open_shard_keeps_no_copy_of_its_tokens_or_bitmaps(tmp_path):
    geometry = Geometry(sequence_length=256, block_size=8, vocab_size=300)
    folder, original = Folder(tmp_path), wide_rows(geometry, 1000)
    entry = write_wide(folder, original, geometry)
    tokens = original.tokens.size
    assert kept_bytes(lambda: Shard(folder, entry, geometry)) < 0.1 * tokens

    def unpacked_rows():
        reader = read_arrow(folder, entry.object, entry.bytes, entry.sha256)
        return rows_of(reader.get_batch(0), geometry)

    # The control: a byte for each bit of two bitmaps is what keeping them unpacked costs.
    assert kept_bytes(unpacked_rows) > 2 * tokens
