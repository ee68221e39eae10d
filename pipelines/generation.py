"""Prompts -> completions: a plan of small parts, each decoded and committed by one actor.

A part is a run of rows of one input file, and the unit of retry: its output is a pure function of
(weights, settings, rows), committed under a fixed name, so a part that is done twice gives the same
bytes and a part that is done is never done again. The manifest comes last. A row that cannot be
answered goes to a dead-letter shard with its reason: rows in = rows out + dead rows. Too many of
them stop the job, which can go on from there.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from cascade_model.chat_template import ChatTemplate
from cascade_model.commit import RECORD_SUFFIX, Folder, Record
from cascade_model.config import EngineConfig
from cascade_model.errors import InputError, Unfinished
from cascade_model.sampling import SamplingParams
from cascade_model.settings import digest
from cascade_model.text_stream import Completion
from pipelines.cluster import quiet_ray_data
from pipelines.prompts import Columns, DeadRow, Part, Prompt, read_part

FORMAT_VERSION = 1
JOB, MANIFEST = "job.json", "manifest.json"
Format = Literal["jsonl", "parquet"]

COMPLETIONS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("num_tokens", pa.int64(), nullable=False),
        pa.field("passes", pa.int64(), nullable=False),
        pa.field("tokens_per_forward", pa.float64(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
    ]
)
DEAD = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("input", pa.string(), nullable=False),
    ]
)


def row_seed(job_seed: int, row: int) -> int:
    """The seed (63 bits) of one row: a function of the job's seed and the row's number alone."""
    hashed = hashlib.sha256(f"cascade generate {job_seed} {row}".encode()).digest()
    return int.from_bytes(hashed[:8], "little") >> 1


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


def completion_row(prompt: Prompt, completion: Completion, seed: int) -> dict[str, Any]:
    """One row of the output."""
    num_tokens = len(completion.token_ids)
    return {
        "id": prompt.id,
        "prompt": prompt.text,
        "completion": completion.text,
        "num_tokens": num_tokens,
        "passes": completion.passes,
        "tokens_per_forward": num_tokens / max(completion.passes, 1),
        "finish_reason": completion.finish_reason,
        "seed": seed,
    }


class PartWorker:
    """Holds the model once and answers parts; the actor class of the Ray Data plan."""

    def __init__(
        self,
        model: str,
        output: str,
        params: SamplingParams,
        columns: Columns,
        format: Format,
        threads: int,
        stop: Sequence[str] = (),
        engine: EngineConfig | None = None,
    ) -> None:
        import torch

        from cascade_model.llm import LLM

        torch.set_num_threads(threads)
        self._refusal: InputError | None = None
        try:
            self._llm = LLM.load(model, engine)
        except InputError as error:
            # Raised by the first call: a constructor's error reaches nobody as it was.
            self._refusal = error
        self._folder = Folder(output)
        self._params, self._columns = params, columns
        self._format: Format = format
        self._stop = tuple(stop)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Ray Data's face: a batch of parts to their records, both as JSON.

        A user's mistake travels as data, since an error would arrive wrapped in Ray's words.
        """
        try:
            records = [self.answer(Part(**json.loads(text))) for text in batch["part"]]
        except InputError as error:
            refusal = json.dumps(error.to_data())
            return {"record": [""] * len(batch["part"]), "refusal": [refusal] * len(batch["part"])}
        written = [json.dumps(dataclasses.asdict(record)) for record in records]
        return {"record": written, "refusal": [""] * len(written)}

    def answer(self, part: Part) -> PartRecord:
        """Decode a part and commit its files, the record last."""
        if self._refusal is not None:
            raise self._refusal
        chat = ChatTemplate.of("plain", self._llm.tokenizer)
        items = list(read_part(part, self._columns, chat.prompt))
        prompts = [item for item in items if not isinstance(item, DeadRow)]
        answers = iter(self._decode(prompts))
        results = [item if isinstance(item, DeadRow) else next(answers) for item in items]
        dead = [result for result in results if isinstance(result, DeadRow)]
        done = [result for result in results if not isinstance(result, DeadRow)]
        if len(done) + len(dead) != part.num_rows:
            raise InputError(f"input={part.url} changed while the job ran; start a new output")
        return self._commit(part, done, dead)

    def _decode(self, prompts: list[Prompt]) -> list[dict[str, Any] | DeadRow]:
        """All prompts of a part together, in their own order."""
        seeds = [row_seed(self._params.seed, prompt.row) for prompt in prompts]
        params = [dataclasses.replace(self._params, seed=seed) for seed in seeds]
        texts = [prompt.text for prompt in prompts]
        rows: dict[int, dict[str, Any] | DeadRow] = {}
        suffixes = [prompt.suffix for prompt in prompts]
        for answer in self._llm.answers(texts, params, self._stop, suffix=suffixes):
            prompt, result = prompts[answer.index], answer.result
            if isinstance(result, InputError):
                shown = f"{result}: {prompt.text}"[:400]
                rows[answer.index] = DeadRow(row=prompt.row, reason="refused", input=shown)
            else:
                rows[answer.index] = completion_row(prompt, result, seeds[answer.index])
        return [rows[index] for index in range(len(prompts))]

    def _commit(self, part: Part, done: list[dict[str, Any]], dead: list[DeadRow]) -> PartRecord:
        """Dead letters first: where the completions are committed, both are there."""
        if not self._folder.exists(JOB):
            raise InputError(f"{self._folder.url} has no {JOB}; the job ended while this part ran")
        reasons, rows = [row.reason for row in dead], [dataclasses.asdict(row) for row in dead]
        letters = None
        if dead:
            data = encode_rows(rows, DEAD, "jsonl")
            letters = file_of(self._folder.commit(dead_name(part), data))
        facts = {
            "index": part.index,
            "rows": len(done),
            "dead": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
            "first_dead": rows[0] if rows else None,
            "num_tokens": sum(row["num_tokens"] for row in done),
            "passes": sum(row["passes"] for row in done),
            "dead_file": letters,
        }
        shard = encode_rows(done, COMPLETIONS, self._format)
        name = shard_name(part, self._format)
        return record_of(self._folder.commit(name, shard, facts=facts))


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
    sentence = (
        f"{dead} of {total} rows cannot be answered ({counts}, the first is row {first['row']}: "
        f"{first['input'][:80]!r}), more than max_dead_rate={max_dead_rate} allows; mend the "
        "input, set prompt_column, or raise max_dead_rate"
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


def run_on_ray(
    parts: Sequence[Part], worker: dict[str, Any], num_workers: int
) -> Iterator[PartRecord]:
    """The Ray Data plan: parts -> pool of model-holding actors -> records, as they come."""
    quiet_ray_data()
    import ray.data

    rows = [{"part": json.dumps(dataclasses.asdict(part))} for part in parts]
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        PartWorker,
        fn_constructor_kwargs=worker,
        batch_size=1,
        num_cpus=worker["threads"],
        num_gpus=worker["engine"].num_gpus,
        compute=ray.data.ActorPoolStrategy(size=min(num_workers, len(parts))),
    )
    for row in data.iter_rows():
        if row["refusal"]:
            raise InputError.from_data(json.loads(row["refusal"]))
        yield PartRecord(**json.loads(row["record"]))
