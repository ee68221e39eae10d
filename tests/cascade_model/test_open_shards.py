"""Rows are found whatever is open, and never more is open than may be."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from cascade_model import open_shards
from cascade_model.columns import rows_columns
from cascade_model.commit import Folder
from cascade_model.errors import CorpusMismatch
from cascade_model.open_shards import OpenShards
from cascade_model.schema import shard_schema
from cascade_model.shard_cache import CacheConfig, ShardCache
from cascade_model.shards import BatchFile, entry_of, write_shard
from cascade_model.stored import fault_of, stored_of
from tests.cascade_model.shard_making import GEOMETRY, MASK_ID, ROWS_PER_BATCH, rows

SIZES = (6, 1, 9, 4)


@pytest.fixture(params=["mapped", "store"])
def made(request, tmp_path):
    """Four small shards: the tokens of all rows, and a way to open them."""
    folder = Folder(tmp_path / "corpus" if request.param == "mapped" else "memory://open_shards")
    entries, tokens, first = [], [], 0
    for number, size in enumerate(SIZES):
        each = rows(size, seed=number)
        each = dataclasses.replace(
            each, sequence_ids=np.arange(first, first + size, dtype=np.uint64)
        )
        columns = rows_columns(each)
        cuts = range(0, size, ROWS_PER_BATCH)
        batches = [[column[cut : cut + ROWS_PER_BATCH] for column in columns] for cut in cuts]
        facts = {"rows": size, "tokens": 1, "first_sequence": first}
        schema = shard_schema(GEOMETRY)
        entries.append(entry_of(write_shard(folder, f"{number}.arrow", schema, batches, facts)))
        tokens.append(each.tokens)
        first += size

    def make(batch, first, count, is_checked):
        fault = None if is_checked else fault_of(batch, GEOMETRY, MASK_ID, first, count)
        return fault or stored_of(batch, GEOMETRY)

    def opened(entries=entries):
        cache = None if folder.is_local else ShardCache(CacheConfig())
        return OpenShards(folder, entries, schema, ROWS_PER_BATCH, make, cache)

    yield np.concatenate(tokens), opened, entries, folder
    for name in folder.list():
        folder.remove(name)


def tokens_of(shards: OpenShards, ids) -> np.ndarray:
    found = np.zeros((len(ids), 8), np.uint16)

    def take(part, rows, at) -> None:
        found[at] = part.tokens[rows]

    shards.visit(np.array(ids, dtype=np.uint64), take)
    return found


def test_rows_come_in_the_order_asked_for_with_repeats(made):
    tokens, opened, *_ = made
    for ids in ([], [0], [19, 0, 6, 6, 7, 3], list(range(20)), list(range(19, -1, -1)) * 2):
        assert np.array_equal(tokens_of(opened(), ids), tokens[np.array(ids, dtype=int)])


def test_at_most_so_much_is_at_hand(made, monkeypatch):
    tokens, opened, *_ = made
    for name in ("MAPPED", "FETCHED"):
        monkeypatch.setattr(open_shards, name, (2, 3))
    shards, order = opened(), np.random.default_rng(0).integers(0, 20, 200)
    for ids in (order[:50], order[50:], order):
        assert np.array_equal(tokens_of(shards, ids), tokens[ids])
        assert len(shards._files) <= 2
        assert len(shards._parts) <= 3
        open_files = {key >> 32 for key in shards._parts}
        assert not shards._folder.is_local or open_files <= set(shards._files)


def count_hashes(monkeypatch) -> list:
    seen, read = [], BatchFile.read

    def counted(self, index, *, is_checked=False):
        seen.append(is_checked)
        return read(self, index, is_checked=is_checked)

    monkeypatch.setattr(BatchFile, "read", counted)
    return seen


def test_a_mapped_record_batch_is_checked_once_however_often_its_file_is_opened(made, monkeypatch):
    _, opened, *_ = made
    for name in ("MAPPED", "FETCHED"):
        monkeypatch.setattr(open_shards, name, (1, 2))
    seen, shards = count_hashes(monkeypatch), opened()
    for _ in range(3):
        tokens_of(shards, range(20))
    batches = sum(-(-size // ROWS_PER_BATCH) for size in SIZES)
    assert len(seen) > 2 * batches
    assert seen.count(False) == batches


def test_a_file_that_changed_while_it_was_closed_is_checked_again(made, monkeypatch):
    _, opened, _, folder = made
    if not folder.is_local:
        pytest.skip("bytes of a store are hashed at each fetch")
    monkeypatch.setattr(open_shards, "MAPPED", (1, 1))
    shards = opened()
    tokens_of(shards, range(20))
    path = Path(folder.path("0.arrow"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    with pytest.raises(CorpusMismatch, match=r"0\.arrow has sha256"):
        tokens_of(shards, range(6))


def test_another_number_of_record_batches_than_the_manifests_rows_is_refused(made):
    _, opened, entries, _ = made
    wrong = [dataclasses.replace(entries[0], rows=9), *entries[1:]]
    with pytest.raises(CorpusMismatch, match=r"0\.arrow.* has 2 record batches, too many or few"):
        tokens_of(opened(wrong), [0])


def test_a_fault_of_meaning_names_the_file(made):
    _, opened, entries, _ = made
    wrong = [dataclasses.replace(entries[0], rows=5), *entries[1:]]
    shards = opened(wrong)
    with pytest.raises(CorpusMismatch, match=r"0\.arrow.* holds 2 rows where the manifest has 1"):
        tokens_of(shards, [4])
