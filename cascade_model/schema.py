"""The data contract: the row of a shard, the manifest, and nothing that reads or writes files.

A sequence is L tokens cut from packed documents. Each document is its tokens plus one EOS, padded
with PAD to a multiple of the block size B, so that the block grid restarts at every document. The
bitmaps are bits in little order (numpy `packbits(bitorder="little")`), one bit per token.
Record batches hold `batch_rows` sequences each, the last one of a shard the rest, so that the batch
of a row is known without reading anything.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa

from cascade_model.config import NoiseConfig
from cascade_model.errors import CorpusMismatch
from cascade_model.settings import digest

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
CURE = "delete the corpus and prepare it again, or copy it anew"
"""Of damage; `prepare` alone leaves a finished corpus as it is."""
SPLITS: tuple[str, ...] = ("train", "held_out")
BATCH_TOKENS = 1 << 16
"""Places in a record batch, at most (one sequence at least). A record batch is what is checked, and
fetched from a store, at once: larger ones make a sequence read at random dearer, smaller ones make
the list of them longer."""
BITMAP_BLOCK = 32
"""Block size from which the thresholds of the blocks take no more room than a bitmap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """What every row of a corpus has in common."""

    sequence_length: int
    block_size: int
    vocab_size: int
    rates_per_row: int = 0
    """Thresholds stored for a sequence; see `rates_per_row`."""

    @property
    def num_blocks(self) -> int:
        """Blocks in a sequence."""
        return self.sequence_length // self.block_size

    @property
    def bitmap_bytes(self) -> int:
        """Bytes of a bitmap over a sequence."""
        return (self.sequence_length + 7) // 8

    @property
    def token_dtype(self) -> np.dtype:
        """uint16 where the vocabulary fits, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)


def rates_per_row(noise: NoiseConfig, sequence_length: int) -> int:
    """Thresholds stored per sequence: 1, L / B, or 0 where the reader recomputes them.

    One rate per sequence costs next to nothing. A rate per block is stored while it takes no more
    room than the bitmap beside it: 32 bits for B tokens against B bits.
    """
    if noise.per == "sequence":
        return 1
    return sequence_length // noise.block_size if noise.block_size >= BITMAP_BLOCK else 0


def batch_rows(geometry: Geometry) -> int:
    """Rows of a record batch."""
    return max(1, BATCH_TOKENS // geometry.sequence_length)


def packed_schema(geometry: Geometry, metadata: dict[str, str] | None = None) -> pa.Schema:
    """Columns of packed sequences before they are numbered and masked."""
    return pa.schema(
        [
            ("tokens", _fixed(pa.from_numpy_dtype(geometry.token_dtype), geometry.sequence_length)),
            ("document_starts", _ragged(pa.uint32())),
            ("document_ids", _ragged(pa.uint64())),
            ("span_starts", _ragged(pa.uint32())),
            ("span_stops", _ragged(pa.uint32())),
            pa.field("is_maskable", pa.binary(geometry.bitmap_bytes), nullable=False),
        ],
        metadata=metadata,
    )


def shard_schema(geometry: Geometry, metadata: dict[str, str] | None = None) -> pa.Schema:
    """Columns of a pre-masked shard: sequence_id, the packed columns, draw 0 of the recipe.

    The column of thresholds is there where the geometry stores any.
    """
    width = geometry.rates_per_row
    rates = [pa.field("thresholds", _fixed(pa.uint32(), width), nullable=False)] if width else []
    return pa.schema(
        [
            pa.field("sequence_id", pa.uint64(), nullable=False),
            *packed_schema(geometry),
            *rates,
            pa.field("is_masked", pa.binary(geometry.bitmap_bytes), nullable=False),
        ],
        metadata=metadata,
    )


def draw_schema(geometry: Geometry, metadata: dict[str, str] | None = None) -> pa.Schema:
    """Columns of a further draw's bitmaps, row by row those of the shard they belong to."""
    return pa.schema(
        [
            pa.field("sequence_id", pa.uint64(), nullable=False),
            pa.field("is_masked", pa.binary(geometry.bitmap_bytes), nullable=False),
        ],
        metadata=metadata,
    )


def documents_schema() -> pa.Schema:
    """Columns of a part's table of documents, a row each, by rising document_id."""
    columns = {
        "document_id": pa.uint64(),  # part index << 32 | row within the part
        "path": pa.string(),
        "where": pa.string(),
        "bytes": pa.uint32(),  # UTF-8, of the cleaned text
        "tokens": pa.uint32(),
        "split": pa.uint8(),  # index into SPLITS
    }
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


def documents_name(part: int) -> str:
    """Name of a part's table of documents."""
    return f"documents-{part:05d}.arrow"


RAGGED = ("document_starts", "document_ids", "span_starts", "span_stops")
"""Columns with an entry for each document start; all four have the same offsets."""


def _fixed(kind: pa.DataType, length: int) -> pa.DataType:
    return pa.list_(pa.field("item", kind, nullable=False), length)


def _ragged(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("item", kind, nullable=False))


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """n packed sequences as arrays."""

    tokens: np.ndarray
    """uint16 or uint32 [n, L]; PAD places hold pad_id."""
    start_offsets: np.ndarray
    """int32 [n + 1]: row i's starts are document_starts[start_offsets[i]:start_offsets[i + 1]]."""
    document_starts: np.ndarray
    """uint32: places where a document starts or goes on; each row's first is 0."""
    document_ids: np.ndarray
    """uint64, one per start: part index << 32 | row of the document within its part."""
    span_starts: np.ndarray
    """uint32, one per start: first byte of the document's cleaned text (UTF-8) that lies here."""
    span_stops: np.ndarray
    """uint32, one per start: the byte after the last one; EOS and PAD have none."""
    is_maskable: np.ndarray
    """bool [n, L]: false at PAD."""

    def __len__(self) -> int:
        return len(self.tokens)

    def slice(self, start: int, stop: int) -> "Packed":
        """Rows start..stop."""
        offsets = self.start_offsets[start : stop + 1]
        ragged = slice(int(offsets[0]), int(offsets[-1]))
        return Packed(
            tokens=self.tokens[start:stop],
            start_offsets=offsets - offsets[0],
            document_starts=self.document_starts[ragged],
            document_ids=self.document_ids[ragged],
            span_starts=self.span_starts[ragged],
            span_stops=self.span_stops[ragged],
            is_maskable=self.is_maskable[start:stop],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows(Packed):
    """n sequences of a shard: packed, numbered, and masked by draw 0."""

    sequence_ids: np.ndarray
    """uint64 [n]."""
    thresholds: np.ndarray
    """uint32 [n, rates_per_row]: mask rates times 2^32 in draw 0, as far as they are stored."""
    is_masked: np.ndarray
    """bool [n, L]: draw 0's masked places; false wherever is_maskable is."""


def packed_columns(packed: Packed) -> list[pa.Array]:
    """The columns of `packed_schema`."""
    offsets = pa.array(packed.start_offsets.astype(np.int32))
    return [
        _fixed_column(packed.tokens),
        _ragged_column(offsets, packed.document_starts.astype(np.uint32)),
        _ragged_column(offsets, packed.document_ids.astype(np.uint64)),
        _ragged_column(offsets, packed.span_starts.astype(np.uint32)),
        _ragged_column(offsets, packed.span_stops.astype(np.uint32)),
        _bitmap_column(packed.is_maskable),
    ]


def rows_columns(rows: Rows) -> list[pa.Array]:
    """The columns of `shard_schema`."""
    return [
        pa.array(rows.sequence_ids.astype(np.uint64)),
        *packed_columns(rows),
        *([_fixed_column(rows.thresholds.astype(np.uint32))] if rows.thresholds.shape[1] else []),
        _bitmap_column(rows.is_masked),
    ]


def draw_columns(sequence_ids: np.ndarray, is_masked: np.ndarray) -> list[pa.Array]:
    """The columns of `draw_schema`, of uint64 [n] and bool [n, L]."""
    return [pa.array(sequence_ids.astype(np.uint64)), _bitmap_column(is_masked)]


def _fixed_column(values: np.ndarray) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    kind = _fixed(flat.type, values.shape[1])
    return pa.FixedSizeListArray.from_arrays(flat, type=kind)


def _ragged_column(offsets: pa.Array, values: np.ndarray) -> pa.Array:
    flat = pa.array(values)
    return pa.ListArray.from_arrays(offsets, flat, type=_ragged(flat.type))


def _bitmap_column(bits: np.ndarray) -> pa.Array:
    packed = np.packbits(bits, axis=1, bitorder="little")
    buffers = [None, pa.py_buffer(packed.tobytes())]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(packed.shape[1]), len(bits), buffers)


def packed_of(batch: pa.RecordBatch, geometry: Geometry) -> Packed:
    """The arrays of one record batch (tokens are views, bitmaps are unpacked)."""
    return Packed(**_packed_fields(batch, geometry))


def rows_of(batch: pa.RecordBatch, geometry: Geometry) -> Rows:
    """The arrays of one record batch of a shard."""
    return Rows(
        **_packed_fields(batch, geometry),
        sequence_ids=batch.column("sequence_id").to_numpy(zero_copy_only=True),
        thresholds=thresholds_of(batch, geometry),
        is_masked=unpacked(bitmap_of(batch, "is_masked", geometry), geometry),
    )


def _packed_fields(batch: pa.RecordBatch, geometry: Geometry) -> dict[str, np.ndarray]:
    return {
        "tokens": tokens_of(batch, geometry),
        "start_offsets": offsets_of(batch, "document_starts"),
        **{name: flat_of(batch, name) for name in RAGGED},
        "is_maskable": unpacked(bitmap_of(batch, "is_maskable", geometry), geometry),
    }


def tokens_of(batch: pa.RecordBatch, geometry: Geometry) -> np.ndarray:
    """The tokens as they lie in the file: a view [n, L]."""
    return flat_of(batch, "tokens").reshape(-1, geometry.sequence_length)


def thresholds_of(batch: pa.RecordBatch, geometry: Geometry) -> np.ndarray:
    """The stored thresholds: a view, uint32 [n, rates_per_row]."""
    if geometry.rates_per_row == 0:
        return np.empty((batch.num_rows, 0), dtype=np.uint32)
    return flat_of(batch, "thresholds").reshape(-1, geometry.rates_per_row)


def offsets_of(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """Where each row of a ragged column begins in `flat_of` it, int32 [n + 1], from 0."""
    offsets = batch.column(name).offsets.to_numpy(zero_copy_only=True)
    return offsets - offsets[0]


def flat_of(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """All values of a list column without empty cells, one row after the other: a view."""
    column = batch.column(name)
    values = column.values.to_numpy(zero_copy_only=True)
    if pa.types.is_fixed_size_list(column.type):
        width = column.type.list_size
        return values[column.offset * width : (column.offset + len(column)) * width]
    offsets = column.offsets
    return values[offsets[0].as_py() : offsets[-1].as_py()]


def bitmap_of(batch: pa.RecordBatch, name: str, geometry: Geometry) -> np.ndarray:
    """A bitmap column as it lies in the file: a view, uint8 [n, bitmap_bytes]."""
    column, width = batch.column(name), geometry.bitmap_bytes
    raw = np.frombuffer(column.buffers()[1], dtype=np.uint8)
    return raw[column.offset * width : (column.offset + len(column)) * width].reshape(-1, width)


def unpacked(bitmap: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The bits of a bitmap, bool [n, L]."""
    bits = np.unpackbits(bitmap, axis=1, bitorder="little", count=geometry.sequence_length)
    return bits.view(np.bool_)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """A shard as the manifest vouches for it."""

    name: str
    object: str
    """File that holds it; the same as the name in a local folder."""
    rows: int
    tokens: int
    """Maskable tokens."""
    bytes: int
    sha256: str
    batches_sha256: str
    """Digest of the record's list of record batches, by which single ones are checked."""
    first_sequence: int
    """Sequence id of its first row; ids go up by one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceEntry:
    """One source's sequences in a split: contiguous ids, and its share of the samples."""

    name: str
    first_sequence: int
    num_sequences: int
    num_tokens: int
    """Maskable tokens."""
    share: int
    """Samples of every 1024 that are this source's; the shares of a split sum to 1024."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentsEntry:
    """A part's table of documents (`documents_schema`, named by `documents_name`)."""

    name: str
    object: str
    bytes: int
    sha256: str
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitEntry:
    """One split of the corpus."""

    num_sequences: int
    num_tokens: int
    """Maskable tokens, EOS included, PAD not."""
    num_bytes: int
    """UTF-8 bytes of the text of those tokens."""
    num_documents: int
    sources: tuple[SourceEntry, ...]
    """By rising id; together they are all sequences of the split."""
    shards: tuple[ShardEntry, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything a reader trusts; written last."""

    format_version: int = FORMAT_VERSION
    sequence_length: int
    block_size: int
    vocab_size: int
    mask_id: int
    pad_id: int
    eos_id: int
    tokenizer_sha256: str
    tokenizer_engine: dict[str, Any] = field(default_factory=dict)
    """What encoded the text: name, version, note, sample_texts, sample_bytes."""
    chat_template: str | None = None
    """Template that made text of conversations; none where there were none."""
    noise: NoiseConfig
    prepare: dict[str, Any]
    """Settings of the job that change its result."""
    sources: tuple[dict[str, Any], ...]
    """Files read: path, bytes, sha256."""
    counts: dict[str, Any]
    """documents in and out, dropped and dead by reason, characters, bytes, tokens."""
    splits: dict[str, SplitEntry] = field(default_factory=dict)
    documents: tuple[DocumentsEntry, ...] = ()
    """Tables of documents, one for each part."""

    @property
    def geometry(self) -> Geometry:
        """The row's shape."""
        return Geometry(
            sequence_length=self.sequence_length,
            block_size=self.block_size,
            vocab_size=self.vocab_size,
            rates_per_row=rates_per_row(self.noise, self.sequence_length),
        )

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the manifest: the identity of the corpus.

        Left out are the objects' own names, which in an object store differ between attempts.
        """
        values = asdict(self)
        for split in values["splits"].values():
            for shard in split["shards"]:
                del shard["object"]
        for table in values["documents"]:
            del table["object"]
        return digest(values)

    def to_json(self) -> bytes:
        """The manifest's one spelling, its digest included."""
        values = {**asdict(self), "digest": self.digest}
        return (json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Manifest":
        """Read a manifest; `CorpusMismatch` when it is damaged or of another format version."""
        try:
            values = json.loads(data)
            written = values.pop("digest")
            version = values["format_version"]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise CorpusMismatch(f"{where} is damaged; {CURE}") from None
        if version != FORMAT_VERSION:
            raise CorpusMismatch(
                f"{where} has format version {version} but this program reads {FORMAT_VERSION}; "
                f"{CURE}"
            )
        try:
            manifest = cls(**{**values, **_parsed(values)})
        except (TypeError, KeyError, ValueError):
            raise CorpusMismatch(f"{where} is damaged; {CURE}") from None
        if manifest.digest != written or set(values) != {f.name for f in fields(cls)}:
            raise CorpusMismatch(
                f"{where} has digest {manifest.digest[:12]} but says {str(written)[:12]}; "
                f"it was edited or damaged; {CURE}"
            )
        return manifest


def _parsed(values: dict[str, Any]) -> dict[str, Any]:
    """The nested parts of a manifest as their dataclasses."""
    return {
        "noise": NoiseConfig(**values["noise"]),
        "sources": tuple(values["sources"]),
        "splits": {name: _split_of(entry) for name, entry in values["splits"].items()},
        "documents": tuple(DocumentsEntry(**each) for each in values["documents"]),
    }


def _split_of(entry: dict[str, Any]) -> SplitEntry:
    nested = {
        "sources": tuple(SourceEntry(**each) for each in entry["sources"]),
        "shards": tuple(ShardEntry(**each) for each in entry["shards"]),
    }
    return SplitEntry(**{**entry, **nested})
