"""A byte-level BPE on tiktoken: the tokens of the reference engine, several times as fast.

Two things must be the same: the words that a text is cut into, and the tokens of a word. The tokens
are by construction (`byte_pairs`). The words are where both engines read the pattern's classes
alike; what that cannot vouch for goes, a text at a time, to the reference engine: characters of
another class, text that the normaliser changes, the text of an added token that is not special (the
reference cuts it out first), words too long for the pattern's engine, and any text whose tokens do
not add up to its bytes.
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import tiktoken

from cascade_model.byte_pairs import NO_ID, merge_ranks, whole_words
from cascade_model.pre_tokens import CHARACTERS, doubtful, other_digits, word_pattern
from cascade_model.token_sizes import (
    only_unicode_forms,
    pre_tokenizer_steps,
    sums,
    utf8_lengths,
)
from cascade_model.tokenizer import Encoded, Tokenizer

NAME, VERSION = "tiktoken", tiktoken.__version__
_NO_TOKENS = np.empty(0, dtype=np.uint32)


class NotConvertibleError(Exception):
    """A tokenizer that tiktoken cannot stand for; the message is a clause that says why."""


class TiktokenEngine:
    """`encode_arrays` of a tokenizer, by tiktoken where that is sure to give the same."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """`NotConvertibleError` when the tokenizer is of another kind."""
        description = tokenizer.description
        model = description["model"]
        _require_byte_pairs(model)
        if not only_unicode_forms(description):
            raise NotConvertibleError("its normaliser changes most texts")
        steps = pre_tokenizer_steps(description)
        pattern = word_pattern(steps)
        if pattern is None:
            raise NotConvertibleError("its pre-tokenizer is not one pattern over bytes")
        try:
            ranks, ids = merge_ranks(model)
        except ValueError as error:
            raise NotConvertibleError(f"its {error}") from None
        if model.get("ignore_merges"):
            words = whole_words(model, ranks)
            if words is None:
                raise NotConvertibleError("some of its tokens are whole words only")
            ranks |= {word: len(ranks) + n for n, word in enumerate(words)}
            ids += words.values()
        self._reference = tokenizer
        # A byte without an id has no size either, so a text that holds it does not add up.
        known = np.array(ids) != NO_ID
        self._ids = np.where(known, ids, 0).astype(np.uint32)
        self._sizes = np.where(known, [len(token) for token in ranks], 0).astype(np.uint32)
        try:
            doubts = doubtful(pattern, members)
            self._engine = _encoding(pattern, ranks)
        except ValueError:
            raise NotConvertibleError("its pattern is not one that both engines read") from None
        if any(step["type"] == "Digits" for step in steps):
            doubts += other_digits()
        if any(character.isascii() for character in doubts):
            raise NotConvertibleError("its pattern means something else to tiktoken")
        added = description.get("added_tokens", ())
        self._cut_out = [token["content"] for token in added if not token["special"]]
        self._odd = re.compile(f"[{re.escape(doubts)}]") if doubts else None

    def encode_arrays(self, texts: Sequence[str]) -> Encoded:
        """As `Tokenizer.encode_arrays`: the same tokens, lengths and sizes."""
        found = [self._ranks_of(text) for text in texts]
        lengths = np.array([len(each) for each in found], dtype=np.int64)
        ranks = np.concatenate([_NO_TOKENS, *found])
        encoded = Encoded(self._ids[ranks], lengths, self._sizes[ranks])
        wrong = sums(encoded.sizes, lengths) != utf8_lengths(texts)
        others = np.flatnonzero(wrong).tolist()
        return encoded.replaced(others, self._reference.encode_arrays([texts[i] for i in others]))

    def _ranks_of(self, text: str) -> np.ndarray:
        """Ranks of a text's tokens, or nothing where the reference engine must answer."""
        if self._is_doubtful(text) or not self._reference.keeps(text):
            return _NO_TOKENS
        try:
            return self._engine.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # a stretch of white space too long for the pattern's stack
            return _NO_TOKENS

    def _is_doubtful(self, text: str) -> bool:
        """Whether the text holds what the two engines may cut in other places."""
        if any(name in text for name in self._cut_out):
            return True
        return bool(self._odd) and not text.isascii() and bool(self._odd.search(text))


def _require_byte_pairs(model: dict[str, Any]) -> None:
    if model.get("type") != "BPE":
        raise NotConvertibleError("it is no byte-level BPE")
    for name in (
        "dropout",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
        "fuse_unk",
    ):
        if model.get(name):
            raise NotConvertibleError(f"its model sets {name}")


def _encoding(pattern: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    # Never allowed, so never made; but without any, tiktoken looks for none at every character.
    special = {"<|none|>": len(ranks)}
    return tiktoken.Encoding(
        "cascade", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
    )


@cache
def members(written: str) -> str:
    """The characters of a class by tiktoken, which leaves out what its pattern does not match."""
    engine = _encoding(written + "+", {bytes([byte]): byte for byte in range(256)})
    found = engine.encode_to_numpy(CHARACTERS, disallowed_special=())
    return found.astype(np.uint8).tobytes().decode()
