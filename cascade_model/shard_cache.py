"""A bounded folder of byte ranges that were fetched from a store, named by their SHA-256.

A name says what the bytes must be: a damaged file is noticed when it is read and fetched again, and
ranges of several corpora may lie in one folder. Several processes may share it. The least recently
used files go first; the sum of sizes is kept in a file that is changed only under a lock, so it is
a bound for all of them together.
"""

import fcntl
import hashlib
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade_model.errors import InputError
from cascade_model.settings import check

_KEPT = 7 / 8
"""Share of the bound that stays when files have to go, so that this is not for each new one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """Where ranges of a corpus in a store are kept, and how many bytes of them."""

    folder: str | None = None
    """Local folder, also for later runs; none: a temporary one of this process alone."""
    max_bytes: int = 8 << 30
    """Bytes that the folder may take."""

    def __post_init__(self) -> None:
        check(
            self.max_bytes >= 1 << 20,
            f"cache.max_bytes={self.max_bytes} holds no record batch; use at least 1048576",
        )


class WrongBytes(Exception):
    """Bytes that do not have the hash they should; `actual` is what they have."""

    def __init__(self, actual: str) -> None:
        super().__init__(actual)
        self.actual = actual


def require_hash(data: Any, sha256: str) -> None:
    """Raise `WrongBytes` unless bytes-like data has this SHA-256 (hex)."""
    actual = hashlib.sha256(memoryview(data)).hexdigest()
    if actual != sha256:
        raise WrongBytes(actual)


class ShardCache:
    """The folder; `get` is all there is to it."""

    def __init__(self, config: CacheConfig) -> None:
        """Make the folder, or raise `InputError`; a temporary one goes with this object."""
        self._max_bytes = config.max_bytes
        if config.folder is None:
            temporary = tempfile.TemporaryDirectory(prefix="cascade-cache-")
            self._folder = Path(temporary.name)
            self._gone = weakref.finalize(self, temporary.cleanup)
        else:
            self._folder = Path(config.folder)
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(
                    f"cache.folder={config.folder} cannot be made ({error.strerror}); choose "
                    "another folder"
                ) from None

    def get(self, sha256: str, fetch: Callable[[], bytes]) -> bytes:
        """Bytes with this SHA-256 (hex), of the folder or of `fetch`, whose result is then kept.

        Raises `WrongBytes` when `fetch` gives others, and whatever `fetch` raises.
        """
        path = self._folder / sha256[:2] / sha256
        with suppress(OSError, WrongBytes):
            data = path.read_bytes()
            require_hash(data, sha256)
            os.utime(path)  # the order of use
            return data
        data = fetch()
        require_hash(data, sha256)
        if len(data) <= self._max_bytes:
            with suppress(OSError):  # a full disk makes reading slow, not wrong
                self._keep(path, data)
        return data

    def _keep(self, path: Path, data: bytes) -> None:
        with self._locked() as total:
            with suppress(FileNotFoundError):  # a damaged copy
                total -= path.stat().st_size
                path.unlink()
            if total + len(data) > self._max_bytes:
                total = self._evict(len(data))
            path.parent.mkdir(exist_ok=True)
            draft = path.with_suffix(".tmp")
            draft.write_bytes(data)
            draft.replace(path)
            self._write_total(total + len(data))

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Hold the folder and know how many bytes lie in it."""
        with open(self._folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                total = int((self._folder / "total").read_text())
            except (OSError, ValueError):
                total = sum(size for _, size, _ in self._files())
            yield total

    def _write_total(self, total: int) -> None:
        (self._folder / "total").write_text(str(total))

    def _evict(self, needed: int) -> int:
        """Delete the least recently used until there is room; returns the bytes that stay."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total + needed <= max(self._max_bytes * _KEPT, needed):
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """Time of last use (ns), size and path of every file, unfinished ones included."""
        for path in self._folder.glob("??/*"):
            with suppress(FileNotFoundError):
                found = path.stat()
                yield found.st_mtime_ns, found.st_size, path
