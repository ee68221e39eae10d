"""The tasks of the prepare job: hash a part, merge a range of hashes, pack a part, mask a part.

All are pure functions of (job, order) apart from the commit, so a task may run twice, anywhere.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from cascade_model import noise as mask_noise
from cascade_model.columns import Packed, Rows, packed_of, rows_columns
from cascade_model.commit import RECORD_SUFFIX, Folder, Record
from cascade_model.config import NoiseConfig
from cascade_model.errors import CorpusMismatch, InputError, Unfinished
from cascade_model.schema import SPLITS, Geometry, batch_rows, documents_name, shard_schema
from cascade_model.shards import read_arrow, write_shard
from pipelines.cleaning import Cleaning, Drop, cleaned_document
from pipelines.config import SourceConfig
from pipelines.dedup import Hashes, dropped_rows, hashes_name, merge_range
from pipelines.documents import Document, read_documents
from pipelines.encoding import DocumentEncoder, encoder_of
from pipelines.infilling import Infilling
from pipelines.intake import Intake, Recipe
from pipelines.isolation import DEATHS, KILLED, attempt, killers
from pipelines.packing import joined
from pipelines.pieces import Part

JOB = "job.json"
"""In the work folder: what the job is. Gone when the job was taken back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What every task of a job needs to know."""

    output: str
    work: str
    sources: dict[str, SourceConfig]
    cleaning: Cleaning
    held_out_rate: float
    num_parts: int
    num_ranges: int
    """Ranges of hashes that are merged; 0 without deduplication."""
    window_bytes: int
    """Text that is packed together, at least; a part has that much or is packed in several."""
    packing: str
    geometry: Geometry
    noise: NoiseConfig
    tokenizer_sha256: str
    engine: str
    """Name of the tokenizer engine that was admitted."""
    engine_version: str
    chat_template: str | None
    infilling: Infilling | None
    """None: every document stays as it is."""

    @property
    def recipe(self) -> Recipe:
        """How records become sequences."""
        return Recipe(
            cleaning=self.cleaning,
            held_out_rate=self.held_out_rate,
            packing="best_fit" if self.packing == "best_fit" else "concat",
            geometry=self.geometry,
            window_bytes=self.window_bytes,
        )

    def documents(self, part: Part) -> Iterator[Document]:
        """The records of a part."""
        source = self.sources[part.source]
        return read_documents(part, source.text_column, source.messages_column, source.id_column)

    def encoder(self) -> DocumentEncoder:
        """The job's encoder in this process."""
        return encoder_of(
            self.output,
            self.tokenizer_sha256,
            self.engine,
            self.engine_version,
            self.chat_template,
            self.cleaning.max_document_bytes,
            self.infilling,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskOrder:
    """What masking one part takes."""

    index: int
    packed: Record
    """The part's packed sequences in the work folder."""
    firsts: dict[str, int]
    """Sequence id of the part's first sequence, by split."""
    source_firsts: dict[str, int]
    """Sequence id of the first sequence of the part's source, by split."""
    source_totals: dict[str, int]
    """Sequences of the part's source, by split."""


def part_name(index: int) -> str:
    """A part's packed sequences in the work folder."""
    return f"part-{index:05d}.arrow"


def shard_name(split: str, index: int) -> str:
    """A part's shard of a split."""
    return f"shard-{split}-{index:05d}.arrow"


def dead_letter_name(index: int) -> str:
    """A part's records that could not be read."""
    return f"dead_letter-{index:05d}.jsonl"


def packed_record(job: Job, index: int) -> Record | None:
    """The record of a part that is packed, its table of documents included."""
    record = Folder(job.work).record(part_name(index))
    return record if record and Folder(job.output).record(documents_name(index)) else None


def hash_part(job: Job, part: Part) -> Record:
    """Before packing: the sorted hashes of a part's cleaned documents, in the work folder."""
    work, name = Folder(job.work), hashes_name(part.index)
    done = work.record(name)
    if done is not None:
        return done
    _require_job(work)
    with attempt(work, name) as deaths:
        trial = partial(_try_rows, job, part, None)
        deadly = killers(work, name, trial) if deaths == DEATHS else frozenset()
        hashes = Hashes()
        for document in job.documents(part):
            if document.text is None or document.row in deadly:
                continue
            found = cleaned_document(document, job.cleaning)
            if not isinstance(found, Drop):
                hashes.add(found.row, found.messages or found.text or "")
        _require_job(work)
        return hashes.commit(work, part.index, job.num_ranges)


def merge_hashes(job: Job, number: int) -> Record:
    """The documents of a range of hashes that equal an earlier one, in the work folder."""
    work = Folder(job.work)
    _require_job(work)
    return merge_range(work, number, job.num_ranges, job.num_parts)


def pack_part(job: Job, part: Part) -> Record:
    """Documents to packed sequences in the work folder, the table of documents and the dead
    letters in the corpus folder."""
    done = packed_record(job, part.index)
    if done is not None:
        return done
    work, output, name = Folder(job.work), Folder(job.output), part_name(part.index)
    _require_job(work)
    with attempt(work, name) as deaths:
        trial = partial(_try_rows, job, part, partial(_encode_alone, job.encoder()))
        deadly = killers(work, name, trial) if deaths == DEATHS else frozenset()
        repeated = dropped_rows(work, part.index, job.num_ranges, job.num_parts)
        intake = Intake(part.index, job.recipe, job.encoder())
        for document in job.documents(part):
            if document.row in deadly:
                intake.bury(document, KILLED)
            else:
                intake.take(document, document.row in repeated)
        intake.close()
        facts = {"source": part.source, **intake.facts()}
        _require_job(work)
        if facts["dead"]:
            intake.dead_letters.commit(output, dead_letter_name(part.index))
        listed = sum(each["documents"] for each in facts["splits"].values())
        intake.documents.commit(output, documents_name(part.index), {"rows": listed})
        return intake.sequences.commit(work, name, facts)


def _try_rows(
    job: Job,
    part: Part,
    work: Callable[[Document], None] | None,
    start: int,
    tell: Callable[[int, bool], None],
) -> None:
    """Read, clean and do `work` record by record from `start` on, telling each beforehand."""
    documents = job.documents(part)
    for row in itertools.count():
        tell(row, True)
        document = next(documents, None)
        if document is None:
            return
        if row >= start and document.text is not None:
            tell(row, False)
            found = cleaned_document(document, job.cleaning)
            if work and not isinstance(found, Drop):
                work(found)


def _encode_alone(encoder: DocumentEncoder, document: Document) -> None:
    """The part of packing that leaves Python for one document."""
    if document.messages is not None:
        encoder.chats([document.messages])
    else:
        texts = [document.text or ""]
        encoder.rearranged(texts, encoder.texts(texts))


def mask_part(job: Job, order: MaskOrder) -> dict[str, Record]:
    """Sequence ids and draw 0 of the recipe; the final shards, by split."""
    output, made = Folder(job.output), {}
    reader = _packed_reader(Folder(job.work), order.packed)
    for number, split in enumerate(SPLITS):
        facts = order.packed.facts["splits"][split]
        if not facts["rows"]:
            continue
        name = shard_name(split, order.index)
        record = output.record(name)
        if record is None:
            _require_job(Folder(job.work))
            mine = [i for i, s in enumerate(order.packed.facts["batch_splits"]) if s == number]
            packed = (packed_of(reader.get_batch(i), job.geometry) for i in mine)
            rows = _masked(job, _rebatched(packed, batch_rows(job.geometry)), order, split)
            record = write_shard(
                output,
                name,
                shard_schema(job.geometry, _metadata(job, split)),
                map(rows_columns, rows),
                {
                    "rows": facts["rows"],
                    "tokens": facts["tokens"],
                    "first_sequence": order.firsts[split],
                },
            )
        made[split] = record
    return made


def _packed_reader(work: Folder, packed: Record) -> pa.ipc.RecordBatchFileReader:
    """A part's packed sequences; `Unfinished` where they are damaged or out of reach, and then the
    part is no longer committed: the same job packs it anew."""
    try:
        return read_arrow(work, packed.object, packed.bytes, packed.sha256)
    except CorpusMismatch as error:
        work.remove(packed.name + RECORD_SUFFIX)
        what = str(error).partition(";")[0]
        raise Unfinished(
            f"{what}; run the same command again, which packs this part anew"
        ) from None


def _require_job(work: Folder) -> None:
    """Stop a task that outlived its job: what was taken back must not come again."""
    if not work.exists(JOB):
        raise InputError(f"{work.url} is no longer there; the job ended while this task ran")


def _rebatched(batches: Iterable[Packed], rows: int) -> Iterator[Packed]:
    """The same sequences in batches of `rows`, the last one of the rest."""
    held: list[Packed] = []
    for packed in batches:
        start = 0
        while start < len(packed):
            room = rows - sum(map(len, held))
            held.append(packed.slice(start, min(start + room, len(packed))))
            start += len(held[-1])
            if sum(map(len, held)) == rows:
                yield joined(held)
                held = []
    if held:
        yield joined(held)


def _masked(job: Job, batches: Iterable[Packed], order: MaskOrder, split: str) -> Iterator[Rows]:
    """Number the sequences and mask them by draw 0."""
    first = order.firsts[split]
    # A source has an order of its own; its ranks begin at its first sequence (`mixing`).
    base, total = np.uint64(order.source_firsts[split]), order.source_totals[split]
    for packed in batches:
        ids = np.arange(first, first + len(packed), dtype=np.uint64)
        ranks = base + mask_noise.rank_of(ids - base, total, job.noise, 0)
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
