"""A sample depends on the corpus alone, holds training text only and keeps to its size."""

import json

import pytest

from pipelines.cleaning import Cleaning, cleaned
from pipelines.config import FilterConfig, SourceConfig
from pipelines.held_out import is_held_out
from pipelines.sampling import read_source, sample_texts, sampled, spaced
from pipelines.sources import make_plan

TEXTS = [f"document {number}: " + "word " * (number % 50) for number in range(2000)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("sample") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS) + "broken\n")
    return SourceConfig(paths=(str(path),))


def test_a_sample_is_training_text_of_about_its_size(source):
    found = list(sample_texts(source, 20_000, 0.2, 30_000))
    assert found == list(sample_texts(source, 20_000, 0.2, 30_000))
    assert 20_000 < sum(map(len, found)) <= 30_000
    assert set(found[:-1]) <= set(TEXTS)
    assert not any(is_held_out(text, 0.2) for text in found[:-1])
    numbers = [int(text.split()[1].rstrip(":")) for text in found[:-1]]
    assert numbers == sorted(numbers)
    assert max(numbers) > 1500  # from all over the corpus


def test_a_small_corpus_is_its_own_sample(source):
    found = list(sample_texts(source, 20_000, 0.0, 10**9))
    assert found == TEXTS


def test_another_salt_gives_another_sample_and_dropped_text_is_not_in_it(source):
    parts = spaced(make_plan(source, 20_000).parts)

    def read(part):
        return read_source(part, source)

    def clean(text):
        return cleaned(text, Cleaning(filters=FilterConfig(min_words=10)))

    one, other = (list(sampled(parts, read, clean, 0.0, 30_000, salt)) for salt in ("a", "b"))
    assert one != other
    assert all(len(text.split()) >= 10 for text in [*one[:-1], *other[:-1]])


@pytest.mark.parametrize(("count", "kept"), [(1, 1), (32, 32), (33, 17), (1000, 32)])
def test_a_few_parts_are_taken_evenly(count, kept):
    found = spaced(range(count))
    assert len(found) == kept
    assert found[0] == 0
