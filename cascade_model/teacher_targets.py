"""What an autoregressive teacher said of a corpus, on disk: written once, read by sequence id.

Of every token that can be supervised and has a left neighbour in its document: the teacher's k
likeliest tokens at that place, their log-probabilities, and the probability of all the others. The
axis is the *predicted* token: row i is the teacher's distribution of token i given the tokens of
its document before it. Places without one hold id -1. One unit for each shard of the corpus, in the
same record batches of rising sequence ids, and last `targets.json`, which names the corpus, the
teacher and the settings; what does not go together is refused with both values.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cascade_model.columns import fixed_column, flat_of
from cascade_model.commit import Folder, Record
from cascade_model.errors import CorpusMismatch
from cascade_model.manifest import CURE, Manifest, ShardEntry
from cascade_model.open_shards import FETCHES, OpenShards, Rows
from cascade_model.schema import fixed
from cascade_model.settings import check, digest, shown
from cascade_model.shard_cache import CacheConfig, ShardCache
from cascade_model.shards import BatchFile, entry_of, refuse, require_size, write_shard

FORMAT_VERSION = 1
TARGETS = "targets.json"
AXIS = "predicted token"
NO_TARGET = -1
_CURE = "write the targets again with `cascade teach` into another folder"
_BATCH_BYTES = 1 << 20
"""Bytes of a record batch, about: what is checked, and fetched from a store, at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetsManifest:
    """What was asked of which teacher about which corpus; written last."""

    format_version: int = FORMAT_VERSION
    corpus: str
    """Digest of the corpus."""
    split: str
    teacher: str
    """Digest of the teacher's weights."""
    tokenizer_sha256: str
    sequence_length: int
    vocab_size: int
    banned: tuple[int, ...]
    """Ids that the teacher cannot emit and that no target names."""
    k: int
    """Tokens named for each place."""
    temperature: float
    """The distributions are softmax(logits / temperature)."""
    precision: str
    """Type of the teacher's weights when it spoke."""
    axis: str = AXIS
    shards: tuple[ShardEntry, ...]
    """One for each of the corpus's, in their order."""

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all but the objects' own names, which in a store differ by attempt."""
        values = asdict(self)
        for shard in values["shards"]:
            del shard["object"]
        return digest(values)

    @property
    def rows_per_batch(self) -> int:
        """Sequences of a record batch."""
        return rows_per_batch(self.sequence_length, self.k)

    def to_json(self) -> bytes:
        """The manifest's one spelling, its digest included."""
        values = {**asdict(self), "digest": self.digest}
        return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "TargetsManifest":
        """Read a manifest; `CorpusMismatch` when it is damaged, edited or of another format."""
        try:
            values = json.loads(data)
            written = values.pop("digest")
            values["shards"] = tuple(ShardEntry(**each) for each in values["shards"])
            values["banned"] = tuple(values["banned"])
            manifest = cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise CorpusMismatch(f"{where} is damaged; {_CURE}") from None
        _require(where, "format_version", manifest.format_version, "this program", FORMAT_VERSION)
        _require(where, "axis", manifest.axis, "this program", AXIS)
        if manifest.digest != written:
            raise CorpusMismatch(
                f"{where} has digest {manifest.digest[:12]} but says {str(written)[:12]}; it was "
                f"edited or damaged; {_CURE}"
            )
        return manifest


@dataclass(frozen=True, slots=True)
class TargetRows:
    """The targets of n sequences of L tokens."""

    ids: np.ndarray
    """int32 [n, L, k], the likeliest first; -1 where there is no target."""
    log_probs: np.ndarray
    """float16 [n, L, k]: nats."""
    rest: np.ndarray
    """float32 [n, L]: probability of all other tokens."""

    def __len__(self) -> int:
        return len(self.ids)


def target_schema(sequence_length: int, k: int) -> pa.Schema:
    """Columns of a unit: a row for each sequence, place by place."""
    return pa.schema(
        [
            pa.field("sequence_id", pa.uint64(), nullable=False),
            pa.field("ids", fixed(pa.int32(), sequence_length * k), nullable=False),
            pa.field("log_probs", fixed(pa.float16(), sequence_length * k), nullable=False),
            pa.field("rest", fixed(pa.float32(), sequence_length), nullable=False),
        ]
    )


def rows_per_batch(sequence_length: int, k: int) -> int:
    """Sequences of a record batch: 6 bytes for each of the k, 4 for the rest."""
    return max(1, _BATCH_BYTES // (sequence_length * (6 * k + 4)))


def target_name(shard: str) -> str:
    """The unit that holds the targets of a shard."""
    return f"targets-{shard}"


def write_targets(
    folder: Folder,
    shard: ShardEntry,
    schema: pa.Schema,
    batches: Iterable[tuple[np.ndarray, TargetRows]],
) -> Record:
    """Commit the targets of one shard, given as record batches of ids, uint64 [n], and rows."""
    facts = {name: getattr(shard, name) for name in ("rows", "tokens", "first_sequence")}

    def columns() -> Iterable[list[pa.Array]]:
        for ids, rows in batches:
            yield [
                pa.array(ids.astype(np.uint64)),
                fixed_column(rows.ids.reshape(len(rows), -1)),
                fixed_column(rows.log_probs.reshape(len(rows), -1)),
                fixed_column(rows.rest),
            ]

    return write_shard(folder, target_name(shard.name), schema, columns(), facts)


def publish_targets(folder: Folder, manifest: TargetsManifest) -> None:
    """Write the manifest, after all units."""
    folder.publish(TARGETS, manifest.to_json())


def entries_of(records: Iterable[Record]) -> tuple[ShardEntry, ...]:
    """Committed units as the manifest names them."""
    return tuple(entry_of(record) for record in records)


def read_targets(url: str) -> TargetsManifest:
    """The manifest of finished targets; `CorpusMismatch` when there is none, `InputError` when the
    folder does not exist."""
    folder = Folder(url)
    try:
        data = folder.read_bytes(TARGETS)
    except (FileNotFoundError, NotADirectoryError):
        check(
            folder.is_there(),
            f"targets={url} does not exist; make it with `cascade teach`, or check the path",
        )
        raise CorpusMismatch(
            f"targets={url} has no {TARGETS}, so it is unfinished or holds no targets; run its "
            "`cascade teach` again to go on, or check the path"
        ) from None
    return TargetsManifest.from_json(data, folder.path(TARGETS))


class TeacherTargets:
    """The targets of a corpus, each record batch checked when it is first touched."""

    def __init__(
        self, url: str, corpus: Manifest, split: str = "train", cache: CacheConfig = CacheConfig()
    ) -> None:
        """Open for a corpus; `CorpusMismatch` with both values when they are another's."""
        self._folder = folder = Folder(url)
        self.manifest = read_targets(url)
        self.require(url, corpus, split)
        self._schema = target_schema(self.manifest.sequence_length, self.manifest.k)
        is_mapped = folder.is_local and cache.folder is None
        self._shards = OpenShards(
            folder,
            self.manifest.shards,
            self._schema,
            self.manifest.rows_per_batch,
            self._stored,
            None if is_mapped else ShardCache(cache),
        )

    def require(self, url: str, corpus: Manifest, split: str) -> None:
        """Refuse the targets of another corpus or split."""
        ours = self.manifest
        for name, found, wanted in (
            ("tokenizer_sha256", ours.tokenizer_sha256, corpus.tokenizer_sha256),
            ("corpus digest", ours.corpus, corpus.digest),
            ("split", ours.split, split),
            ("sequence_length", ours.sequence_length, corpus.sequence_length),
        ):
            _require(f"targets={url}", name, found, "the corpus", wanted)
        own = [(target_name(shard.name), shard.rows) for shard in corpus.splits[split].shards]
        if [(each.name, each.rows) for each in ours.shards] != own:
            raise CorpusMismatch(f"targets={url} lists other shards than the corpus; {_CURE}")

    def rows(self, sequence_ids: np.ndarray) -> TargetRows:
        """The targets of sequences, uint64 [n], in the order asked for; `CorpusMismatch` names a
        file that is not what its record says."""
        count, length, k = len(sequence_ids), self.manifest.sequence_length, self.manifest.k
        found = TargetRows(
            np.empty((count, length, k), dtype=np.int32),
            np.empty((count, length, k), dtype=np.float16),
            np.empty((count, length), dtype=np.float32),
        )

        def take(stored: TargetRows, rows: Rows, at: Rows) -> None:
            found.ids[at] = stored.ids[rows]
            found.log_probs[at] = stored.log_probs[rows]
            found.rest[at] = stored.rest[rows]

        with _cured_as_targets():
            self._shards.visit(np.asarray(sequence_ids, dtype=np.uint64), take)
        return found

    def require_units(self) -> None:
        """Refuse units that are missing, cut or of other columns, without reading their targets."""
        with ThreadPoolExecutor(FETCHES) as pool, _cured_as_targets():
            list(pool.map(self._require_unit, self.manifest.shards))

    def _require_unit(self, entry: ShardEntry) -> None:
        where = self._folder.path(entry.object)
        try:
            require_size(where, self._folder.size(entry.object), entry.bytes)
        except OSError as error:
            refuse(where, f"cannot be read ({type(error).__name__})")
        BatchFile(self._folder, entry, self._schema)

    def _stored(
        self, batch: pa.RecordBatch, first: int, count: int, is_checked: bool
    ) -> TargetRows | str:
        """A record batch as arrays, or what is wrong with it."""
        length, k = self.manifest.sequence_length, self.manifest.k
        wanted = np.arange(first, first + count, dtype=np.uint64)
        if not np.array_equal(batch.column("sequence_id").to_numpy(), wanted):
            return "has other sequence ids than its shard"
        rows = TargetRows(
            flat_of(batch, "ids").reshape(-1, length, k),
            flat_of(batch, "log_probs").reshape(-1, length, k),
            flat_of(batch, "rest").reshape(-1, length),
        )
        return rows if is_checked else fault_of(rows, self.manifest.vocab_size) or rows


@contextlib.contextmanager
def _cured_as_targets() -> Iterator[None]:
    """What a shard's reader refuses here is written by another command than a corpus is."""
    try:
        yield
    except CorpusMismatch as error:
        raise CorpusMismatch(str(error).removesuffix(CURE) + _CURE) from None


def fault_of(rows: TargetRows, vocab_size: int) -> str | None:
    """What targets of a sound file cannot be; none when they are sound."""
    if rows.ids.size and not NO_TARGET <= rows.ids.min() <= rows.ids.max() < vocab_size:
        return f"names tokens outside the vocabulary of {vocab_size}"
    is_told = rows.ids != NO_TARGET
    if (is_told != is_told[:, :, :1]).any():
        return "names some of a place's tokens only"
    if not (np.isfinite(rows.log_probs).all() and (rows.log_probs <= 0).all()):
        return "holds log-probabilities that are none"
    if not ((rows.rest >= 0) & (rows.rest <= 1)).all():
        return "holds probabilities that are none"
    return None


def _require(where: str, name: str, found: Any, whose: str, wanted: Any) -> None:
    if found != wanted:
        raise CorpusMismatch(
            f"{where} has {name}={shown(found)} and {whose} {name}={shown(wanted)}; {_CURE}"
        )
