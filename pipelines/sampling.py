"""A small sample of a corpus, for what must know its text before every part is read.

Documents are taken from evenly spaced parts and chosen by their hash, so a sample depends on the
corpus alone.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from pipelines.config import SourceConfig
from pipelines.documents import Document, read_documents
from pipelines.held_out import is_held_out, text_hash
from pipelines.pieces import Part
from pipelines.sources import make_plan

MOST_PARTS = 32
_CHARACTERS = 1 << 16
"""Of one document, at most."""

Reader = Callable[[Part], Iterable[Document]]


def sample_texts(
    source: SourceConfig, part_bytes: int, held_out_rate: float, sample_bytes: int
) -> Iterator[str]:
    """About `sample_bytes` characters of a source's training documents, as they stand there."""

    def read(part: Part) -> Iterator[Document]:
        return read_source(part, source)

    parts = spaced(make_plan(source, part_bytes).parts)
    return sampled(parts, read, str, held_out_rate, sample_bytes, "tokenizer sample:")


def read_source(part: Part, source: SourceConfig) -> Iterator[Document]:
    """The records of a part of this source."""
    return read_documents(part, source.text_column, source.messages_column, source.id_column)


def spaced(parts: Sequence[Part], most: int = MOST_PARTS) -> Sequence[Part]:
    """A few of the parts, evenly spaced."""
    return parts[:: -(-len(parts) // most)]


def sampled(
    parts: Sequence[Part],
    read: Reader,
    clean: Callable[[str], object],
    held_out_rate: float,
    sample_bytes: int,
    salt: str,
) -> Iterator[str]:
    """Cleaned training texts of about `sample_bytes` characters in all.

    `clean` gives something else than a text for what is dropped; another salt gives another sample.
    """
    rate = sample_bytes / max(1, sum(piece.bytes for part in parts for piece in part.pieces))
    left = sample_bytes
    for part in parts:
        for document in read(part):
            if left <= 0:
                return
            text = None if document.text is None else clean(document.text)
            if not isinstance(text, str) or is_held_out(text, held_out_rate):
                continue
            # Another hash than the one that decided the split.
            if text_hash(salt + text) < rate or left == sample_bytes:
                text = text[: min(left, _CHARACTERS)]
                left -= len(text)
                yield text
