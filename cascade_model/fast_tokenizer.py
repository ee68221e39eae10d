"""A faster engine for a tokenizer, admitted only where it gives the same tokens.

The reference engine is Hugging Face's. Another one may encode a corpus after it has encoded a
stated sample of it in the same way: tokens, lengths and sizes. Its name and version belong into the
corpus's manifest. A worker builds the admitted engine again from its name.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np
import tokenizers

from cascade_model import tiktoken_engine
from cascade_model.errors import InputError
from cascade_model.tiktoken_engine import NotConvertibleError, TiktokenEngine
from cascade_model.token_sizes import utf8_lengths
from cascade_model.tokenizer import Encoded, Encoder, Tokenizer

REFERENCE = "tokenizers"
_BATCH = 64
_SHOWN = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """Which engine encodes a corpus, and why."""

    engine: Encoder
    name: str
    version: str
    note: str
    """One sentence."""
    sample_texts: int
    """Texts that both engines encoded; 0 when none was compared."""
    sample_bytes: int
    """Their bytes in UTF-8."""


@lru_cache(maxsize=2)
def _built(tokenizer: Tokenizer) -> Encoder:
    """Made once in a process: it takes about a second for 32,768 tokens."""
    return TiktokenEngine(tokenizer)


def admit(
    tokenizer: Tokenizer,
    sample: Iterable[str],
    build: Callable[[Tokenizer], Encoder] = _built,
) -> Admission:
    """The fast engine when it encodes the whole sample as the reference does, else the tokenizer.

    `build` makes the engine on trial; it raises `NotConvertibleError` for a tokenizer that it
    cannot stand for.
    """
    fast = f"{tiktoken_engine.NAME} {tiktoken_engine.VERSION}"
    try:
        engine = build(tokenizer)
    except NotConvertibleError as reason:
        return _refused(tokenizer, f"{fast} cannot stand for this tokenizer, as {reason}", 0, 0)
    texts, size, rest = 0, 0, iter(sample)
    while batch := list(islice(rest, _BATCH)):
        wrong = _first_difference(batch, engine.encode_arrays(batch), tokenizer)
        if wrong is not None:
            texts, size = texts + wrong + 1, size + int(utf8_lengths(batch[: wrong + 1]).sum())
            shown = repr(batch[wrong][:_SHOWN])
            note = f"{fast} gave other tokens than the reference engine for the text {shown}"
            return _refused(tokenizer, note, texts, size)
        texts, size = texts + len(batch), size + int(utf8_lengths(batch).sum())
    if not texts:
        return _refused(tokenizer, f"{fast} was not tried, as the sample is empty", 0, 0)
    return Admission(
        engine=engine,
        name=tiktoken_engine.NAME,
        version=tiktoken_engine.VERSION,
        note=f"{fast} gave the same tokens as the reference engine on {texts:,} texts "
        f"({size:,} bytes)",
        sample_texts=texts,
        sample_bytes=size,
    )


def engine_of(tokenizer: Tokenizer, name: str) -> Encoder:
    """The engine that `admit` named, built again; `InputError` for an unknown name."""
    if name == REFERENCE:
        return tokenizer
    if name != tiktoken_engine.NAME:
        raise InputError(
            f"tokenizer_engine={name} is not known; use {REFERENCE} or {tiktoken_engine.NAME}"
        )
    try:
        return _built(tokenizer)
    except NotConvertibleError as reason:
        raise InputError(
            f"tokenizer_engine={name} cannot stand for this tokenizer, as {reason}; use {REFERENCE}"
        ) from None


def _refused(tokenizer: Tokenizer, reason: str, texts: int, size: int) -> Admission:
    return Admission(
        engine=tokenizer,
        name=REFERENCE,
        version=tokenizers.__version__,
        note=f"{reason}; the reference engine is used",
        sample_texts=texts,
        sample_bytes=size,
    )


def _first_difference(texts: list[str], found: Encoded, tokenizer: Tokenizer) -> int | None:
    """Place of the first text that the two engines encode in different ways."""
    expected = tokenizer.encode_arrays(texts)
    if len(found.lengths) != len(texts):
        return len(texts) - 1
    pairs = zip(*found.split(), *expected.split(), strict=True)
    for place, (tokens, sizes, right_tokens, right_sizes) in enumerate(pairs):
        if not (np.array_equal(tokens, right_tokens) and np.array_equal(sizes, right_sizes)):
            return place
    return None
