"""The one commit protocol: nothing half-written is ever read.

A *unit* is a file plus the record that names it (`NAME.record.json`: object, bytes, sha256, facts).
A unit exists when its record does; readers go through the record or the manifest, never by listing.

Local folder: temporary file, fsync, rename to the deterministic name, fsync of the folder; then the
record in the same way. Object store, which has no rename: an object whose name only this attempt
uses, then a put of the record that succeeds only if no record is there (If-None-Match). When the
outcome of that put is unknown, the record is read back; an object is deleted only when a record is
known to name another one.
"""

import builtins
import errno
import json
import os
import posixpath
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cascade_model.errors import InputError, Unfinished
from cascade_model.hashing import HashingWriter, sha256_of
from cascade_model.local_files import TEMPORARY, create_file, draft, make_folder, replace_file

RECORD_SUFFIX = ".record.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What was committed under a name."""

    name: str
    object: str
    """File that holds the bytes: the name itself locally, an attempt's own name in a store."""
    bytes: int
    sha256: str
    facts: dict[str, Any] = field(default_factory=dict)
    """Counts and the like that belong to the unit."""

    def to_json(self) -> builtins.bytes:
        """The record's one spelling."""
        return (json.dumps(asdict(self), sort_keys=True, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: builtins.bytes, where: str) -> "Record":
        """Read a record; `InputError` when it is damaged."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            raise InputError(
                f"record {where} is damaged; delete it and run the job again"
            ) from None


class Folder:
    """A folder, local or behind any fsspec URL, whose units are committed whole or not at all."""

    def __init__(self, url: str | Path) -> None:
        self.url = str(url).rstrip("/") or "/"
        try:
            self._fs, path = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise InputError(
                f"folder {self.url!r} cannot be opened ({error}); use a local path or an fsspec URL"
            ) from None
        self._root = cast(str, path)
        self.is_local = isinstance(self._fs, LocalFileSystem)
        if self.is_local:  # absolute, as a worker may run elsewhere
            self.url = self._root

    def __truediv__(self, name: str) -> "Folder":
        return Folder(posixpath.join(self.url, name))

    def path(self, name: str) -> str:
        """Path of a file inside the folder, as the file system spells it."""
        return posixpath.join(self._root, name)

    def __reduce__(self) -> tuple[type["Folder"], tuple[str]]:
        """By its URL: another process finds its own credentials."""
        return Folder, (self.url,)

    def exists(self, name: str) -> bool:
        """Whether a unit is committed or a file of this very name is there."""
        return self._fs.exists(self.path(name + RECORD_SUFFIX)) or self._fs.exists(self.path(name))

    def record(self, name: str) -> Record | None:
        """The record of a unit, none when it is not committed (or its file is gone or cut)."""
        where = self.path(name + RECORD_SUFFIX)
        try:
            record = Record.from_json(cast(bytes, self._fs.cat_file(where)), where)
            whole = self._fs.size(self.path(record.object)) == record.bytes
        except FileNotFoundError:
            return None
        return record if whole else None

    def read_bytes(self, name: str) -> bytes:
        """The bytes of a committed unit or of a plain file; `FileNotFoundError` when missing."""
        with suppress(FileNotFoundError):
            return cast(bytes, self._fs.cat_file(self.path(name)))
        record = self.record(name)
        if record is None:
            raise FileNotFoundError(self.path(name))
        return cast(bytes, self._fs.cat_file(self.path(record.object)))

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Bytes of a file (an object's own name); fewer where it ends before."""
        return cast(bytes, self._fs.cat_file(self.path(name), start=offset, end=offset + length))

    def open(self, name: str) -> BinaryIO:
        """Open a file (an object's own name) for reading."""
        return cast(BinaryIO, self._fs.open(self.path(name), "rb"))

    def size(self, name: str) -> int:
        """Bytes of a file; `FileNotFoundError` when missing."""
        return int(self._fs.size(self.path(name)) or 0)

    def sha256_of(self, name: str) -> str:
        """Digest (hex) of a file as it is now."""
        with self.open(name) as file:
            return sha256_of(file)

    def is_there(self) -> bool:
        """Whether the folder exists (in an object store: holds anything)."""
        return self._fs.exists(self._root)

    def list(self) -> list[str]:
        """Names in the folder, sorted, but our own unfinished files; empty when it is not there."""
        return sorted(name for name in self._names() if not TEMPORARY.fullmatch(name))

    def files(self) -> Iterator[str]:
        """Every file in the folder and below it, by its path inside the folder, in no order."""
        if self.is_local:
            root = Path(self._root)
            yield from (str(p.relative_to(root)) for p in root.rglob("*") if not p.is_dir())
            return
        for path in cast(list[str], self._fs.find(self._root)):
            yield posixpath.relpath(path, self._root)

    def modified(self, name: str) -> float:
        """When a file was last written, by the storage's own clock (seconds since 1970)."""
        if self.is_local:
            return os.stat(self.path(name)).st_mtime
        return self._fs.modified(self.path(name)).timestamp()

    def touch(self, name: str) -> None:
        """Let a small file be written now; in a store, which has no other way, with its own bytes.

        Only for a file that nobody else writes.
        """
        if self.is_local:
            os.utime(self.path(name))
        else:
            self._fs.pipe_file(self.path(name), self._fs.cat_file(self.path(name)))

    def now(self) -> float:
        """The storage's own clock, read from a file written now: clocks of machines differ."""
        name = f".clock.{uuid.uuid4().hex}.tmp"
        if self.is_local:
            make_folder(Path(self._root))
        self._fs.pipe_file(self.path(name), b"?")
        try:
            return self.modified(name)
        finally:
            self.remove(name)

    def remove(self, name: str) -> None:
        """Remove a file or a sub-folder; missing is fine. The folder itself is never removed so."""
        if name.strip("./") == "":
            raise ValueError(f"{name!r} is no name inside {self.url}")
        with suppress(FileNotFoundError):
            self._fs.rm(self.path(name), recursive=True)

    def remove_if_empty(self) -> None:
        """Remove a local folder that holds nothing; in an object store an empty one is no thing."""
        if self.is_local:
            with suppress(OSError):
                os.rmdir(self._root)

    def put(self, name: str, write: Callable[[BinaryIO], Any]) -> HashingWriter:
        """Write a file under a name that no other writer uses; returns its bytes and SHA-256.

        Nothing commits it: a record, a manifest or a COMMIT that names it must do that afterwards.
        """
        written: list[HashingWriter] = []

        def write_hashed(file: BinaryIO) -> None:
            written.append(HashingWriter(file))
            write(cast(BinaryIO, written[0]))

        if self.is_local:
            target = Path(self.path(name))
            with draft(target, write_hashed) as finished:
                os.replace(finished, target)
        else:
            with self._fs.open(self.path(name), "wb") as file:
                write_hashed(cast(BinaryIO, file))
        return written[0]

    def create(self, name: str, data: bytes) -> bytes:
        """Put a small file unless one is there; returns the bytes that stand there afterwards.

        An outcome that the store left unknown is read back; what cannot be read back is raised.
        """
        if self.is_local:
            target = Path(self.path(name))
            try:
                create_file(target, data)
            except FileExistsError:
                return target.read_bytes()
            return data
        try:
            self._fs.pipe_file(self.path(name), data, mode="create")
            return data
        except Exception:
            # Lost the race, or an unknown outcome: whatever stands there now is the truth.
            try:
                return cast(bytes, self._fs.cat_file(self.path(name)))
            except FileNotFoundError:
                pass
            raise

    def publish(self, name: str, data: bytes) -> None:
        """Put one small file under its own name, atomically and once.

        The same bytes again are fine; other bytes raise `InputError` and change nothing.
        """
        with self._told_if_full(name):
            found = self.create(name, data)
        if found != data:
            raise InputError(
                f"{self.path(name)} exists with other content; choose another place or delete it"
            )

    def replace(self, name: str, data: bytes) -> None:
        """Put one small file under its own name, whole, over whatever is there.

        For what no reader trusts and a later run may tell anew, such as a report.
        """
        if self.is_local:
            with self._told_if_full(name):
                replace_file(Path(self.path(name)), data)
        else:
            self._fs.pipe_file(self.path(name), data)

    def commit(
        self,
        name: str,
        write: Callable[[BinaryIO], Any] | bytes,
        facts: dict[str, Any] | None = None,
    ) -> Record:
        """Commit a unit; `write` gets a binary file (not seekable).

        Committing the same bytes twice is harmless; other bytes under a committed name raise
        `InputError`, a full disk `Unfinished`.
        """
        source = _writer_of(write)
        with self._told_if_full(name):
            if self.is_local:
                record = self._write_local(name, source, facts or {})
            else:
                record = self._write_object(name, source, facts or {})
            winner = self._put_record(record)
            if winner.object != record.object and self.record(name) is None:
                # What it names is gone or cut, so the unit is not committed.
                self.remove(name + RECORD_SUFFIX)
                winner = self._put_record(record)
        if winner.object != record.object:
            self.remove(record.object)
        if winner.sha256 != record.sha256:
            raise InputError(
                f"{self.path(name)} is committed with sha256 {winner.sha256[:12]} but this run "
                f"made {record.sha256[:12]}; choose another folder or delete it"
            )
        return winner

    def _put_record(self, record: Record) -> Record:
        """The record that stands there after this one was put."""
        name = record.name + RECORD_SUFFIX
        return Record.from_json(self.create(name, record.to_json()), self.path(name))

    @contextmanager
    def _told_if_full(self, name: str) -> Iterator[None]:
        """A full disk as one sentence: what is committed stays, so the job can go on."""
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise Unfinished(
                f"{self.path(name)} cannot be written ({os.strerror(error.errno)}); free some "
                "space or raise the quota and run the same command again, which goes on from here"
            ) from None

    def _names(self) -> Iterator[str]:
        try:
            for entry in self._fs.ls(self._root, detail=False):
                yield posixpath.basename(str(entry).rstrip("/"))
        except (FileNotFoundError, NotADirectoryError):
            return

    def _write_local(self, name: str, write: Callable[[BinaryIO], Any], facts: dict) -> Record:
        """Temporary file, fsync, rename, fsync of the folder."""
        hashed: list[HashingWriter] = []

        def write_hashed(file: BinaryIO) -> None:
            hashed.append(HashingWriter(file))
            write(cast(BinaryIO, hashed[0]))

        target = Path(self.path(name))
        with draft(target, write_hashed) as finished:
            size, sha256 = hashed[0].bytes, hashed[0].sha256
            record = Record(name=name, object=name, bytes=size, sha256=sha256, facts=facts)
            self._refuse_other(record)
            os.replace(finished, target)
        return record

    def _refuse_other(self, record: Record) -> None:
        """Keep a committed file that differs: the rename below would overwrite it."""
        old = self.record(record.name)
        if old is not None and old.sha256 != record.sha256:
            raise InputError(
                f"{self.path(record.name)} is committed with sha256 {old.sha256[:12]} but this run "
                f"made {record.sha256[:12]}; choose another folder or delete it"
            )

    def _write_object(self, name: str, write: Callable[[BinaryIO], Any], facts: dict) -> Record:
        """An object of this attempt alone; the record will name it."""
        attempt = f"{name}~{uuid.uuid4().hex}"
        writer = self.put(attempt, write)
        return Record(
            name=name, object=attempt, bytes=writer.bytes, sha256=writer.sha256, facts=facts
        )


def require_writable(output: str | Path) -> None:
    """Raise `InputError` unless a folder, which need not be there yet, can be written to.

    It is tried, as rights alone do not tell; nothing stays behind.
    """
    folder = Folder(output)
    try:
        if folder.is_local:
            places = [Path(folder.url), *Path(folder.url).parents]
            with tempfile.TemporaryDirectory(dir=next(p for p in places if p.exists())):
                return
        name = f".writable.{uuid.uuid4().hex}.tmp"
        folder._fs.pipe_file(folder.path(name), b"?")
        folder.remove(name)
    except Exception as error:  # each store has errors of its own
        raise InputError(
            f"output={output} cannot be written ({reason_of(error)}); choose another folder or "
            "check its rights"
        ) from None


def reason_of(error: Exception) -> str:
    """What a file system or a store says went wrong, in one line."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(reason).splitlines()[0]


def _writer_of(write: Callable[[BinaryIO], Any] | bytes) -> Callable[[BinaryIO], Any]:
    """Plain bytes as a writing function."""
    if callable(write):
        return write
    return lambda file: file.write(write)
