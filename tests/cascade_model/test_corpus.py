"""A sample depends on its number and the recipe alone, never on ranks or batches."""

import dataclasses
import shutil

import numpy as np
import pytest

from cascade_model import noise as mask_noise
from cascade_model.config import TrainingNoise
from cascade_model.corpus import Batch, Corpus
from cascade_model.errors import CorpusMismatch, InputError


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
        "clean_tokens": ("uint16", (4, length)),
        "is_masked": ("bool", (4, length)),
        "is_maskable": ("bool", (4, length)),
        "thresholds": ("uint32", (4, blocks)),
        "positions": ("int32", (4, length)),
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
    with pytest.raises(CorpusMismatch, match=r"shard-train-00000\.arrow has \d+ bytes"):
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


def training_noise(corpus, **settings) -> TrainingNoise:
    return TrainingNoise.over(corpus.manifest.noise, **settings)


def test_a_run_without_settings_of_its_own_reads_the_stored_bits(corpus):
    plain = corpus.batch(0, 6, corpus.manifest.noise)
    assert same(plain, corpus.batch(0, 6, training_noise(corpus)))


@pytest.mark.parametrize("first", [0, 10])
def test_a_complementary_pair_is_one_sequence_that_masks_everything_once(corpus, first):
    noise = training_noise(corpus, complement=True, sequences_per_batch=8)
    batch = corpus.batch(first, 8, noise)
    single = corpus.batch(first // 2, 4, corpus.manifest.noise)
    one, two = slice(0, None, 2), slice(1, None, 2)
    assert np.array_equal(batch.is_masked[one], single.is_masked)
    assert np.array_equal(batch.thresholds[one], single.thresholds)
    assert np.array_equal(batch.clean_tokens[one], batch.clean_tokens[two])
    assert np.array_equal(batch.is_masked[one] ^ batch.is_masked[two], single.is_maskable)
    assert not (batch.is_masked[one] & batch.is_masked[two]).any()
    rates = batch.thresholds.astype(np.int64)
    assert (rates[one] + rates[two] == 2**32).all()


def test_the_complement_of_stored_bits_equals_that_of_recomputed_ones(corpus, monkeypatch):
    noise = training_noise(corpus, complement=True, sequences_per_batch=2)
    stored = corpus.batch(0, 12, noise)
    other = dataclasses.replace(corpus.manifest, noise=dataclasses.replace(noise.recipe, seed=99))
    monkeypatch.setattr(corpus, "manifest", other)
    assert same(stored, corpus.batch(0, 12, noise))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_the_global_batch_of_pairs(corpus, world_size):
    noise = training_noise(corpus, complement=True, sequences_per_batch=16)
    first = 2 * corpus.num_sequences - 8  # the batch crosses into the next draw
    whole = corpus.batch(first, 16, noise)
    parts = [corpus.batch(first, 16, noise, rank, world_size) for rank in range(world_size)]
    names = [f.name for f in dataclasses.fields(Batch)]
    joined = Batch(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in names})
    assert same(whole, joined)
    assert np.array_equal(
        whole.is_masked[8::2], corpus.batch(corpus.num_sequences, 4, noise.recipe).is_masked
    )


def test_padding_as_eos_is_masked_and_counted_like_text(corpus):
    everything = corpus.num_sequences
    plain = corpus.batch(0, everything, corpus.manifest.noise)
    batch = corpus.batch(0, everything, training_noise(corpus, padding="eos"))
    padding = ~plain.is_maskable
    assert padding.any()
    assert batch.is_maskable.all()
    assert (batch.clean_tokens[padding] == corpus.manifest.eos_id).all()
    assert 0.3 < batch.is_masked[padding].mean() < 0.7
    assert np.array_equal(batch.is_masked[~padding], plain.is_masked[~padding])
    assert np.array_equal(batch.clean_tokens[~padding], plain.clean_tokens[~padding])


def test_padding_as_eos_needs_padding_of_its_own(corpus, monkeypatch):
    changed = dataclasses.replace(corpus.manifest, pad_id=corpus.manifest.eos_id)
    monkeypatch.setattr(corpus, "manifest", changed)
    with pytest.raises(InputError, match=r"pad_id and eos_id .* use noise\.padding=never"):
        corpus.batch(0, 1, training_noise(corpus, padding="eos"))


def test_a_short_batch_is_the_beginning_of_the_whole_one(corpus):
    size = corpus.block_size
    noise = training_noise(corpus, short_rate=1.0, short_multiple=size, sequences_per_batch=4)
    lengths = set()
    for number in range(12):
        whole = corpus.batch(4 * number, 4, corpus.manifest.noise)
        short = corpus.batch(4 * number, 4, noise)
        length = short.clean_tokens.shape[1]
        lengths.add(length)
        assert length == mask_noise.cut_length(noise, number, corpus.sequence_length)
        assert short.thresholds.shape == (4, length // size)
        for name in ("clean_tokens", "is_masked", "is_maskable", "positions", "segments"):
            assert np.array_equal(getattr(short, name), getattr(whole, name)[:, :length])
        halves = [corpus.batch(4 * number + start, 2, noise) for start in (0, 2)]
        assert all(half.clean_tokens.shape[1] == length for half in halves)
    assert len(lengths) > 3
    with pytest.raises(InputError, match="several batches"):
        corpus.batch(2, 4, noise)


def test_a_rate_per_sequence_lets_a_batch_end_anywhere(corpus):
    recipe = dataclasses.replace(corpus.manifest.noise, per="sequence")
    noise = TrainingNoise.over(recipe, short_rate=1.0, sequences_per_batch=1)
    batches = [corpus.batch(number, 1, noise) for number in range(40)]
    odd = [b for b in batches if b.clean_tokens.shape[1] % corpus.block_size]
    assert odd
    assert all(batch.thresholds.shape == (1, 1) for batch in odd)
