"""Targets on disk: what is written is read by sequence id, and anything else is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from cascade_model import teacher_targets
from cascade_model.commit import Folder
from cascade_model.corpus import Corpus
from cascade_model.errors import CorpusMismatch, InputError
from cascade_model.teacher_targets import (
    TARGETS,
    TargetRows,
    TargetsManifest,
    TeacherTargets,
    entries_of,
    fault_of,
    publish_targets,
    read_targets,
    rows_per_batch,
    target_name,
    target_schema,
    write_targets,
)
from tests.cascade_model.corpus_making import make_corpus

K, LENGTH = 3, 64
TEXTS = {"a": [f"text {i} " * (5 + i % 20) for i in range(60)]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return Corpus.open(make_corpus(tmp_path_factory.mktemp("c") / "corpus", TEXTS, parts=3))


def told(ids: np.ndarray) -> TargetRows:
    """Numbers that tell the sequence and the place."""
    keys = ids[:, None].astype(np.int64) * LENGTH + np.arange(LENGTH)
    names = (keys[:, :, None] + np.arange(K)) % 100
    names[keys % 7 == 0] = -1
    log_probs = -(keys[:, :, None] % 50 + np.arange(K)).astype(np.float16)
    return TargetRows(names.astype(np.int32), log_probs, (keys % 11 / 11).astype(np.float32))


def manifest_of(made_for: Corpus, **changes) -> TargetsManifest:
    values = {
        "corpus": made_for.digest,
        "split": "train",
        "teacher": "weights",
        "tokenizer_sha256": made_for.manifest.tokenizer_sha256,
        "sequence_length": LENGTH,
        "vocab_size": made_for.manifest.vocab_size,
        "banned": (1, 2),
        "k": K,
        "temperature": 1.0,
        "precision": "float32",
        "shards": (),
    }
    return TargetsManifest(**(values | changes))


def write(url, made_for: Corpus, **changes) -> str:
    folder, size = Folder(url), rows_per_batch(LENGTH, K)
    records = []
    for shard in made_for.manifest.splits["train"].shards:
        first = shard.first_sequence
        ids = np.arange(first, first + shard.rows, dtype=np.uint64)
        parts = (ids[i : i + size] for i in range(0, len(ids), size))
        batches = ((part, told(part)) for part in parts)
        records.append(write_targets(folder, shard, target_schema(LENGTH, K), batches))
    publish_targets(folder, manifest_of(made_for, shards=entries_of(records), **changes))
    return str(url)


def same(found: TargetRows, wanted: TargetRows) -> bool:
    names = ("ids", "log_probs", "rest")
    return all(np.array_equal(getattr(found, name), getattr(wanted, name)) for name in names)


@pytest.mark.parametrize("rows", [4, 1000])
def test_rows_are_found_by_sequence_id_in_any_order(tmp_path, corpus, rows, monkeypatch):
    monkeypatch.setattr(teacher_targets, "_BATCH_BYTES", rows * LENGTH * (6 * K + 4))
    targets = TeacherTargets(write(tmp_path, corpus), corpus.manifest)
    ids = np.random.default_rng(0).permutation(corpus.num_sequences).astype(np.uint64)
    ids = np.concatenate([ids, ids[:5]])
    assert same(targets.rows(ids), told(ids))
    assert targets.rows(ids).log_probs.dtype == np.float16


def test_a_store_holds_the_same(s3_url, corpus):
    targets = TeacherTargets(write(s3_url, corpus), corpus.manifest)
    ids = np.arange(corpus.num_sequences, dtype=np.uint64)[::-1].copy()
    assert same(targets.rows(ids), told(ids))
    targets.require_units()
    Folder(s3_url).remove(targets.manifest.shards[0].object)
    with pytest.raises(CorpusMismatch, match="cannot be read"):
        targets.require_units()


def test_the_manifest_is_read_as_it_was_written_and_names_no_attempt(tmp_path, corpus):
    manifest = read_targets(write(tmp_path, corpus))
    assert manifest.axis == "predicted token"
    moved = [dataclasses.replace(each, object="other") for each in manifest.shards]
    assert dataclasses.replace(manifest, shards=tuple(moved)).digest == manifest.digest
    assert dataclasses.replace(manifest, k=4).digest != manifest.digest


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"corpus": "other"}, "corpus digest=other and the corpus corpus digest="),
        ({"tokenizer_sha256": "xyz"}, "tokenizer_sha256=xyz and the corpus tokenizer_sha256="),
        ({"split": "held_out"}, "split=held_out and the corpus split=train"),
        ({"axis": "row"}, "axis=row and this program axis=predicted token"),
        ({"format_version": 9}, "format_version=9 and this program format_version=1"),
    ],
)
def test_targets_of_something_else_are_refused_with_both_values(tmp_path, corpus, changes, shown):
    with pytest.raises(CorpusMismatch, match=shown):
        TeacherTargets(write(tmp_path, corpus, **changes), corpus.manifest)


def test_an_edited_manifest_is_refused(tmp_path, corpus):
    path = Path(write(tmp_path, corpus)) / TARGETS
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "teacher": "another"}))
    with pytest.raises(CorpusMismatch, match="edited or damaged"):
        read_targets(str(tmp_path))
    path.write_text("{")
    with pytest.raises(CorpusMismatch, match="is damaged"):
        read_targets(str(tmp_path))


def test_unfinished_targets_are_refused(tmp_path, corpus):
    (Path(write(tmp_path, corpus)) / TARGETS).unlink()
    with pytest.raises(CorpusMismatch, match="so it is unfinished or holds no targets"):
        TeacherTargets(str(tmp_path), corpus.manifest)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_unit_is_named_before_a_number_of_it_is_used(tmp_path, corpus, damage):
    targets = TeacherTargets(write(tmp_path, corpus), corpus.manifest)
    name = target_name(corpus.manifest.splits["train"].shards[0].name)
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    if damage != "gone":
        path.write_bytes(data if damage == "flip" else data[:-100])
    with pytest.raises(CorpusMismatch, match=f"{name}.*; write the targets again with `cascade te"):
        targets.rows(np.zeros(1, dtype=np.uint64))


@pytest.mark.parametrize("damage", ["cut", "gone", "no record", "another's record"])
def test_what_can_be_seen_of_a_unit_is_refused_before_it_is_read(tmp_path, corpus, damage):
    targets = TeacherTargets(write(tmp_path, corpus), corpus.manifest)
    targets.require_units()
    first, last = (tmp_path / targets.manifest.shards[index].name for index in (0, -1))
    record, other = (path.with_name(f"{path.name}.record.json") for path in (last, first))
    match damage:
        case "cut":
            last.write_bytes(last.read_bytes()[:-100])
        case "gone":
            last.unlink()
        case "no record":
            record.unlink()
        case _:
            record.write_bytes(other.read_bytes())
    with pytest.raises(CorpusMismatch, match=f"{last.name}.*; write the targets again with"):
        targets.require_units()


def test_units_of_two_jobs_do_not_mix(tmp_path, corpus):
    write(tmp_path, corpus)
    shard = corpus.manifest.splits["train"].shards[0]
    ids = np.arange(shard.rows, dtype=np.uint64)
    other = dataclasses.replace(told(ids), rest=np.zeros((shard.rows, LENGTH), np.float32))
    with pytest.raises(InputError, match="is committed with sha256"):
        write_targets(Folder(tmp_path), shard, target_schema(LENGTH, K), [(ids, other)])


def test_numbers_that_no_teacher_says_are_faults():
    rows = told(np.arange(4, dtype=np.uint64))
    assert fault_of(rows, 100) is None
    assert "outside the vocabulary of 50" in str(fault_of(rows, 50))
    half = rows.ids.copy()
    half[0, 1, 2] = -1
    assert "some of a place's tokens" in str(fault_of(dataclasses.replace(rows, ids=half), 100))
    for name, wrong in (("log_probs", 0.5), ("log_probs", np.nan), ("rest", 1.5), ("rest", np.nan)):
        values = getattr(rows, name).copy()
        values.flat[5] = wrong
        assert "none" in str(fault_of(dataclasses.replace(rows, **{name: values}), 100))
