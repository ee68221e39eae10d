"""Corpus to pre-masked Arrow shards, in two rounds of small tasks with a sum between them.

Round 1, a task per part: documents, split by a hash of the text, tokens, packed sequences, put into
a work folder. The driver then numbers the sequences of each split over all parts. Round 2, a task
per part: sequence ids and draw 0's thresholds and mask, committed as the final shards. The manifest
comes last. A task whose record is there is not run again.
"""

import json
import logging
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from cascade_model.commit import RECORD_SUFFIX, Folder, Record, require_writable
from cascade_model.corpus import read_manifest
from cascade_model.errors import InputError, Unfinished
from cascade_model.mixing import UNITS
from cascade_model.schema import (
    MANIFEST,
    SPLITS,
    TOKENIZER,
    Geometry,
    Manifest,
    ShardEntry,
    SourceEntry,
    SplitEntry,
    rates_per_row,
)
from cascade_model.shards import entry_of
from cascade_model.tokenizer import Tokenizer, byte_tokenizer, train_tokenizer
from pipelines.config import PrepareConfig
from pipelines.documents import Part, Piece, read_documents
from pipelines.parts import (
    JOB,
    Job,
    MaskOrder,
    dead_letter_name,
    is_held_out,
    mask_part,
    pack_part,
    part_name,
    shard_name,
    text_hash,
)
from pipelines.runner import run_tasks
from pipelines.sources import Plan, make_plan

log = logging.getLogger(__name__)
WORK = "_work"
_RUN = "run-"
_SAMPLED_PARTS = 32
_SAMPLED_CHARACTERS = 1 << 16


def prepare(config: PrepareConfig) -> Manifest:
    """Make the corpus, or finish it, or (when it is finished) do nothing; returns the manifest.

    `InputError` when sources, settings or the output folder cannot do; nothing stays behind, as the
    same command would fail again. `Unfinished` when the same job can go on from here: packed parts
    and dead letters stay. Either way nothing is touched that this run did not write.
    """
    require_writable(config.output)
    folder = Folder(config.output)
    given = None
    if config.tokenizer not in ("train", "bytes"):
        given = Tokenizer.from_url(config.tokenizer).with_specials()
    plan = make_plan(config.source, config.part_bytes)
    identity = _identity(config, plan, given)
    finished = _finished(folder, identity)
    if finished is not None:
        return finished
    was_there = folder.is_there()
    _begin(folder, identity)
    try:
        manifest = _run(config, folder, plan, given, identity)
    except Unfinished:
        raise
    except InputError:
        _take_back(folder, plan)
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
    settings["tokenizer_sha256"] = given.sha256 if given else None
    sources = [{"path": f.path, "bytes": f.bytes, "sha256": f.sha256} for f in plan.files]
    return json.loads(json.dumps({"prepare": settings, "sources": sources}))


def _finished(folder: Folder, identity: dict[str, Any]) -> Manifest | None:
    """The manifest when the job is done; refuses a corpus of another job."""
    if not folder.exists(MANIFEST):
        return None
    manifest = read_manifest(folder)
    theirs = {"prepare": manifest.prepare, "sources": list(manifest.sources)}
    _require_same(theirs, identity, folder)
    folder.remove(WORK)
    return manifest


def _begin(folder: Folder, identity: dict[str, Any]) -> None:
    """Claim an empty folder, or check that an unfinished one is of this very job."""
    work = folder / WORK
    if work.exists(JOB):
        _require_same(json.loads(work.read_bytes(JOB)), identity, folder)
    else:
        names = [name for name in folder.list() if name != WORK]
        names += [f"{WORK}/{name}" for name in work.list()]
        if names:
            raise InputError(
                f"output={folder.url} already holds {names[0]!r} but no corpus; choose an empty "
                "folder"
            )
        work.publish(JOB, json.dumps(identity, sort_keys=True).encode())
    work.publish(_RUN + uuid.uuid4().hex, b"")


def _take_back(folder: Folder, plan: Plan) -> None:
    """Remove the units of a job that cannot be finished, unless another run worked on it too."""
    work = folder / WORK
    if sum(name.startswith(_RUN) for name in work.list()) > 1:
        return
    work.remove(JOB)  # first: a task that still runs then writes nothing more
    units = {TOKENIZER, *(dead_letter_name(part.index) for part in plan.parts)}
    units |= {shard_name(split, part.index) for split in SPLITS for part in plan.parts}
    units |= {unit + RECORD_SUFFIX for unit in units}
    for name in folder.list():
        if name.partition("~")[0] in units:
            folder.remove(name)
    folder.remove(WORK)


def _require_same(theirs: dict[str, Any], ours: dict[str, Any], folder: Folder) -> None:
    """Name the first setting in which two jobs differ."""
    for name, new in ours["prepare"].items():
        old = theirs["prepare"].get(name)
        if old != new:
            raise InputError(
                f"output={folder.url} was made with {name}={old!r} but this run has {new!r}; "
                "choose another output or delete the folder"
            )
    if theirs != ours:
        raise InputError(
            f"output={folder.url} was made from other source files than source.paths holds now; "
            "choose another output or delete the folder"
        )


def _run(
    config: PrepareConfig,
    folder: Folder,
    plan: Plan,
    given: Tokenizer | None,
    identity: dict[str, Any],
) -> Manifest:
    """Tokenizer, both rounds, manifest."""
    tokenizer = _tokenizer(config, folder, plan, given)
    job = Job(
        output=folder.url,
        work=(folder / WORK).url,
        text_column=config.source.text_column,
        held_out_rate=config.held_out_rate,
        geometry=Geometry(
            sequence_length=config.sequence_length,
            block_size=config.noise.block_size,
            vocab_size=tokenizer.vocab_size,
            rates_per_row=rates_per_row(config.noise, config.sequence_length),
        ),
        noise=config.noise,
        tokenizer_sha256=tokenizer.sha256,
    )
    packed = _pack_all(config, job, plan)
    counts = _counts(packed)
    _require_sound(counts, packed, config)
    orders = list(_mask_orders(packed))
    entries = _mask_all(config, job, orders)
    manifest = Manifest(
        sequence_length=config.sequence_length,
        block_size=config.noise.block_size,
        vocab_size=tokenizer.vocab_size,
        mask_id=tokenizer.mask_id,
        pad_id=tokenizer.pad_id,
        eos_id=tokenizer.eos_id,
        tokenizer_sha256=tokenizer.sha256,
        noise=config.noise,
        prepare=identity["prepare"],
        sources=tuple(identity["sources"]),
        counts=counts,
        splits={split: _split_entry(split, packed, entries[split]) for split in SPLITS},
    )
    folder.publish(MANIFEST, manifest.to_json())
    return manifest


def _tokenizer(
    config: PrepareConfig, folder: Folder, plan: Plan, given: Tokenizer | None
) -> Tokenizer:
    """The job's tokenizer, kept in the corpus folder."""
    if folder.exists(TOKENIZER):
        return Tokenizer(folder.read_bytes(TOKENIZER), folder.path(TOKENIZER))
    tokenizer = given or (
        byte_tokenizer()
        if config.tokenizer == "bytes"
        else train_tokenizer(_sample(config, plan), config.vocab_size)
    )
    folder.publish(TOKENIZER, tokenizer.to_bytes())
    return tokenizer


def _sample(config: PrepareConfig, plan: Plan) -> Iterator[str]:
    """Training text for the tokenizer: documents of evenly spaced parts, chosen by their hash."""
    step = -(-len(plan.parts) // _SAMPLED_PARTS)
    parts = plan.parts[::step]
    rate = config.sample_bytes / max(1, sum(piece.bytes for p in parts for piece in p.pieces))
    left = config.sample_bytes
    for part in parts:
        for document in read_documents(part, config.source.text_column):
            if left <= 0:
                return
            text = document.text
            if text is None or is_held_out(text, config.held_out_rate):
                continue
            # A second hash, as the first one already decided the split.
            if text_hash("tokenizer sample:" + text) < rate or left == config.sample_bytes:
                text = text[: min(left, _SAMPLED_CHARACTERS)]
                left -= len(text)
                yield text


def _pack_all(config: PrepareConfig, job: Job, plan: Plan) -> list[Record]:
    """Round 1: the record of every part, in order."""
    work = Folder(job.work)
    records = {part.index: work.record(part_name(part.index)) for part in plan.parts}
    missing = [part for part in plan.parts if records[part.index] is None]
    log.info("round 1: %d of %d parts to pack", len(missing), len(plan.parts))
    results = run_tasks(
        partial(_pack_step, job),
        [asdict(part) for part in missing],
        runner=config.runner,
        num_workers=config.num_workers,
    )
    made = {part.index: Record(**r) for part, r in zip(missing, results, strict=True)}
    return [records[part.index] or made[part.index] for part in plan.parts]


def _pack_step(job: Job, order: dict[str, Any]) -> dict[str, Any]:
    pieces = tuple(Piece(**piece) for piece in order["pieces"])
    return asdict(pack_part(job, Part(index=order["index"], pieces=pieces)))


def _mask_orders(packed: list[Record]) -> Iterator[MaskOrder]:
    """Number the sequences of each split over all parts."""
    rows = [{s: record.facts["splits"][s]["rows"] for s in SPLITS} for record in packed]
    totals = {split: sum(each[split] for each in rows) for split in SPLITS}
    firsts = dict.fromkeys(SPLITS, 0)
    for index, record in enumerate(packed):
        yield MaskOrder(index=index, packed=record, firsts=dict(firsts), totals=totals)
        firsts = {split: firsts[split] + rows[index][split] for split in SPLITS}


def _mask_all(
    config: PrepareConfig, job: Job, orders: list[MaskOrder]
) -> dict[str, list[ShardEntry]]:
    """Round 2: the shards of every split, in order."""
    output = Folder(job.output)
    names = {
        (order.index, split): shard_name(split, order.index)
        for order in orders
        for split in SPLITS
        if order.packed.facts["splits"][split]["rows"]
    }
    records = {key: output.record(name) for key, name in names.items()}
    missing = [o for o in orders if any(records.get((o.index, s), o) is None for s in SPLITS)]
    log.info("round 2: %d of %d parts to mask", len(missing), len(orders))
    results = run_tasks(
        partial(_mask_step, job),
        [asdict(order) for order in missing],
        runner=config.runner,
        num_workers=config.num_workers,
    )
    for order, result in zip(missing, results, strict=True):
        records |= {(order.index, split): Record(**values) for split, values in result.items()}
    entries: dict[str, list[ShardEntry]] = {split: [] for split in SPLITS}
    for (_, split), record in records.items():
        assert record is not None
        entries[split].append(entry_of(record))
    return entries


def _mask_step(job: Job, order: dict[str, Any]) -> dict[str, Any]:
    made = mask_part(job, MaskOrder(**{**order, "packed": Record(**order["packed"])}))
    return {split: asdict(record) for split, record in made.items()}


def _split_entry(split: str, packed: list[Record], shards: list[ShardEntry]) -> SplitEntry:
    facts = [record.facts["splits"][split] for record in packed]
    sequences, tokens = sum(each["rows"] for each in facts), sum(each["tokens"] for each in facts)
    source = SourceEntry(
        name="all", first_sequence=0, num_sequences=sequences, num_tokens=tokens, share=UNITS
    )
    return SplitEntry(
        num_sequences=sequences,
        num_tokens=tokens,
        num_bytes=sum(each["bytes"] for each in facts),
        num_documents=sum(each["documents"] for each in facts),
        sources=(source,) if sequences else (),
        shards=tuple(shards),
    )


def _counts(packed: list[Record]) -> dict[str, Any]:
    """Sums over all parts; in = out + dropped + dead."""
    dropped, dead, sums = Counter(), Counter(), Counter()
    for record in packed:
        dropped.update(record.facts["dropped"])
        dead.update(record.facts["dead"])
        sums["documents_in"] += record.facts["documents_in"]
        for each in record.facts["splits"].values():
            sums.update(each)
    if sums["documents_in"] != sums["documents"] + dropped.total() + dead.total():
        raise RuntimeError("a document was lost or doubled")
    return {
        "documents_in": sums["documents_in"],
        "documents": sums["documents"],
        "dropped": dict(sorted(dropped.items())),
        "dead": dict(sorted(dead.items())),
        "characters": sums["characters"],
        "bytes": sums["bytes"],
        "tokens": sums["tokens"],
        "sequences": sums["rows"],
    }


def _require_sound(counts: dict[str, Any], packed: list[Record], config: PrepareConfig) -> None:
    """Refuse a corpus that is too broken (`Unfinished`), empty, or leaves nothing to train on."""
    dead, total = sum(counts["dead"].values()), counts["documents_in"]
    if dead > config.max_dead_rate * total:
        first = next(r.facts["first_dead"] for r in packed if r.facts["first_dead"])
        sentence = (
            f"{dead} of {total} documents cannot be read ({counts['dead']}, the first in "
            f"{first['path']} at {first['where']}), more than max_dead_rate={config.max_dead_rate} "
            "allows; mend the source, set source.text_column, or raise max_dead_rate"
        )
        if not counts["documents"]:
            raise InputError(sentence)
        raise Unfinished(
            f"{sentence}, which goes on from here: the packed parts stay in {config.output}, and "
            "dead_letter-*.jsonl there lists what cannot be read"
        )
    paths = list(config.source.paths)
    if not counts["documents"]:
        raise InputError(
            f"source.paths={paths} holds no document with text in it; give files with documents"
        )
    if not any(record.facts["splits"]["train"]["rows"] for record in packed):
        raise InputError(
            f"held_out_rate={config.held_out_rate} keeps all {counts['documents']} documents from "
            "training; lower it or give more documents"
        )
