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
import hashlib
import json
import os
import posixpath
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cascade_model.errors import InputError

RECORD_SUFFIX = ".record.json"
_CHUNK = 1 << 20


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


class HashingWriter:
    """A binary file that counts and hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.bytes = 0

    closed = False

    def write(self, data: Any) -> int:
        """Write bytes-like data; returns the number of bytes."""
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self.bytes += len(view)
        self._file.write(view)
        return len(view)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.bytes

    def flush(self) -> None:
        """Nothing to do: the commit flushes."""

    def close(self) -> None:
        """Nothing to do: the commit closes."""

    def readable(self) -> bool:
        """A writer is not readable."""
        return False

    def writable(self) -> bool:
        """A writer is writable."""
        return True

    def seekable(self) -> bool:
        """What was hashed cannot be taken back."""
        return False

    @property
    def sha256(self) -> str:
        """Digest (hex) of everything written."""
        return self._hash.hexdigest()


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

    def open(self, name: str) -> BinaryIO:
        """Open a file (an object's own name) for reading."""
        return cast(BinaryIO, self._fs.open(self.path(name), "rb"))

    def size(self, name: str) -> int:
        """Bytes of a file; `FileNotFoundError` when missing."""
        return int(self._fs.size(self.path(name)) or 0)

    def sha256_of(self, name: str) -> str:
        """Digest (hex) of a file as it is now."""
        total = hashlib.sha256()
        with self.open(name) as file:
            while chunk := file.read(_CHUNK):
                total.update(chunk)
        return total.hexdigest()

    def list(self) -> list[str]:
        """Names in the folder, sorted, without temporary files; empty when there is no folder."""
        return sorted(name for name in self._names() if not name.endswith(".tmp"))

    def remove(self, name: str = "") -> None:
        """Remove a file or sub-folder, or (no name) the folder itself; missing is fine."""
        with suppress(FileNotFoundError):
            self._fs.rm(self.path(name) if name else self._root, recursive=True)

    def publish(self, name: str, data: bytes) -> None:
        """Put one small file under its own name, atomically and once.

        The same bytes again are fine; other bytes raise `InputError` and change nothing.
        """
        if self._create(name, data) != data:
            raise InputError(
                f"{self.path(name)} exists with other content; choose another folder or delete it"
            )

    def commit(
        self,
        name: str,
        write: Callable[[BinaryIO], Any] | bytes,
        facts: dict[str, Any] | None = None,
    ) -> Record:
        """Commit a unit; `write` gets a binary file (not seekable).

        Committing the same bytes twice is harmless; other bytes under a committed name raise
        `InputError`.
        """
        source = _writer_of(write)
        if self.is_local:
            record = self._write_local(name, source, facts or {})
        else:
            record = self._write_object(name, source, facts or {})
        data = self._create(name + RECORD_SUFFIX, record.to_json())
        winner = Record.from_json(data, self.path(name + RECORD_SUFFIX))
        if winner.object != record.object:
            self.remove(record.object)
        if winner.sha256 != record.sha256:
            raise InputError(
                f"{self.path(name)} is committed with sha256 {winner.sha256[:12]} but this run "
                f"made {record.sha256[:12]}; choose another folder or delete it"
            )
        return winner

    def _names(self) -> Iterator[str]:
        try:
            for entry in self._fs.ls(self._root, detail=False):
                yield posixpath.basename(str(entry).rstrip("/"))
        except (FileNotFoundError, NotADirectoryError):
            return

    def _write_local(self, name: str, write: Callable[[BinaryIO], Any], facts: dict) -> Record:
        """Temporary file, fsync, rename, fsync of the folder."""
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("xb") as file:
                writer = HashingWriter(file)
                write(cast(BinaryIO, writer))
                file.flush()
                os.fsync(file.fileno())
            record = Record(
                name=name, object=name, bytes=writer.bytes, sha256=writer.sha256, facts=facts
            )
            self._refuse_other(record)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        _fsync_folder(target.parent)
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
        with self._fs.open(self.path(attempt), "wb") as file:
            writer = HashingWriter(cast(BinaryIO, file))
            write(cast(BinaryIO, writer))
        return Record(
            name=name, object=attempt, bytes=writer.bytes, sha256=writer.sha256, facts=facts
        )

    def _create(self, name: str, data: bytes) -> bytes:
        """Put a small file unless it is there; returns the bytes that stand there afterwards."""
        if self.is_local:
            return self._create_local(Path(self.path(name)), data)
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

    def _create_local(self, target: Path, data: bytes) -> bytes:
        """Link a finished temporary file to the name; the link fails if the name is taken."""
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            _link(temporary, target)
        except FileExistsError:
            return target.read_bytes()
        finally:
            temporary.unlink(missing_ok=True)
        _fsync_folder(target.parent)
        return data


def _writer_of(write: Callable[[BinaryIO], Any] | bytes) -> Callable[[BinaryIO], Any]:
    """Plain bytes as a writing function."""
    if callable(write):
        return write
    return lambda file: file.write(write)


def _link(temporary: Path, target: Path) -> None:
    """Give a finished file its name unless the name is taken (`FileExistsError`)."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links, where the check is not atomic
        if target.exists():
            raise FileExistsError(target) from None
        os.replace(temporary, target)


def _fsync_folder(folder: Path) -> None:
    """Make a rename durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
