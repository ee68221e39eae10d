"""The sizes of a text's tokens add up to its bytes, and say where each token begins."""

import numpy as np
import pytest
from hypothesis import given, settings

from cascade_model.token_sizes import sizes_from_offsets, sums, utf8_lengths
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

EVERY = {**dict.fromkeys(CONVERTIBLE, kind), **dict.fromkeys(FOREIGN, foreign)}


@pytest.mark.parametrize("name", EVERY)
def test_sizes_add_up_to_the_bytes_of_each_text(name):
    tokenizer, texts = EVERY[name](name), [*AWKWARD, *real_texts(5)]
    encoded = tokenizer.encode_arrays(texts)
    assert encoded.sizes.dtype == np.uint32
    assert len(encoded.sizes) == len(encoded.tokens) == encoded.lengths.sum()
    has_tokens = encoded.lengths > 0
    expected = np.where(has_tokens, utf8_lengths(texts), 0)
    assert sums(encoded.sizes, encoded.lengths).tolist() == expected.tolist()
    assert has_tokens[-5:].all()


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_where_tokens_are_bytes_a_size_is_its_token(text):
    tokenizer = trained()
    encoded = tokenizer.encode_arrays([text])
    data, stops = text.encode(), np.cumsum(encoded.sizes)
    cut = [data[stop - size : stop] for size, stop in zip(encoded.sizes, stops, strict=True)]
    assert b"".join(cut) == data
    assert [tokenizer.decode([token]) for token in encoded.tokens] == [
        each.decode(errors="replace") for each in cut
    ]


@settings(max_examples=50, deadline=None)
@given(TEXTS)
def test_other_sizes_end_at_characters(text):
    sizes = foreign("unigram").encode_arrays([text]).sizes
    ends = set(np.cumsum([len(character.encode()) for character in text]).tolist()) | {0}
    assert set(np.cumsum(sizes).tolist()) <= ends


def test_offsets_that_skip_overlap_or_stop_early_still_cover_the_text():
    # " é🙂x ": the first token starts late, two share 🙂, nothing covers the last space.
    sizes = sizes_from_offsets(" é🙂x ", [(1, 2), (2, 3), (2, 3), (3, 4)])
    assert sizes.tolist() == [3, 4, 0, 2]
    assert sizes_from_offsets("abc", [(0, 2), (1, 1), (2, 3)]).tolist() == [2, 0, 1]
    assert sizes_from_offsets("  ", []).tolist() == []


@pytest.mark.parametrize("name", ["nfc", "missing bytes", "trained"])
def test_sizes_do_not_depend_on_what_stands_beside_a_text(name):
    tokenizer = kind(name)
    together = tokenizer.encode_arrays(AWKWARD)
    alone = [tokenizer.encode_arrays([text]) for text in AWKWARD]
    assert together.sizes.tolist() == np.concatenate([each.sizes for each in alone]).tolist()
    assert together.tokens.tolist() == np.concatenate([each.tokens for each in alone]).tolist()


def test_a_normaliser_that_changes_a_text_does_not_shift_the_sizes():
    text = "e\u0301 Å x"  # NFC makes two characters one
    encoded = kind("nfc").encode_arrays([text])
    assert encoded.sizes.sum() == len(text.encode())
    assert len(encoded.tokens) < len(text.encode())
