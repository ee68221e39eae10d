"""Bitmaps of further draws, written beside the shards, for readers that would rather not compute.

A draw d >= 1 is one unit `draw-000d-SHARD` for each shard (`draw_schema`) and, last, a manifest of
its own, `draw-000d.json`, which is bound to the corpus by its digest. The bits are the recipe's, so
a reader has the same ones with and without; a draw without its manifest is not there.
"""

import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import pyarrow as pa

from cascade_model import noise as mask_noise
from cascade_model.columns import bitmap_of, draw_columns, unpacked
from cascade_model.commit import Folder
from cascade_model.errors import CorpusMismatch
from cascade_model.manifest import Manifest, ShardEntry
from cascade_model.mixing import mixture_of
from cascade_model.open_shards import OpenShards, Rows
from cascade_model.schema import batch_rows, draw_schema, shard_schema
from cascade_model.settings import digest
from cascade_model.shard_cache import ShardCache
from cascade_model.shards import BatchFile, entry_of, write_shard
from cascade_model.stored import stored_of

_DRAWS, _FILES = 4, 128
"""Draws at hand at most, and mapped files of each: with those of the corpus itself they stay below
the usual 1024 open ones."""


def draw_name(draw: int, shard: str) -> str:
    """The unit that holds a draw's bitmaps of a shard."""
    return f"draw-{draw:04d}-{shard}"


def draw_manifest_name(draw: int) -> str:
    """The manifest of a draw, written last."""
    return f"draw-{draw:04d}.json"


def masked_in(
    manifest: Manifest, split: str, draw: int, sequence_ids: np.ndarray, is_maskable: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What the recipe says of sequences, uint64 [n], in a draw.

    Returns thresholds, uint32 [n, L / B], and masked places, bool [n, L], of `is_maskable` alike.
    """
    geometry, noise = manifest.geometry, manifest.noise
    entry = manifest.splits[split]
    mixture = mixture_of(entry.sources, entry.num_sequences)
    ranks = mixture.ranks_of(sequence_ids, noise, draw)
    rates = mask_noise.thresholds(noise, draw, ranks, geometry.num_blocks)
    bits = mask_noise.mask_bits(noise, draw, sequence_ids, rates, geometry.sequence_length)
    return rates, bits & is_maskable


def write_draw(folder: Folder, manifest: Manifest, split: str, index: int, draw: int) -> ShardEntry:
    """Commit a draw's bitmaps of one shard; what is committed already is not computed again."""
    shard = manifest.splits[split].shards[index]
    name, geometry = draw_name(draw, shard.name), manifest.geometry
    record = folder.record(name)
    if record is None:
        source = BatchFile(folder, shard, shard_schema(geometry))

        def batches() -> Iterator[list[pa.Array]]:
            for number in range(len(source)):
                batch = source.read(number)
                ids = batch.column("sequence_id").to_numpy()
                maskable = unpacked(stored_of(batch, geometry).is_maskable, geometry)
                yield draw_columns(ids, masked_in(manifest, split, draw, ids, maskable)[1])

        facts = {"rows": shard.rows, "tokens": shard.tokens, "first_sequence": shard.first_sequence}
        record = write_shard(folder, name, draw_schema(geometry), batches(), facts)
    return entry_of(record)


def publish_draw(
    folder: Folder, manifest: Manifest, draw: int, entries: dict[str, list[ShardEntry]]
) -> None:
    """Write a draw's manifest: its shards of every split, in the order of the corpus's own."""
    values = {
        "corpus": manifest.digest,
        "draw": draw,
        "splits": {split: [asdict(each) for each in mine] for split, mine in entries.items()},
    }
    values["digest"] = digest(values)
    data = json.dumps(values, indent=1, sort_keys=True) + "\n"
    folder.publish(draw_manifest_name(draw), data.encode())


def read_draw(folder: Folder, manifest: Manifest, draw: int) -> dict[str, tuple[ShardEntry, ...]]:
    """The shards of a draw by split; empty when it was not written.

    `CorpusMismatch` when its manifest is damaged or another corpus's.
    """
    where = folder.path(draw_manifest_name(draw))
    try:
        values = json.loads(folder.read_bytes(draw_manifest_name(draw)))
        written = values.pop("digest")
        splits = {
            split: tuple(ShardEntry(**each) for each in mine)
            for split, mine in values["splits"].items()
        }
        owner, number = values["corpus"], values["draw"]
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CorpusMismatch(f"{where} is damaged; delete it and materialise again") from None
    if digest(values) != written or number != draw:
        raise CorpusMismatch(f"{where} was edited or damaged; delete it and materialise again")
    if owner != manifest.digest:
        raise CorpusMismatch(
            f"{where} belongs to corpus {owner[:12]} but this one is {manifest.digest[:12]}; "
            "delete it and materialise again"
        )
    for split, mine in splits.items():
        own = [(draw_name(draw, s.name), s.rows) for s in manifest.splits[split].shards]
        if [(each.name, each.rows) for each in mine] != own:
            raise CorpusMismatch(f"{where} lists other shards than the corpus; delete it")
    return splits


class Draws:
    """The further draws of a split, as far as they were written."""

    def __init__(
        self, folder: Folder, manifest: Manifest, split: str, cache: ShardCache | None
    ) -> None:
        self._folder, self._manifest, self._split, self._cache = folder, manifest, split, cache
        self._open: OrderedDict[int, OpenShards[np.ndarray] | None] = OrderedDict()

    def masked(self, draw: int, sequence_ids: np.ndarray) -> np.ndarray | None:
        """Masked places of sequences, uint64 [n], in a draw: bool [n, L]; none if not written."""
        if draw not in self._open:
            self._open[draw] = self._opened(draw)
        self._open.move_to_end(draw)
        if len(self._open) > _DRAWS:
            self._open.popitem(last=False)
        shards, geometry = self._open[draw], self._manifest.geometry
        if shards is None:
            return None
        bits = np.empty((len(sequence_ids), geometry.bitmap_bytes), dtype=np.uint8)

        def take(stored: np.ndarray, rows: Rows, at: Rows) -> None:
            bits[at] = stored[rows]

        shards.visit(sequence_ids, take)
        return unpacked(bits, geometry)

    def _opened(self, draw: int) -> OpenShards[np.ndarray] | None:
        entries = read_draw(self._folder, self._manifest, draw).get(self._split)
        if entries is None:
            return None
        geometry = self._manifest.geometry
        schema, rows = draw_schema(geometry), batch_rows(geometry)
        return OpenShards(self._folder, entries, schema, rows, self._stored, self._cache, _FILES)

    def _stored(
        self, batch: pa.RecordBatch, first: int, count: int, is_checked: bool
    ) -> np.ndarray | str:
        ids = batch.column("sequence_id").to_numpy()
        if not np.array_equal(ids, np.arange(first, first + count, dtype=np.uint64)):
            return "has other sequence ids than its shard"
        return bitmap_of(batch, "is_masked", self._manifest.geometry)
