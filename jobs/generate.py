"""generate: prompts -> completions, each exactly once, on Ray Data."""

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade_model.errors import InputError, Unfinished
from jobs.cli import command
from jobs.generate_settings import GenerateConfig, job_identity
from jobs.launch import absolute
from pipelines.cluster import cores, require_resources, start_ray

if TYPE_CHECKING:
    from cascade_model.commit import Folder
    from pipelines.answers import Source
    from pipelines.completions import PartRecord
    from pipelines.generation import Work
    from pipelines.prompts import Part

KEY_VARIABLE = "CASCADE_API_KEY"
"""Holds the key of an endpoint; it stands in no file and no log."""


def run(config: GenerateConfig) -> dict[str, Any]:
    """Answer what is not answered yet, then write the manifest; returns its counts."""
    from cascade_model.commit import Folder, require_writable
    from pipelines import completions
    from pipelines.prompt_input import input_urls
    from pipelines.prompts import plan, require_columns

    require_writable(config.output)
    urls = input_urls(config.input, config.split, config.subset)
    source, answerer = source_of(config)
    parts, input_sha256 = plan(urls, config.rows_per_shard)
    require_columns(urls, config.prompt_column, config.messages_column, config.setting_columns)
    job = job_identity(config, answerer, input_sha256)
    folder = Folder(config.output)
    was_there, is_new = folder.is_there(), completions.claim(folder, job)
    if folder.exists(completions.MANIFEST):
        manifest = json.loads(folder.read_bytes(completions.MANIFEST))
        counts = ", ".join(f"{value} {name}" for name, value in manifest["counts"].items())
        print(f"{config.output} is finished already: {counts}")
        return manifest["counts"]
    try:
        records = answer_all(config, work_of(config, source), folder, parts)
    except Unfinished:
        raise
    except InputError:
        if is_new:
            completions.take_back(folder, parts, config.format)
            if not was_there:
                folder.remove_if_empty()
        raise
    manifest = completions.manifest_of(job, parts, records)
    folder.publish(completions.MANIFEST, json.dumps(manifest, indent=1).encode())
    show_counts(manifest["counts"], config.output)
    return manifest["counts"]


def source_of(config: GenerateConfig) -> "tuple[Source, dict[str, Any]]":
    """Who answers, and what of that belongs to the job's identity."""
    if config.endpoint:
        return _endpoint(config)
    from cascade_model.weights import weights_digest
    from pipelines.model_answers import ModelSource

    weights = weights_digest(config.model)
    template = _template_text(config)
    source = ModelSource(
        model=absolute(config.model),
        chat_template=template,
        threads=config.threads_per_worker or max(1, cores() // config.num_workers),
        engine=config.engine,
    )
    return source, {
        "weights_sha256": weights,
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        "engine": {name: getattr(config.engine, name) for name in ("precision", "device")},
    }


def _endpoint(config: GenerateConfig) -> "tuple[Source, dict[str, Any]]":
    from pipelines.endpoint_answers import EndpointSource, found

    asked = EndpointSource(
        url=config.endpoint,
        model_name=config.model_name,
        key=os.environ.get(KEY_VARIABLE) or None,
        in_flight=config.requests_in_flight,
        patience_seconds=config.patience_seconds,
    )
    source = found(asked)
    return source, {"model_name": source.model_name, "fingerprint": source.fingerprint}


def _template_text(config: GenerateConfig) -> str:
    """The template's text or the name of one that is built in; a file is read here, as a worker may
    be elsewhere."""
    from cascade_model.own_template import own_template

    given = config.chat_template or own_template(config.model) or "plain"
    if "{" in given or not Path(given).is_file():
        return given
    try:
        return Path(given).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"chat_template={given} cannot be read ({type(error).__name__}); check the file"
        ) from None


def work_of(config: GenerateConfig, source: "Source") -> "Work":
    """What the workers are told."""
    from pipelines.generation import Work
    from pipelines.prompt_rows import Columns
    from pipelines.row_settings import Decoding

    columns = Columns(
        prompt=config.prompt_column,
        messages=config.messages_column,
        suffix=config.suffix_column,
        id=config.id_column,
        params=config.params_column,
        settings=config.setting_columns,
    )
    return Work(
        source=source,
        output=absolute(config.output),
        columns=columns,
        common=Decoding(params=config.sampling, stop=config.stop),
        format=config.format,
        rows_per_part=config.rows_per_shard,
    )


def answer_all(
    config: GenerateConfig, work: "Work", folder: "Folder", parts: "list[Part]"
) -> "list[PartRecord]":
    """The records of all parts; those that are there already are not made again."""
    from pipelines import completions, generation
    from pipelines.progress import Progress

    found = [completions.read_record(folder, part, config.format) for part in parts]
    records = [record for record in found if record is not None]
    missing = [part for part, record in zip(parts, found, strict=True) if record is None]
    completions.require_sound(records, parts, config.max_dead_rate, config.output)
    if not missing:
        return records
    workers = min(config.num_workers, len(missing))
    cpus, gpus = work.source.num_cpus * workers, work.source.num_gpus * workers
    start_ray(num_cpus=int(cpus))
    require_resources(
        cpus,
        gpus,
        f"num_workers={config.num_workers} with {work.source.num_cpus:g} threads each on "
        f"{config.engine.device}",
        "use fewer workers or threads_per_worker, or engine.device=cpu",
    )
    size = {part.index: part.num_rows for part in parts}
    progress = Progress("generate", sum(size.values()), unit="rows")
    progress.resume(sum(size[record.index] for record in records))
    try:
        for record, seconds in generation.run_on_ray(missing, work, config.num_workers):
            records.append(record)
            progress.began(seconds)
            progress.add(record.num_tokens, size[record.index])
            completions.require_sound(records, parts, config.max_dead_rate, config.output)
    finally:
        progress.close()
    return records


def show_counts(counts: dict[str, Any], output: str) -> None:
    """The result in one line."""
    passes = counts["passes"]
    speed = f"{counts['num_tokens'] / passes:.2f} tokens per forward pass; " if passes else ""
    print(
        f"{counts['rows_in']} rows in, {counts['rows_out']} completions, "
        f"{counts['rows_dead']} dead {counts['dead_by_reason'] or ''}; {speed}{output}"
    )


main = command(GenerateConfig, run)

if __name__ == "__main__":
    raise SystemExit(main())
