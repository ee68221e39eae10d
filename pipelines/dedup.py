"""Exact deduplication over the whole corpus, in flat memory, equal for any number of workers.

Two rounds before packing. First a task per part puts a 128-bit hash of each cleaned document into a
file sorted by hash. Then a task per range of hashes merges that range of all parts and lists the
documents to drop: of equal ones the first in the order of the corpus stays. Near-duplicates and
decontamination have their place here too: another file per part, another merge, the same lists.

The number of ranges depends on the size of the corpus alone, so a merge holds about `RANGE_BYTES`
of source text worth of hashes, whatever the corpus.
"""

import hashlib
import json
from array import array

import numpy as np

from cascade_model.commit import Folder, Record
from cascade_model.errors import Unfinished
from pipelines.documents import Message

RANGE_BYTES = 1 << 30
"""Source bytes whose hashes a merge holds: a few million documents, some tens of megabytes."""
HASHED = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<u4")])
"""A document of a part: its hash, and its row there."""
DROPPED = np.dtype("<u8")
"""Document id: part << 32 | row."""
_EDGE = np.dtype("<u8")


def content_hash(content: "str | list[Message]") -> bytes:
    """BLAKE2b-128 of a document's text, or of a conversation's one spelling."""
    if not isinstance(content, str):
        content = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


def hashes_name(part: int) -> str:
    """A part's sorted hashes in the work folder."""
    return f"hashes-{part:05d}.bin"


def drops_name(number: int) -> str:
    """The documents that a range of hashes drops, in the work folder."""
    return f"drops-{number:05d}.bin"


def num_ranges(corpus_bytes: int) -> int:
    """Ranges of hashes, each a merge."""
    return max(1, -(-corpus_bytes // RANGE_BYTES))


def range_edges(count: int) -> np.ndarray:
    """Where each of `count` ranges begins, by a hash's first 64 bits: uint64 [count]."""
    return np.array([(number << 64) // count for number in range(count)], dtype=np.uint64)


class Hashes:
    """The hashes of a part's documents on their way to a file: 20 bytes of memory each."""

    def __init__(self) -> None:
        self._words, self._rows = bytearray(), array("I")

    def add(self, row: int, content: "str | list[Message]") -> None:
        """Take a document."""
        self._words += content_hash(content)
        self._rows.append(row)

    def commit(self, work: Folder, part: int, ranges: int) -> Record:
        """The file: where each range begins (uint64 [ranges + 1], in documents), then the
        documents as `HASHED`, sorted."""
        words = np.frombuffer(self._words, dtype=">u8").reshape(-1, 2)
        table = np.empty(len(words), dtype=HASHED)
        table["high"], table["low"], table["row"] = words[:, 0], words[:, 1], self._rows
        table = table[np.lexsort((table["row"], table["low"], table["high"]))]
        edges = np.searchsorted(table["high"], range_edges(ranges))
        edges = np.append(edges, len(table)).astype(_EDGE)
        data = edges.tobytes() + table.tobytes()
        return work.commit(hashes_name(part), data, {"documents": len(table)})


def merge_range(work: Folder, number: int, ranges: int, num_parts: int) -> Record:
    """Commit which documents of a range of hashes equal an earlier one.

    The file: where each part begins (uint64 [num_parts + 1]), then ids (uint64), rising.
    """
    done = work.record(drops_name(number))
    if done is not None:
        return done
    tables = [_slice(work, hashes_name(p), HASHED, ranges, number) for p in range(num_parts)]
    document = np.concatenate(
        [table["row"].astype(np.uint64) | np.uint64(p << 32) for p, table in enumerate(tables)]
    )
    high = np.concatenate([table["high"] for table in tables])
    low = np.concatenate([table["low"] for table in tables])
    order = np.lexsort((document, low, high))
    high, low, document = high[order], low[order], document[order]
    is_repeated = np.zeros(len(document), dtype=bool)
    is_repeated[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    dropped = np.sort(document[is_repeated]).astype(DROPPED)
    parts = np.arange(num_parts + 1, dtype=np.uint64) << np.uint64(32)
    edges = np.searchsorted(dropped, parts).astype(_EDGE)
    data = edges.tobytes() + dropped.tobytes()
    return work.commit(drops_name(number), data, {"documents": len(dropped)})


def dropped_rows(work: Folder, part: int, ranges: int, num_parts: int) -> frozenset[int]:
    """Rows of a part that equal an earlier document of the corpus."""
    rows: set[int] = set()
    for number in range(ranges):
        found = _slice(work, drops_name(number), DROPPED, num_parts, part)
        rows.update((found & np.uint64(0xFFFFFFFF)).tolist())
    return frozenset(rows)


def _slice(work: Folder, name: str, kind: np.dtype, count: int, number: int) -> np.ndarray:
    """Slice `number` of the `count` that a file says it has, by ranged reads."""
    record = work.record(name)
    if record is None:
        raise Unfinished(f"{work.path(name)} is gone; run the same command again")
    head = (count + 1) * _EDGE.itemsize
    with work.open(record.object) as file:
        file.seek(number * _EDGE.itemsize)
        start, stop = np.frombuffer(file.read(2 * _EDGE.itemsize), dtype=_EDGE).tolist()
        file.seek(head + start * kind.itemsize)
        data = file.read((stop - start) * kind.itemsize)
    return np.frombuffer(data, dtype=kind, count=stop - start)
