"""How many bytes of a text each of its tokens stands for.

Where tokens are bytes (byte-level BPE), a table of token lengths says it: one look-up per token.
Everything else goes by the engine's character offsets: a token reaches from where the one before it
ended to its own end, so that what a normaliser took away belongs to the token after it, and of two
tokens that share a character the first has all of its bytes. Either way the sizes of a text add up
to its length in UTF-8, and their prefix sums are places in its bytes.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

_UNICODE_FORMS = {"NFC", "NFD", "NFKC", "NFKD"}


def byte_symbols() -> list[str]:
    """The character that byte-level BPE writes for each byte: printable Latin-1 stays itself,
    every other byte is the next character from U+0100 on (the table of GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def byte_sizes(description: dict[str, Any], vocab_size: int) -> np.ndarray | None:
    """Bytes of each token, uint32 [vocab_size], from a parsed tokenizer.json.

    None unless tokens are written in the symbols of bytes and the pre-tokenizer adds none. A text
    with a byte that the vocabulary lacks has sizes that do not add up.
    """
    model, steps = description["model"], pre_tokenizer_steps(description)
    levels = [step for step in steps if step["type"] == "ByteLevel"]
    if model.get("type") != "BPE" or not levels:
        return None
    adds = any(step.get("add_prefix_space", True) for step in levels)
    marks = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if adds or marks:
        return None
    sizes = np.zeros(vocab_size, dtype=np.uint32)
    for token, index in model["vocab"].items():
        sizes[index] = len(token)
    for token in description.get("added_tokens", ()):
        sizes[token["id"]] = len(token["content"].encode())
    return sizes


def pre_tokenizer_steps(description: dict[str, Any]) -> list[dict[str, Any]]:
    """The pre-tokenizers of a parsed tokenizer.json in order, sequences laid flat."""
    return _flat(description.get("pre_tokenizer"), "pretokenizers")


def normalizer_steps(description: dict[str, Any]) -> list[dict[str, Any]]:
    """The normalisers of a parsed tokenizer.json in order, sequences laid flat."""
    return _flat(description.get("normalizer"), "normalizers")


def only_unicode_forms(description: dict[str, Any]) -> bool:
    """Whether all normalisers are forms of Unicode, which leave ASCII text as it is."""
    return all(step["type"] in _UNICODE_FORMS for step in normalizer_steps(description))


def utf8_lengths(texts: Iterable[str]) -> np.ndarray:
    """Bytes of each text in UTF-8, int64 [texts]."""
    lengths = [len(text) if text.isascii() else len(text.encode()) for text in texts]
    return np.array(lengths, dtype=np.int64)


def sums(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sum of each text's run of values, int64 [texts]; `lengths` are those of the runs."""
    before = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    stops = np.cumsum(lengths)
    return before[stops] - before[stops - lengths]


def sizes_from_offsets(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Bytes of each token, uint32 [tokens], by the engine's offsets in characters.

    The last token has what lies behind it, too; a text without tokens has no sizes.
    """
    if not offsets:
        return np.empty(0, dtype=np.uint32)
    stops = np.maximum.accumulate(np.array(offsets, dtype=np.int64).reshape(-1, 2)[:, 1])
    stops[-1] = len(text)
    places = np.concatenate([[0], np.cumsum(_character_bytes(text))])[stops]
    return np.diff(places, prepend=0).astype(np.uint32)


def _character_bytes(text: str) -> np.ndarray:
    """Bytes of each character in UTF-8, int64 [characters]."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    bounds = np.array([0x80, 0x800, 0x10000], dtype=np.uint32)
    return np.searchsorted(bounds, points, side="right") + 1


def _flat(step: dict[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step[parts] for inner in _flat(part, parts)]
