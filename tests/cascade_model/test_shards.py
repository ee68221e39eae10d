"""A record batch is read true, or refused by name before its bytes are used."""

import dataclasses
import hashlib
import json
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cascade_model.columns import rows_columns, rows_of
from cascade_model.commit import Folder
from cascade_model.errors import CorpusMismatch
from cascade_model.manifest import ShardEntry
from cascade_model.schema import shard_schema
from cascade_model.settings import digest
from cascade_model.shard_cache import CacheConfig, ShardCache
from cascade_model.shards import BatchFile, arrow_writer, read_arrow, write_shard
from tests.cascade_model.shard_making import FIRST, GEOMETRY, rows, write

SCHEMA = shard_schema(GEOMETRY)


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path / "corpus")


def with_list(folder: Folder, entry: ShardEntry, batches) -> ShardEntry:
    """Another list of record batches in the record, and an entry that vouches for it."""
    name = Path(folder.path(entry.name + ".record.json"))
    record = json.loads(name.read_text())
    record["facts"]["batches"] = batches
    name.write_text(json.dumps(record))
    return dataclasses.replace(entry, batches_sha256=digest(batches))


def listed(folder: Folder, entry: ShardEntry) -> list:
    record = folder.record(entry.name)
    assert record is not None
    return record.facts["batches"]


@pytest.mark.parametrize("kind", ["mapped", "cached", "store", "store without a cache"])
def test_each_record_batch_comes_back_alone(tmp_path, kind):
    folder = Folder("memory://shards/a" if "store" in kind else tmp_path / "corpus")
    cache = ShardCache(CacheConfig()) if kind in ("cached", "store") else None
    original = rows(10)
    file = BatchFile(folder, write(folder, original), SCHEMA, cache)
    assert len(file) == 3
    for index in (2, 0, 1, 1):
        found = rows_of(file.read(index), GEOMETRY)
        part = slice(4 * index, 4 * index + 4)
        assert np.array_equal(found.tokens, original.tokens[part])
        assert np.array_equal(found.is_masked, original.is_masked[part])


def test_the_list_says_where_each_record_batch_lies_and_its_hash(folder):
    entry = write(folder, rows(10))
    data = folder.read_bytes(entry.object)
    reader = read_arrow(folder, entry.object, entry.bytes, entry.sha256)
    assert reader.num_record_batches == 3
    for number, (offset, length, sha256) in enumerate(listed(folder, entry)):
        part = data[offset : offset + length]
        assert hashlib.sha256(part).hexdigest() == sha256
        found = pa.ipc.read_record_batch(pa.ipc.read_message(part), SCHEMA)
        assert found.equals(reader.get_batch(number))


def test_the_record_names_columns_rows_tokens_and_ids(folder):
    each = rows(6)
    write(folder, each)
    facts = json.loads(folder.read_bytes("a.arrow.record.json"))["facts"]
    assert facts["schema"][0] == "sequence_id: uint64"
    assert facts["first_sequence"] == FIRST
    assert facts["rows"] == 6
    assert facts["tokens"] == each.is_maskable.sum()


def test_a_shard_written_twice_has_the_same_record(tmp_path):
    one, two = Folder(tmp_path / "one"), Folder(tmp_path / "two")
    assert write(one, rows()) == write(two, rows())
    assert one.record("a.arrow") == two.record("a.arrow")
    assert write(one, rows()) == write(two, rows())


def test_a_shard_cut_in_the_middle_is_refused(folder):
    entry = write(folder, rows())
    path = Path(folder.path("a.arrow"))
    data = path.read_bytes()
    path.write_bytes(data[: entry.bytes // 2])
    with pytest.raises(CorpusMismatch, match=rf"a\.arrow has {entry.bytes // 2} bytes but its"):
        BatchFile(folder, entry, SCHEMA)
    with pytest.raises(CorpusMismatch, match=rf"a\.arrow has {entry.bytes // 2} bytes but its"):
        read_arrow(folder, entry.object, entry.bytes, entry.sha256)
    cached = BatchFile(folder, entry, SCHEMA, ShardCache(CacheConfig()))
    with pytest.raises(CorpusMismatch, match="was cut, damaged or exchanged"):
        cached.read(1)


def test_one_flipped_bit_is_refused_wherever_a_record_batch_has_it(folder):
    entry = write(folder, rows())
    path = Path(folder.path("a.arrow"))
    original = path.read_bytes()
    for index, (offset, length, _) in enumerate(listed(folder, entry)):
        for place in range(offset, offset + length, 41):
            flipped = bytearray(original)
            flipped[place] ^= 1
            path.write_bytes(flipped)
            file = BatchFile(folder, entry, SCHEMA)
            with pytest.raises(CorpusMismatch, match=rf"a\.arrow has sha256 .* at bytes {offset}"):
                file.read(index)
            file.read(1 - index)  # the other record batch is as it was
    with pytest.raises(CorpusMismatch, match=r"a\.arrow has sha256"):
        read_arrow(folder, entry.object, entry.bytes, entry.sha256)


def test_a_shard_or_a_record_that_is_missing_is_named(folder):
    entry = write(folder, rows())
    folder.remove("a.arrow")
    with pytest.raises(CorpusMismatch, match=r"a\.arrow cannot be read \(FileNotFoundError\)"):
        BatchFile(folder, entry, SCHEMA)
    folder.remove("a.arrow.record.json")
    with pytest.raises(CorpusMismatch, match=r"a\.arrow has a record that cannot be read"):
        BatchFile(folder, entry, SCHEMA)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"facts": {}}',
        '{"facts": {"batches": 3}}',
        "\x00",
        "[" * 10**5,
        '{"facts": {"batches": [[1e999, 8, "a"]]}}',
    ],
)
def test_a_broken_record_is_refused(folder, text):
    entry = write(folder, rows())
    Path(folder.path("a.arrow.record.json")).write_text(text)
    with pytest.raises(CorpusMismatch, match=r"a\.arrow has a (damaged record|record that is not)"):
        BatchFile(folder, entry, SCHEMA)


def test_a_record_of_other_bytes_is_not_the_manifests(folder):
    entry = write(folder, rows())
    folder.remove("a.arrow.record.json")
    other = write(folder, rows(seed=2))
    for cache in (None, ShardCache(CacheConfig())):
        with pytest.raises(CorpusMismatch, match="not the one the manifest vouches for"):
            BatchFile(folder, dataclasses.replace(entry, bytes=other.bytes), SCHEMA, cache)


@pytest.mark.parametrize(
    "change",
    [
        lambda listed, size: [[-8, *listed[0][1:]], listed[1]],
        lambda listed, size: [listed[0], [listed[1][0], size, listed[1][2]]],
        lambda listed, size: [listed[1], listed[0]],
        lambda listed, size: [[2**70, 8, "a"]],
        lambda listed, size: [[listed[0][0], -(2**40), "a"], listed[1]],
        lambda listed, size: [listed[0], listed[0]],
        lambda listed, size: [[0, *listed[0][1:]], listed[1]],
    ],
)
def test_a_list_that_points_outside_of_the_file_is_refused(folder, change):
    entry = write(folder, rows())
    entry = with_list(folder, entry, change(listed(folder, entry), entry.bytes))
    with pytest.raises(CorpusMismatch, match="outside of the file"):
        BatchFile(folder, entry, SCHEMA)


def test_ranges_that_hold_no_record_batch_are_refused(folder):
    entry = write(folder, rows(8))
    data = folder.read_bytes("a.arrow")
    (offset, length, _), (_, _, second) = listed(folder, entry)

    def item(start, size):
        return [start, size, hashlib.sha256(data[start : start + size]).hexdigest()]

    for bad in (item(offset, length - 64), item(offset + 8, length - 8), item(offset, 8)):
        rest = [offset + length, length, second]
        found = with_list(folder, entry, [bad, rest])
        with pytest.raises(CorpusMismatch, match=r"Arrow"):
            BatchFile(folder, found, SCHEMA).read(0)


def test_a_file_of_other_columns_or_of_none_is_refused(folder, tmp_path):
    each = rows()
    names = [*SCHEMA.names]
    names[-1], names[-3] = names[-3], names[-1]  # the two bitmaps, which have one type
    exchanged = pa.schema([SCHEMA.field(i).with_name(name) for i, name in enumerate(names)])
    entry = write(folder, each, schema=exchanged)
    with pytest.raises(CorpusMismatch, match=r"a\.arrow has other columns"):
        BatchFile(folder, entry, SCHEMA)
    path = Path(folder.path("a.arrow"))
    path.write_bytes(b"not arrow at all".ljust(entry.bytes, b"."))
    with pytest.raises(CorpusMismatch, match="cannot be read as an Arrow file"):
        BatchFile(folder, entry, SCHEMA)
    record = folder.commit("b.arrow", b"not arrow at all")
    with pytest.raises(CorpusMismatch, match="is no Arrow file"):
        read_arrow(folder, "b.arrow", record.bytes, record.sha256)


def test_bad_offsets_inside_a_valid_file_are_refused_before_use(folder):
    each = rows(4)
    columns = rows_columns(each)
    for wrong in ([0, 2, 10**6, 6, 8], [0, 2, -4, 6, 8], [0, 6, 4, 6, 8]):
        for index in (2, 3, 4, 5):
            offsets = pa.array(np.array(wrong, np.int32)).buffers()[1]
            kind, values = columns[index].type, columns[index].values
            damaged = [*columns]
            damaged[index] = pa.Array.from_buffers(kind, 4, [None, offsets], children=[values])
            folder.remove("a.arrow.record.json")
            entry = write(folder, each, columns=damaged)
            with pytest.raises(CorpusMismatch, match=r"a\.arrow holds arrays that Arrow refuses"):
                BatchFile(folder, entry, SCHEMA).read(0)


def test_empty_cells_are_refused(folder):
    each = rows(4)
    columns = rows_columns(each)
    valid = pa.py_buffer(b"\x0e")
    tokens = columns[1]
    columns[1] = pa.Array.from_buffers(tokens.type, 4, [valid], children=[tokens.values])
    entry = write(folder, each, columns=columns)
    with pytest.raises(CorpusMismatch, match="holds empty cells"):
        BatchFile(folder, entry, SCHEMA).read(0)


def test_a_damaged_copy_in_the_cache_is_fetched_again(folder, tmp_path):
    entry, original = write(folder, rows()), rows()
    kept = tmp_path / "cache"
    cache = ShardCache(CacheConfig(folder=str(kept)))
    BatchFile(folder, entry, SCHEMA, cache).read(0)
    copies = [path for path in kept.glob("??/*") if path.stat().st_size > 500]
    for path in copies:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    found = BatchFile(folder, entry, SCHEMA, cache).read(0)
    assert np.array_equal(rows_of(found, GEOMETRY).tokens, original.tokens[:4])
    folder.remove("a.arrow")
    # The mended copy serves now; only the header is read of the file itself.
    with pytest.raises(CorpusMismatch, match="cannot be read as an Arrow file"):
        BatchFile(folder, entry, SCHEMA, cache)


def test_a_shard_whose_batches_are_not_full_is_not_written(folder):
    columns = rows_columns(rows(6))
    uneven = [[c[:2] for c in columns], [c[2:] for c in columns]]
    with pytest.raises(ValueError, match="record batch"):
        write_shard(folder, "a.arrow", SCHEMA, uneven, {})


def test_a_file_of_a_store_is_read_batch_by_batch(monkeypatch):
    folder, schema = Folder(f"memory://{uuid.uuid4().hex}"), pa.schema([("x", pa.int64())])
    columns = [[pa.array(range(n, n + 1000))] for n in range(0, 9000, 1000)]
    record = folder.commit("a.arrow", arrow_writer(schema, columns))
    monkeypatch.delattr(Folder, "read_bytes")
    reader = read_arrow(folder, record.object, record.bytes, record.sha256)
    batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    assert [batch.column(0) for batch in batches] == [column for [column] in columns]
