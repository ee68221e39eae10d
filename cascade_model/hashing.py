"""SHA-256 of files: while they are written, and as they are."""

import hashlib
from typing import Any, BinaryIO

_CHUNK = 1 << 20


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


def sha256_of(file: BinaryIO) -> str:
    """Digest (hex) of what an open file still holds."""
    total = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        total.update(chunk)
    return total.hexdigest()


class HashingReader:
    """A binary file that counts and hashes what is read of it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.bytes = 0

    def read(self, size: int) -> bytearray:
        """The next bytes, writable; fewer only where the file ends."""
        data = bytearray(size)
        view, filled = memoryview(data), 0
        while filled < size and (count := self._file.readinto(view[filled:])):  # type: ignore[attr-defined]
            filled += count
        self._hash.update(view[:filled])
        self.bytes += filled
        view.release()
        del data[filled:]
        return data

    def skip(self, size: int | None) -> None:
        """Pass over the next bytes (none: all that are left), hashing them."""
        left = size
        while left is None or left > 0:
            count = len(self.read(_CHUNK if left is None else min(left, _CHUNK)))
            if count == 0:
                return
            left = None if left is None else left - count

    @property
    def sha256(self) -> str:
        """Digest (hex) of everything read."""
        return self._hash.hexdigest()
