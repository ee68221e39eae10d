"""The merges of a byte-level BPE as ranks of byte strings, which is how faster engines want them.

The file lists merges: pairs of tokens, the first of all that apply is applied first. A rank engine
knows joined byte strings only: of all neighbours that join to a known one, it joins those of the
lowest rank. Both do the same if every token is known in the one way in which it can arise, and the
tokens that cannot arise are not known at all.

Why this is enough: take two neighbours X and Y whose bytes are those of a known token T. No merge
crossed the two ends of this stretch so far, so inside it happened exactly what happens to the bytes
of T on their own. On their own they come, by the merges before that of T, to the two parts A and B
of T's merge: this is what is checked here of each token, in order. So X is A and Y is B. A merge
whose parts the bytes of its own token never come to can never apply, and is left out. So is any
further merge of a known token. All this holds where a token's merge stands behind those of its
parts, as training writes them.
"""

import itertools
from typing import Any

from cascade_model.token_sizes import byte_symbols

NO_ID = -1
_BYTES = {symbol: byte for byte, symbol in enumerate(byte_symbols())}


def merge_ranks(model: dict[str, Any]) -> tuple[dict[bytes, int], list[int]]:
    """Rank of each token that can arise, and the id of each rank.

    `model` is the parsed BPE of a tokenizer.json. The bytes come first, those that the vocabulary
    lacks with the id `NO_ID`, then the tokens in the order of their merges. `ValueError` when the
    only merges of a token stand before that of its part: they would be applied out of order.
    """
    vocabulary = model["vocab"]
    ranks = {bytes([byte]): byte for byte in range(256)}
    ids = [vocabulary.get(symbol, NO_ID) for symbol in byte_symbols()]
    early: list[list[bytes]] = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        parts = [as_bytes(left), as_bytes(right)]
        token = b"".join(parts)
        if token in ranks:
            continue
        if not ranks.keys() >= set(parts):
            early.append(parts)
        elif joined(token, ranks) == parts:
            ranks[token] = len(ids)
            ids.append(vocabulary[left + right])
    if any(ranks.keys() >= set(parts) and b"".join(parts) not in ranks for parts in early):
        raise ValueError("merges stand before those of their parts")
    return ranks, ids


def whole_words(model: dict[str, Any], ranks: dict[bytes, int]) -> dict[bytes, int] | None:
    """Ids of the tokens that arise only as a whole word (`ignore_merges`), for the last ranks.

    None when a rank engine would also join one inside a word, where the file has no merge for it.
    """
    ids = {as_bytes(t): i for t, i in model["vocab"].items() if _BYTES.keys() >= set(t)}
    rest = {token: i for token, i in ids.items() if token and token not in ranks}
    later = ranks | {token: len(ranks) + n for n, token in enumerate(rest)}
    return None if any(joined(token, later) == [token] for token in rest) else rest


def as_bytes(token: str) -> bytes:
    """The bytes that a token of the vocabulary is written for."""
    return bytes([_BYTES[symbol] for symbol in token])


def joined(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The parts of a word when neighbours are joined, the lowest rank and then the left one first.

    The number of steps grows with the square of the word's length.
    """
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 1:
        pairs = [left + right for left, right in itertools.pairwise(parts)]
        best = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
        if pairs[best] not in ranks:
            break
        parts[best : best + 2] = [pairs[best]]
    return parts
