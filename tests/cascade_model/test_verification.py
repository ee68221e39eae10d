"""What only a look at everything can find, on corpora whose hashes all agree."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cascade_model.commit import RECORD_SUFFIX, Folder
from cascade_model.config import NoiseConfig
from cascade_model.corpus import Corpus, read_manifest
from cascade_model.manifest import MANIFEST
from cascade_model.provenance import DocumentTables
from cascade_model.schema import documents_schema
from cascade_model.shards import arrow_writer
from cascade_model.verification import Verifier, draws_of
from tests.cascade_model.corpus_making import make_corpus
from tests.cascade_model.damage import Target

TEXTS = {"a": [f"text {i} " * (3 + i % 20) for i in range(60)], "b": ["other words "] * 20}


def verifier(url) -> Verifier:
    folder = Folder(url)
    return Verifier(folder, read_manifest(folder))


def target(folder: Path, index: int = 0, seed: int = 0) -> Target:
    return Target(folder, index, np.random.default_rng(seed), folder, folder)


def faults(folder: Path, index: int = 0) -> list[str]:
    found = verifier(folder)
    return found.corpus() + found.shard("train", index)


@pytest.mark.parametrize("block_size", [4, 32])
@pytest.mark.parametrize("per", ["block", "sequence"])
def test_a_sound_corpus_has_no_faults(tmp_path, per, block_size):
    noise = NoiseConfig(block_size=block_size, per=per)
    url = make_corpus(tmp_path, TEXTS, noise=noise, parts=2, weights=[5, 1])
    found = verifier(url)
    assert found.corpus() == []
    assert [found.shard("train", index) for index in range(4)] == [[]] * 4


def test_one_wrong_mask_bit_in_the_middle_is_found_where_a_reader_may_not(tmp_path):
    make_corpus(tmp_path, TEXTS)
    each = target(tmp_path).rows()
    masked = each.is_masked.copy()
    place = len(each) // 2, int(np.flatnonzero(each.is_maskable[len(each) // 2])[0])
    masked[place] ^= True
    target(tmp_path).change(is_masked=masked)
    corpus = Corpus.open(str(tmp_path))
    corpus.rows(np.arange(corpus.num_sequences))
    assert faults(tmp_path) == [
        f"{tmp_path}/shard-train-00000.arrow has another mask than its recipe"
    ]


@pytest.mark.parametrize("per", ["block", "sequence"])
def test_one_wrong_threshold_is_found(tmp_path, per):
    make_corpus(tmp_path, TEXTS, noise=NoiseConfig(block_size=32, per=per))
    rates = target(tmp_path).rows().thresholds.copy()
    rates[len(rates) // 2, 0] ^= 1
    target(tmp_path).change(thresholds=rates)
    assert any("has other thresholds than its recipe" in fault for fault in faults(tmp_path))


def shifted(spans: np.ndarray, at: int, by: int) -> np.ndarray:
    changed = spans.astype(np.int64)
    changed[at] += by
    return changed.astype(np.uint32)


@pytest.mark.parametrize(
    ("name", "by", "sentence"),
    [
        ("span_starts", 1, "leave a gap in a document or hold a byte twice"),
        ("span_stops", -1, "leave a gap|do not end where"),
        ("span_stops", 1, "hold a byte twice|do not end where"),
    ],
)
def test_spans_that_do_not_cover_their_documents_are_found(tmp_path, name, by, sentence):
    import re

    make_corpus(tmp_path, TEXTS)
    each = target(tmp_path).rows()
    at = int(np.flatnonzero(each.span_stops - each.span_starts > 2)[3])
    target(tmp_path).change(**{name: shifted(getattr(each, name), at, by)})
    assert any(re.search(sentence, fault) for fault in faults(tmp_path))


def test_a_document_that_no_table_lists_is_found(tmp_path):
    make_corpus(tmp_path, TEXTS)
    ids = target(tmp_path).rows().document_ids.copy()
    ids[ids == ids[-1]] = 50_000
    target(tmp_path).change(document_ids=ids)
    assert any("does not list a document" in fault for fault in faults(tmp_path))
    ids[ids == 50_000] = 77 << 32
    target(tmp_path).change(document_ids=ids)
    assert any("documents-00077.arrow is not in the manifest" in f for f in faults(tmp_path))


@pytest.mark.parametrize("tokens", [0, 5])
def test_a_document_of_a_table_that_no_sequence_holds_is_found(tmp_path, tokens):
    make_corpus(tmp_path, TEXTS)
    folder, manifest = Folder(tmp_path), read_manifest(Folder(tmp_path))
    entry, schema = manifest.documents[0], documents_schema()
    values = DocumentTables(folder, manifest).table(0).to_pydict()
    last = {name: column[-1] for name, column in values.items()}
    last |= {"document_id": last["document_id"] + 1, "tokens": tokens}
    columns = [pa.array([*values[each.name], last[each.name]], each.type) for each in schema]
    for name in (entry.name, entry.name + RECORD_SUFFIX):
        folder.remove(name)
    record = folder.commit(entry.name, arrow_writer(schema, [columns]))
    longer = dataclasses.replace(
        entry, bytes=record.bytes, sha256=record.sha256, rows=entry.rows + 1
    )
    changed = dataclasses.replace(manifest, documents=(longer, *manifest.documents[1:]))
    (tmp_path / MANIFEST).write_bytes(changed.to_json())
    assert verifier(tmp_path).corpus() == ["the splits have 80 documents but the tables list 81"]
    assert any("holds 60 of 61 documents" in fault for fault in faults(tmp_path))


def test_a_shard_with_another_number_of_tokens_than_listed_is_found(tmp_path):
    make_corpus(tmp_path, TEXTS)
    mine = target(tmp_path)
    mine.vouch_for(dataclasses.replace(mine.entry, tokens=mine.entry.tokens + 1))
    found = faults(tmp_path)
    assert any("maskable tokens, the manifest" in fault for fault in found)
    assert any("num_tokens is" in fault for fault in found)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda split: {"num_sequences": split.num_sequences + 1}, "num_sequences is"),
        (lambda split: {"shards": split.shards[::-1]}, "do not follow one another"),
        (lambda split: {"sources": split.sources[:1]}, "do not hold its"),
    ],
)
def test_a_manifest_whose_parts_do_not_fit_is_found(tmp_path, change, sentence):
    make_corpus(tmp_path, TEXTS)
    manifest = read_manifest(Folder(tmp_path))
    split = manifest.splits["train"]
    changed = dataclasses.replace(split, **change(split))
    values = dataclasses.replace(manifest, splits={"train": changed})
    (tmp_path / MANIFEST).write_bytes(values.to_json())
    assert any(sentence in fault for fault in verifier(tmp_path).corpus())


def test_draws_are_found_by_their_manifests_gaps_or_not(tmp_path):
    for name in ("draw-0001.json", "draw-0007.json", "draw-0003-shard-train-00000.arrow"):
        (tmp_path / name).write_text("")
    assert draws_of(Folder(tmp_path)) == [1, 7]
