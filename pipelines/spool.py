"""What a task makes while it reads, kept in memory while small and on the local disk beyond that,
until everything is read and it can be committed."""

import shutil
import tempfile
from typing import Any

import pyarrow as pa

from cascade_model.commit import Folder, Record

SPOOL_BYTES = 32 << 20
"""Kept in memory."""
_CHUNK = 1 << 20


class Spool:
    """Bytes on their way to a unit."""

    def __init__(self) -> None:
        self._file: Any = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115

    def write(self, data: bytes) -> None:
        """Add bytes at the end."""
        self._file.write(data)

    def commit(self, folder: Folder, name: str, facts: dict[str, Any] | None = None) -> Record:
        """Commit everything as a unit."""
        self._file.seek(0)
        return folder.commit(name, lambda out: shutil.copyfileobj(self._file, out, _CHUNK), facts)


class ArrowSpool(Spool):
    """Record batches on their way to an Arrow file."""

    def __init__(self, schema: pa.Schema) -> None:
        super().__init__()
        self._schema = schema
        self._writer = pa.ipc.new_file(pa.PythonFile(self._file, mode="w"), schema)

    def append(self, columns: list[pa.Array]) -> None:
        """Add a record batch."""
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))

    def finish(self) -> None:
        """Write the file's footer; nothing can be added after it."""
        self._writer.close()
