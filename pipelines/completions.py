"""The output folder of a batch job: shards of completions, dead letters, records, the manifest.

A part's shard is committed under a fixed name, and equal rows give equal bytes, so a part that is
done twice is there once. The manifest comes last: rows in = rows out + dead rows.
"""

import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from cascade_model.commit import RECORD_SUFFIX, Folder, Record
from cascade_model.errors import InputError, Unfinished
from cascade_model.settings import digest
from pipelines.answers import Answered
from pipelines.prompt_rows import DeadRow, Prompt
from pipelines.prompts import Part

FORMAT_VERSION = 2
JOB, MANIFEST = "job.json", "manifest.json"
Format = Literal["jsonl", "parquet"]

COMPLETIONS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("num_tokens", pa.int64(), nullable=False),
        pa.field("passes", pa.int64()),
        pa.field("tokens_per_forward", pa.float64()),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
    ]
)
DEAD = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("input", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PartRecord:
    """What the manifest says about one finished part."""

    index: int
    rows: int
    dead: dict[str, int]
    """Dead rows by reason."""
    first_dead: dict[str, Any] | None
    """The first of them, where there are any."""
    num_tokens: int
    passes: int
    file: dict[str, Any]
    """Name, object (where the bytes lie), bytes and SHA-256 of the completions."""
    dead_file: dict[str, Any] | None
    """The same of the dead letters, where there are any."""


def file_of(record: Record) -> dict[str, Any]:
    """A commit record as the manifest names it."""
    return {key: getattr(record, key) for key in ("name", "object", "bytes", "sha256")}


def record_of(record: Record) -> PartRecord:
    """A part's record from the commit record of its completions."""
    return PartRecord(file=file_of(record), **record.facts)


def shard_name(part: Part, format: Format) -> str:
    """Name of a part's completions."""
    return f"completions-{part.index:06d}.{format}"


def dead_name(part: Part) -> str:
    """Name of a part's dead letters."""
    return f"dead-{part.index:06d}.jsonl"


def encode_rows(rows: list[dict[str, Any]], schema: pa.Schema, format: Format) -> bytes:
    """Rows as the bytes of a file; equal rows give equal bytes."""
    if format == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


def completion_row(prompt: Prompt, answered: Answered) -> dict[str, Any]:
    """One row of the output; passes are null where an endpoint does not tell them."""
    tokens, passes = answered.num_tokens, answered.passes
    return {
        "id": prompt.id,
        "prompt": answered.prompt,
        "completion": answered.completion,
        "num_tokens": tokens,
        "passes": passes,
        "tokens_per_forward": None if passes is None else tokens / max(passes, 1),
        "finish_reason": answered.finish_reason,
        "seed": prompt.decoding.params.seed,
    }


def commit_part(
    folder: Folder, part: Part, format: Format, done: list[dict[str, Any]], dead: list[DeadRow]
) -> PartRecord:
    """Commit a part's rows; the dead letters first, so that where the completions are committed
    both are there. `InputError` where the job has been taken back meanwhile."""
    if not folder.exists(JOB):
        raise InputError(f"{folder.url} has no {JOB}; the job ended while this part ran")
    reasons, rows = [row.reason for row in dead], [dataclasses.asdict(row) for row in dead]
    letters = None
    if dead:
        letters = file_of(folder.commit(dead_name(part), encode_rows(rows, DEAD, "jsonl")))
    facts = {
        "index": part.index,
        "rows": len(done),
        "dead": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "first_dead": rows[0] if rows else None,
        "num_tokens": sum(row["num_tokens"] for row in done),
        "passes": sum(row["passes"] or 0 for row in done),
        "dead_file": letters,
    }
    shard = encode_rows(done, COMPLETIONS, format)
    return record_of(folder.commit(shard_name(part, format), shard, facts=facts))


def claim(folder: Folder, job: dict[str, Any]) -> bool:
    """Bind the output folder to one job; True if this run is the first to do so.

    `InputError` names the first setting in which an earlier job in this folder differs.
    """
    if folder.exists(JOB):
        earlier = json.loads(folder.read_bytes(JOB))
        for key in sorted({*earlier, *job}):
            if earlier.get(key) != job.get(key):
                raise InputError(
                    f"output={folder.url} holds a job with {key}={earlier.get(key)!r}, this one "
                    f"has {key}={job.get(key)!r}; give another output folder"
                )
        return False
    names = folder.list()
    if names:
        raise InputError(
            f"output={folder.url} holds {names[0]!r} and no generate job; give another folder"
        )
    folder.publish(JOB, json.dumps(job, sort_keys=True, indent=1).encode())
    return True


def take_back(folder: Folder, parts: Sequence[Part], format: Format) -> None:
    """Remove the files of a job that nothing can come of, and no others."""
    folder.remove(JOB)  # first: a part that is still being decoded is then not written
    units = {name for part in parts for name in (shard_name(part, format), dead_name(part))}
    units |= {unit + RECORD_SUFFIX for unit in units}
    for name in folder.list():
        if name.partition("~")[0] in units:
            folder.remove(name)


def require_sound(
    records: Sequence[PartRecord], parts: Sequence[Part], max_dead_rate: float, output: str
) -> None:
    """Stop the job as soon as it is sure that too many of all rows are dead.

    `Unfinished` when some rows are answered, which stay for a run with a higher rate.
    """
    counts, total = dead_by_reason(records), sum(part.num_rows for part in parts)
    dead = sum(counts.values())
    if dead <= max_dead_rate * total:
        return
    letters = (record.first_dead for record in records if record.first_dead)
    first = min(letters, key=lambda letter: letter["row"])
    told = (first["detail"] or first["input"])[:120]
    sentence = (
        f"{dead} of {total} rows cannot be answered ({counts}, the first is row {first['row']}: "
        f"{told!r}), more than max_dead_rate={max_dead_rate} allows; mend the input, set "
        "prompt_column, or raise max_dead_rate"
    )
    if not any(record.rows for record in records):
        raise InputError(sentence)
    raise Unfinished(f"{sentence}, which goes on from here: what is answered stays in {output}")


def dead_by_reason(records: Sequence[PartRecord]) -> dict[str, int]:
    """Dead rows of several parts."""
    counts: dict[str, int] = {}
    for record in records:
        for reason, count in record.dead.items():
            counts[reason] = counts.get(reason, 0) + count
    return dict(sorted(counts.items()))


def read_record(folder: Folder, part: Part, format: Format) -> PartRecord | None:
    """The record of a finished part, or None."""
    record = folder.record(shard_name(part, format))
    return None if record is None else record_of(record)


def manifest_of(job: dict[str, Any], parts: Sequence[Part], records: Sequence[PartRecord]) -> dict:
    """The manifest; every part must have its record, and every row must be accounted for.

    `files` are the completions, `dead_files` the dead letters.
    """
    by_index = {record.index: record for record in records}
    ordered = [by_index[part.index] for part in parts]
    for part, record in zip(parts, ordered, strict=True):
        if record.rows + sum(record.dead.values()) != part.num_rows:
            raise RuntimeError(f"part {part.index} lost rows: {record} of {part.num_rows}")
    dead = dead_by_reason(ordered)
    counts = {
        "rows_in": sum(part.num_rows for part in parts),
        "rows_out": sum(record.rows for record in ordered),
        "rows_dead": sum(dead.values()),
        "dead_by_reason": dead,
        "num_tokens": sum(record.num_tokens for record in ordered),
        "passes": sum(record.passes for record in ordered),
    }
    body = {
        "format_version": FORMAT_VERSION,
        "job": job,
        "counts": counts,
        "files": [record.file for record in ordered],
        "dead_files": [record.dead_file for record in ordered if record.dead_file],
    }
    return {**body, "digest": digest(body)}
