"""Damaged corpora, each from a kind and a seed, and a reader of them in a process of its own.

Some kinds damage bytes and leave the records as they were, or make a record that is true for the
new bytes. The others are wrong in meaning only: the shard is written anew, its record and the
manifest vouch for it, so nothing but a look at the values can tell.

    python -m tests.cascade_model.damage checked|unchecked FOLDER...    a line for each folder
"""

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from cascade_model import shards
from cascade_model.columns import Rows, rows_columns, rows_of
from cascade_model.commit import RECORD_SUFFIX, Folder
from cascade_model.corpus import Corpus, read_manifest
from cascade_model.errors import CorpusMismatch
from cascade_model.manifest import MANIFEST, Manifest, ShardEntry
from cascade_model.schema import RAGGED, shard_schema
from cascade_model.sequences import Sequences
from cascade_model.settings import digest
from cascade_model.shards import entry_of, read_arrow, write_shard
from cascade_model.stored import stored_of


@dataclass(frozen=True)
class Target:
    """A copy of a corpus, the shard of it to damage, and the corpora it may take parts from."""

    folder: Path
    index: int
    rng: np.random.Generator
    foreign: Path
    """Another corpus of the same geometry."""
    stale: Path
    """The same texts, prepared earlier with another seed."""

    @property
    def manifest(self) -> Manifest:
        return read_manifest(Folder(self.folder))

    @property
    def entry(self) -> ShardEntry:
        return self.manifest.splits["train"].shards[self.index]

    @property
    def path(self) -> Path:
        return self.folder / self.entry.name

    def rows(self) -> Rows:
        """The shard's sequences, which are one record batch."""
        entry, geometry = self.entry, self.manifest.geometry
        reader = read_arrow(Folder(self.folder), entry.object, entry.bytes, entry.sha256)
        return rows_of(reader.get_batch(0), geometry)

    def rewrite(self, columns: list[pa.Array], schema: pa.Schema | None = None) -> None:
        """Write the shard anew, with a record and a manifest that are true for it."""
        entry, folder = self.entry, Folder(self.folder)
        folder.remove(entry.name + RECORD_SUFFIX)
        facts = {key: getattr(entry, key) for key in ("rows", "tokens", "first_sequence")}
        schema = schema or shard_schema(self.manifest.geometry)
        self.vouch_for(entry_of(write_shard(folder, entry.name, schema, [columns], facts)))

    def vouch_for(self, entry: ShardEntry) -> None:
        """Let the manifest say this of the shard."""
        manifest = self.manifest
        split = manifest.splits["train"]
        mine = [*split.shards]
        mine[self.index] = entry
        splits = {"train": dataclasses.replace(split, shards=tuple(mine))}
        changed = dataclasses.replace(manifest, splits=splits)
        (self.folder / MANIFEST).write_bytes(changed.to_json())

    def trust(self, data: bytes, offset: int, length: int) -> None:
        """Put bytes in the shard's place, with a record and a manifest that are true for them."""
        self.path.write_bytes(data)
        path = Path(f"{self.path}{RECORD_SUFFIX}")
        record, whole = json.loads(path.read_text()), _sha256(data)
        batches = [[offset, length, _sha256(data[offset : offset + length])]]
        record["facts"]["batches"], record["sha256"] = batches, whole
        path.write_text(json.dumps(record))
        vouched = dataclasses.replace(self.entry, sha256=whole, batches_sha256=digest(batches))
        self.vouch_for(vouched)

    def change(self, **values: np.ndarray) -> None:
        """Write the shard anew with other values."""
        self.rewrite(rows_columns(dataclasses.replace(self.rows(), **values)))

    def take(self, source: Path, name: str, with_record: bool) -> None:
        """Put another shard in this one's place."""
        shutil.copy(source / name, self.path)
        if with_record:
            record = json.loads((source / (name + RECORD_SUFFIX)).read_text())
            record |= {"name": self.entry.name, "object": self.entry.name}
            Path(f"{self.path}{RECORD_SUFFIX}").write_text(json.dumps(record))


def cut(target: Target) -> None:
    data = target.path.read_bytes()
    target.path.write_bytes(data[: int(target.rng.integers(len(data)))])


def flipped(target: Target) -> None:
    """A bit of the record batch; the record may be made true for it."""
    path = Path(f"{target.path}{RECORD_SUFFIX}")
    record, data = json.loads(path.read_text()), bytearray(target.path.read_bytes())
    [[offset, length, _]] = record["facts"]["batches"]
    data[offset + int(target.rng.integers(length))] ^= 1 << int(target.rng.integers(8))
    target.path.write_bytes(data)
    if target.rng.random() < 0.5:
        batch = bytes(data[offset : offset + length])
        record["facts"]["batches"] = [[offset, length, _sha256(batch)]]
        record["sha256"] = _sha256(bytes(data))
        path.write_text(json.dumps(record))


def swapped(target: Target) -> None:
    """Two shards of the corpus exchanged, with their records or without."""
    every = target.manifest.splits["train"].shards
    others = [shard.name for i, shard in enumerate(every) if i != target.index]
    other, with_record = target.rng.choice(others), bool(target.rng.random() < 0.5)
    target.take(target.folder, str(other), with_record)


def foreign(target: Target) -> None:
    target.take(target.foreign, target.entry.name, bool(target.rng.random() < 0.5))


def stale(target: Target) -> None:
    target.take(target.stale, target.entry.name, bool(target.rng.random() < 0.5))


def stale_and_vouched_for(target: Target) -> None:
    """An earlier preparation's masks, which are right for another seed."""
    old = dataclasses.replace(target, folder=target.stale).rows()
    target.change(is_masked=old.is_masked)


def token_out_of_range(target: Target) -> None:
    tokens = target.rows().tokens.copy()
    high = target.rng.integers(target.manifest.vocab_size, 2**16)
    tokens[tuple(target.rng.integers(tokens.shape))] = high
    target.change(tokens=tokens)


def mask_token_in_text(target: Target) -> None:
    tokens = target.rows().tokens.copy()
    tokens[tuple(target.rng.integers(tokens.shape))] = target.manifest.mask_id
    target.change(tokens=tokens)


def rows_exchanged(target: Target) -> None:
    ids = target.rows().sequence_ids.copy()
    one, two = target.rng.choice(len(ids), 2, replace=False)
    ids[[one, two]] = ids[[two, one]]
    target.change(sequence_ids=ids)


def numbered_from_elsewhere(target: Target) -> None:
    shift = np.uint64(target.rng.integers(1, 2**40))
    target.change(sequence_ids=target.rows().sequence_ids + shift)


def starts_off_the_grid(target: Target) -> None:
    starts = target.rows().document_starts.copy()
    starts[target.rng.integers(len(starts))] += target.rng.integers(1, 4)
    target.change(document_starts=starts)


def spans_off(target: Target) -> None:
    each = target.rows()
    starts, stops = each.span_starts.copy(), each.span_stops
    at = target.rng.integers(len(starts))
    starts[at] = stops[at] + target.rng.integers(1, 2**20)
    target.change(span_starts=starts)


def padding_masked(target: Target) -> None:
    each = target.rows()
    masked = each.is_masked.copy()
    places = np.argwhere(~each.is_maskable)
    masked[tuple(places[target.rng.integers(len(places))])] = True
    target.change(is_masked=masked)


def offsets_astray(target: Target) -> None:
    """List offsets that point anywhere: what would reach a SIGBUS, were they followed."""
    schema = shard_schema(target.manifest.geometry)
    columns = rows_columns(target.rows())
    at = schema.names.index(str(target.rng.choice(RAGGED)))
    offsets = columns[at].offsets.to_numpy().copy()
    middle = target.rng.integers(1, len(offsets) - 1)
    offsets[middle] = target.rng.choice([-(2**31), -1, 2**31 - 1, offsets[-1] + 1])
    buffers = [None, pa.py_buffer(offsets.tobytes())]
    columns[at] = pa.Array.from_buffers(
        columns[at].type, len(columns[at]), buffers, children=[columns[at].values]
    )
    target.rewrite(columns)


def empty_cells(target: Target) -> None:
    columns = rows_columns(target.rows())
    count = len(columns[0])
    valid = np.ones(count, dtype=bool)
    valid[target.rng.integers(count)] = False
    bits = pa.py_buffer(np.packbits(valid, bitorder="little").tobytes())
    columns[0] = pa.Array.from_buffers(pa.uint64(), count, [bits, columns[0].buffers()[1]])
    target.rewrite(columns)


def foreign_columns(target: Target) -> None:
    """Columns under exchanged names, or one too few: the bytes are laid out alike."""
    schema, columns = shard_schema(target.manifest.geometry), rows_columns(target.rows())
    if target.rng.random() < 0.5:
        one, two = target.rng.choice([(2, 4), (2, 5), (4, 5), (6, 7)])
        names = [*schema.names]
        names[one], names[two] = names[two], names[one]
        schema = pa.schema([f.with_name(n) for f, n in zip(schema, names, strict=True)])
    else:
        schema, columns = schema.remove(5), columns[:5] + columns[6:]
    target.rewrite(columns, schema)


def rows_missing(target: Target) -> None:
    count = len(target.rows())
    keep = int(target.rng.integers(1, count))
    target.rewrite([column[:keep] for column in rows_columns(target.rows())])


def list_astray(target: Target) -> None:
    """The manifest vouches for a record that leads outside of the file, or into its middle."""
    path = Path(f"{target.path}{RECORD_SUFFIX}")
    record = json.loads(path.read_text())
    [[offset, length, sha256]] = record["facts"]["batches"]
    where = target.rng.choice([-64, offset + 8 * int(target.rng.integers(1, 9)), 2**62])
    record["facts"]["batches"] = [[int(where), length, sha256]]
    path.write_text(json.dumps(record))
    sha256 = digest(record["facts"]["batches"])
    target.vouch_for(dataclasses.replace(target.entry, batches_sha256=sha256))


BYTES = (cut, flipped, swapped, foreign, stale)
MEANING = (
    stale_and_vouched_for,
    token_out_of_range,
    mask_token_in_text,
    rows_exchanged,
    numbered_from_elsewhere,
    starts_off_the_grid,
    spans_off,
    padding_masked,
    offsets_astray,
    empty_cells,
    foreign_columns,
    rows_missing,
    list_astray,
)
KINDS: tuple[Callable[[Target], None], ...] = BYTES + MEANING


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def switch_checks_off() -> None:
    """The control: a reader that believes what it reads."""
    shards.require_hash = lambda data, sha256: None
    Sequences._stored = lambda self, batch, *_: stored_of(batch, self._geometry)


def read(folder: str) -> dict[str, str]:
    """Touch every sequence; what was refused, or that nothing was."""
    try:
        corpus = Corpus.open(folder)
        every = np.arange(corpus.num_sequences, dtype=np.uint64)
        corpus.batch(0, corpus.num_sequences, corpus.manifest.noise)
        corpus.rows(every)
    except CorpusMismatch as error:
        return {"folder": folder, "refused": str(error)}
    return {"folder": folder, "read": str(len(every))}


def main(words: list[str]) -> int:
    """Read each folder; a line of JSON as soon as it is done."""
    mode, *folders = words
    if mode == "unchecked":
        switch_checks_off()
    for folder in folders:
        sys.stdout.write(json.dumps(read(folder)) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
