"""The row group of a Parquet file that this process decoded last.

A row group is decoded whole and holds many parts, of which a worker has several at once and most
others soon after. So the last one stays at hand: it is decoded once a worker, not once a part.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(slots=True)
class _Kept:
    """One row group, and what it is of."""

    key: tuple[Any, ...] | None = None
    table: pa.Table | None = None
    turn: threading.Lock = field(default_factory=threading.Lock)


_LAST = _Kept()


def row_group(url: str, parquet: pq.ParquetFile, group: int, columns: Sequence[str]) -> pa.Table:
    """The columns of a row group of an open file; a file with another footer is another file."""
    key = (url, parquet.metadata, group, tuple(columns))
    with _LAST.turn:  # who wants the same waits for it
        if _LAST.table is None or _LAST.key != key:
            _LAST.key = _LAST.table = None  # never two of them in memory
            _LAST.table, _LAST.key = parquet.read_row_group(group, columns=list(columns)), key
        return _LAST.table
