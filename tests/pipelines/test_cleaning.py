"""A text comes out cleaned or with the reason why not; nothing else happens to it."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.cleaning import (
    Cleaning,
    Drop,
    cleaned,
    cleaned_document,
    failed_filters,
    is_long,
    normalised,
    pieces,
)
from pipelines.config import FilterConfig
from pipelines.documents import Document

PLAIN = Cleaning(filters=FilterConfig())
TEXTS = st.text(
    alphabet=st.one_of(
        st.characters(exclude_categories=("Cs",)), st.sampled_from("a e\u0301\r\n\t\0\x85.。 ")
    ),
    max_size=60,
)


@given(TEXTS)
def test_normalising_twice_is_normalising_once(text):
    once = normalised(text, "nfc")
    assert normalised(once, "nfc") == once
    assert unicodedata.is_normalized("NFC", once)
    assert all(unicodedata.category(c) != "Cc" or c in "\t\n" for c in once)


@given(TEXTS)
def test_without_a_rule_a_text_stays_as_it_is_unless_it_is_empty(text):
    assert cleaned(text, PLAIN) == (Drop("empty") if not text.strip() else text)


def test_line_ends_accents_and_control_characters_have_one_spelling():
    assert normalised("a\r\nb\rc\td\x00\x0b\x85", "nfc") == "a\nb\nc\td"
    assert normalised("e\x00\u0301", "nfc") == "é"
    assert normalised("e\x00\u0301\r\n", "none") == "e\x00\u0301\r\n"


@given(TEXTS, st.integers(4, 12))
def test_pieces_join_to_the_text_and_none_is_longer_than_allowed(text, max_bytes):
    found = pieces(text, max_bytes)
    assert "".join(found) == text
    assert all(len(piece.encode()) <= max_bytes for piece in found)
    assert is_long(text, max_bytes) == (len(found) > 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two\nthree four", ["one two\n", "three four"]),
        ("One two. Three four", ["One two. ", "Three four"]),
        ("one two three four", ["one two ", "three four"]),
        ("onetwothreefour", ["onetwothre", "efour"]),
        ("短い文。次の文", ["短い文", "。次の", "文"]),
    ],
)
def test_a_long_text_is_cut_behind_a_line_a_sentence_or_a_word(text, expected):
    assert pieces(text, 10) == expected


def test_a_long_document_is_kept_whole_or_dropped():
    short, long = "é" * 4, "é" * 5
    drop = Cleaning(max_document_bytes=8, long_documents="drop", filters=FilterConfig())
    assert cleaned(short, drop) == short
    assert cleaned(long, drop) == Drop("max_document_bytes")
    cut = Cleaning(max_document_bytes=8, long_documents="cut", filters=FilterConfig())
    assert cleaned(long, cut) == long


RULES = [
    ("min_bytes", 9, "ééééé", "éééé"),
    ("min_words", 3, "a b c", "a b"),
    ("max_words", 2, "a b", "a b c"),
    ("min_mean_word_length", 3.0, "abcd ab", "abc ab"),
    ("max_mean_word_length", 3.0, "abcd ab", "abcd abc"),
    ("min_letter_share", 0.5, "a1 22", "a1 22 33"),
    ("max_symbol_share", 0.5, "# a", "# # a"),
    ("max_symbol_share", 0.5, "so… it", "so... it… is"),
    ("max_bullet_line_share", 0.5, "- a\nb", "- a\n• b\nc"),
    ("max_ellipsis_line_share", 0.5, "a...\nb", "a...\nb…\nc"),
    ("max_repeated_line_share", 0.5, "a\n a\nb\nc", "a\na\n\na\na\nb"),
    ("min_unique_word_share", 0.5, "a b a b", "a b a b a"),
]


@pytest.mark.parametrize(("name", "threshold", "good", "bad"), RULES)
def test_each_rule_keeps_its_threshold_and_gives_its_name(name, threshold, good, bad):
    filters = FilterConfig(**{name: threshold})
    assert list(failed_filters(good, filters)) == []
    assert list(failed_filters(bad, filters)) == [name]
    assert cleaned(bad, Cleaning(filters=filters)) == Drop(name)
    assert cleaned(bad, PLAIN) == bad


def test_every_rule_that_can_be_set_has_a_case_above():
    assert {name for name, *_ in RULES} | {"banned_phrases"} == set(vars(FilterConfig()))


def test_a_banned_phrase_is_found_in_any_case():
    filters = FilterConfig(banned_phrases=("lorem ipsum",))
    assert list(failed_filters("So: LOREM Ipsum!", filters)) == ["banned_phrases"]
    assert list(failed_filters("lorem, ipsum", filters)) == []


def test_the_first_rule_that_fails_gives_the_reason():
    filters = FilterConfig(min_words=3, min_bytes=100)
    assert cleaned("a b", Cleaning(filters=filters)) == Drop("min_bytes")
    assert list(failed_filters("a b", filters)) == ["min_bytes", "min_words"]


def test_of_a_conversation_each_content_is_normalised_and_all_are_judged_together():
    turns = [{"role": "user", "content": "a\r\n"}, {"role": "assistant", "content": "b\x00"}]
    document = Document(row=0, path="p", where="w", text="a\r\n\n\nb\x00", messages=turns)
    found = cleaned_document(document, Cleaning(normalise="nfc", filters=FilterConfig()))
    assert found.messages == [
        {"role": "user", "content": "a\n"},
        {"role": "assistant", "content": "b"},
    ]
    assert found.text == "a\n\n\nb"
    filters = FilterConfig(min_words=3)
    assert cleaned_document(document, Cleaning(filters=filters)) == Drop("min_words")
