"""Ranks of byte strings do what any list of merges does, also one that no training would write."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_model.byte_pairs import joined, merge_ranks, whole_words
from cascade_model.tiktoken_engine import NotConvertibleError, TiktokenEngine
from cascade_model.tokenizer import Tokenizer, byte_tokenizer
from tests.cascade_model.tokenizer_kinds import kind, trained


def with_merges(merges: list[tuple[str, str]]) -> Tokenizer:
    document = json.loads(byte_tokenizer().to_bytes())
    vocabulary = document["model"]["vocab"]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary) + 3)
    document["model"]["merges"] = [list(merge) for merge in merges]
    return Tokenizer(json.dumps(document).encode())


@st.composite
def merge_lists(draw) -> list[tuple[str, str]]:
    """Merges of parts that are there, in any order: several ways to one token, tokens that can
    never arise, parts that come later than what they are part of."""
    tokens, merges = ["a", "b", "c"], []
    for _ in range(draw(st.integers(0, 14))):
        merge = (draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens)))
        if merge not in merges and len("".join(merge)) < 9:
            merges.append(merge)
            tokens.append("".join(merge))
    return draw(st.permutations(merges)) if draw(st.booleans()) else merges


@settings(max_examples=300, deadline=None)
@given(merge_lists(), st.lists(st.text("abc", max_size=24), max_size=6))
def test_any_list_of_merges_gives_the_tokens_of_the_reference(merges, words):
    tokenizer = with_merges(merges)
    try:
        found = TiktokenEngine(tokenizer).encode_arrays(words)
    except NotConvertibleError:
        made = ["".join(merge) for merge in merges]
        later = [set(merge) & set(made[place:]) for place, merge in enumerate(merges)]
        assert any(later)
        return
    assert found.tokens.tolist() == [i for word in words for i in tokenizer.encode(word)]


def test_a_token_that_no_bytes_come_to_has_no_rank():
    # "bc" is joined first, so "ab" + "c" is never there.
    ranks, ids = merge_ranks(
        with_merges([("b", "c"), ("a", "b"), ("ab", "c")]).description["model"]
    )
    assert list(ranks)[256:] == [b"bc", b"ab"]
    assert len(ids) == len(ranks)


def test_ranks_alone_would_join_what_the_file_does_not():
    """The negative control: the usual conversion, every token at its id, gives other tokens."""
    tokenizer = with_merges([("b", "c"), ("a", "b"), ("ab", "c")])
    vocabulary = {t.encode("latin-1"): i for t, i in tokenizer.description["model"]["vocab"].items()
                  if set(t) <= set("abc")}  # fmt: skip
    assert joined(b"abc", vocabulary) == [b"abc"]
    assert tokenizer.encode("abc") == [vocabulary[b"a"], vocabulary[b"bc"]]


def test_further_merges_of_a_token_change_nothing():
    model = kind("every split").description["model"]
    ranks, _ = merge_ranks(model)
    assert len(model["merges"]) > 1.3 * (len(ranks) - 256)
    assert len(ranks) == len(model["vocab"]) - 5  # all but the special tokens


def test_merges_out_of_order_are_refused_where_they_would_matter():
    with pytest.raises(ValueError, match="before those of their parts"):
        merge_ranks(with_merges([("a", "bc"), ("b", "c")]).description["model"])
    known = with_merges([("a", "b"), ("ab", "c"), ("a", "bc"), ("b", "c")])
    assert list(merge_ranks(known.description["model"])[0])[256:] == [b"ab", b"abc", b"bc"]


def test_every_token_of_a_trained_tokenizer_can_arise():
    model = trained().description["model"]
    assert len(merge_ranks(model)[0]) == 256 + len(model["merges"])


def test_whole_words_that_would_be_joined_inside_others_are_refused():
    model = kind("whole words").description["model"]
    ranks, _ = merge_ranks(model)
    assert {b"qzjx", b" heightened", b" widthQ"} <= whole_words(model, ranks).keys()
    two = {**model, "vocab": {**model["vocab"], "qz": 9999}}
    assert whole_words(two, ranks) is None
