"""generate: a file of prompts -> completions, each exactly once, on Ray Data."""

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from cascade_model.config import EngineConfig
from cascade_model.errors import InputError, Unfinished
from cascade_model.sampling import SamplingParams
from cascade_model.settings import check, to_dict
from jobs.cli import command
from jobs.launch import absolute
from pipelines.cluster import cores, require_resources, start_ray

if TYPE_CHECKING:
    from cascade_model.commit import Folder
    from pipelines.generation import PartRecord
    from pipelines.prompts import Columns, Part


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Complete every prompt of a file, exactly once; run it again to go on after a stop."""

    model: str
    """Model folder (weights, config, tokenizer, manifest)."""
    input: str
    """JSONL or Parquet file of prompts, a folder of them, or an fsspec URL."""
    output: str
    """Folder or fsspec URL for the completions."""
    prompt_column: str = "prompt"
    """Column with the text to continue."""
    messages_column: str = "messages"
    """Column with a chat, used where the prompt column is missing."""
    suffix_column: str = "suffix"
    """Column with what follows the completion, for a model that was trained to fill holes
    (infill=psm); it may be missing."""
    id_column: str = "id"
    """Column that is carried along; where it is missing, the row's number."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """Decoding settings; each row's seed is derived from sampling.seed and the row's number."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion; they are not part of it."""
    format: Literal["jsonl", "parquet"] = "jsonl"
    """Format of the output shards."""
    rows_per_shard: int = 64
    """Prompts per output shard: the unit of retry."""
    max_dead_rate: float = 0.01
    """Share of rows that cannot be answered above which the job stops instead of setting them
    aside; the same job may go on with another share."""
    num_workers: int = 1
    """Actors, each holding the model once."""
    threads_per_worker: int | None = None
    """Torch threads of an actor; none: the cores divided by the actors."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """The decode engine of an actor."""

    def __post_init__(self) -> None:
        for name in ("rows_per_shard", "num_workers"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        check(
            0.0 <= self.max_dead_rate <= 1.0,
            f"max_dead_rate={self.max_dead_rate} must be in 0..1; use 0.01",
        )
        seconds = self.sampling.deadline_seconds
        check(
            seconds is None,
            f"sampling.deadline_seconds={seconds} lets the clock decide, and a shard that is made "
            "again must have the same bytes; use sampling.max_steps",
        )
        for name in ("logprobs", "report_margin"):
            value = getattr(self.sampling, name)
            check(
                value is None or value is False,
                f"sampling.{name}={value} is not written to the output; leave it out",
            )
        threads = self.threads_per_worker
        check(
            threads is None or threads >= 1,
            f"threads_per_worker={threads} must be at least 1, or left out",
        )


def run(config: GenerateConfig) -> dict[str, Any]:
    """Answer what is not answered yet, then write the manifest; returns its counts."""
    from cascade_model.commit import Folder, require_writable
    from cascade_model.weights import weights_digest
    from pipelines import generation
    from pipelines.prompts import plan, require_columns

    require_writable(config.output)
    urls = input_urls(config.input)
    weights = weights_digest(config.model)
    parts, input_sha256 = plan(urls, config.rows_per_shard)
    require_columns(urls, columns_of(config))
    job = job_identity(config, weights, input_sha256)
    folder = Folder(config.output)
    was_there, is_new = folder.is_there(), generation.claim(folder, job)
    if folder.exists(generation.MANIFEST):
        manifest = json.loads(folder.read_bytes(generation.MANIFEST))
        counts = ", ".join(f"{value} {name}" for name, value in manifest["counts"].items())
        print(f"{config.output} is finished already: {counts}")
        return manifest["counts"]
    try:
        records = answer_all(config, folder, parts)
    except Unfinished:
        raise
    except InputError:
        if is_new:
            generation.take_back(folder, parts, config.format)
            if not was_there:
                folder.remove_if_empty()
        raise
    manifest = generation.manifest_of(job, parts, records)
    folder.publish(generation.MANIFEST, json.dumps(manifest, indent=1).encode())
    show_counts(manifest["counts"], config.output)
    return manifest["counts"]


def answer_all(config: GenerateConfig, folder: "Folder", parts: "list[Part]") -> "list[PartRecord]":
    """The records of all parts; those that are there already are not made again."""
    from pipelines import generation

    began = time.perf_counter()
    found = [generation.read_record(folder, part, config.format) for part in parts]
    records = [record for record in found if record is not None]
    missing = [part for part, record in zip(parts, found, strict=True) if record is None]
    generation.require_sound(records, parts, config.max_dead_rate, config.output)
    if not missing:
        return records
    threads = config.threads_per_worker or max(1, cores() // config.num_workers)
    workers = min(config.num_workers, len(missing))
    start_ray(num_cpus=threads * workers)
    require_resources(
        threads * workers,
        config.engine.num_gpus * workers,
        f"num_workers={config.num_workers} with {threads} threads each on {config.engine.device}",
        "use fewer workers or threads_per_worker, or engine.device=cpu",
    )
    settings = worker_settings(config, threads)
    for record in generation.run_on_ray(missing, settings, config.num_workers):
        records.append(record)
        show_progress(records, parts, time.perf_counter() - began)
        generation.require_sound(records, parts, config.max_dead_rate, config.output)
    return records


def input_urls(source: str) -> list[str]:
    """The input's files in the order of their names."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(source)
    except (ValueError, ImportError) as error:
        raise InputError(
            f"input={source} cannot be opened ({error}); use a local path or an fsspec URL"
        ) from None
    if not system.exists(path):
        raise InputError(f"input={source} does not exist; give a JSONL or Parquet file of prompts")
    if system.isfile(path):
        return [source]
    found = sorted(system.glob(f"{path}/*.jsonl") + system.glob(f"{path}/*.parquet"))
    if not found:
        raise InputError(
            f"input={source} holds no *.jsonl and no *.parquet; give a file of prompts"
        )
    return [system.unstrip_protocol(str(name)) for name in found]


def job_identity(config: GenerateConfig, weights: str, input_sha256: str) -> dict[str, Any]:
    """What the completions depend on; an output folder belongs to one such job."""
    same_answer = {"model", "input", "output", "num_workers", "threads_per_worker", "max_dead_rate"}
    settings = {key: value for key, value in to_dict(config).items() if key not in same_answer}
    settings["engine"] = {name: getattr(config.engine, name) for name in ("precision", "device")}
    # Through JSON, so that it compares equal to what is read back.
    return json.loads(
        json.dumps({**settings, "weights_sha256": weights, "input_sha256": input_sha256})
    )


def columns_of(config: GenerateConfig) -> "Columns":
    """The input's columns by their use."""
    from pipelines.prompts import Columns

    return Columns(
        prompt=config.prompt_column,
        messages=config.messages_column,
        suffix=config.suffix_column,
        id=config.id_column,
    )


def worker_settings(config: GenerateConfig, threads: int) -> dict[str, Any]:
    """The arguments of `PartWorker`."""
    return {
        "model": absolute(config.model),
        "output": absolute(config.output),
        "params": config.sampling,
        "columns": columns_of(config),
        "format": config.format,
        "threads": threads,
        "stop": config.stop,
        "engine": config.engine,
    }


def show_progress(records: list[Any], parts: list[Any], seconds: float) -> None:
    """One line a finished part."""
    rows = sum(record.rows for record in records)
    total = sum(part.num_rows for part in parts)
    print(f"{rows}/{total} rows, {len(records)}/{len(parts)} shards, {seconds:.0f} s", flush=True)


def show_counts(counts: dict[str, Any], output: str) -> None:
    """The result in one line."""
    per_forward = counts["num_tokens"] / max(counts["passes"], 1)
    print(
        f"{counts['rows_in']} rows in, {counts['rows_out']} completions, "
        f"{counts['rows_dead']} dead {counts['dead_by_reason'] or ''}; "
        f"{per_forward:.2f} tokens per forward pass; {output}"
    )


main = command(GenerateConfig, run)

if __name__ == "__main__":
    raise SystemExit(main())
