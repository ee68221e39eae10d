"""A sample depends on its number and the recipe alone, never on ranks or batches."""

import dataclasses
import hashlib
import itertools
import shutil

import numpy as np
import pytest

from cascade_model import noise as mask_noise
from cascade_model.config import TrainingNoise
from cascade_model.corpus import Batch, Corpus
from cascade_model.errors import CorpusMismatch, InputError
from cascade_model.feed import feed, spans
from cascade_model.shard_cache import CacheConfig
from cascade_model.training_config import TrainerConfig
from tests.cascade_model.corpus_making import NOISE, make_corpus


@pytest.fixture(scope="module")
def corpus(tiny_corpus) -> Corpus:
    return Corpus.open(tiny_corpus)


def same(left: Batch, right: Batch) -> bool:
    return all(
        np.array_equal(getattr(left, f.name), getattr(right, f.name))
        for f in dataclasses.fields(Batch)
    )


def joined(parts: list[Batch]) -> Batch:
    names = [f.name for f in dataclasses.fields(Batch)]
    return Batch(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in names})


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


def by_ranks(corpus, noise, step, sequences_per_step, world_size) -> Batch:
    """The global batch of a step, joined from the forward passes of all ranks in turn."""
    config = TrainerConfig(sequences_per_step=sequences_per_step, sequences_per_forward=4)
    mine = [spans(step, config, rank, world_size) for rank in range(world_size)]
    return joined([corpus.batch(*span, noise) for span in itertools.chain.from_iterable(mine)])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_together_see_the_global_batch(corpus, world_size):
    noise = corpus.manifest.noise
    step = corpus.num_sequences // 30
    assert corpus.num_sequences % 30  # the batch crosses into the next draw
    whole = corpus.batch(30 * step, 30, noise)
    assert same(whole, by_ranks(corpus, noise, step, 30, world_size))


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
    with pytest.raises(InputError, match="does not exist"):
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
    noise = training_noise(corpus, complement=True, sequences_per_batch=30)
    step, before = divmod(2 * corpus.num_sequences, 30)
    assert before  # the batch crosses into the next draw
    whole = corpus.batch(30 * step, 30, noise)
    assert same(whole, by_ranks(corpus, noise, step, 30, world_size))
    behind = corpus.batch(corpus.num_sequences, (30 - before) // 2, noise.recipe)
    assert np.array_equal(whole.is_masked[before::2], behind.is_masked)


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


def fields_of(batch: Batch) -> list:
    return [getattr(batch, f.name) for f in dataclasses.fields(Batch)]


def fingerprint(batch: Batch) -> str:
    """SHA-256 of a batch's arrays in the types that they had in format one."""
    types = ("uint64", "int64", "bool", "bool", "uint32", "int64", "int32")
    arrays = [
        np.ascontiguousarray(a).astype(t) for a, t in zip(fields_of(batch), types, strict=True)
    ]
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()[:16]


def pseudo_texts(count: int = 200) -> list[str]:
    """Lines of numbers, the same ones everywhere."""
    words = [[f"w{(i * j * j + 7 * j) % 97}" for j in range(5 + i % 60)] for i in range(count)]
    return [f"line {i}: " + " ".join(each) for i, each in enumerate(words)]


def is_kept(text: str) -> bool:
    """What a held-out share of 0.1 left in training."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 >= 0.1


def test_with_one_source_every_sample_is_bit_for_bit_what_it_was_in_format_one(tmp_path):
    """The literals were taken from the reader and the packer before this format."""
    texts = [text for text in pseudo_texts() if is_kept(text)]
    corpus = Corpus.open(make_corpus(tmp_path, {"all": texts}))
    size, noise = corpus.num_sequences, corpus.manifest.noise
    pairs = training_noise(corpus, complement=True, sequences_per_batch=16)
    found = [
        corpus.batch(0, size, noise),
        corpus.batch(size - 5, 12, noise),
        corpus.batch(5 * size + 3, 7, noise),
        corpus.batch(2 * size - 8, 16, pairs),
        corpus.batch(40, 9, training_noise(corpus, padding="eos")),
        corpus.batch(size - 5, 12, dataclasses.replace(noise, per="sequence", block_size=2)),
    ]
    assert size == 399
    assert [fingerprint(batch) for batch in found] == [
        "783b4c6c2938ffdf",
        "80c36ee29c2ddeb3",
        "27927a0953cc7614",
        "1851bc2d9df97281",
        "6437a4cb55523311",
        "3421a2c03bedd478",
    ]


SOURCES = {"web": pseudo_texts(150), "code": [t[::-1] for t in pseudo_texts(40)], "one": ["only"]}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Corpus:
    """Three sources, the last of one sequence, in two shards each where there is enough."""
    folder = tmp_path_factory.mktemp("mixed") / "corpus"
    return Corpus.open(make_corpus(folder, SOURCES, weights=[6, 3, 1]))


@pytest.mark.parametrize("per", ["block", "sequence"])
@pytest.mark.parametrize("block_size", [4, 32, 64])
def test_stored_bits_are_the_recomputed_ones_however_thresholds_are_kept(
    tmp_path, per, block_size, monkeypatch
):
    recipe = dataclasses.replace(NOISE, per=per, block_size=block_size)
    corpus = Corpus.open(make_corpus(tmp_path, SOURCES, noise=recipe, weights=[6, 3, 1]))
    stored = corpus.batch(0, 900, recipe)
    other = dataclasses.replace(corpus.manifest, noise=dataclasses.replace(recipe, seed=99))
    monkeypatch.setattr(corpus, "manifest", other)
    assert same(stored, corpus.batch(0, 900, recipe))


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_together_see_the_global_batch_of_a_mixture(mixed, world_size):
    noise = training_noise(mixed, complement=True, sequences_per_batch=42)
    for step in (0, 10, 10**6):
        whole = mixed.batch(42 * step, 42, noise)
        assert same(whole, by_ranks(mixed, noise, step, 42, world_size))
        one, two = slice(0, None, 2), slice(1, None, 2)
        assert np.array_equal(whole.sequence_ids[one], whole.sequence_ids[two])
        assert np.array_equal(whole.is_masked[one] ^ whole.is_masked[two], whole.is_maskable[one])


def test_a_mixture_gives_each_source_its_share_of_the_samples(mixed):
    ids = mixed.batch(0, 1024, mixed.manifest.noise).sequence_ids
    for source in mixed.manifest.splits["train"].sources:
        mine = (ids >= source.first_sequence) & (ids < source.first_sequence + source.num_sequences)
        assert mine.sum() == source.share


@pytest.mark.parametrize("kind", ["corpus", "mixed"])
def test_no_sequence_is_lost_or_doubled_when_the_world_changes_within_a_draw(kind, request):
    """1, 2, 3 and 1 workers in turn, each from where the others stopped, and one all alone."""
    corpus: Corpus = request.getfixturevalue(kind)
    noise, batch_size, step = corpus.manifest.noise, 6, 0
    total = -(-2 * corpus.num_sequences // batch_size)
    seen = []
    for part, world_size in enumerate((1, 2, 3, 1)):
        until = total * (part + 1) // 4
        while step < until:
            seen.append(by_ranks(corpus, noise, step, batch_size, world_size))
            step += 1
    alone = corpus.batch(0, total * batch_size, noise)
    assert same(alone, joined(seen))
    if kind == "corpus":
        once = alone.sequence_ids[: corpus.num_sequences]
        assert sorted(once.tolist()) == list(range(corpus.num_sequences))


def test_the_documents_of_a_sample_are_told_to_the_byte(mixed):
    noise = mixed.manifest.noise
    batch, eos = mixed.batch(500, 40, noise), mixed.manifest.eos_id
    texts = {
        (f"part-{part}.jsonl", f"line {row + 1}"): text.encode()
        for part, docs in enumerate(SOURCES.values())
        for row, text in enumerate(docs)
    }
    seen = mixed.documents_of(500, 40)
    assert [piece.sample for piece in seen] == sorted(piece.sample for piece in seen)
    for sample in range(40):
        mine = [piece for piece in seen if piece.sample == 500 + sample]
        assert {piece.sequence_id for piece in mine} == {int(batch.sequence_ids[sample])}
        assert len(mine) == batch.segments[sample].max() + 1
        for number, piece in enumerate(mine):
            inside = (batch.segments[sample] == number) & batch.is_maskable[sample]
            tokens = batch.clean_tokens[sample][inside]
            data = bytes(tokens[tokens != eos].astype(np.uint8))
            assert texts[piece.path, piece.where][slice(*piece.span)] == data


def test_documents_follow_the_order_of_the_run(mixed):
    noise = training_noise(mixed, complement=True, sequences_per_batch=4, seed=5)
    batch = mixed.batch(8, 4, noise)
    found = [piece.sequence_id for piece in mixed.documents_of(8, 4, noise)]
    assert list(dict.fromkeys(found)) == list(dict.fromkeys(batch.sequence_ids.tolist()))


def test_a_local_corpus_goes_through_a_cache_that_is_named(mixed, tmp_path):
    folder = tmp_path / "cache"
    url = mixed._folder.url
    cached = Corpus.open(url, cache=CacheConfig(folder=str(folder)))
    noise = mixed.manifest.noise
    assert same(cached.batch(0, 50, noise), mixed.batch(0, 50, noise))
    assert list(folder.glob("??/*"))


def test_a_fault_while_reading_ahead_comes_at_its_turn(tmp_path):
    copy = make_corpus(tmp_path, {"all": pseudo_texts()})
    corpus = Corpus.open(copy)
    noise = corpus.manifest.noise
    (tmp_path / "shard-train-00000.arrow").unlink()
    batches = feed(corpus, noise, TrainerConfig(), 0)
    with pytest.raises(CorpusMismatch, match=r"shard-train-00000\.arrow cannot be read"):
        next(batches)
