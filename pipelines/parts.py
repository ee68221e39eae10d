"""The two tasks of the prepare job: pack a part, then number and mask it.

Both are pure functions of (job, order) apart from the commit, so a task may run twice, anywhere.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from cascade_model import noise as mask_noise
from cascade_model.commit import Folder, Record
from cascade_model.config import NoiseConfig
from cascade_model.errors import InputError
from cascade_model.schema import (
    SPLITS,
    TOKENIZER,
    Geometry,
    Packed,
    Rows,
    batch_rows,
    packed_columns,
    packed_of,
    packed_schema,
    rows_columns,
    shard_schema,
)
from cascade_model.shards import arrow_writer, read_arrow, write_shard
from cascade_model.tokenizer import Encoded, Tokenizer
from pipelines.documents import Document, Part, read_documents
from pipelines.packing import pack

JOB = "job.json"
"""In the work folder: what the job is. Gone when the job was taken back."""
CHUNK_CHARACTERS = 1 << 20
"""Text handed to the tokenizer in one call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What every task of a job needs to know."""

    output: str
    work: str
    text_column: str
    held_out_rate: float
    geometry: Geometry
    noise: NoiseConfig
    tokenizer_sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskOrder:
    """Round 2's order for one part."""

    index: int
    packed: Record
    """The part's packed sequences in the work folder."""
    firsts: dict[str, int]
    """Sequence id of the part's first sequence, by split."""
    totals: dict[str, int]
    """Sequences of the whole corpus, by split."""


def part_name(index: int) -> str:
    """A part's packed sequences in the work folder."""
    return f"part-{index:05d}.arrow"


def shard_name(split: str, index: int) -> str:
    """A part's shard of a split."""
    return f"shard-{split}-{index:05d}.arrow"


def dead_letter_name(index: int) -> str:
    """A part's records that could not be read."""
    return f"dead_letter-{index:05d}.jsonl"


def text_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def is_held_out(text: str, held_out_rate: float) -> bool:
    """Whether a document is kept from training; equal texts always go the same way."""
    return text_hash(text) < held_out_rate


def pack_part(job: Job, part: Part) -> Record:
    """Round 1: documents to packed sequences, training ones first, in the work folder."""
    work = Folder(job.work)
    done = work.record(part_name(part.index))
    if done is not None:
        return done
    tokenizer = _tokenizer(job.output, job.tokenizer_sha256)
    intake = _Intake(job, tokenizer)
    for document in read_documents(part, job.text_column):
        intake.take(document, part.index << 32 | document.row)
    intake.flush()
    packed = {split: intake.packed(split) for split in SPLITS}
    _require_job(work)
    if intake.dead:
        lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in intake.dead)
        Folder(job.output).commit(dead_letter_name(part.index), lines.encode())
    facts = intake.facts(packed)
    batches = (packed_columns(piece) for split in SPLITS for piece in _sliced(packed[split], job))
    schema = packed_schema(job.geometry)
    return work.commit(part_name(part.index), arrow_writer(schema, batches), facts)


@dataclass
class _Intake:
    """Documents of a part on their way to arrays."""

    job: Job
    tokenizer: Tokenizer
    waiting: list[tuple[str, int]] = field(default_factory=list)
    characters: int = 0
    pieces: dict[str, list[tuple[Encoded, np.ndarray]]] = field(
        default_factory=lambda: {split: [] for split in SPLITS}
    )
    totals: dict[str, Counter] = field(default_factory=lambda: {s: Counter() for s in SPLITS})
    dropped: Counter = field(default_factory=Counter)
    dead: list[dict[str, Any]] = field(default_factory=list)
    documents_in: int = 0

    def take(self, document: Document, document_id: int) -> None:
        """Sort a record: dead, dropped, or on to its split."""
        self.documents_in += 1
        if document.text is None:
            keys = ("path", "where", "reason", "excerpt")
            self.dead.append({key: getattr(document, key) for key in keys})
        elif not document.text.strip():
            self.dropped["empty"] += 1
        else:
            self.waiting.append((document.text, document_id))
            self.characters += len(document.text)
            if self.characters >= CHUNK_CHARACTERS:
                self.flush()

    def flush(self) -> None:
        """Tokenise what waits."""
        rate = self.job.held_out_rate
        for split in SPLITS:
            mine = [w for w in self.waiting if is_held_out(w[0], rate) == (split == "held_out")]
            if not mine:
                continue
            texts = [text for text, _ in mine]
            encoded = self.tokenizer.encode_arrays(texts)
            self._refuse_reserved(encoded.tokens)
            ids = np.array([document_id for _, document_id in mine], dtype=np.uint64)
            self.pieces[split].append((encoded, ids))
            self.totals[split].update(
                documents=len(texts),
                characters=sum(map(len, texts)),
                bytes=sum(len(text.encode()) for text in texts),
            )
        self.waiting, self.characters = [], 0

    def _refuse_reserved(self, tokens: np.ndarray) -> None:
        """No text may turn into a token that only the pipeline sets."""
        reserved = [self.tokenizer.mask_id, self.tokenizer.pad_id, self.tokenizer.eos_id]
        found = np.intersect1d(tokens, np.array(reserved, dtype=np.uint32))
        if found.size:
            raise InputError(
                f"tokenizer turns ordinary text into the reserved token {int(found[0])}; use a "
                "tokenizer.json that marks its mask, padding and end tokens as special"
            )

    def packed(self, split: str) -> Packed:
        """All documents of a split, packed."""
        pieces = self.pieces[split]
        none = np.empty(0, dtype=np.uint32), np.empty(0, dtype=np.int64)
        encoded = Encoded(
            np.concatenate([none[0], *(e.tokens for e, _ in pieces)]),
            np.concatenate([none[1], *(e.lengths for e, _ in pieces)]),
        )
        ids = np.concatenate([np.empty(0, dtype=np.uint64), *(ids for _, ids in pieces)])
        eos, pad = self.tokenizer.eos_id, self.tokenizer.pad_id
        return pack(encoded, ids, self.job.geometry, eos, pad)

    def facts(self, packed: dict[str, Packed]) -> dict[str, Any]:
        """The part's counts; in = out + dropped + dead is checked."""
        splits = {}
        for split in SPLITS:
            total = self.totals[split]
            splits[split] = {
                "rows": len(packed[split]),
                "tokens": int(packed[split].is_maskable.sum()),
                **{key: total[key] for key in ("documents", "characters", "bytes")},
            }
        out = sum(each["documents"] for each in splits.values())
        if self.documents_in != out + self.dropped.total() + len(self.dead):
            raise RuntimeError("a document was lost or doubled")
        return {
            "documents_in": self.documents_in,
            "dropped": dict(self.dropped),
            "dead": dict(Counter(each["reason"] for each in self.dead)),
            "first_dead": self.dead[0] if self.dead else None,
            "splits": splits,
        }


def mask_part(job: Job, order: MaskOrder) -> dict[str, Record]:
    """Round 2: sequence ids and draw 0 of the recipe; the final shards, by split."""
    output, made = Folder(job.output), {}
    reader = read_arrow(
        Folder(job.work), order.packed.object, order.packed.bytes, order.packed.sha256
    )
    batches = (
        packed_of(reader.get_batch(i), job.geometry) for i in range(reader.num_record_batches)
    )
    for split in SPLITS:
        facts = order.packed.facts["splits"][split]
        count = -(-facts["rows"] // batch_rows(job.geometry))
        mine = [next(batches) for _ in range(count)]
        if not mine:
            continue
        name = shard_name(split, order.index)
        first, total = order.firsts[split], order.totals[split]
        expected = {"rows": facts["rows"], "tokens": facts["tokens"], "first_sequence": first}
        record = output.record(name)
        if record is None:
            _require_job(Folder(job.work))
            schema = shard_schema(job.geometry, _metadata(job, split))
            columns = (rows_columns(rows) for rows in _masked(job, mine, first, total))
            record = write_shard(output, name, schema, columns, expected)
        made[split] = record
    return made


def _require_job(work: Folder) -> None:
    """Stop a task that outlived its job: what was taken back must not come again."""
    if not work.exists(JOB):
        raise InputError(f"{work.url} is no longer there; the job ended while this task ran")


def _masked(job: Job, batches: list[Packed], first: int, total: int) -> Iterator[Rows]:
    """Number the sequences and mask them by draw 0."""
    for packed in batches:
        ids = np.arange(first, first + len(packed), dtype=np.uint64)
        ranks = mask_noise.rank_of(ids, total, job.noise, 0)
        rates = mask_noise.thresholds(job.noise, 0, ranks, job.geometry.num_blocks)
        bits = mask_noise.mask_bits(job.noise, 0, ids, rates, job.geometry.sequence_length)
        fields = {name: getattr(packed, name) for name in Packed.__dataclass_fields__}
        yield Rows(
            **fields,
            sequence_ids=ids,
            thresholds=rates[:, : job.geometry.rates_per_row],
            is_masked=bits & packed.is_maskable,
        )
        first += len(packed)


def _metadata(job: Job, split: str) -> dict[str, str]:
    """What a shard says of itself; readers trust the manifest instead."""
    return {
        "cascade.split": split,
        "cascade.tokenizer_sha256": job.tokenizer_sha256,
        "cascade.noise": json.dumps(asdict(job.noise), sort_keys=True),
    }


def _sliced(packed: Packed, job: Job) -> Iterator[Packed]:
    """Record batches of a split."""
    step = batch_rows(job.geometry)
    for start in range(0, len(packed), step):
        yield packed.slice(start, min(start + step, len(packed)))


@lru_cache(maxsize=2)
def _tokenizer(output: str, sha256: str) -> Tokenizer:
    """The job's tokenizer, read once per process."""
    tokenizer = Tokenizer(Folder(output).read_bytes(TOKENIZER), f"{output}/{TOKENIZER}")
    if tokenizer.sha256 != sha256:
        raise InputError(
            f"output={output} holds a tokenizer with sha256 {tokenizer.sha256[:12]}, not the job's "
            f"{sha256[:12]}; delete the folder and run again"
        )
    return tokenizer
