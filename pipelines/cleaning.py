"""Cleaning: a text in, the cleaned text or the reason why it is dropped out.

The order is fixed: normalise, empty, long, then the filters as `FilterConfig` lists them. The first
rule that fails gives the reason. Nothing but `normalise` changes a text.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from pipelines.config import FilterConfig
from pipelines.documents import Document

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Unicode's control characters (Cc) but tab and newline."""
_BULLETS = ("-", "*", "•", "‣", "◦", "▪", "–")
_ELLIPSES = ("...", "…")


@dataclass(frozen=True, slots=True)
class Drop:
    """Why a document is left out."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Cleaning:
    """The settings of cleaning."""

    normalise: Literal["none", "nfc"] = "none"
    max_document_bytes: int = 1 << 20
    long_documents: Literal["cut", "drop"] = "cut"
    filters: FilterConfig


def cleaned(text: str, cleaning: Cleaning) -> str | Drop:
    """The text as it goes on, or why it does not."""
    text = normalised(text, cleaning.normalise)
    if not text or text.isspace():
        return Drop("empty")
    if cleaning.long_documents == "drop" and is_long(text, cleaning.max_document_bytes):
        return Drop("max_document_bytes")
    reason = next(failed_filters(text, cleaning.filters), None)
    return Drop(reason) if reason else text


def cleaned_document(document: Document, cleaning: Cleaning) -> Document | Drop:
    """A document that was read whole, cleaned; of a conversation each content is normalised, and
    the rules judge all of them together."""
    if document.messages is not None:
        messages = [
            {**turn, "content": normalised(turn["content"], cleaning.normalise)}
            for turn in document.messages
        ]
        document = replace(document, messages=messages)
    text = cleaned(document.text or "", cleaning)
    if isinstance(text, Drop):
        return text
    return document if text == document.text else replace(document, text=text)


def normalised(text: str, how: Literal["none", "nfc"]) -> str:
    """The text in one spelling; once more changes nothing.

    Control characters go first, as a letter and its accent may come together when they are gone.
    """
    if how == "none":
        return text
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return unicodedata.normalize("NFC", _CONTROLS.sub("", text))


def is_long(text: str, max_bytes: int) -> bool:
    """Whether a text has more UTF-8 bytes than this."""
    if len(text) * 4 <= max_bytes:
        return False
    return len(text) > max_bytes or len(text.encode()) > max_bytes


def pieces(text: str, max_bytes: int) -> list[str]:
    """The text in pieces of at most `max_bytes` (at least 4) UTF-8 bytes that join to it again.

    A piece ends behind a line, else behind a sentence, else behind a word, in the second half of
    what it could hold; else between two characters.
    """
    if not is_long(text, max_bytes):
        return [text]
    data, found, start = text.encode(), [], 0
    while start < len(data):
        stop = _cut(data, start, max_bytes)
        found.append(data[start:stop].decode())
        start = stop
    return found


def _cut(data: bytes, start: int, max_bytes: int) -> int:
    """Where the piece that begins at `start` ends."""
    stop = start + max_bytes
    if stop >= len(data):
        return len(data)
    for mark in (b"\n", b". ", "。".encode(), b" "):
        place = data.rfind(mark, start + max_bytes // 2, stop)
        if place >= 0:
            return place + len(mark)
    while data[stop] & 0xC0 == 0x80:  # inside a character
        stop -= 1
    return stop


def failed_filters(text: str, filters: FilterConfig) -> Iterator[str]:
    """Names of the rules that a text breaks, in their order; what is off is not computed."""
    for name, threshold in _set_rules(filters):
        value = _MEASURES[name](text)
        if value < threshold if name.startswith("min_") else value > threshold:
            yield name
    if filters.banned_phrases:
        folded = text.casefold()
        if any(phrase.casefold() in folded for phrase in filters.banned_phrases):
            yield "banned_phrases"


@lru_cache(maxsize=4)
def _set_rules(filters: FilterConfig) -> tuple[tuple[str, float], ...]:
    """The rules with a threshold, in their order."""
    rules = ((name, getattr(filters, name)) for name in _MEASURES)
    return tuple((name, threshold) for name, threshold in rules if threshold is not None)


def _share(part: int, whole: int) -> float:
    """A share of nothing is 0."""
    return part / whole if whole else 0.0


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def _mean_word_length(text: str) -> float:
    words = text.split()
    return _share(sum(map(len, words)), len(words))


def _letter_share(text: str) -> float:
    words = text.split()
    return _share(sum(any(map(str.isalpha, word)) for word in words), len(words))


def _symbol_share(text: str) -> float:
    ellipses = sum(text.count(mark) for mark in _ELLIPSES)
    return min(1.0, _share(max(text.count("#"), ellipses), len(text.split())))


def _line_share(text: str, is_hit: Callable[[str], bool]) -> float:
    lines = _lines(text)
    return _share(sum(map(is_hit, lines)), len(lines))


def _repeated_line_share(text: str) -> float:
    lines = _lines(text)
    return _share(len(lines) - len(set(lines)), len(lines))


def _unique_word_share(text: str) -> float:
    words = text.split()
    return _share(len(set(words)), len(words))


_MEASURES: dict[str, Callable[[str], float]] = {
    "min_bytes": lambda text: len(text.encode()),
    "min_words": lambda text: len(text.split()),
    "max_words": lambda text: len(text.split()),
    "min_mean_word_length": _mean_word_length,
    "max_mean_word_length": _mean_word_length,
    "min_letter_share": _letter_share,
    "max_symbol_share": _symbol_share,
    "max_bullet_line_share": lambda text: _line_share(text, lambda x: x.startswith(_BULLETS)),
    "max_ellipsis_line_share": lambda text: _line_share(text, lambda x: x.endswith(_ELLIPSES)),
    "max_repeated_line_share": _repeated_line_share,
    "min_unique_word_share": _unique_word_share,
}
