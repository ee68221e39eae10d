"""The fast engine gives exactly what the reference engine gives, or says that it cannot."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_model.tiktoken_engine import NotConvertibleError, TiktokenEngine
from cascade_model.tokenizer import Tokenizer
from tests.cascade_model.tokenizer_kinds import (
    AWKWARD,
    CONVERTIBLE,
    FOREIGN,
    TEXTS,
    foreign,
    kind,
    real_texts,
    trained,
)


def require_equal(name: str, texts: list[str]) -> None:
    tokenizer = kind(name)
    expected, found = tokenizer.encode_arrays(texts), engine(name).encode_arrays(texts)
    for field in ("tokens", "lengths", "sizes"):
        right, own = getattr(expected, field), getattr(found, field)
        assert own.dtype == right.dtype
        assert np.array_equal(own, right), (field, texts)


ENGINES: dict[str, TiktokenEngine] = {}


def engine(name: str) -> TiktokenEngine:
    return ENGINES.setdefault(name, TiktokenEngine(kind(name)))


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_real_files_and_awkward_texts_have_the_same_tokens(name):
    require_equal(name, [*AWKWARD, *real_texts()])


@pytest.mark.parametrize("name", CONVERTIBLE)
@settings(max_examples=50, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4))
def test_any_text_has_the_same_tokens(name, texts):
    require_equal(name, texts)


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_special_tokens_in_a_text_are_ordinary_text(name):
    special = kind(name).special_tokens
    texts = [f"a{name}b {name} {name * 2}" for name in special]
    found = engine(name).encode_arrays(texts)
    assert not set(special.values()) & set(found.tokens.tolist())


def test_every_assigned_character_has_the_same_tokens():
    blocks = ["".join(map(chr, range(start, start + 0x80))) for start in range(0, 0x3000, 0x80)]
    blocks += [" ".join(map(chr, range(s, s + 0x100))) for s in range(0x1F000, 0x20000, 0x100)]
    require_equal("trained", blocks)
    require_equal("split", blocks)


def test_the_fast_engine_itself_answers_for_ordinary_text(monkeypatch):
    """Else equality would prove nothing."""
    fast = TiktokenEngine(trained())
    texts = [text for text in real_texts() if text]
    expected = trained().encode_arrays(texts).tokens

    def refuse(_: list[str]) -> None:
        raise AssertionError("asked the reference engine")

    monkeypatch.setattr(fast._reference, "encode_arrays", lambda t: refuse(t) if t else EMPTY)
    assert np.array_equal(fast.encode_arrays(texts).tokens, expected)


EMPTY = trained().encode_arrays([])


@pytest.mark.parametrize("name", FOREIGN)
def test_other_kinds_are_refused_with_a_reason(name):
    with pytest.raises(NotConvertibleError, match=r"^(it|its|some) "):
        TiktokenEngine(foreign(name))


@pytest.mark.parametrize(
    "change",
    [
        {"dropout": 0.1},
        {"byte_fallback": True},
        {"end_of_word_suffix": "</w>"},
    ],
)
def test_settings_of_the_model_that_are_not_known_are_refused(change):
    document = json.loads(trained().to_bytes())
    document["model"] |= change
    with pytest.raises(NotConvertibleError, match=next(iter(change))):
        TiktokenEngine(Tokenizer(json.dumps(document).encode()))


def test_a_pattern_that_drops_text_is_left_to_the_reference():
    document = json.loads(kind("removed").to_bytes())
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+"
    tokenizer = Tokenizer(json.dumps(document).encode())
    texts = ["one two", "one", ""]
    found, expected = TiktokenEngine(tokenizer).encode_arrays(texts), tokenizer.encode_arrays(texts)
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.sizes.sum() == sum(map(len, texts))


def test_a_text_too_long_for_the_pattern_goes_to_the_reference():
    text = "x" + " " * 1_000_000 + "y"
    with pytest.raises(ValueError, match="stack"):
        engine("trained")._engine.encode_to_numpy(text, disallowed_special=())
    require_equal("trained", [text, "short"])


@pytest.mark.parametrize("pattern", [r"\h+|\H", r"\X", r"\p{Emoji}|(?>\R)"])
def test_a_pattern_that_is_not_surely_read_alike_is_refused(pattern):
    document = json.loads(kind("split").to_bytes())
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    tokenizer = Tokenizer(json.dumps(document).encode())
    with pytest.raises(NotConvertibleError, match="its pattern"):
        TiktokenEngine(tokenizer)
