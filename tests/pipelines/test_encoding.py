"""A document's tokens depend on it alone, however long it is and whatever stands beside it."""

import numpy as np
import pytest

from cascade_model.chat_template import ChatTemplate
from cascade_model.errors import InputError
from cascade_model.tokenizer import byte_tokenizer
from pipelines.encoding import DocumentEncoder
from pipelines.infilling import Infilling

TOKENIZER = byte_tokenizer()
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ODD = [{"role": "wizard", "content": "a"}]


def encoder(max_piece_bytes=1 << 20, engine=TOKENIZER):
    template = ChatTemplate.of("plain", TOKENIZER)
    return DocumentEncoder(TOKENIZER, engine, template, max_piece_bytes)


@pytest.mark.parametrize("max_piece_bytes", [4, 5, 16, 1000])
def test_a_long_text_is_encoded_in_pieces_and_joined(max_piece_bytes):
    texts = ["short", "a longer text\nof two lines", "naïve 中文", "x" * 40]
    found = encoder(max_piece_bytes).texts(texts)
    assert found.lengths.tolist() == [len(text.encode()) for text in texts]
    assert bytes(found.tokens.tolist()) == "".join(texts).encode()
    assert np.array_equal(found.sizes, np.ones(len(found.tokens)))


def test_no_piece_is_longer_than_allowed():
    seen = []

    class Watching:
        def encode_arrays(self, texts):
            seen.extend(texts)
            return TOKENIZER.encode_arrays(texts)

    encoder(16, Watching()).texts(["word " * 100])
    assert max(len(text.encode()) for text in seen) <= 16
    assert "".join(seen) == "word " * 100


def test_a_conversation_that_the_template_refuses_does_not_touch_the_others():
    alone, is_response, refused = encoder().chats([TURNS, TURNS])
    mixed, its_response, their = encoder().chats([ODD, TURNS, ODD, TURNS])
    assert (refused, their) == ([], [0, 2])
    assert np.array_equal(alone.tokens, mixed.tokens)
    assert np.array_equal(is_response, its_response)
    nothing, no_response, all_of_them = encoder().chats([ODD])
    assert (len(nothing.lengths), len(no_response), all_of_them) == (0, 0, [0])


@pytest.mark.parametrize("role", ["mask", "pad", "eos"])
def test_a_reserved_token_out_of_text_is_refused(role):
    reserved = getattr(TOKENIZER, f"{role}_id")

    class Broken:
        def encode_arrays(self, texts):
            encoded = TOKENIZER.encode_arrays(texts)
            encoded.tokens[0] = reserved
            return encoded

    with pytest.raises(InputError, match=f"reserved token {reserved}"):
        encoder(engine=Broken()).texts(["a"])


def test_a_token_of_infilling_out_of_text_is_refused_where_documents_are_rearranged():
    tokenizer = TOKENIZER.with_infill()
    infilling = Infilling.of(0.5, 0, tokenizer, 64)

    class Broken:
        def encode_arrays(self, texts):
            encoded = tokenizer.encode_arrays(texts)
            encoded.tokens[0] = tokenizer.infill_ids[1]
            return encoded

    assert DocumentEncoder(tokenizer, Broken(), None, 64).texts(["a"]).tokens.tolist() == [260]
    with pytest.raises(InputError, match="reserved token 260"):
        DocumentEncoder(tokenizer, Broken(), None, 64, infilling).texts(["a"])
