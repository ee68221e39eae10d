"""Text that is never taken back, and exact stops."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_model.text_stream import TextStream, TokenLogprob
from cascade_model.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()


def pieces(data: bytes, size: int, stop: tuple[str, ...] = ()) -> tuple[list[str], int, str]:
    """Bytes cut into blocks of `size`, through a text stream: texts, tokens taken, reason."""
    stream, texts, taken = TextStream(TOKENIZER.decode, stop), [], 0
    for start in range(0, len(data), size):
        block = list(data[start : start + size])
        end = "length" if start + size >= len(data) else None
        chunk = stream.push(block, passes=1, steps=1, finish_reason=end)
        texts.append(chunk.text)
        taken += len(chunk.token_ids)
        if chunk.finish_reason:
            return texts, taken, chunk.finish_reason
    return texts, taken, "length"


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=40), st.integers(1, 9))
def test_joined_pieces_are_the_decoded_whole_even_for_bytes_that_are_no_text(data, size):
    texts, taken, reason = pieces(data, size)
    assert "".join(texts) == data.decode("utf-8", "replace")
    assert (taken, reason) == (len(data), "length")


def test_a_character_cut_by_a_block_border_waits_for_its_rest():
    texts, *_ = pieces("a€b".encode(), 2)
    assert texts == ["a", "€", "b"]


@settings(deadline=None)
@given(
    st.text(alphabet="ab€", min_size=1, max_size=24),
    st.lists(st.text(alphabet="ab€", min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(1, 9),
)
def test_the_stop_that_is_complete_first_cuts_the_text_whatever_the_blocks(text, stops, size):
    texts, taken, reason = pieces(text.encode(), size, tuple(stops))
    ends = [end for end in range(1, len(text) + 1) if text[:end].endswith(tuple(stops))]
    if not ends:
        assert ("".join(texts), reason) == (text, "length")
        return
    seen = text[: ends[0]]
    longest = max(len(stop) for stop in stops if seen.endswith(stop))
    assert ("".join(texts), reason) == (seen[: len(seen) - longest], "stop")
    assert taken == len(seen.encode())


def test_what_may_become_a_stop_is_held_back_and_released_when_it_does_not():
    texts, *_ = pieces(b"xEND? yEND!", 2, ("END!",))
    assert texts[:3] == ["x", "", "END? "]
    assert "".join(texts) == "xEND? y"


def test_the_end_of_text_token_counts_but_is_not_text():
    chunk = TextStream(TOKENIZER.decode).push(
        [104, 105, TOKENIZER.eos_id], passes=2, steps=1, finish_reason="stop"
    )
    assert (chunk.text, len(chunk.token_ids), chunk.finish_reason) == ("hi", 3, "stop")


def told(values: list[float]) -> list[TokenLogprob]:
    return [TokenLogprob(value, ()) for value in values]


@pytest.mark.parametrize(("stop", "kept"), [((), 5), (("b!",), 3), (("a",), 1)])
def test_what_is_told_is_cut_where_the_tokens_are(stop, kept):
    logprobs = told([-1.0, -2.0, -3.0, -4.0, -5.0])
    chunk = TextStream(TOKENIZER.decode, stop).push(
        list(b"ab!cd"), passes=1, steps=1, finish_reason="length", logprobs=logprobs
    )
    assert chunk.logprobs == tuple(logprobs[:kept])
    assert len(chunk.token_ids) == kept
