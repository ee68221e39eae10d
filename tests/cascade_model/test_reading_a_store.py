"""A corpus behind S3 is read in ranges, each checked, and kept in a bounded folder."""

from pathlib import Path

import numpy as np
import pytest

from cascade_model.commit import Folder
from cascade_model.corpus import Corpus, read_manifest
from cascade_model.errors import CorpusMismatch
from cascade_model.feed import feed
from cascade_model.shard_cache import CacheConfig
from cascade_model.training_config import TrainerConfig
from jobs import shards
from tests.cascade_model.corpus_making import make_corpus
from tests.cascade_model.test_draws import materialise, same

TEXTS = {"a": [f"text {i} " * (40 + i) for i in range(280)], "b": ["b " * 90] * 9}
"""Some four hundred thousand bytes: several record batches in a shard."""


@pytest.fixture
def corpora(s3_url, tmp_path) -> tuple[str, str]:
    """The same corpus in a bucket and in a folder."""
    return make_corpus(s3_url, TEXTS, parts=2), make_corpus(tmp_path / "local", TEXTS, parts=2)


def count_ranges(monkeypatch) -> list[tuple[str, int]]:
    """Name and length of each ranged read."""
    seen, read = [], Folder.read_range

    def counted(self, name, offset, length):
        seen.append((name, length))
        return read(self, name, offset, length)

    monkeypatch.setattr(Folder, "read_range", counted)
    return seen


def test_batches_from_a_store_are_those_of_the_local_copy(corpora):
    there, here = (Corpus.open(url) for url in corpora)
    noise = here.manifest.noise
    assert there.digest == here.digest
    for first in (0, 700, 5000):
        assert same(there.batch(first, 100, noise), here.batch(first, 100, noise))
    assert there.documents_of(30, 20) == here.documents_of(30, 20)
    config = TrainerConfig(num_steps=2, sequences_per_step=8)
    one, two = (list(feed(corpus, noise, config, 0)) for corpus in (there, here))
    assert len(one) == len(two) == 2
    assert all(map(same, one, two))


def test_one_sequence_costs_its_record_batch_and_no_more(corpora, monkeypatch):
    corpus, seen = Corpus.open(corpora[0]), count_ranges(monkeypatch)
    shard = corpus.manifest.splits["train"].shards[0]
    assert shard.rows > 2048
    corpus.rows(np.array([5]))
    assert [name for name, _ in seen] == [shard.object] * 2
    header, batch = (length for _, length in seen)
    assert header < 4096
    assert batch < 0.5 * shard.bytes
    corpus.rows(np.array([5, 6, 7]))
    assert len(seen) == 2  # at hand
    corpus.rows(np.array([2000]))
    assert len(seen) == 3


def test_a_folder_that_was_filled_serves_a_later_reader(corpora, tmp_path, monkeypatch):
    kept = CacheConfig(folder=str(tmp_path / "cache"))
    first = Corpus.open(corpora[0], cache=kept)
    noise, everything = first.manifest.noise, first.num_sequences
    expected = first.batch(0, everything, noise)
    seen = count_ranges(monkeypatch)
    later = Corpus.open(corpora[0], cache=kept)
    assert same(later.batch(0, everything, noise), expected)
    assert {length for _, length in seen} == {min(length for _, length in seen)}  # headers alone
    assert len(seen) == len(later.manifest.splits["train"].shards)


def test_the_cache_stays_within_its_bound_while_everything_is_read(corpora, tmp_path):
    kept = CacheConfig(folder=str(tmp_path / "cache"), max_bytes=1 << 20)
    corpus = Corpus.open(corpora[0], cache=kept)
    local = Corpus.open(corpora[1])
    noise = local.manifest.noise
    total = sum(shard.bytes for shard in corpus.manifest.splits["train"].shards)
    assert total > 1 << 20
    for first in range(0, corpus.num_sequences, 500):
        assert same(corpus.batch(first, 500, noise), local.batch(first, 500, noise))
        size = sum(p.stat().st_size for p in Path(kept.folder or "").glob("??/*"))
        assert size <= kept.max_bytes


def test_a_damaged_object_is_refused_by_name(corpora):
    url, _ = corpora
    folder = Folder(url)
    entry = read_manifest(folder).splits["train"].shards[1]
    data = bytearray(folder.read_bytes(entry.object))
    for place in range(0, len(data), 1000):
        data[place] ^= 1
    with folder._fs.open(folder.path(entry.object), "wb") as file:
        file.write(bytes(data))
    corpus = Corpus.open(url)
    with pytest.raises(CorpusMismatch, match=rf"{entry.object} (has sha256|cannot be read)"):
        corpus.rows(np.arange(entry.first_sequence, entry.first_sequence + entry.rows))
    folder.remove(entry.object)
    with pytest.raises(CorpusMismatch, match=rf"{entry.object} cannot be read"):
        Corpus.open(url).rows(np.array([entry.first_sequence]))


def test_verify_and_materialise_work_on_a_store(corpora, capsys):
    url, local = corpora
    assert shards.main(["verify", "--corpus", url, "--num-workers", "1"]) == 0
    materialise(url, 1)
    materialise(local, 1)
    assert shards.main(["verify", "--corpus", url, "--num-workers", "1"]) == 0
    assert "shards: 4, draws: 2" in capsys.readouterr().out
    there, here = Corpus.open(url), Corpus.open(local)
    first, noise = here.num_sequences + 5, here.manifest.noise
    assert same(there.batch(first, 64, noise), here.batch(first, 64, noise))
