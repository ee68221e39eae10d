"""Corpus to pre-masked Arrow shards, in rounds of small tasks with a sum between them.

Hash and merge (with deduplication): which documents equal an earlier one. Pack, a task per part:
documents, cleaned and split by a hash of the text, tokens, packed sequences, put into a work
folder. The driver then numbers the sequences of each split over all parts. Mask, a task per part:
sequence ids and draw 0's thresholds and mask, committed as the final shards. The report and the
manifest come last. A task whose record is there is not run again.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

from cascade_model.chat_template import ChatTemplate, template_text
from cascade_model.commit import RECORD_SUFFIX, Folder, Record, require_writable
from cascade_model.errors import InputError, Unfinished
from cascade_model.fast_tokenizer import REFERENCE
from cascade_model.manifest import MANIFEST, TOKENIZER, Manifest, ShardEntry
from cascade_model.schema import SPLITS, Geometry, documents_name, rates_per_row
from cascade_model.shards import entry_of
from cascade_model.tokenizer import Tokenizer, byte_tokenizer, train_tokenizer
from pipelines.admission import ENGINE, SAMPLE_PARTS, choose_engine, reference
from pipelines.claim import WORK, begin, finished, take_back
from pipelines.cleaning import Cleaning, cleaned
from pipelines.config import PrepareConfig
from pipelines.dedup import drops_name, hashes_name, num_ranges
from pipelines.documents import Document
from pipelines.encoding import engine_version
from pipelines.infilling import Infilling
from pipelines.parts import (
    Job,
    MaskOrder,
    hash_part,
    mask_part,
    merge_hashes,
    pack_part,
    part_name,
    shard_name,
)
from pipelines.pieces import Part, Piece
from pipelines.progress import Progress
from pipelines.report import write_report
from pipelines.runner import Step, run_tasks
from pipelines.sampling import read_source, sampled, spaced
from pipelines.sources import Plan, plan_sources, require_unchanged
from pipelines.totals import (
    counts_of,
    documents_of,
    infill_entry,
    mask_orders,
    require_sound,
    split_entry,
)

_READERS = 16
"""Records that are read at a time."""


def prepare(
    config: PrepareConfig, on_finished: Callable[[Manifest], object] = lambda manifest: None
) -> Manifest:
    """Make the corpus, or finish it; returns the manifest.

    One that was finished before is left as it is, and `on_finished` hears of it.

    `InputError` when sources, settings or the output folder cannot do; nothing stays behind, as the
    same command would fail again. `Unfinished` when the same job can go on from here: packed parts
    and dead letters stay. Either way nothing is touched that this run did not write.
    """
    require_writable(config.output)
    folder = Folder(config.output)
    given = None
    if config.tokenizer not in ("train", "bytes"):
        given = _with_tokens(config, Tokenizer.from_url(config.tokenizer))
    plan = plan_sources(config.sources, config.part_bytes, folder.path("").rstrip("/"))
    identity = _identity(config, plan, given)
    done = finished(folder, identity)
    if done is not None:
        on_finished(done)
        return done
    was_there = folder.is_there()
    begin(folder, identity)
    try:
        manifest = _run(config, folder, plan, given, identity)
    except Unfinished:
        raise
    except InputError:
        take_back(folder, plan)
        if not was_there:
            folder.remove_if_empty()
        raise
    folder.remove(WORK)
    return manifest


def _identity(config: PrepareConfig, plan: Plan, given: Tokenizer | None) -> dict[str, Any]:
    """Everything that the shards' bytes depend on, as plain JSON values."""
    settings = asdict(config)
    for name in ("output", "num_workers", "runner", "max_dead_rate"):
        del settings[name]
    if not config.infill_rate:  # such a corpus is the one it was before there was infilling
        del settings["infill_rate"]
    settings["chat_template"] = _template(config)
    settings["tokenizer_sha256"] = given.sha256 if given else None
    names = ("source", "path", "bytes", "sha256")
    sources = [{name: getattr(file, name) for name in names} for file in plan.files]
    return json.loads(json.dumps({"prepare": settings, "sources": sources}))


def _run(
    config: PrepareConfig,
    folder: Folder,
    plan: Plan,
    given: Tokenizer | None,
    identity: dict[str, Any],
) -> Manifest:
    """Tokenizer, rounds, report, manifest."""
    rounds = _Rounds(config)
    tokenizer = _tokenizer(config, folder, plan, given)
    job = _job(config, folder, plan, tokenizer)
    engine = _engine(rounds, job, plan)
    job = replace(job, engine=engine["name"], engine_version=engine["version"])
    if job.num_ranges:
        _find_repeated(rounds, job, plan)
    packed = _pack_all(rounds, job, plan)
    require_unchanged(plan)
    counts = counts_of(packed)
    require_sound(counts, packed, config)
    entries = _mask_all(rounds, job, mask_orders(packed))
    manifest = Manifest(
        sequence_length=config.sequence_length,
        block_size=config.noise.block_size,
        vocab_size=tokenizer.vocab_size,
        mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id,
        eos_id=tokenizer.eos_id,
        tokenizer_sha256=tokenizer.sha256,
        tokenizer_engine=engine,
        chat_template=job.chat_template,
        noise=config.noise,
        prepare=identity["prepare"],
        sources=tuple(identity["sources"]),
        counts=counts,
        splits={s: split_entry(s, packed, entries[s], config.sources) for s in SPLITS},
        documents=documents_of(folder, len(packed)),
        infill=infill_entry(job.infilling, packed),
    )
    facts = [record.facts for record in packed]
    write_report(folder, manifest, facts, rounds.timing(counts["tokens"]))
    folder.publish(MANIFEST, manifest.to_json())
    return manifest


@dataclass
class _Rounds:
    """Runs the rounds of a job, showing how far they are and keeping their times."""

    config: PrepareConfig
    seconds: dict[str, float] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)

    def run(
        self,
        name: str,
        step: Step,
        orders: Sequence[dict[str, Any]],
        tokens: Callable[[dict[str, Any]], int] = lambda result: 0,
    ) -> list[dict[str, Any]]:
        """The results of a round's tasks, in the order of their orders."""
        started = time.monotonic()
        progress = Progress(name, len(orders))
        results = run_tasks(
            step,
            orders,
            runner=self.config.runner,
            num_workers=self.config.num_workers,
            on_result=lambda result: progress.add(tokens(result)),
        )
        progress.close()
        self.seconds[name] = time.monotonic() - started
        return results

    def timing(self, tokens: int) -> dict[str, Any]:
        """What this run took; no part of the corpus."""
        seconds = time.monotonic() - self.begun
        return {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "runner": self.config.runner,
            "num_workers": self.config.num_workers,
            "rounds": self.seconds,
        }


def _job(config: PrepareConfig, folder: Folder, plan: Plan, tokenizer: Tokenizer) -> Job:
    template = _template(config)
    if template is not None:
        ChatTemplate.of(template, tokenizer)  # refuses it here, before anything is read
    return Job(
        output=folder.url,
        work=(folder / WORK).url,
        sources=config.sources,
        cleaning=_cleaning(config),
        held_out_rate=config.held_out_rate,
        num_parts=len(plan.parts),
        num_ranges=num_ranges(plan.bytes) if config.dedup == "exact" else 0,
        window_bytes=config.part_bytes,
        packing=config.packing,
        geometry=Geometry(
            sequence_length=config.sequence_length,
            block_size=config.noise.block_size,
            vocab_size=tokenizer.vocab_size,
            rates_per_row=rates_per_row(config.noise, config.sequence_length),
        ),
        noise=config.noise,
        tokenizer_sha256=tokenizer.sha256,
        engine=REFERENCE,
        engine_version=engine_version(REFERENCE),
        chat_template=template,
        infilling=Infilling.of(
            config.infill_rate, config.noise.seed, tokenizer, config.sequence_length
        ),
    )


def _template(config: PrepareConfig) -> str | None:
    """The chat template by its name or its text, none where there are no conversations."""
    return template_text(config.chat_template) if config.has_chats else None


def _cleaning(config: PrepareConfig) -> Cleaning:
    return Cleaning(
        normalise=config.normalise,
        max_document_bytes=config.max_document_bytes,
        long_documents=config.long_documents,
        filters=config.filters,
    )


def _tokenizer(
    config: PrepareConfig, folder: Folder, plan: Plan, given: Tokenizer | None
) -> Tokenizer:
    """The job's tokenizer, kept in the corpus folder."""
    if folder.exists(TOKENIZER):
        return Tokenizer(folder.read_bytes(TOKENIZER), folder.path(TOKENIZER))
    if config.tokenizer == "train":
        sample, infill = _sample(config, plan), bool(config.infill_rate)
        tokenizer = train_tokenizer(sample, config.vocab_size, infill=infill)
    else:
        tokenizer = given or _with_tokens(config, byte_tokenizer())
    folder.publish(TOKENIZER, tokenizer.to_bytes())
    return tokenizer


def _with_tokens(config: PrepareConfig, tokenizer: Tokenizer) -> Tokenizer:
    """With the tokens that the pipeline sets."""
    tokenizer = tokenizer.with_specials()
    return tokenizer.with_infill() if config.infill_rate else tokenizer


def _sample(config: PrepareConfig, plan: Plan) -> Iterator[str]:
    """Training text for the tokenizer."""

    def read(part: Part) -> Iterator[Document]:
        return read_source(part, config.sources[part.source])

    clean = partial(cleaned, cleaning=_cleaning(config))
    rate, size = config.held_out_rate, config.sample_bytes
    return sampled(spaced(plan.parts), read, clean, rate, size, "tokenizer sample:")


def _engine(rounds: _Rounds, job: Job, plan: Plan) -> dict[str, Any]:
    """The tokenizer engine as the manifest names it."""
    work = Folder(job.work)
    if work.exists(ENGINE):
        return json.loads(work.read_bytes(ENGINE))
    if rounds.config.tokenizer_engine == "reference":
        found = reference("tokenizer_engine=reference asks for it")
        work.publish(ENGINE, json.dumps(found).encode())
        return found
    order = {"parts": [asdict(part) for part in spaced(plan.parts, SAMPLE_PARTS)]}
    [found] = rounds.run("check", partial(_engine_step, job), [order])
    return found


def _engine_step(job: Job, order: dict[str, Any]) -> dict[str, Any]:
    return choose_engine(job, [_part_of(part) for part in order["parts"]])


def _find_repeated(rounds: _Rounds, job: Job, plan: Plan) -> None:
    """Hash every part, then merge every range of hashes."""
    work = Folder(job.work)
    merged = _committed(work, map(drops_name, range(job.num_ranges)))
    numbers = [number for number in range(job.num_ranges) if drops_name(number) not in merged]
    if not numbers:
        return
    hashed = _committed(work, (hashes_name(part.index) for part in plan.parts))
    missing = [part for part in plan.parts if hashes_name(part.index) not in hashed]
    rounds.run("hash", partial(_hash_step, job), [asdict(part) for part in missing])
    rounds.run("merge", partial(_merge_step, job), [{"number": number} for number in numbers])


def _hash_step(job: Job, order: dict[str, Any]) -> dict[str, Any]:
    return asdict(hash_part(job, _part_of(order)))


def _merge_step(job: Job, order: dict[str, Any]) -> dict[str, Any]:
    return asdict(merge_hashes(job, order["number"]))


def _pack_all(rounds: _Rounds, job: Job, plan: Plan) -> list[Record]:
    """The record of every part, in order."""
    records = _committed(Folder(job.work), (part_name(part.index) for part in plan.parts))
    listed = _committed(Folder(job.output), (documents_name(part.index) for part in plan.parts))
    done = {
        part.index: records[part_name(part.index)]
        for part in plan.parts
        if part_name(part.index) in records and documents_name(part.index) in listed
    }
    missing = [part for part in plan.parts if part.index not in done]
    results = rounds.run(
        "pack",
        partial(_pack_step, job),
        [asdict(part) for part in missing],
        lambda result: sum(each["tokens"] for each in result["facts"]["splits"].values()),
    )
    done |= {part.index: Record(**r) for part, r in zip(missing, results, strict=True)}
    return [done[part.index] for part in plan.parts]


def _committed(folder: Folder, names: Iterable[str]) -> dict[str, Record]:
    """The records of those units that are there; the folder is listed once, as most are not."""
    listed = set(folder.list())
    there = [name for name in names if name + RECORD_SUFFIX in listed]
    with ThreadPoolExecutor(_READERS) as pool:
        found = zip(there, pool.map(folder.record, there), strict=True)
        return {name: record for name, record in found if record is not None}


def _pack_step(job: Job, order: dict[str, Any]) -> dict[str, Any]:
    return asdict(pack_part(job, _part_of(order)))


def _part_of(order: dict[str, Any]) -> Part:
    return Part(**{**order, "pieces": tuple(Piece(**piece) for piece in order["pieces"])})


def _mask_all(
    rounds: _Rounds, job: Job, orders: Sequence[MaskOrder]
) -> dict[str, list[ShardEntry]]:
    """The shards of every split, in order."""
    names = {
        order.index: [
            shard_name(split, order.index)
            for split in SPLITS
            if order.packed.facts["splits"][split]["rows"]
        ]
        for order in orders
    }
    records = _committed(Folder(job.output), chain.from_iterable(names.values()))
    missing = [order for order in orders if not records.keys() >= set(names[order.index])]
    results = rounds.run(
        "mask",
        partial(_mask_step, job),
        [asdict(order) for order in missing],
        lambda result: sum(record["facts"]["tokens"] for record in result.values()),
    )
    for result in results:
        made = (Record(**values) for values in result.values())
        records |= {record.name: record for record in made}
    return {
        split: [
            entry_of(records[name])
            for order in orders
            if (name := shard_name(split, order.index)) in names[order.index]
        ]
        for split in SPLITS
    }


def _mask_step(job: Job, order: dict[str, Any]) -> dict[str, Any]:
    made = mask_part(job, MaskOrder(**{**order, "packed": Record(**order["packed"])}))
    return {split: asdict(record) for split, record in made.items()}
