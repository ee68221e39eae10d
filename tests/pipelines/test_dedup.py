"""Of equal documents the first stays, wherever they lie and however the hashes are cut."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_model.commit import Folder
from cascade_model.errors import Unfinished
from pipelines import dedup
from pipelines.dedup import (
    Hashes,
    content_hash,
    dropped_rows,
    drops_name,
    hashes_name,
    merge_range,
    num_ranges,
    range_edges,
)


def found(folder, parts, ranges):
    """Rows dropped of each part, by the two rounds."""
    work = Folder(folder)
    for part, texts in enumerate(parts):
        hashes = Hashes()
        for row, text in enumerate(texts):
            hashes.add(row, text)
        hashes.commit(work, part, ranges)
    for number in range(ranges):
        merge_range(work, number, ranges, len(parts))
    return [dropped_rows(work, part, ranges, len(parts)) for part in range(len(parts))]


def by_hand(parts):
    seen, dropped = set(), []
    for texts in parts:
        dropped.append(frozenset(row for row, text in enumerate(texts) if text in seen
                                 or seen.add(text)))  # fmt: skip
    return dropped


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([f"text {i}" for i in range(12)]), max_size=8), min_size=1,
             max_size=5),
    st.integers(1, 6),
)  # fmt: skip
def test_the_first_of_equal_documents_stays_for_any_number_of_ranges(
    tmp_path_factory, parts, ranges
):
    assert found(tmp_path_factory.mktemp("work"), parts, ranges) == by_hand(parts)


def test_the_order_in_which_tasks_run_changes_no_byte(tmp_path):
    parts = [[f"text {i * j % 11}" for i in range(9)] for j in range(1, 5)]
    expected = found(tmp_path / "a", parts, 3)
    work = Folder(tmp_path / "b")
    for part in (2, 0, 3, 1):
        hashes = Hashes()
        for row, text in enumerate(parts[part]):
            hashes.add(row, text)
        hashes.commit(work, part, 3)
    for number in (1, 2, 0):
        merge_range(work, number, 3, 4)
    assert [dropped_rows(work, part, 3, 4) for part in range(4)] == expected
    for name in [*map(hashes_name, range(4)), *map(drops_name, range(3))]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_range_that_is_merged_is_not_merged_again(tmp_path, monkeypatch):
    found(tmp_path, [["a", "a"]], 1)
    monkeypatch.setattr(dedup, "_slice", None)
    assert merge_range(Folder(tmp_path), 0, 1, 1).facts == {"documents": 1}


def test_without_deduplication_nothing_is_dropped(tmp_path):
    assert dropped_rows(Folder(tmp_path), 0, 0, 1) == frozenset()


def test_a_file_that_is_gone_stops_the_job_which_can_go_on(tmp_path):
    with pytest.raises(Unfinished, match=r"hashes-00000\.bin is gone"):
        merge_range(Folder(tmp_path), 0, 1, 1)


def test_rows_are_kept_that_were_not_hashed(tmp_path):
    work, hashes = Folder(tmp_path), Hashes()
    for row, text in ((1, "a"), (4, "b"), (7, "a")):
        hashes.add(row, text)
    hashes.commit(work, 0, 1)
    merge_range(work, 0, 1, 1)
    assert dropped_rows(work, 0, 1, 1) == {7}


def test_a_conversation_is_its_turns_however_their_keys_are_ordered():
    turn, same = {"role": "user", "content": "é"}, {"content": "é", "role": "user"}
    assert content_hash([turn]) == content_hash([same])
    assert content_hash([turn]) != content_hash([turn, turn])
    assert content_hash("a") != content_hash("b")
    assert len(content_hash("a")) == 16


def test_ranges_cut_all_hashes_evenly_and_grow_with_the_corpus_alone():
    edges = range_edges(3)
    assert edges.dtype == np.uint64
    assert edges[0] == 0
    assert np.diff(np.append(edges, [2**64 - 1]).astype(float)).std() < 1e4
    assert [num_ranges(size) for size in (0, 1, 1 << 30, (1 << 30) + 1)] == [1, 1, 1, 2]
