"""Where a piece of a sequence came from: the tables of documents beside the shards."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn

import numpy as np
import pyarrow as pa

from cascade_model.commit import Folder
from cascade_model.manifest import Manifest
from cascade_model.schema import documents_name, documents_schema
from cascade_model.shards import read_arrow, refuse

_PART = np.uint64(32)
"""Bits of a document id below the index of its part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A piece of a document in a sample."""

    sample: int
    """Global sample number."""
    sequence_id: int
    document_id: int
    path: str
    """File that the document was read from."""
    where: str
    """Place in that file."""
    span: tuple[int, int]
    """First byte and the byte after the last one, of the document's cleaned text in UTF-8; of a
    rearranged one (infilling) in the order of its parts in the corpus."""


class DocumentTables:
    """The tables of a corpus, each read and checked when a document of its part is asked for."""

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        self._folder = folder
        self._entries = {entry.name: entry for entry in manifest.documents}
        self.table = lru_cache(maxsize=16)(self._read)

    def places(self, document_ids: np.ndarray) -> list[tuple[str, str]]:
        """Path and place of each document, uint64 [n]; `CorpusMismatch` when one is not listed."""
        found: list[tuple[str, str]] = [("", "")] * len(document_ids)
        for table, mine, rows in self._found(document_ids):
            paths, places = table.column("path"), table.column("where")
            for at, row in zip(mine.tolist(), rows.tolist(), strict=True):
                found[at] = (paths[row].as_py(), places[row].as_py())
        return found

    def sizes(self, document_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bytes, uint32 [n], and split, uint8 [n], of each document, uint64 [n].

        The bytes are those that its tokens hold: none where a normaliser left no token, else all.
        `CorpusMismatch` when one is not listed.
        """
        sizes = np.empty(len(document_ids), dtype=np.uint32)
        splits = np.empty(len(document_ids), dtype=np.uint8)
        for table, mine, rows in self._found(document_ids):
            has_tokens = table.column("tokens").to_numpy() > 0
            sizes[mine] = np.where(has_tokens, table.column("bytes").to_numpy(), 0)[rows]
            splits[mine] = table.column("split").to_numpy()[rows]
        return sizes, splits

    def num_documents(self, parts: np.ndarray, split: int) -> int:
        """Documents of a split (an index into SPLITS) that the tables of these parts list."""
        tables = (self.table(int(part)) for part in parts)
        return sum(int((table.column("split").to_numpy() == split).sum()) for table in tables)

    def _found(
        self, document_ids: np.ndarray
    ) -> Iterator[tuple[pa.RecordBatch, np.ndarray, np.ndarray]]:
        """Each part's table, the places of its documents in `document_ids`, and their rows."""
        parts = document_ids >> _PART
        for part in np.unique(parts):
            table, mine = self.table(int(part)), np.flatnonzero(parts == part)
            ids = table.column("document_id").to_numpy()
            rows = np.searchsorted(ids, document_ids[mine])
            is_listed = rows < len(ids)
            is_listed[is_listed] = ids[rows[is_listed]] == document_ids[mine][is_listed]
            if not is_listed.all():
                self._refuse(int(part), "does not list a document that the shards hold")
            yield table, mine, rows

    def _read(self, part: int) -> pa.RecordBatch:
        """The table of a part, its ids rising and of this part."""
        name = documents_name(part)
        if name not in self._entries:
            self._refuse(part, "is not in the manifest")
        entry = self._entries[name]
        reader = read_arrow(self._folder, entry.object, entry.bytes, entry.sha256)
        if not reader.schema.equals(documents_schema()):
            self._refuse(part, "has other columns than a table of documents")
        try:
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            for batch in batches:
                batch.validate(full=True)
            table = pa.concat_batches(batches) if batches else _empty()
        except (pa.ArrowException, OSError):
            self._refuse(part, "holds arrays that Arrow refuses")
        ids = table.column("document_id").to_numpy()
        is_sound = table.num_rows == entry.rows and bool((ids[1:] > ids[:-1]).all())
        if not is_sound or (ids >> _PART != part).any():
            self._refuse(part, "holds other documents than its name says")
        return table

    def _refuse(self, part: int, what: str) -> NoReturn:
        refuse(self._folder.path(documents_name(part)), what)


def _empty() -> pa.RecordBatch:
    schema = documents_schema()
    return pa.RecordBatch.from_arrays([pa.array([], each.type) for each in schema], schema=schema)
