"""Written draws are the recomputed ones, and nobody else's."""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from cascade_model import noise as mask_noise
from cascade_model.commit import Folder
from cascade_model.config import TrainingNoise
from cascade_model.corpus import Batch, Corpus, read_manifest
from cascade_model.draws import draw_manifest_name, publish_draw, write_draw
from cascade_model.errors import CorpusMismatch
from tests.cascade_model.corpus_making import make_corpus

TEXTS = {
    "a": [f"text {i} " * (5 + i % 20) for i in range(60)],
    "b": [f"{i} other" * 9 for i in range(20)],
}


def materialise(url: str, draw: int) -> None:
    folder = Folder(url)
    manifest = read_manifest(folder)
    shards = manifest.splits["train"].shards
    entries = [write_draw(folder, manifest, "train", i, draw) for i in range(len(shards))]
    publish_draw(folder, manifest, draw, {"train": entries})


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    return make_corpus(tmp_path_factory.mktemp("draws") / "corpus", TEXTS, weights=[3, 1], parts=2)


@pytest.fixture(scope="module")
def written(plain, tmp_path_factory) -> str:
    """The same corpus with draws 1 and 3 written."""
    copy = tmp_path_factory.mktemp("written") / "corpus"
    shutil.copytree(plain, copy)
    for draw in (1, 3):
        materialise(str(copy), draw)
    return str(copy)


def same(left: Batch, right: Batch) -> bool:
    names = [f.name for f in dataclasses.fields(Batch)]
    return all(np.array_equal(getattr(left, n), getattr(right, n)) for n in names)


def spy(monkeypatch) -> list[int]:
    """How many rows of mask bits were computed, from the shards' own spot checks on."""
    seen, real = [], mask_noise.mask_bits

    def counted(noise, draw, ids, *rest):
        seen.append(len(ids))
        return real(noise, draw, ids, *rest)

    monkeypatch.setattr(mask_noise, "mask_bits", counted)
    return seen


@pytest.mark.parametrize("complement", [False, True])
def test_batches_are_the_same_with_written_draws_and_without(plain, written, complement):
    one, two = Corpus.open(plain), Corpus.open(written)
    settings = {"complement": complement, "sequences_per_batch": 32}
    noise = TrainingNoise.over(one.manifest.noise, **settings)
    for first in range(0, 10 * one.num_sequences, 512):
        assert same(one.batch(first, 32, noise), two.batch(first, 32, noise))


def test_written_draws_are_read_and_not_computed(written, monkeypatch):
    corpus = Corpus.open(written)
    noise = corpus.manifest.noise
    _, _, draws = corpus._mixture.places(np.arange(9000, dtype=np.uint64), noise)
    samples = {draw: np.flatnonzero(draws == draw)[:3].tolist() for draw in range(4)}
    corpus.rows(np.arange(corpus.num_sequences))  # the spot checks of first touches
    computed = {}
    for draw, mine in samples.items():
        with monkeypatch.context() as patch:
            seen = spy(patch)
            for sample in mine:
                corpus.batch(sample, 1, noise)
            computed[draw] = sum(seen)
    assert computed == {0: 0, 1: 0, 2: 3, 3: 0}
    with monkeypatch.context() as patch:
        seen = spy(patch)
        corpus.batch(samples[1][0], 1, dataclasses.replace(noise, max_rate=0.9))
        assert seen == [1]  # another recipe has other bits


def test_a_draw_without_its_manifest_is_not_there(written, tmp_path, monkeypatch):
    copy = tmp_path / "corpus"
    shutil.copytree(written, copy)
    (copy / draw_manifest_name(1)).unlink()
    corpus = Corpus.open(str(copy))
    assert corpus._draws.masked(1, np.array([0], np.uint64)) is None
    assert corpus._draws.masked(3, np.array([0], np.uint64)) is not None


def test_a_draw_of_another_corpus_is_refused(written, tmp_path):
    other = make_corpus(tmp_path / "other", {"a": ["another text"] * 3})
    shutil.copy(Path(written) / draw_manifest_name(1), other)
    with pytest.raises(CorpusMismatch, match=r"draw-0001\.json belongs to corpus"):
        Corpus.open(other)._draws.masked(1, np.array([0], np.uint64))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda data: data.replace(b'"draw": 1', b'"draw": 2'), "edited or damaged"),
        (lambda data: data[:-9], "is damaged"),
        (lambda data: b"[]", "is damaged"),
    ],
)
def test_a_damaged_manifest_of_a_draw_is_refused(written, tmp_path, change, sentence):
    copy = tmp_path / "corpus"
    shutil.copytree(written, copy)
    path = copy / draw_manifest_name(1)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CorpusMismatch, match=sentence):
        Corpus.open(str(copy))._draws.masked(1, np.array([0], np.uint64))


def test_a_damaged_bitmap_is_refused(written, tmp_path):
    copy = tmp_path / "corpus"
    shutil.copytree(written, copy)
    path = copy / "draw-0003-shard-train-00001.arrow"
    data = bytearray(path.read_bytes())
    record = Folder(copy).record(path.name)
    assert record is not None
    offset, length, _ = record.facts["batches"][0]
    data[offset + length - 9] ^= 1
    path.write_bytes(data)
    corpus = Corpus.open(str(copy))
    with pytest.raises(CorpusMismatch, match=r"draw-0003-shard-train-00001\.arrow has sha256"):
        corpus._draws.masked(3, np.arange(corpus.num_sequences, dtype=np.uint64))


def test_a_bitmap_that_masks_padding_is_refused(plain, tmp_path, monkeypatch):
    copy = tmp_path / "corpus"
    shutil.copytree(plain, copy)
    everything = lambda manifest, split, draw, ids, maskable: (None, np.ones_like(maskable))  # noqa: E731
    monkeypatch.setattr("cascade_model.draws.masked_in", everything)
    materialise(str(copy), 1)
    monkeypatch.undo()
    corpus = Corpus.open(str(copy))
    with pytest.raises(CorpusMismatch, match=r"draw 1 .* masks places that must stay"):
        corpus.batch(corpus.num_sequences + 60, 200, corpus.manifest.noise)


def test_a_draw_that_is_written_is_not_computed_again(written, monkeypatch):
    monkeypatch.setattr("cascade_model.draws.masked_in", None)
    materialise(written, 1)
    with pytest.raises(TypeError):
        materialise(written, 2)


def test_many_draws_hold_few_files_open(plain, tmp_path):
    url = shutil.copytree(plain, tmp_path / "corpus")
    for draw in range(1, 8):
        materialise(str(url), draw)
    corpus, before = Corpus.open(str(url)), len(os.listdir("/proc/self/fd"))
    recipe, shards = corpus.recipe, len(corpus.manifest.splits["train"].shards)
    for _ in range(2):
        corpus.batch(0, 7 * corpus.num_sequences, recipe)
    opened = len(os.listdir("/proc/self/fd")) - before
    assert shards < opened <= shards * 5  # the corpus itself and four draws
    assert len(corpus._draws._open) == 4
