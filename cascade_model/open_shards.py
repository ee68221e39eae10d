"""The shards at hand: so many open files and record batches, each checked when first touched.

What was checked in a mapped file is remembered beyond its turn, so no byte of it is hashed twice.
Record batches of a store are fetched several at a time.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from cascade_model.commit import Folder
from cascade_model.manifest import ShardEntry
from cascade_model.shard_cache import ShardCache
from cascade_model.shards import BatchFile, refuse

MAPPED = (256, 16384)
"""Files and record batches at hand at most: files stay well below the usual 1024 open ones, and the
views that are a mapped record batch cost little."""
FETCHED = (4096, 512)
"""The same for a store, where a file is its list and a record batch its bytes."""
FETCHES = 32
"""Requests to a store at a time."""

_SHARD = 32
"""A record batch at hand is known by shard << 32 | its number in the shard."""

Part = TypeVar("Part")
Rows = int | np.ndarray
"""One row, or int64 [m]: numpy takes either as an index, and one row is faster as a number."""


class OpenShards(Generic[Part]):
    """Record batches of several files by sequence id, as whatever `make` makes of them."""

    def __init__(
        self,
        folder: Folder,
        entries: Sequence[ShardEntry],
        schema: pa.Schema,
        batch_rows: int,
        make: Callable[[pa.RecordBatch, int, int, bool], Part | str],
        cache: ShardCache | None,
        max_mapped: int | None = None,
    ) -> None:
        """`make(batch, first id, rows, is_checked)` gives the part, or says what is wrong.

        `max_mapped`: files at hand at most, where they are mapped into memory; none: `MAPPED`.
        """
        self._folder, self._entries, self._schema = folder, entries, schema
        self._batch_rows, self._make, self._cache = batch_rows, make, cache
        self._first = np.array([entry.first_sequence for entry in entries], dtype=np.uint64)
        self._files: OrderedDict[int, BatchFile] = OrderedDict()
        self._parts: OrderedDict[int, Part] = OrderedDict()
        self._checked: dict[tuple[int, Any], bytearray] = {}
        self._max_files, self._max_parts = FETCHED if cache else MAPPED
        if max_mapped and not cache:
            self._max_files = max_mapped
        self._lock = threading.RLock()

    def visit(self, ids: np.ndarray, take: Callable[[Part, Rows, Rows], None]) -> None:
        """Call `take(part, rows of the part, places in ids)` until all ids, uint64 [n], are done.

        `CorpusMismatch` names a file that is not what its record says.
        """
        owners = np.searchsorted(self._first, ids, side="right") - 1
        batches, rows = np.divmod((ids - self._first[owners]).astype(np.int64), self._batch_rows)
        keys = owners << _SHARD | batches
        order = np.argsort(keys, kind="stable")
        cuts = np.flatnonzero(np.diff(keys[order])) + 1
        bounds = [0, *cuts.tolist(), len(order)] if len(order) else []
        heads = order[bounds[:-1]]
        wanted, first_rows, first_places = (a.tolist() for a in (keys[heads], rows[heads], heads))
        with self._lock:
            for number, (low, high) in enumerate(pairwise(bounds)):
                if self._cache is not None and number % FETCHES == 0:
                    self._fetch(wanted[number : number + FETCHES])
                part = self._part(wanted[number])
                if high - low == 1:
                    take(part, first_rows[number], first_places[number])
                else:
                    take(part, rows[order[low:high]], order[low:high])

    def _fetch(self, wanted: Sequence[int]) -> None:
        """Bring record batches of a store to hand, all at once."""
        missing = [key for key in wanted if key not in self._parts]
        closed = {key >> _SHARD for key in missing} - set(self._files)
        with ThreadPoolExecutor(FETCHES) as pool:
            self._files.update(zip(closed, pool.map(self._opened, closed), strict=True))
            self._parts.update(zip(missing, pool.map(self._loaded, missing), strict=True))
        self._close_oldest()

    def _part(self, key: int) -> Part:
        if key not in self._parts:
            shard = key >> _SHARD
            if shard not in self._files:
                self._files[shard] = self._opened(shard)
            self._parts[key] = self._loaded(key)
            self._files.move_to_end(shard)
            self._close_oldest()
        self._parts.move_to_end(key)
        return self._parts[key]

    def _opened(self, shard: int) -> BatchFile:
        entry = self._entries[shard]
        file = BatchFile(self._folder, entry, self._schema, self._cache)
        if len(file) != -(-entry.rows // self._batch_rows):
            refuse(file.where, f"has {len(file)} record batches, too many or few for its rows")
        return file

    def _loaded(self, key: int) -> Part:
        """A record batch that was checked, now or since the file is as it is."""
        shard, batch = divmod(key, 1 << _SHARD)
        file, entry = self._files[shard], self._entries[shard]
        checked = self._checked.setdefault((shard, file.identity), bytearray(len(file)))
        is_checked, begin = bool(checked[batch]), batch * self._batch_rows
        count = min(self._batch_rows, entry.rows - begin)
        found = file.read(batch, is_checked=is_checked)
        made = self._make(found, entry.first_sequence + begin, count, is_checked)
        if isinstance(made, str):
            refuse(file.where, made)
        checked[batch] = True
        return made

    def _close_oldest(self) -> None:
        """Let go of what was loaded or used longest ago; a file goes with its record batches."""
        while len(self._files) > self._max_files:
            shard, file = self._files.popitem(last=False)
            for batch in range(len(file)):
                self._parts.pop(shard << _SHARD | batch, None)
        while len(self._parts) > self._max_parts:
            self._parts.popitem(last=False)
