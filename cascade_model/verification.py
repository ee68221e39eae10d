"""Everything that a finished corpus says of itself, computed again and compared.

Each shard is looked at alone, so several processes may share the work.
"""

import re

import numpy as np
import pyarrow as pa

from cascade_model.columns import bitmap_of, unpacked
from cascade_model.commit import Folder
from cascade_model.draws import masked_in, read_draw
from cascade_model.errors import CorpusMismatch, InputError
from cascade_model.manifest import TOKENIZER, Manifest, ShardEntry
from cascade_model.mixing import mixture_of
from cascade_model.provenance import DocumentTables
from cascade_model.schema import SPLITS, batch_rows, draw_schema, shard_schema
from cascade_model.shards import BatchFile, read_arrow
from cascade_model.stored import Stored, fault_of, stored_of
from cascade_model.tokenizer import Tokenizer

_DRAW = re.compile(r"draw-(\d{4})\.json")


class Verifier:
    """A corpus and what all its shards are compared with, read once."""

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        """`CorpusMismatch` when the manifest of a further draw is damaged or another corpus's."""
        self.folder, self.manifest = folder, manifest
        self._tables = DocumentTables(folder, manifest)
        self.draws = {draw: read_draw(folder, manifest, draw) for draw in draws_of(folder)}

    def corpus(self) -> list[str]:
        """What is wrong with the corpus as a whole: its tokenizer, its sums, its numbering."""
        return [
            *self._tokenizer(),
            *(fault for split in self.manifest.splits for fault in self._split(split)),
            *self._documents(),
        ]

    def shard(self, split: str, index: int) -> list[str]:
        """What is wrong with one shard and its further draws; nothing for a sound one."""
        entry = self.manifest.splits[split].shards[index]
        where, geometry = self.folder.path(entry.object), self.manifest.geometry
        stored: list[Stored] = []
        faults: list[str] = []
        try:
            for batch in _whole(self.folder, entry, shard_schema(geometry), batch_rows(geometry)):
                first = entry.first_sequence + sum(map(len, stored))
                mask_id, count = self.manifest.mask_id, batch.num_rows
                fault = fault_of(batch, geometry, mask_id, first, count)
                if fault:
                    return [f"{where} {fault}"]
                stored.append(stored_of(batch, geometry))
                faults += self._recipe(split, first, stored[-1])
            faults += self._counts(entry, stored) + self._spans(split, stored)
            faults = [f"{where} {fault}" for fault in faults]
            for draw in self.draws:
                faults += self._draw(split, index, draw, stored)
        except CorpusMismatch as error:
            faults.append(str(error))
        return list(dict.fromkeys(faults))

    def _tokenizer(self) -> list[str]:
        where, said = self.folder.path(TOKENIZER), self.manifest.tokenizer_sha256
        try:
            found = Tokenizer(self.folder.read_bytes(TOKENIZER), where).sha256
        except FileNotFoundError:
            found = "none"
        except InputError as error:
            return [str(error)]
        same = found == said
        return [] if same else [f"{where} has sha256 {found[:12]}, the manifest {said[:12]}"]

    def _split(self, name: str) -> list[str]:
        """The numbering of a split and its sums."""
        split, faults = self.manifest.splits[name], []
        if split.num_sequences:
            try:
                mixture_of(split.sources, split.num_sequences)
            except CorpusMismatch as error:
                faults.append(f"split {name}: {error}")
        ends = np.cumsum([0, *(shard.rows for shard in split.shards)])
        if [shard.first_sequence for shard in split.shards] != ends[:-1].tolist():
            faults.append(f"split {name}: its shards do not follow one another")
        tokens = sum(shard.tokens for shard in split.shards)
        sums = {
            "num_sequences": (split.num_sequences, int(ends[-1])),
            "num_tokens": (split.num_tokens, tokens),
            "num_tokens of its sources": (sum(each.num_tokens for each in split.sources), tokens),
        }
        for key, (said, counted) in sums.items():
            if said != counted:
                faults.append(f"split {name}: {key} is {said} but its shards sum to {counted}")
        return faults

    def _documents(self) -> list[str]:
        """The splits' documents against the tables, where the corpus has any."""
        tables = self.manifest.documents
        said = sum(split.num_documents for split in self.manifest.splits.values())
        listed = sum(table.rows for table in tables)
        same = said == listed or not tables
        return [] if same else [f"the splits have {said} documents but the tables list {listed}"]

    def _recipe(self, split: str, first: int, rows: Stored) -> list[str]:
        """Thresholds and bitmap of draw 0 against the recipe."""
        geometry, faults = self.manifest.geometry, []
        rates, masked = self._masked(split, 0, first, rows)
        if not np.array_equal(rows.thresholds, rates[:, : geometry.rates_per_row]):
            faults.append("has other thresholds than its recipe")
        if not np.array_equal(unpacked(rows.is_masked, geometry), masked):
            faults.append("has another mask than its recipe")
        return faults

    def _masked(
        self, split: str, draw: int, first: int, rows: Stored
    ) -> tuple[np.ndarray, np.ndarray]:
        ids = np.arange(first, first + len(rows), dtype=np.uint64)
        maskable = unpacked(rows.is_maskable, self.manifest.geometry)
        return masked_in(self.manifest, split, draw, ids, maskable)

    def _counts(self, entry: ShardEntry, stored: list[Stored]) -> list[str]:
        geometry = self.manifest.geometry
        tokens = sum(int(unpacked(rows.is_maskable, geometry).sum()) for rows in stored)
        same = tokens == entry.tokens
        return [] if same else [f"has {tokens} maskable tokens, the manifest {entry.tokens}"]

    def _spans(self, split: str, stored: list[Stored]) -> list[str]:
        """Every document of the shard is in its table, and its pieces cover it once and whole."""
        if not self.manifest.documents or not stored:
            return []
        ids, starts, stops = (
            np.concatenate([getattr(rows, name) for rows in stored])
            for name in ("document_ids", "span_starts", "span_stops")
        )
        order = np.lexsort((stops, starts, ids))
        ids, starts, stops = ids[order], starts[order], stops[order]
        is_first = np.append(True, ids[1:] != ids[:-1])
        is_last = np.append(is_first[1:], True)
        sizes, splits = self._tables.sizes(ids[is_first])
        if (splits != SPLITS.index(split)).any():
            return ["holds documents of another split"]
        if (starts[is_first] != 0).any() or (starts[~is_first] != stops[~is_last]).any():
            return ["has byte spans that leave a gap in a document or hold a byte twice"]
        if (stops[is_last] != sizes).any():
            return ["has byte spans that do not end where their documents do"]
        # A part's documents of a split are in one shard.
        listed = self._tables.num_documents(np.unique(ids >> np.uint64(32)), SPLITS.index(split))
        if listed != int(is_first.sum()):
            return [f"holds {int(is_first.sum())} of {listed} documents that its tables list"]
        return []

    def _draw(self, split: str, index: int, draw: int, stored: list[Stored]) -> list[str]:
        """A further draw's bitmaps of the shard against the recipe."""
        entry, geometry = self.draws[draw][split][index], self.manifest.geometry
        batches = _whole(self.folder, entry, draw_schema(geometry), batch_rows(geometry))
        first, where = entry.first_sequence, self.folder.path(entry.object)
        for batch, rows in zip(batches, stored, strict=True):
            ids = np.arange(first, first + len(rows), dtype=np.uint64)
            found = unpacked(bitmap_of(batch, "is_masked", geometry), geometry)
            same_ids = np.array_equal(batch.column("sequence_id").to_numpy(), ids)
            if not same_ids or not np.array_equal(found, self._masked(split, draw, first, rows)[1]):
                return [f"{where} has another mask than draw {draw} of its recipe"]
            first += len(rows)
        return []


def draws_of(folder: Folder) -> list[int]:
    """The further draws that have a manifest."""
    names = (_DRAW.fullmatch(name) for name in folder.list())
    return [int(name.group(1)) for name in names if name]


def _whole(folder: Folder, entry: ShardEntry, schema: pa.Schema, rows: int) -> list[pa.RecordBatch]:
    """All record batches: the file's hash, each one's hash, and both ways of finding them."""
    reader = read_arrow(folder, entry.object, entry.bytes, entry.sha256)
    file = BatchFile(folder, entry, schema)
    batches = [file.read(number) for number in range(len(file))]
    where = folder.path(entry.object)
    if sum(batch.num_rows for batch in batches) != entry.rows or any(
        batch.num_rows != rows for batch in batches[:-1]
    ):
        raise CorpusMismatch(f"shard {where} has other rows than the manifest's {entry.rows}")
    same = reader.num_record_batches == len(batches) and all(
        reader.get_batch(number).equals(batch) for number, batch in enumerate(batches)
    )
    if not same:
        raise CorpusMismatch(f"shard {where} has a footer that leads to other record batches")
    return batches
