"""Text sources as an ordered plan of parts.

The plan depends on the files and `part_bytes` alone, never on workers, as packing does not cross a
part. Small files share a part; a large JSONL file is cut at bytes, Parquet at row groups, Arrow
(and with it a Hugging Face dataset folder) at record batches. Sources follow each other, and a part
holds one source only.
"""

import json
import posixpath
import re
import sysconfig
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from cascade_model.commit import reason_of, sha256_of
from cascade_model.errors import InputError
from cascade_model.settings import check
from pipelines.config import ONLY_SOURCE, SourceConfig
from pipelines.pieces import Part, Piece, compression_of, is_sound, open_source, whole
from pipelines.tables import Range, arrow_kind, file_batches, row_groups, stream_batches

STDLIB = "stdlib:"
"""Stands for the folder of the running Python's standard library (PSF licence)."""
_STDLIB_EXCLUDE = ("site-packages", "dist-packages", "__pycache__")
_SUFFIXES = {
    "jsonl": (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".jsonl.zst", ".ndjson.zst"),
    "parquet": (".parquet",),
    "arrow": (".arrow", ".arrows", ".ipc", ".feather"),
    "text": (".txt", ".md", ".rst", ".py"),
}
_BATCHES = {"parquet": row_groups, "arrow_file": file_batches, "arrow_stream": stream_batches}


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
    source: str = ONLY_SOURCE
    stamp: str = ""
    """Size and time or tag of the file before it was hashed; another one tells a change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The whole job, in order."""

    files: tuple[SourceFile, ...]
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        """Size of all parts in the plan's arithmetic."""
        return sum(piece.bytes for part in self.parts for piece in part.pieces)


def plan_sources(
    sources: Mapping[str, SourceConfig], part_bytes: int, output: str | None = None
) -> Plan:
    """The plan of several sources, one after the other; part numbers go on from one to the next.

    `output` is the job's own folder, as its file system spells it: what the job writes there is no
    source of it, though it may lie below one.
    """
    files: list[SourceFile] = []
    parts: list[Part] = []
    for name, source in sources.items():
        plan = make_plan(source, part_bytes, name, output)
        files += plan.files
        parts += [replace(part, index=len(parts) + part.index) for part in plan.parts]
    return Plan(files=tuple(files), parts=tuple(parts))


def make_plan(
    source: SourceConfig, part_bytes: int, name: str = ONLY_SOURCE, output: str | None = None
) -> Plan:
    """List, hash and cut the files; `InputError` when something is missing or empty."""
    label = label_of(name)
    files = [file for path in source.paths for file in _list_files(source, path, label, output)]
    for file in files:
        check(
            is_sound(file.path),
            f"{label}.paths holds a file whose name {file.path!a} is no UTF-8; rename or exclude "
            "it",
        )
    with ThreadPoolExecutor(8) as pool:
        files = [replace(file, source=name) for file in pool.map(_hashed, files)]
    pieces = [piece for file in files for piece in _pieces(file, source, part_bytes, label)]
    if not pieces:
        raise InputError(
            f"{label}.paths={list(source.paths)} holds no text at all; give files with documents"
        )
    return Plan(files=tuple(files), parts=tuple(_group(pieces, part_bytes, name)))


def require_unchanged(plan: Plan) -> None:
    """Raise `InputError` if a file is not the one that was hashed for the plan: what was packed
    since may be of either."""
    with ThreadPoolExecutor(8) as pool:
        stamps = pool.map(_stamp, (file.url for file in plan.files))
        for file, stamp in zip(plan.files, stamps, strict=True):
            check(
                file.stamp == stamp,
                f"source file {file.path} changed while it was read; run the same command again "
                "when nobody writes to it",
            )


def _stamp(url: str) -> str:
    """What a file system says of a file and changes with it."""
    with whole(url, "file"):
        fs, place = fsspec.core.url_to_fs(url, use_listings_cache=False)
        info = fs.info(place)
    names = ("size", "mtime", "ino", "ETag", "etag", "LastModified")
    return repr([info.get(name) for name in names])


def label_of(name: str) -> str:
    """The setting that describes a source."""
    return "source" if name == ONLY_SOURCE else f"mixture.{name}"


def _group(pieces: list[Piece], part_bytes: int, source: str) -> Iterator[Part]:
    """Fill parts in order; a piece larger than part_bytes stands alone."""
    index, held, size = 0, [], 0
    for piece in pieces:
        if held and size + piece.bytes > part_bytes:
            yield Part(index=index, pieces=tuple(held), source=source)
            index, held, size = index + 1, [], 0
        held.append(piece)
        size += piece.bytes
    yield Part(index=index, pieces=tuple(held), source=source)


def _list_files(
    source: SourceConfig, given: str, label: str, output: str | None
) -> list[SourceFile]:
    """The files behind one of a source's paths, sorted by path."""
    is_stdlib = given == STDLIB
    url = sysconfig.get_paths()["stdlib"] if is_stdlib else given
    try:
        fs, root = fsspec.core.url_to_fs(url)
        info = fs.info(root)
    except FileNotFoundError:
        cure = "give the folder, and the rest as pattern" if "*" in given else "check the path"
        raise InputError(f"{label}.paths names {given}, which does not exist; {cure}") from None
    except Exception as error:  # each store has errors of its own
        raise InputError(
            f"{label}.paths names {given}, which cannot be read ({reason_of(error)}); check path "
            "and rights"
        ) from None
    if info["type"] != "directory":
        kind = source.format if source.format != "auto" else _format_of(str(root)) or "text"
        return [_file(fs, given, str(root), kind)]
    if source.format == "hf" or (source.format == "auto" and is_dataset(fs, str(root))):
        return [
            _file(fs, posixpath.join(given, name), posixpath.join(str(root), name), "hf")
            for names in dataset_files(
                fs, str(root), f"{label}.paths names {given}", f" or set {label}.format"
            ).values()
            for name in names
        ]
    exclude = source.exclude + (_STDLIB_EXCLUDE if is_stdlib else ())
    names = sorted(_walk(fs, str(root), exclude, output))
    kinds = {name: kind for name in names if (kind := _chosen(source, name, is_stdlib))}
    if not kinds:
        raise InputError(
            f"{label}.paths names {given}, which holds no file that {label}.format={source.format} "
            f"and {label}.pattern={source.pattern} take; set {label}.format and {label}.pattern"
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


def _walk(fs: Any, root: str, exclude: tuple[str, ...], output: str | None) -> Iterator[str]:
    """Paths below root; excluded folders and the job's own are not entered."""
    for folder, folders, files in fs.walk(root):
        inside = posixpath.relpath(folder, root)
        prefix = "" if inside == "." else inside + "/"
        for name in list(folders):
            if _matches(prefix + name, exclude) or posixpath.join(root, prefix + name) == output:
                folders.remove(name) if isinstance(folders, list) else folders.pop(name)
        yield from (prefix + n for n in files if not _matches(prefix + n, exclude))


def is_dataset(fs: Any, root: str) -> bool:
    """Whether a folder was written by datasets' save_to_disk."""
    return any(fs.exists(posixpath.join(root, n)) for n in ("state.json", "dataset_dict.json"))


def dataset_files(fs: Any, root: str, where: str, or_else: str = "") -> dict[str, list[str]]:
    """Arrow files of a folder written by save_to_disk, by split in the order of a DatasetDict; ""
    where there are no splits. `where` begins the sentence of a refusal, `or_else` ends it."""
    try:
        if fs.exists(posixpath.join(root, "dataset_dict.json")):
            splits = json.loads(fs.cat_file(posixpath.join(root, "dataset_dict.json")))["splits"]
            return {
                split: [f"{split}/{name}" for name in _split_files(fs, posixpath.join(root, split))]
                for split in map(_own_name, splits)
            }
        return {"": _split_files(fs, root)}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{where}, which is no dataset folder (no sound state.json); write it with datasets' "
            f"save_to_disk{or_else}"
        ) from None


def _split_files(fs: Any, root: str) -> list[str]:
    state = json.loads(fs.cat_file(posixpath.join(root, "state.json")))
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ValueError("rows are chosen by a file of indices, which is not read")
    return [_own_name(entry["filename"]) for entry in state["_data_files"]]


def _own_name(name: str) -> str:
    """A name that leads to nowhere but into its folder; `ValueError` for another."""
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise ValueError(f"{name!r} leads out of the folder")
    return name


def _file(fs: Any, path: str, place: str, kind: str) -> SourceFile:
    url = place if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(place)
    return SourceFile(path=path, url=url, format=kind, bytes=int(fs.size(place) or 0))


def _hashed(file: SourceFile) -> SourceFile:
    """The file with the digest of its bytes, and what it was like before they were read."""
    stamp = _stamp(file.url)
    with open_source(file.url) as stream:
        return replace(file, sha256=sha256_of(stream), stamp=stamp)


def _pieces(file: SourceFile, source: SourceConfig, part_bytes: int, label: str) -> Iterator[Piece]:
    """Cut a file at most every part_bytes, where its format allows it."""
    kind = arrow_kind(file.url) if file.format in ("arrow", "hf") else file.format
    if kind == "text" and source.messages_column:
        raise InputError(
            f"{label}.messages_column={source.messages_column} needs records but {file.path} is "
            f"plain text; set {label}.format or {label}.exclude"
        )
    for start, stop, size in _ranges(file, kind, source, part_bytes, label):
        if size:
            yield Piece(
                path=file.path, url=file.url, format=kind, start=start, stop=stop, bytes=size
            )


def _ranges(
    file: SourceFile, kind: str, source: SourceConfig, part_bytes: int, label: str
) -> list[Range]:
    if kind in _BATCHES:
        columns = {
            f"{label}.text_column": None if source.messages_column else source.text_column,
            f"{label}.messages_column": source.messages_column,
            f"{label}.id_column": source.id_column,
        }
        return _BATCHES[kind](file.url, columns)
    if kind == "jsonl" and not compression_of(file.url):
        stops = [*range(part_bytes, file.bytes, part_bytes), file.bytes]
        return [(a, b, b - a) for a, b in zip([0, *stops[:-1]], stops, strict=True)]
    return [(0, file.bytes, file.bytes)]
