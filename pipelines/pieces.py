"""Parts and their pieces, how source files are opened, and who is to blame when one is damaged."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, cast

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from cascade_model.errors import InputError, Unfinished
from pipelines.config import ONLY_SOURCE

EXCERPT = 200
"""Characters of a broken record that its dead letter keeps."""
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A range of one file: bytes (jsonl, text, arrow_stream), row groups (parquet) or record
    batches (arrow_file)."""

    path: str
    """As recorded."""
    url: str
    """Where it is read."""
    format: str
    start: int
    stop: int
    bytes: int
    """Size in the plan's arithmetic."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Pieces of one source that are read, packed and committed together: the unit of work and of
    retry."""

    index: int
    pieces: tuple[Piece, ...]
    source: str = ONLY_SOURCE


@dataclass(frozen=True, slots=True)
class Dead:
    """Why a record cannot be used."""

    reason: str
    excerpt: str


def decoded(data: bytes) -> "str | Dead":
    """Bytes as the text that they spell."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return no_utf8(error)


def no_utf8(error: UnicodeDecodeError) -> Dead:
    """The dead letter of bytes that spell nothing, with what stands around them."""
    around = error.object[max(0, error.start - 40) : error.start + 40]
    return Dead("invalid_utf8", around.decode("utf-8", "backslashreplace"))


def is_sound(text: str) -> bool:
    """Whether a text can be written at all: JSON may hold halves of characters (\\ud800)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def compression_of(url: str) -> str | None:
    """Arrow's name of a file's compression, by its suffix."""
    return next((name for suffix, name in _COMPRESSED.items() if url.endswith(suffix)), None)


def open_source(url: str) -> BinaryIO:
    """Open a source file; `Unfinished` when it cannot be read now."""
    try:
        fs, place = fsspec.core.url_to_fs(url)
        return cast(BinaryIO, fs.open(place, "rb"))
    except OSError as error:
        raise _unreadable(url, error) from None


@contextmanager
def open_arrow(url: str) -> Iterator[pa.NativeFile]:
    """A source file for Arrow's own readers: a memory map where it is local, else ranged reads."""
    fs, place = fsspec.core.url_to_fs(url)
    if isinstance(fs, LocalFileSystem) and fs.size(place):
        with pa.memory_map(place) as file:
            yield file
    else:
        with open_source(url) as file:
            yield pa.PythonFile(file, mode="r")


@contextmanager
def whole(url: str, kind: str) -> Iterator[None]:
    """Turn a reader's complaint about a damaged file into one sentence."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        # Arrow's own complaints have no number; those of a disk or a network do.
        if isinstance(error, OSError) and error.errno is not None:
            raise _unreadable(url, error) from None
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(
            f"source file {url} is a damaged {kind} ({reason}); mend it, leave it out or "
            "name the right format"
        ) from None


def _unreadable(url: str, error: OSError) -> Unfinished:
    return Unfinished(
        f"source file {url} cannot be read ({type(error).__name__}); check path and rights, then "
        "run the same command again"
    )
