"""The output folder of a batch job: shards of completions, dead letters, records, the manifest.

A part is committed by one record, that of its shard, which holds the dead rows too: their file is
made of it, so whoever writes it, or writes it twice, writes the same bytes, also where another
answering of the part would have given others. The manifest comes last: rows in = rows out + dead
rows.
"""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from cascade_model.commit import RECORD_SUFFIX, Folder, Record
from cascade_model.errors import InputError, Unfinished
from cascade_model.settings import check, digest
from pipelines.answers import Answered
from pipelines.differences import differences
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


def shard_name(part: Part, format: Format) -> str:
    """Name of a part's completions."""
    return f"completions-{part.index:06d}.{format}"


def dead_name(part: Part) -> str:
    """Name of a part's dead letters."""
    return f"dead-{part.index:06d}.jsonl"


def encode_rows(rows: list[dict[str, Any]], schema: pa.Schema, format: Format) -> bytes:
    """Rows as the bytes of a file; equal rows give equal bytes, whatever their keys' order."""
    if format == "jsonl":
        ordered = ({name: row[name] for name in schema.names} for row in rows)
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ordered).encode()
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
    """Commit a part's rows. `InputError` where the job has been taken back meanwhile."""
    require_claimed(folder)
    facts = {
        "rows": len(done),
        "dead": [dataclasses.asdict(row) for row in dead],
        "num_tokens": sum(row["num_tokens"] for row in done),
        "passes": sum(row["passes"] or 0 for row in done),
    }
    shard = encode_rows(done, COMPLETIONS, format)
    return _told(folder, part, folder.commit(shard_name(part, format), shard, facts=facts))


def read_record(folder: Folder, part: Part, format: Format) -> PartRecord | None:
    """The record of a finished part, or None."""
    record = folder.record(shard_name(part, format))
    return None if record is None else _told(folder, part, record)


def _told(folder: Folder, part: Part, record: Record) -> PartRecord:
    """A part's record from the commit record of its completions; its dead letters are written
    where whoever committed it was killed before that."""
    dead, letters = record.facts["dead"], None
    if dead:
        name = dead_name(part)
        letters = folder.record(name) or folder.commit(name, encode_rows(dead, DEAD, "jsonl"))
    reasons = [row["reason"] for row in dead]
    return PartRecord(
        index=part.index,
        rows=record.facts["rows"],
        dead={reason: reasons.count(reason) for reason in sorted(set(reasons))},
        first_dead=dead[0] if dead else None,
        num_tokens=record.facts["num_tokens"],
        passes=record.facts["passes"],
        file=file_of(record),
        dead_file=file_of(letters) if letters else None,
    )


def claim(folder: Folder, job: dict[str, Any], named: Mapping[str, str]) -> bool:
    """Bind the output folder to one job; True if this run is the first to do so.

    `InputError` names the settings in which an earlier job in this folder differs (`differences`,
    which reads `named`).
    """
    if folder.exists(JOB):
        told = differences(json.loads(folder.read_bytes(JOB)), job, named)
        check(
            not told,
            f"output={folder.url} belongs to another job: {'; '.join(told)}; give another output, "
            "or what this one was made with",
        )
        return False
    names = folder.list()
    if names:
        raise InputError(
            f"output={folder.url} holds {names[0]!r} and no generate job; give another folder"
        )
    folder.publish(JOB, json.dumps(job, sort_keys=True, indent=1).encode())
    return True


def require_claimed(folder: Folder) -> None:
    """Raise `InputError` where the job was taken back, by another run of it that failed first."""
    if not folder.exists(JOB):
        raise InputError(
            f"{folder.url} has no {JOB}; another run of this job failed and took it back, so run "
            "the same command again"
        )


def take_back(folder: Folder, parts: Sequence[Part], format: Format) -> bool:
    """Remove the files of a job that has answered nothing, and no others.

    False, and nothing is removed, where a row is answered, by whatever run of this job.
    """
    if _is_answered(folder, parts, format):
        return False
    job = folder.read_bytes(JOB)
    folder.remove(JOB)  # first: a part that is still being decoded is then not written
    if _is_answered(folder, parts, format):  # by one that had looked for the job before
        folder.publish(JOB, job)
        return False
    units = {name for part in parts for name in (shard_name(part, format), dead_name(part))}
    units |= {unit + RECORD_SUFFIX for unit in units}
    for name in folder.list():
        if name.partition("~")[0] in units:
            folder.remove(name)
    return True


def _is_answered(folder: Folder, parts: Sequence[Part], format: Format) -> bool:
    """Whether a committed part holds a completion."""
    there = set(folder.list())
    names = (shard_name(part, format) for part in parts)
    records = (folder.record(name) for name in names if name + RECORD_SUFFIX in there)
    return any(record is not None and record.facts["rows"] for record in records)


class TooManyDead(InputError):
    """More dead rows than may be; what cures it depends on whether the folder stays the job's."""

    def told(self, output: str, *, stays: bool) -> InputError:
        """The whole sentence. A folder that stays takes no other input and no other columns."""
        if not stays:
            return InputError(f"{self}; mend the input, set prompt_column, or raise max_dead_rate")
        return Unfinished(
            f"{self}; raise max_dead_rate and run the same command again, which goes on from here; "
            f"for a mended input or another prompt_column give another output, as {output} is "
            "bound to these"
        )


def require_sound(
    records: Sequence[PartRecord], parts: Sequence[Part], max_dead_rate: float
) -> None:
    """Stop the job (`TooManyDead`) as soon as it is sure that too many of all rows are dead."""
    counts, total = dead_by_reason(records), sum(part.num_rows for part in parts)
    dead = sum(counts.values())
    if dead <= max_dead_rate * total:
        return
    letters = (record.first_dead for record in records if record.first_dead)
    first = min(letters, key=lambda letter: letter["row"])
    told = (first["detail"] or first["input"])[:120]
    raise TooManyDead(
        f"{dead} of {total} rows cannot be answered ({counts}, the first is row {first['row']}: "
        f"{told!r}), more than max_dead_rate={max_dead_rate} allows"
    )


def dead_by_reason(records: Sequence[PartRecord]) -> dict[str, int]:
    """Dead rows of several parts."""
    counts: dict[str, int] = {}
    for record in records:
        for reason, count in record.dead.items():
            counts[reason] = counts.get(reason, 0) + count
    return dict(sorted(counts.items()))


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
