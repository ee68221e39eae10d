"""The manifest of a corpus: everything a reader trusts, and the identity of it all.

It vouches for each file by bytes and SHA-256, and is written last.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from cascade_model.config import NoiseConfig
from cascade_model.errors import CorpusMismatch
from cascade_model.schema import Geometry, rates_per_row
from cascade_model.settings import digest

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
CURE = "delete the corpus and prepare it again, or copy it anew"
"""Of damage; `prepare` alone leaves a finished corpus as it is."""


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
class InfillEntry:
    """How documents of the training split were rearranged, to learn to fill holes."""

    mode: Literal["psm"] = "psm"
    """psm: prefix, suffix, middle, each behind its token (Bavarian et al. 2022)."""
    rate: float
    """Share of the documents that were drawn; those that fit into a sequence were rearranged."""
    ids: tuple[int, int, int]
    """Tokens before prefix, suffix and middle; never masked."""
    num_documents: int
    """Documents that were rearranged."""


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
    infill: InfillEntry | None = None
    """None, and then not written, where no document was rearranged."""

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
        values = self._values()
        for split in values["splits"].values():
            for shard in split["shards"]:
                del shard["object"]
        for table in values["documents"]:
            del table["object"]
        return digest(values)

    def to_json(self) -> bytes:
        """The manifest's one spelling, its digest included."""
        values = {**self._values(), "digest": self.digest}
        return (json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()

    def _values(self) -> dict[str, Any]:
        """The fields that are written: a corpus without infilling has the bytes and the digest that
        it had before there was any."""
        values = asdict(self)
        if self.infill is None:
            del values["infill"]
        return values

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
        if manifest.digest != written or set(values) != manifest._values().keys():
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
        "infill": _infill_of(values.get("infill")),
    }


def _infill_of(entry: dict[str, Any] | None) -> InfillEntry | None:
    return None if entry is None else InfillEntry(**{**entry, "ids": tuple(entry["ids"])})


def _split_of(entry: dict[str, Any]) -> SplitEntry:
    nested = {
        "sources": tuple(SourceEntry(**each) for each in entry["sources"]),
        "shards": tuple(ShardEntry(**each) for each in entry["shards"]),
    }
    return SplitEntry(**{**entry, **nested})
