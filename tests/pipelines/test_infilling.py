"""A rearranged document is all of its text, cut by a pure function, and everything else stays."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade_model.commit import Folder
from cascade_model.corpus import Corpus, read_manifest
from cascade_model.errors import InputError
from cascade_model.tokenizer import byte_tokenizer
from cascade_model.verification import Verifier
from pipelines.config import SourceConfig
from pipelines.held_out import is_held_out
from pipelines.infilling import Infilling, rearranged
from pipelines.prepare import prepare
from pipelines.report import REPORT_HTML, REPORT_JSON
from tests.pipelines.config_making import config_for

TOKENIZER = byte_tokenizer().with_infill()
PREFIX, SUFFIX, MIDDLE = TOKENIZER.infill_ids
NAMES = "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"


def infilling(**changes) -> Infilling:
    return Infilling(**{"rate": 1.0, "seed": 0, "ids": TOKENIZER.infill_ids, "max_tokens": 63}
                     | changes)  # fmt: skip


@given(st.text(), st.integers(0, 2**63 - 1))
def test_the_parts_are_all_of_the_text_and_always_the_same(text, seed):
    prefix, suffix, middle = infilling(seed=seed).parts(text)
    assert prefix + middle + suffix == text
    assert infilling(seed=seed).parts(text) == (prefix, suffix, middle)


def test_the_share_and_the_cuts_are_as_they_should_be():
    texts = [f"{number:04d}" + "x" * 95 for number in range(4000)]
    assert not any(infilling(rate=0.0).parts(text) for text in texts)
    some = [infilling(rate=0.3).parts(text) is not None for text in texts]
    assert abs(np.mean(some) - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5
    parts = [infilling().parts(text) for text in texts]
    places = np.array([(len(p), len(p) + len(m)) for p, _, m in parts])
    # Two uniform places of 0..99 in order: their means are a third and two thirds.
    assert np.allclose(places.mean(axis=0), [33, 66], atol=4 * 24 / 4000**0.5)
    assert set(places.ravel()) == set(range(100))
    others = [infilling(seed=1).parts(text) for text in texts]
    assert np.mean([a == b for a, b in zip(parts, others, strict=True)]) < 0.01


def marked(parts) -> list[int]:
    """The tokens of parts by hand."""
    return [
        token
        for mark, part in zip(TOKENIZER.infill_ids, parts, strict=True)
        for token in [mark, *part.encode()]
    ]


def test_the_parts_are_tokenised_apart_each_behind_its_token():
    texts = ["", "a", "Größe 中文 🙂", "x" * 60, "y" * 61, NAMES]
    encoded = TOKENIZER.encode_arrays(texts)
    found, count = rearranged(encoded, texts, infilling(), TOKENIZER.encode_arrays)
    assert count == 5
    tokens, sizes = found.split()
    for text, own, size in zip(texts, tokens, sizes, strict=True):
        whole = list(text.encode())
        assert own.tolist() == (whole if text == "y" * 61 else marked(infilling().parts(text)))
        assert size.sum() == len(whole)
        assert (size[np.isin(own, TOKENIZER.infill_ids)] == 0).all()


def test_the_same_text_gives_the_same_tokens_in_any_company():
    texts = [f"text number {number}" for number in range(40)]
    half = infilling(rate=0.5)
    together, count = rearranged(
        TOKENIZER.encode_arrays(texts), texts, half, TOKENIZER.encode_arrays
    )
    assert 5 < count < 35
    for text, tokens in zip(texts, together.split()[0], strict=True):
        alone, _ = rearranged(
            TOKENIZER.encode_arrays([text]), [text], half, TOKENIZER.encode_arrays
        )
        assert alone.tokens.tolist() == tokens.tolist()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    short = [f"document {number}: " + "ab cd " * (number % 9) for number in range(300)]
    return [*short, NAMES, "", " ", *(f"long {number} " * 20 for number in range(30))]


@pytest.fixture(scope="module")
def source(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def corpus(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("infilled") / "corpus"
    prepare(config_for(output, source, infill_rate=0.5, packing="best_fit", part_bytes=4000))
    return output


def documents_of(corpus: Corpus) -> dict[int, list[int]]:
    """The tokens of every document, EOS at the end and no padding."""
    found: dict[int, list[int]] = {}
    for number in range(corpus.num_sequences):
        rows = corpus.rows([number])
        starts = np.flatnonzero(rows.is_start[0]).tolist()
        for start, stop in zip(starts, [*starts[1:], len(rows.tokens[0])], strict=True):
            tokens = rows.tokens[0][start:stop]
            text = tokens[tokens != TOKENIZER.pad_id].tolist()
            found[len(found)] = text
    return found


def test_a_corpus_holds_what_was_drawn_rearranged_and_all_else_as_it_was(corpus, texts):
    manifest = read_manifest(Folder(corpus))
    assert manifest.infill is not None
    assert manifest.infill.ids == TOKENIZER.infill_ids == (259, 260, 261)
    assert Corpus.open(str(corpus)).tokenizer().sha256 == TOKENIZER.sha256
    half, expected, count = infilling(rate=0.5), [], 0
    for text in texts:
        if not text.strip() or is_held_out(text, 0.1):
            continue
        parts = half.parts(text) if len(text.encode()) <= 60 else None
        whole = marked(parts) if parts else list(text.encode())
        count += parts is not None
        pieces = [whole[i : i + 64] for i in range(0, len([*whole, 0]), 64)]
        expected += [*pieces[:-1], [*pieces[-1], TOKENIZER.eos_id]]
    found = documents_of(Corpus.open(str(corpus))).values()
    assert sorted(found) == sorted(expected)
    assert manifest.infill.num_documents == count > 100
    held_out = documents_of(Corpus.open(str(corpus), "held_out")).values()
    assert not {PREFIX, SUFFIX, MIDDLE} & {token for tokens in held_out for token in tokens}


def test_what_stands_before_a_part_is_never_masked_and_the_end_always_may_be(corpus):
    opened = Corpus.open(str(corpus))
    rows = opened.rows(range(opened.num_sequences))
    is_mark = np.isin(rows.tokens, TOKENIZER.infill_ids)
    assert is_mark.sum() == 3 * opened.manifest.infill.num_documents
    assert not rows.is_maskable[is_mark].any()
    assert rows.is_maskable[~is_mark & (rows.tokens != TOKENIZER.pad_id)].all()
    ends = rows.tokens == TOKENIZER.eos_id
    empty = ends[:, 1:] & (rows.tokens[:, :-1] == MIDDLE)  # a middle without a character
    assert empty.any()
    split = opened.manifest.splits["train"]
    assert split.num_tokens == rows.is_maskable.sum()
    assert split.num_bytes == split.num_tokens - ends.sum()


def test_the_corpus_is_verified_and_told_of(corpus):
    manifest = read_manifest(Folder(corpus))
    verifier = Verifier(Folder(corpus), manifest)
    assert verifier.corpus() == []
    for split, entry in manifest.splits.items():
        for index in range(len(entry.shards)):
            assert verifier.shard(split, index) == []
    assert manifest.prepare["infill_rate"] == 0.5
    report = json.loads((corpus / REPORT_JSON).read_text())
    assert report["infill"]["num_documents"] == manifest.infill.num_documents
    assert 'data-pointer="/infill/num_documents"' in (corpus / REPORT_HTML).read_text()


def test_without_a_rate_nothing_of_it_is_in_the_corpus(source, tmp_path):
    manifest = prepare(config_for(tmp_path / "corpus", source))
    assert manifest.infill is None
    assert b"infill" not in (tmp_path / "corpus" / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="without infill_rate"):
        prepare(config_for(tmp_path / "corpus", source, infill_rate=0.5))


def test_the_rate_is_part_of_the_identity(corpus, source):
    settings = {"packing": "best_fit", "part_bytes": 4000}
    with pytest.raises(InputError, match=r"infill_rate=0\.5 but this run has 0\.25"):
        prepare(config_for(corpus, source, infill_rate=0.25, **settings))
    with pytest.raises(InputError, match=r"infill_rate=0\.5 but this run has no such setting"):
        prepare(config_for(corpus, source, **settings))


@pytest.mark.ray
def test_ray_gives_the_same_bytes(corpus, source, tmp_path, ray_local):
    output = tmp_path / "corpus"
    settings = {"packing": "best_fit", "part_bytes": 4000, "runner": "ray"}
    manifest = prepare(config_for(output, source, infill_rate=0.5, **settings))
    assert manifest.digest == read_manifest(Folder(corpus)).digest


def test_a_trained_tokenizer_has_the_tokens_within_its_vocabulary(source, tmp_path):
    settings = {"tokenizer": "train", "vocab_size": 280, "tokenizer_engine": "auto"}
    manifest = prepare(config_for(tmp_path / "corpus", source, infill_rate=1.0, **settings))
    assert manifest.infill.ids == (3, 4, 5)
    assert manifest.vocab_size == 280
    assert manifest.tokenizer_engine["name"] == "tiktoken"
    tokens = Corpus.open(str(tmp_path / "corpus")).rows([0]).tokens
    assert np.isin([3, 4, 5], tokens).all()


def test_conversations_stay_as_they_are_and_alone_are_refused(source, tmp_path):
    turns = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]
    path = tmp_path / "c.jsonl"
    path.write_text((json.dumps({"messages": turns}) + "\n") * 20)
    chats = SourceConfig(paths=(str(path),), messages_column="messages")
    settings = {"source": SourceConfig(), "infill_rate": 1.0, "dedup": "none"}
    mixture = {"chats": chats, "texts": SourceConfig(paths=(str(source),))}
    manifest = prepare(config_for(tmp_path / "corpus", "", mixture=mixture, **settings))
    first, second = manifest.splits["train"].sources
    opened = Corpus.open(str(tmp_path / "corpus"))
    chat = opened.rows(range(first.num_sequences)).tokens
    text = opened.rows(range(second.first_sequence, opened.num_sequences)).tokens
    assert PREFIX not in chat
    assert PREFIX in text
    with pytest.raises(InputError, match="every source holds conversations"):
        config_for(tmp_path / "other", "", mixture={"chats": chats}, **settings)


def test_a_rate_that_rearranges_nothing_is_one_sentence(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * 100}) + "\n")
    with pytest.raises(InputError, match="rearranges none of 1 documents"):
        prepare(config_for(tmp_path / "corpus", path, infill_rate=1.0, held_out_rate=0.0))
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_outside_its_bounds_is_refused(rate):
    with pytest.raises(InputError, match="infill_rate"):
        config_for("out", "in", infill_rate=rate)
