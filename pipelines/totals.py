"""What the parts add up to: counts, the manifest's entries, the numbers of the sequences."""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cascade_model.commit import Folder, Record
from cascade_model.errors import InputError, Unfinished
from cascade_model.manifest import DocumentsEntry, InfillEntry, ShardEntry, SourceEntry, SplitEntry
from cascade_model.mixing import shares
from cascade_model.schema import SPLITS, documents_name
from pipelines.config import PrepareConfig, SourceConfig
from pipelines.infilling import Infilling
from pipelines.parts import MaskOrder
from pipelines.sources import label_of

_LOST = ("dropped", "dead")
"""The counts of documents that are no part of the corpus."""


def counts_of(packed: Sequence[Record]) -> dict[str, Any]:
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
        "padding": sums["padding"],
    }


def require_sound(counts: dict[str, Any], packed: Sequence[Record], config: PrepareConfig) -> None:
    """Refuse a corpus that is too broken (`Unfinished`), empty, or leaves nothing to train on."""
    dead, total = sum(counts["dead"].values()), counts["documents_in"]
    if dead > config.max_dead_rate * total:
        worst = _worst_source(packed)
        mine = [record.facts for record in packed if record.facts["source"] == worst]
        first = next(facts["first_dead"] for facts in mine if facts["first_dead"])
        source, label = config.sources[worst], label_of(worst)
        name = "messages_column" if source.messages_column else "text_column"
        sentence = (
            f"{dead} of {total} documents cannot be read ({counts['dead']}; in {first['path']} at "
            f"{first['where']}: {first['reason']}), more than max_dead_rate={config.max_dead_rate} "
            f"allows; mend the source, set {label}.{name} (now {getattr(source, name)}) or "
            f"{label}.format (now {source.format}), or raise max_dead_rate"
        )
        if not counts["documents"]:
            raise InputError(sentence)
        raise Unfinished(
            f"{sentence}, which goes on from here: the packed parts stay in {config.output}, and "
            "dead_letter-*.jsonl there lists what cannot be read"
        )
    for name, source in config.sources.items():
        mine = [record.facts["splits"] for record in packed if record.facts["source"] == name]
        label, paths = label_of(name), list(source.paths)
        documents = sum(each["documents"] for splits in mine for each in splits.values())
        if not documents:
            lost = " and ".join(f"{kind}: {counts[kind]}" for kind in _LOST if counts[kind])
            lost = f" ({lost})" if lost else ""
            raise InputError(
                f"{label}.paths={paths} leaves no document{lost}; give files with documents or "
                "loosen the rules that drop them"
            )
        if not any(splits["train"]["rows"] for splits in mine):
            raise InputError(
                f"held_out_rate={config.held_out_rate} keeps all {documents} documents of "
                f"{label}.paths={paths} from training; lower it or give more documents"
            )

    if config.infill_rate and not _rearranged(packed):
        raise InputError(
            f"infill_rate={config.infill_rate} rearranges none of {counts['documents']} documents, "
            f"as none is drawn that fits into sequence_length={config.sequence_length}; raise "
            "sequence_length, or leave infill_rate out"
        )


def infill_entry(infilling: Infilling | None, packed: Sequence[Record]) -> InfillEntry | None:
    """What the manifest says of the rearranged documents."""
    if infilling is None:
        return None
    return InfillEntry(rate=infilling.rate, ids=infilling.ids, num_documents=_rearranged(packed))


def _rearranged(packed: Sequence[Record]) -> int:
    """Documents that were rearranged."""
    return sum(record.facts["rearranged"] for record in packed)


def _worst_source(packed: Sequence[Record]) -> str:
    """The source with the most dead documents."""
    dead: Counter[str] = Counter()
    for record in packed:
        dead[record.facts["source"]] += sum(record.facts["dead"].values())
    return dead.most_common(1)[0][0]


def mask_orders(packed: Sequence[Record]) -> list[MaskOrder]:
    """Number the sequences of each split over all parts."""
    rows = [{s: record.facts["splits"][s]["rows"] for s in SPLITS} for record in packed]
    ranges = {split: _source_ranges(split, packed) for split in SPLITS}
    firsts, orders = dict.fromkeys(SPLITS, 0), []
    for index, record in enumerate(packed):
        mine = {split: ranges[split][record.facts["source"]] for split in SPLITS}
        orders.append(
            MaskOrder(
                index=index,
                packed=record,
                firsts=dict(firsts),
                source_firsts={split: first for split, (first, _) in mine.items()},
                source_totals={split: total for split, (_, total) in mine.items()},
            )
        )
        firsts = {split: firsts[split] + rows[index][split] for split in SPLITS}
    return orders


def _source_ranges(split: str, packed: Sequence[Record]) -> dict[str, tuple[int, int]]:
    """First sequence and number of sequences of each source; their parts follow each other."""
    totals: Counter[str] = Counter()
    for record in packed:
        totals[record.facts["source"]] += record.facts["splits"][split]["rows"]
    found, first = {}, 0
    for name, total in totals.items():
        found[name] = (first, total)
        first += total
    return found


def split_entry(
    split: str,
    packed: Sequence[Record],
    shards: Sequence[ShardEntry],
    sources: Mapping[str, SourceConfig],
) -> SplitEntry:
    """A split as the manifest describes it; a source without sequences in it has no share."""
    facts = [record.facts["splits"][split] for record in packed]
    ranges = {n: r for n, r in _source_ranges(split, packed).items() if r[1]}
    tokens: Counter[str] = Counter()
    for record in packed:
        tokens[record.facts["source"]] += record.facts["splits"][split]["tokens"]
    given = shares([sources[name].weight for name in ranges]) if ranges else []
    return SplitEntry(
        num_sequences=sum(each["rows"] for each in facts),
        num_tokens=sum(each["tokens"] for each in facts),
        num_bytes=sum(each["bytes"] for each in facts),
        num_documents=sum(each["documents"] for each in facts),
        sources=tuple(
            SourceEntry(
                name=name,
                first_sequence=first,
                num_sequences=total,
                num_tokens=tokens[name],
                share=share,
            )
            for (name, (first, total)), share in zip(ranges.items(), given, strict=True)
        ),
        shards=tuple(shards),
    )


def documents_of(output: Folder, num_parts: int) -> tuple[DocumentsEntry, ...]:
    """The parts' tables of documents."""
    names = [documents_name(index) for index in range(num_parts)]
    with ThreadPoolExecutor(16) as pool:
        records = list(pool.map(output.record, names))
    entries = []
    for name, record in zip(names, records, strict=True):
        if record is None:
            raise Unfinished(f"{output.path(name)} is gone; run the same command again")
        entries.append(
            DocumentsEntry(
                name=record.name,
                object=record.object,
                bytes=record.bytes,
                sha256=record.sha256,
                rows=record.facts["rows"],
            )
        )
    return tuple(entries)
