"""Text sources as an ordered plan of parts.

The plan depends on the files and `part_bytes` alone, never on workers, as packing does not cross a
part. Small files share a part; a large JSONL file is cut at bytes, Parquet at row groups, a Hugging
Face dataset folder at record batches.
"""

import json
import posixpath
import re
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import fsspec
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from cascade_model.commit import sha256_of
from cascade_model.errors import InputError
from pipelines.config import SourceConfig
from pipelines.documents import (
    Part,
    Piece,
    compression_of,
    open_arrow_stream,
    open_source,
    require_column,
    whole,
)

STDLIB = "stdlib:"
"""Stands for the folder of the running Python's standard library (PSF licence)."""
_STDLIB_EXCLUDE = ("site-packages", "dist-packages", "__pycache__")
_SUFFIXES = {
    "jsonl": (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".jsonl.zst", ".ndjson.zst"),
    "parquet": (".parquet",),
    "text": (".txt", ".md", ".rst", ".py"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """A file of the corpus."""

    path: str
    """As recorded: the source as given plus the path inside it."""
    url: str
    """Where it is read."""
    format: str
    bytes: int
    sha256: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The whole job, in order."""

    files: tuple[SourceFile, ...]
    parts: tuple[Part, ...]


def make_plan(source: SourceConfig, part_bytes: int) -> Plan:
    """List, hash and cut the files; `InputError` when something is missing or empty."""
    files = [file for path in source.paths for file in _list_files(source, path)]
    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(_hashed, files))
    pieces = [piece for file in files for piece in _pieces(file, source, part_bytes)]
    if not pieces:
        raise InputError(
            f"source.paths={list(source.paths)} holds no text at all; give files with documents"
        )
    return Plan(files=tuple(files), parts=tuple(_group(pieces, part_bytes)))


def _group(pieces: list[Piece], part_bytes: int) -> Iterator[Part]:
    """Fill parts in order; a piece larger than part_bytes stands alone."""
    index, held, size = 0, [], 0
    for piece in pieces:
        if held and size + piece.bytes > part_bytes:
            yield Part(index=index, pieces=tuple(held))
            index, held, size = index + 1, [], 0
        held.append(piece)
        size += piece.bytes
    yield Part(index=index, pieces=tuple(held))


def _list_files(source: SourceConfig, given: str) -> list[SourceFile]:
    """The files behind one of source.paths, sorted by path."""
    is_stdlib = given == STDLIB
    url = sysconfig.get_paths()["stdlib"] if is_stdlib else given
    try:
        fs, root = fsspec.core.url_to_fs(url)
        info = fs.info(root)
    except FileNotFoundError:
        raise InputError(f"source.paths names {given}, which does not exist; check the path") from (
            None
        )
    except (OSError, ValueError, ImportError) as error:
        raise InputError(
            f"source.paths names {given}, which cannot be read ({error}); check path and rights"
        ) from None
    if info["type"] != "directory":
        kind = source.format if source.format != "auto" else _format_of(str(root)) or "text"
        return [_file(fs, given, str(root), kind)]
    if source.format == "hf" or (source.format == "auto" and _is_dataset(fs, str(root))):
        return [
            _file(fs, posixpath.join(given, name), posixpath.join(str(root), name), "hf")
            for name in _dataset_files(fs, str(root), given)
        ]
    exclude = source.exclude + (_STDLIB_EXCLUDE if is_stdlib else ())
    names = sorted(_walk(fs, str(root), exclude))
    kinds = {name: kind for name in names if (kind := _chosen(source, name, is_stdlib))}
    if not kinds:
        raise InputError(
            f"source.paths names {given}, which holds no file that source.format={source.format} "
            f"and source.pattern={source.pattern} take; set source.format and source.pattern"
        )
    prefix = given if is_stdlib else given.rstrip("/") + "/"
    return [_file(fs, prefix + n, posixpath.join(str(root), n), k) for n, k in kinds.items()]


def _chosen(source: SourceConfig, name: str, is_stdlib: bool) -> str | None:
    """The format a file of a folder is read in, none when it is left out."""
    pattern = source.pattern or ("**/*.py" if is_stdlib else None)
    if pattern is not None and not _matches(name, (pattern,)):
        return None
    found = _format_of(name)
    if source.format == "auto":
        return found or ("text" if pattern else None)
    return source.format if pattern or source.format in ("text", found) else None


def _format_of(name: str) -> str | None:
    return next((kind for kind, ends in _SUFFIXES.items() if name.lower().endswith(ends)), None)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.match(glob_translate(pattern), name) for pattern in patterns)


def _walk(fs: Any, root: str, exclude: tuple[str, ...]) -> Iterator[str]:
    """Paths below root; excluded folders are not entered."""
    for folder, folders, files in fs.walk(root):
        inside = posixpath.relpath(folder, root)
        prefix = "" if inside == "." else inside + "/"
        for name in list(folders):
            if _matches(prefix + name, exclude):
                folders.remove(name) if isinstance(folders, list) else folders.pop(name)
        yield from (prefix + n for n in files if not _matches(prefix + n, exclude))


def _is_dataset(fs: Any, root: str) -> bool:
    return any(fs.exists(posixpath.join(root, n)) for n in ("state.json", "dataset_dict.json"))


def _dataset_files(fs: Any, root: str, given: str) -> list[str]:
    """Arrow files of a folder written by save_to_disk, a DatasetDict's splits in their order."""
    try:
        if fs.exists(posixpath.join(root, "dataset_dict.json")):
            splits = json.loads(fs.cat_file(posixpath.join(root, "dataset_dict.json")))["splits"]
            return [
                f"{split}/{name}"
                for split in splits
                for name in _dataset_files(fs, posixpath.join(root, split), given)
            ]
        state = json.loads(fs.cat_file(posixpath.join(root, "state.json")))
        return [entry["filename"] for entry in state["_data_files"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        raise InputError(
            f"source.paths names {given}, which is no dataset folder (no sound state.json); write "
            "it with datasets' save_to_disk or set source.format"
        ) from None


def _file(fs: Any, path: str, place: str, kind: str) -> SourceFile:
    url = place if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(place)
    return SourceFile(path=path, url=url, format=kind, bytes=int(fs.size(place) or 0))


def _hashed(file: SourceFile) -> SourceFile:
    """The file with the digest of its bytes."""
    with open_source(file.url) as stream:
        return replace(file, sha256=sha256_of(stream))


def _pieces(file: SourceFile, source: SourceConfig, part_bytes: int) -> Iterator[Piece]:
    """Cut a file at most every part_bytes, where its format allows it."""
    if file.format == "parquet":
        ranges = _row_groups(file, source.text_column)
    elif file.format == "hf":
        ranges = _record_batches(file, source.text_column)
    elif file.format == "jsonl" and not compression_of(file.url):
        stops = [*range(part_bytes, file.bytes, part_bytes), file.bytes]
        ranges = [
            (start, stop, stop - start) for start, stop in zip([0, *stops], stops, strict=False)
        ]
    else:
        ranges = [(0, file.bytes, file.bytes)]
    for start, stop, size in ranges:
        if size:
            yield Piece(
                path=file.path,
                url=file.url,
                format=file.format,
                start=start,
                stop=stop,
                bytes=size,
            )


def _row_groups(file: SourceFile, column: str) -> list[tuple[int, int, int]]:
    with open_source(file.url) as stream, whole(file.url, "Parquet file"):
        parquet = pq.ParquetFile(stream)
        require_column(parquet.schema_arrow, column, file.url)
        meta = parquet.metadata
        sizes = [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
    return [(i, i + 1, size) for i, size in enumerate(sizes)]


def _record_batches(file: SourceFile, column: str) -> list[tuple[int, int, int]]:
    with whole(file.url, "Arrow stream"), open_arrow_stream(file.url) as reader:
        require_column(reader.schema, column, file.url)
        sizes = [batch.nbytes for batch in reader]
    return [(i, i + 1, size) for i, size in enumerate(sizes)]
