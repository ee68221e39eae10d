"""Everything that a finished corpus says of itself, computed again and compared.

Each shard is looked at alone, so several processes may share the work.
"""

import numpy as np
import pyarrow as pa

from cascade_model.commit import Folder
from cascade_model.draws import draw_manifest_name, masked_in, read_draw
from cascade_model.errors import CorpusMismatch
from cascade_model.mixing import mixture_of
from cascade_model.provenance import DocumentTables
from cascade_model.schema import (
    SPLITS,
    TOKENIZER,
    Manifest,
    ShardEntry,
    batch_rows,
    bitmap_of,
    draw_schema,
    shard_schema,
    unpacked,
)
from cascade_model.shards import BatchFile, read_arrow
from cascade_model.stored import Stored, fault_of, stored_of
from cascade_model.tokenizer import Tokenizer


def corpus_faults(folder: Folder, manifest: Manifest) -> list[str]:
    """What is wrong with a corpus as a whole: its tokenizer, its sums, its numbering."""
    faults = []
    try:
        found = Tokenizer(folder.read_bytes(TOKENIZER), folder.path(TOKENIZER)).sha256
    except FileNotFoundError:
        found = "none"
    if found != manifest.tokenizer_sha256:
        faults.append(
            f"{folder.path(TOKENIZER)} has sha256 {found[:12]}, the manifest "
            f"{manifest.tokenizer_sha256[:12]}"
        )
    for name, split in manifest.splits.items():
        if split.num_sequences:
            try:
                mixture_of(split)
            except CorpusMismatch as error:
                faults.append(f"split {name}: {error}")
        ends = np.cumsum([0, *(shard.rows for shard in split.shards)])
        if [shard.first_sequence for shard in split.shards] != ends[:-1].tolist():
            faults.append(f"split {name}: its shards do not follow one another")
        sums = {
            "num_sequences": (split.num_sequences, int(ends[-1])),
            "num_tokens": (split.num_tokens, sum(shard.tokens for shard in split.shards)),
        }
        for key, (said, counted) in sums.items():
            if said != counted:
                faults.append(f"split {name}: {key} is {said} but its shards sum to {counted}")
    return faults


def draws_of(folder: Folder) -> list[int]:
    """The further draws that have a manifest."""
    names = set(folder.list())
    draw = 1
    found = []
    while draw_manifest_name(draw) in names:
        found.append(draw)
        draw += 1
    return found


def shard_faults(folder: Folder, manifest: Manifest, split: str, index: int) -> list[str]:
    """What is wrong with one shard and with its further draws; nothing for a sound one."""
    entry = manifest.splits[split].shards[index]
    geometry, faults = manifest.geometry, []
    schema, stored = shard_schema(geometry), []
    try:
        for batch in _whole(folder, entry, schema, batch_rows(geometry)):
            first = entry.first_sequence + sum(map(len, stored))
            fault = fault_of(batch, geometry, manifest.mask_id, first, batch.num_rows)
            if fault:
                return [f"{folder.path(entry.object)} {fault}"]
            stored.append(stored_of(batch, geometry))
            faults += _recipe_faults(manifest, split, first, stored[-1])
        faults += _count_faults(entry, manifest, stored)
        faults += _span_faults(folder, manifest, split, stored)
        faults = [f"{folder.path(entry.object)} {fault}" for fault in faults]
        for draw in draws_of(folder):
            faults += _draw_faults(folder, manifest, split, index, draw, stored)
    except CorpusMismatch as error:
        faults.append(str(error))
    return list(dict.fromkeys(faults))


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


def _recipe_faults(manifest: Manifest, split: str, first: int, rows: Stored) -> list[str]:
    """Thresholds and bitmap of draw 0 against the recipe."""
    geometry, faults = manifest.geometry, []
    ids = np.arange(first, first + len(rows), dtype=np.uint64)
    maskable = unpacked(rows.is_maskable, geometry)
    rates, masked = masked_in(manifest, split, 0, ids, maskable)
    if not np.array_equal(rows.thresholds, rates[:, : geometry.rates_per_row]):
        faults.append("has other thresholds than its recipe")
    if not np.array_equal(unpacked(rows.is_masked, geometry), masked):
        faults.append("has another mask than its recipe")
    return faults


def _count_faults(entry: ShardEntry, manifest: Manifest, stored: list[Stored]) -> list[str]:
    geometry = manifest.geometry
    tokens = sum(int(unpacked(rows.is_maskable, geometry).sum()) for rows in stored)
    if tokens != entry.tokens:
        return [f"has {tokens} maskable tokens, the manifest {entry.tokens}"]
    return []


def _span_faults(folder: Folder, manifest: Manifest, split: str, stored: list[Stored]) -> list[str]:
    """Every document of the shard is in its table, and its pieces cover it once and whole."""
    if not manifest.documents or not stored:
        return []
    ids, starts, stops = (
        np.concatenate([getattr(rows, name) for rows in stored])
        for name in ("document_ids", "span_starts", "span_stops")
    )
    order = np.lexsort((stops, starts, ids))
    ids, starts, stops = ids[order], starts[order], stops[order]
    is_first = np.append(True, ids[1:] != ids[:-1])
    is_last = np.append(is_first[1:], True)
    tables = DocumentTables(folder, manifest)
    sizes, splits = tables.sizes(ids[is_first])
    if (splits != SPLITS.index(split)).any():
        return ["holds documents of another split"]
    if (starts[is_first] != 0).any() or (starts[~is_first] != stops[~is_last]).any():
        return ["has byte spans that leave a gap in a document or hold a byte twice"]
    if (stops[is_last] != sizes).any():
        return ["has byte spans that do not end where their documents do"]
    return []


def _draw_faults(
    folder: Folder, manifest: Manifest, split: str, index: int, draw: int, stored: list[Stored]
) -> list[str]:
    """A further draw's bitmaps of the shard against the recipe."""
    entry, geometry = read_draw(folder, manifest, draw)[split][index], manifest.geometry
    batches = _whole(folder, entry, draw_schema(geometry), batch_rows(geometry))
    first = entry.first_sequence
    for batch, rows in zip(batches, stored, strict=True):
        ids = np.arange(first, first + len(rows), dtype=np.uint64)
        maskable = unpacked(rows.is_maskable, geometry)
        _, masked = masked_in(manifest, split, draw, ids, maskable)
        found = unpacked(bitmap_of(batch, "is_masked", geometry), geometry)
        same_ids = np.array_equal(batch.column("sequence_id").to_numpy(), ids)
        if not (same_ids and np.array_equal(found, masked)):
            return [f"{folder.path(entry.object)} has another mask than draw {draw} of its recipe"]
        first += len(rows)
    return []
