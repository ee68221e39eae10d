"""The tables of documents are read whole and true, or refused by name."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from cascade_model.commit import Folder
from cascade_model.corpus import read_manifest
from cascade_model.errors import CorpusMismatch
from cascade_model.provenance import DocumentTables
from cascade_model.schema import documents_name, documents_schema
from cascade_model.shards import arrow_writer
from tests.cascade_model.corpus_making import make_corpus

TEXTS = {"a": ["one", "two", "three é"], "b": ["four"]}
SECOND = 1 << 32
"""Id of the second part's first document."""


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(make_corpus(tmp_path, TEXTS))


def tables(folder: Folder) -> DocumentTables:
    return DocumentTables(folder, read_manifest(folder))


def with_table(folder: Folder, columns: dict[str, list], schema=None) -> DocumentTables:
    """Tables of which part 0's is another one that the manifest vouches for."""
    schema = schema or documents_schema()
    name = documents_name(0)
    folder.remove(name + ".record.json")
    values = [pa.array(columns[field.name], field.type) for field in schema]
    record = folder.commit(name, arrow_writer(schema, [values]))
    manifest = read_manifest(folder)
    mine, *rest = manifest.documents
    mine = dataclasses.replace(mine, bytes=record.bytes, sha256=record.sha256)
    return DocumentTables(folder, dataclasses.replace(manifest, documents=(mine, *rest)))


def rows(ids: list[int]) -> dict[str, list]:
    count = len(ids)
    words, numbers = ["x"] * count, [1] * count
    return {
        "document_id": ids, "path": words, "where": words, "bytes": numbers, "tokens": numbers,
        "split": [0] * count,
    }  # fmt: skip


def test_places_and_sizes_come_in_the_order_asked_for(folder):
    ids = np.array([SECOND, 2, 0, 2], dtype=np.uint64)
    places = [("part-1.jsonl", "line 1"), *[("part-0.jsonl", f"line {i}") for i in (3, 1, 3)]]
    assert tables(folder).places(ids) == places
    sizes, splits = tables(folder).sizes(ids)
    assert sizes.tolist() == [4, 8, 3, 8]
    assert splits.tolist() == [0] * 4
    assert tables(folder).places(np.empty(0, np.uint64)) == []


@pytest.mark.parametrize("wrong", [3, SECOND - 1, SECOND + 1])
def test_a_document_that_is_not_listed_is_refused(folder, wrong):
    with pytest.raises(CorpusMismatch, match=r"documents-0000\d\.arrow does not list"):
        tables(folder).places(np.array([0, wrong], dtype=np.uint64))


def test_a_part_without_a_table_is_refused(folder):
    with pytest.raises(CorpusMismatch, match=r"documents-00009\.arrow is not in the manifest"):
        tables(folder).places(np.array([9 << 32], dtype=np.uint64))


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        ([0, 1], "other documents than its name says"),
        ([0, 2, 1], "other documents than its name says"),
        ([0, 1, 1], "other documents than its name says"),
        ([0, 1, SECOND], "other documents than its name says"),
    ],
)
def test_a_table_of_other_documents_is_refused(folder, ids, sentence):
    with pytest.raises(CorpusMismatch, match=sentence):
        with_table(folder, rows(ids)).places(np.array([0], dtype=np.uint64))


def test_a_table_of_other_columns_is_refused(folder):
    schema = documents_schema().remove(5)
    with pytest.raises(CorpusMismatch, match="other columns than a table of documents"):
        with_table(folder, rows([0, 1, 2]), schema).places(np.array([0], dtype=np.uint64))


def test_string_offsets_astray_are_refused_before_use(folder):
    schema, values = documents_schema(), rows([0, 1, 2])
    columns = [pa.array(values[field.name], field.type) for field in schema]
    offsets = pa.py_buffer(np.array([0, 10**9, -5, 3], np.int32).tobytes())
    columns[1] = pa.Array.from_buffers(pa.string(), 3, [None, offsets, columns[1].buffers()[2]])
    name = documents_name(0)
    folder.remove(name + ".record.json")
    record = folder.commit(name, arrow_writer(schema, [columns]))
    manifest = read_manifest(folder)
    mine, *rest = manifest.documents
    mine = dataclasses.replace(mine, bytes=record.bytes, sha256=record.sha256)
    changed = dataclasses.replace(manifest, documents=(mine, *rest))
    with pytest.raises(CorpusMismatch, match="holds arrays that Arrow refuses"):
        DocumentTables(folder, changed).places(np.array([1], dtype=np.uint64))


def test_a_cut_table_is_refused(folder):
    path = folder.path(documents_name(0))
    with open(path, "r+b") as file:
        file.truncate(100)
    with pytest.raises(CorpusMismatch, match=r"documents-00000\.arrow has 100 bytes"):
        tables(folder).places(np.array([0], dtype=np.uint64))
