"""How log-probabilities are spelt: tokens that cut characters, offsets, texts that are equal."""

import pytest

from cascade_model.text_stream import TokenLogprob
from cascade_model.tokenizer import byte_tokenizer, train_tokenizer
from jobs.logprobs import CompletionLogprobs, TokenSpelling, chat_logprobs, joined


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["zwei Bäume 🌳 und ein ▁ Strich, zwei Bäume"] * 3, 300)


def told(value: float, *top: tuple[int, float]) -> TokenLogprob:
    return TokenLogprob(value, top)


def test_a_token_that_cuts_a_character_is_shown_by_its_bytes():
    spelling = TokenSpelling(byte_tokenizer())
    assert [spelling.text_of(byte) for byte in "ä".encode()] == ["bytes:\\xc3", "bytes:\\xa4"]
    assert spelling.text_of(ord("a")) == "a"
    assert spelling.text_of(256) == "<|endoftext|>"
    assert spelling.text_of(10**6) == ""


@pytest.mark.parametrize("text", ["zwei Bäume 🌳", "▁🌳ß\x00 \n", "", "日本語 über\u0301"])
def test_the_bytes_of_a_texts_tokens_are_the_texts(tokenizer, text):
    spelling = TokenSpelling(tokenizer)
    tokens = tokenizer.encode(text)
    assert b"".join(map(spelling.bytes_of, tokens)).decode() == text


def test_offsets_say_where_each_token_begins_in_the_text():
    text = "aä🌳b"
    tokens = list(text.encode())
    writer = CompletionLogprobs(TokenSpelling(byte_tokenizer()))
    parts = [writer.write(tokens[:3], [None] * 3), writer.write(tokens[3:], [None] * 5)]
    assert joined(parts)["text_offset"] == [0, 1, 1, 2, 2, 2, 2, 3]


def test_a_special_token_within_a_text_moves_no_offset():
    tokenizer = byte_tokenizer()
    tokens = [*b"ab", tokenizer.special_tokens["<|endoftext|>"], *b"c"]
    text = tokenizer.decode(tokens)
    told = CompletionLogprobs(TokenSpelling(tokenizer)).write(tokens, [None] * len(tokens))
    assert text == "abc"
    assert told["text_offset"] == [0, 1, 2, 2]


def test_the_token_itself_is_among_the_likeliest_and_equal_texts_keep_the_best():
    writer = CompletionLogprobs(TokenSpelling(byte_tokenizer()))
    [one, two, none] = writer.write(
        [97, 98, 99], [told(-3.0, (98, -0.1), (100, -2.0)), told(-0.5), None]
    )["top_logprobs"]
    assert one == {"b": -0.1, "d": -2.0, "a": -3.0}
    assert two == {"b": -0.5}
    assert none is None
    same = writer.write([10**6], [told(-3.0, (10**6 + 1, -1.0))])["top_logprobs"]
    assert same == [{"": -1.0}]


def test_a_chats_tokens_have_their_bytes_and_exactly_as_many_likeliest_as_asked():
    [token] = chat_logprobs(TokenSpelling(byte_tokenizer()), [0xC3], [told(-1.5, (97, -0.5))])[
        "content"
    ]
    assert token == {
        "token": "bytes:\\xc3",
        "logprob": -1.5,
        "bytes": [0xC3],
        "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]}],
    }
