"""A sample depends on its number and the recipe alone, never on ranks or batches."""

import dataclasses
import shutil

import numpy as np
import pytest

from cascade_model import noise as mask_noise
from cascade_model.corpus import Batch, Corpus
from cascade_model.errors import CorpusMismatch


@pytest.fixture(scope="module")
def corpus(tiny_corpus) -> Corpus:
    return Corpus.open(tiny_corpus)


def same(left: Batch, right: Batch) -> bool:
    return all(
        np.array_equal(getattr(left, f.name), getattr(right, f.name))
        for f in dataclasses.fields(Batch)
    )


def test_a_batch_has_the_shapes_and_types_of_the_contract(corpus):
    batch = corpus.batch(0, 4, corpus.manifest.noise)
    length, blocks = corpus.sequence_length, corpus.sequence_length // corpus.block_size
    found = {
        f.name: (getattr(batch, f.name).dtype.name, getattr(batch, f.name).shape)
        for f in dataclasses.fields(Batch)
    }
    assert found == {
        "sequence_ids": ("uint64", (4,)),
        "clean_tokens": ("int64", (4, length)),
        "is_masked": ("bool", (4, length)),
        "is_maskable": ("bool", (4, length)),
        "thresholds": ("uint32", (4, blocks)),
        "positions": ("int64", (4, length)),
        "segments": ("int32", (4, length)),
    }


def test_every_draw_shows_every_sequence_once_and_in_its_own_order(corpus):
    total, noise = corpus.num_sequences, corpus.manifest.noise
    first, second = corpus.batch(0, total, noise), corpus.batch(total, total, noise)
    for batch in (first, second):
        assert sorted(batch.sequence_ids.tolist()) == list(range(total))
    assert not np.array_equal(first.sequence_ids, second.sequence_ids)
    assert not np.array_equal(first.is_masked, second.is_masked)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_together_see_the_global_batch(corpus, world_size):
    noise = corpus.manifest.noise
    first = corpus.num_sequences - 7  # the batch crosses into the next draw
    whole = corpus.batch(first, 16, noise)
    parts = [corpus.batch(first, 16, noise, rank, world_size) for rank in range(world_size)]
    names = [f.name for f in dataclasses.fields(Batch)]
    joined = Batch(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in names})
    assert same(whole, joined)


def test_the_stored_draw_equals_the_recomputed_one(corpus, monkeypatch):
    noise = corpus.manifest.noise
    stored = corpus.batch(0, corpus.num_sequences, noise)
    other = dataclasses.replace(corpus.manifest, noise=dataclasses.replace(noise, seed=99))
    monkeypatch.setattr(corpus, "manifest", other)
    assert same(stored, corpus.batch(0, corpus.num_sequences, noise))


def test_padding_is_never_masked_and_belongs_to_the_document_before_it(corpus):
    batch = corpus.batch(0, corpus.num_sequences, corpus.manifest.noise)
    padding = batch.clean_tokens == corpus.manifest.pad_id
    assert np.array_equal(padding, ~batch.is_maskable)
    assert not (batch.is_masked & padding).any()
    assert not padding[:, 0].any()
    assert (batch.segments[:, 1:][padding[:, 1:]] == batch.segments[:, :-1][padding[:, 1:]]).all()


def test_positions_and_segments_restart_together_on_the_block_grid(corpus):
    batch = corpus.batch(0, corpus.num_sequences, corpus.manifest.noise)
    changes = np.diff(batch.segments, axis=1)
    assert set(np.unique(changes)) <= {0, 1}
    assert np.array_equal(batch.positions[:, 1:] == 0, changes == 1)
    assert (np.nonzero(batch.positions == 0)[1] % corpus.block_size == 0).all()
    assert (batch.segments[:, 0] == 0).all()


def test_the_text_comes_back_document_by_document(corpus, real_documents):
    tokenizer = corpus.tokenizer()
    rows = corpus.rows(np.arange(corpus.num_sequences, dtype=np.uint64))
    tokens = rows.tokens[rows.is_maskable]
    ends = np.nonzero(tokens == tokenizer.eos_id)[0]
    texts = [tokenizer.decode(each) for each in np.split(tokens, ends + 1)[:-1]]
    assert set(texts) <= set(real_documents)
    assert len(texts) == corpus.manifest.splits["train"].num_documents
    assert sum(len(text.encode()) for text in texts) == corpus.num_bytes
    assert len(tokens) == corpus.num_tokens


def test_the_mask_and_reserved_ids_are_in_no_text(corpus):
    rows = corpus.rows(np.arange(corpus.num_sequences, dtype=np.uint64))
    assert not (rows.tokens == corpus.manifest.mask_id).any()


def test_the_stored_mask_rate_is_that_of_the_thresholds(corpus):
    batch = corpus.batch(0, corpus.num_sequences, corpus.manifest.noise)
    rates = np.repeat(batch.thresholds / 2**32, corpus.block_size, axis=1)
    expected, found = rates[batch.is_maskable].mean(), batch.is_masked[batch.is_maskable].mean()
    assert abs(expected - found) < 0.01


def test_a_divisor_of_the_block_size_is_recomputed_and_another_size_refused(corpus):
    noise = dataclasses.replace(corpus.manifest.noise, block_size=1)
    batch = corpus.batch(0, 4, noise)
    assert batch.thresholds.shape == (4, corpus.sequence_length)
    ranks = np.arange(4, dtype=np.uint64)
    assert np.array_equal(
        batch.thresholds, mask_noise.thresholds(noise, 0, ranks, corpus.sequence_length)
    )
    with pytest.raises(CorpusMismatch, match=r"noise\.block_size=8 does not divide .* size 4"):
        corpus.batch(0, 4, dataclasses.replace(noise, block_size=8))


def test_a_sequence_outside_the_split_is_an_index_error(corpus):
    with pytest.raises(IndexError):
        corpus.rows(np.array([corpus.num_sequences], dtype=np.uint64))


def test_an_unfinished_or_missing_folder_is_refused(tiny_corpus, tmp_path):
    with pytest.raises(CorpusMismatch, match="does not exist"):
        Corpus.open(str(tmp_path / "none"))
    copy = tmp_path / "corpus"
    shutil.copytree(tiny_corpus, copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(CorpusMismatch, match="unfinished"):
        Corpus.open(str(copy))


def test_a_cut_and_a_foreign_shard_are_refused_when_first_touched(tiny_corpus, tmp_path):
    copy = tmp_path / "corpus"
    shutil.copytree(tiny_corpus, copy)
    shard = copy / "shard-train-00000.arrow"
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(CorpusMismatch, match=r"shard-train-00000\.arrow has \d+ bytes"):
        Corpus.open(str(copy)).batch(0, 1, Corpus.open(str(copy)).manifest.noise)
    shutil.copy(copy / "shard-held_out-00000.arrow", shard)
    with pytest.raises(CorpusMismatch, match=r"shard-train-00000\.arrow has"):
        Corpus.open(str(copy)).rows(np.array([0], np.uint64))


def test_a_tokenizer_that_does_not_match_is_refused_with_both_digests(tiny_corpus, tmp_path):
    copy = tmp_path / "corpus"
    shutil.copytree(tiny_corpus, copy)
    corpus = Corpus.open(str(copy))
    with pytest.raises(
        CorpusMismatch, match=f"has sha256 abcd but .* {corpus.tokenizer().sha256[:12]}"
    ):
        corpus.require_tokenizer("abcd", "model x")
    (copy / "tokenizer.json").write_bytes((copy / "tokenizer.json").read_bytes() + b"\n")
    with pytest.raises(CorpusMismatch, match="was made with"):
        corpus.tokenizer()


def test_a_split_that_is_not_there_names_those_that_are(tiny_corpus):
    with pytest.raises(CorpusMismatch, match=r"split 'test', only in \['held_out', 'train'\]"):
        Corpus.open(tiny_corpus, "test")
