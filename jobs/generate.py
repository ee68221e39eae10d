"""generate: prompts -> completions, each exactly once, on Ray Data."""

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

from cascade_model.errors import InputError, Stopped, Unfinished
from cascade_model.settings import check
from cascade_model.stopping import sigterm_has_come
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


def run(config: GenerateConfig) -> dict[str, Any]:
    """Answer what is not answered yet, then write the manifest; returns its counts."""
    from cascade_model.commit import Folder, require_writable
    from pipelines import completions
    from pipelines.prompt_input import input_urls
    from pipelines.prompts import may_have_setting, plan, require_columns

    require_writable(config.output)
    urls = input_urls(config.input, config.split, config.subset)
    source, answerer = source_of(config)
    parts, input_sha256 = plan(urls, config.rows_per_shard)
    require_columns(urls, config.prompt_column, config.messages_column, config.setting_columns)
    if not may_have_setting(urls, "max_tokens", config.params_column, config.setting_columns):
        require_room(config, source)
    job = job_identity(config, answerer, input_sha256)
    folder = Folder(config.output)
    was_there, is_new = folder.is_there(), completions.claim(folder, job, named(config))
    if folder.exists(completions.MANIFEST):
        manifest = json.loads(folder.read_bytes(completions.MANIFEST))
        counts = ", ".join(f"{value} {name}" for name, value in manifest["counts"].items())
        print(f"{config.output} is finished already: {counts}")
        return manifest["counts"]
    try:
        records = answer_all(config, work_of(config, source), folder, parts)
    except Unfinished:
        raise
    except InputError as error:
        is_gone = is_new and completions.take_back(folder, parts, config.format)
        if is_gone and not was_there:
            folder.remove_if_empty()
        if isinstance(error, completions.TooManyDead):
            raise error.told(config.output, stays=not is_gone) from None
        if is_new and not is_gone:
            raise _kept(error, config.output) from None
        raise
    completions.require_claimed(folder)
    manifest = completions.manifest_of(job, parts, records)
    folder.publish(completions.MANIFEST, json.dumps(manifest, indent=1).encode())
    show_counts(manifest["counts"], config.output)
    return manifest["counts"]


def _kept(error: InputError, output: str) -> Unfinished:
    """A mistake that came late, when some rows were answered: they stay."""
    told = Unfinished(f"{error}; what is answered stays in {output}")
    told.exit_code = error.exit_code
    return told


def named(config: GenerateConfig) -> dict[str, str]:
    """What a person gave, by the name of the digest that the job's identity has of it."""
    answerer = f"endpoint={config.endpoint}" if config.endpoint else f"model={config.model}"
    given = f"chat_template={config.chat_template}"
    return {
        "input_sha256": f"input={config.input}",
        "weights_sha256": answerer,
        "fingerprint": answerer,
        "chat_template_sha256": given if config.chat_template else f"chat template of {answerer}",
    }


def source_of(config: GenerateConfig) -> "tuple[Source, dict[str, Any]]":
    """Who answers, and what of that belongs to the job's identity."""
    if config.endpoint:
        return _endpoint(config)
    from cascade_model.own_template import text_of
    from cascade_model.weights import weights_digest
    from pipelines.model_answers import ModelSource

    weights = weights_digest(config.model)
    template = text_of(config.model, config.chat_template)
    source = ModelSource(
        model=absolute(config.model),
        weights_sha256=weights,
        chat_template=template,
        threads=config.threads_per_worker or max(1, cores() // config.num_workers),
        engine=config.engine,
    )
    return source, {
        "weights_sha256": weights,
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        "engine": {name: getattr(config.engine, name) for name in ("precision", "device")},
    }


def require_room(config: GenerateConfig, source: "Source") -> None:
    """Refuse a max_tokens that no row could have, not even with a prompt of one token: one that
    goes beyond the model's context, the cache of its engine, or what an endpoint allows."""
    from pipelines.endpoint_answers import EndpointSource

    params, length = config.sampling, f"sampling.max_tokens={config.sampling.max_tokens}"
    if isinstance(source, EndpointSource):
        check(
            source.longest is None or params.max_tokens < source.longest,
            f"{length} leaves a prompt no place in the {source.longest} tokens that "
            f"endpoint={config.endpoint} gives a request (max_model_len); lower it to "
            f"{(source.longest or 0) - 1} at most",
        )
        return
    from cascade_model.engine_config import room_of
    from cascade_model.requests import block_edges
    from cascade_model.weights import read_config

    shape = read_config(config.model)
    context = shape.max_sequence_length
    check(
        params.max_tokens < context,
        f"{length} leaves a prompt no place in the context of {context} that model={config.model} "
        f"has; lower it to {context - 1} at most",
    )
    needed = block_edges(shape, 1, params)[-1]
    held = room_of(shape, config.engine).longest(2 if params.guidance_scale else 1)
    check(
        needed <= held,
        f"{length} takes keys and values of {needed} tokens with the shortest prompt, and "
        f"engine.cache_bytes={config.engine.cache_bytes} holds those of {held}; lower max_tokens, "
        "or raise engine.cache_bytes",
    )


def _endpoint(config: GenerateConfig) -> "tuple[Source, dict[str, Any]]":
    from pipelines.endpoint_answers import EndpointSource, found
    from pipelines.endpoint_client import KEY_VARIABLE

    asked = EndpointSource(
        url=config.endpoint,
        model_name=config.model_name,
        key=os.environ.get(KEY_VARIABLE) or None,
        in_flight=config.requests_in_flight,
        patience_seconds=config.patience_seconds,
    )
    source = found(asked)
    names = ("model_name", "fingerprint", "chat_template_sha256")
    return source, {name: getattr(source, name) for name in names}


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
    completions.require_sound(records, parts, config.max_dead_rate)
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
            completions.require_sound(records, parts, config.max_dead_rate)
    except KeyboardInterrupt:
        if not sigterm_has_come():
            raise
        done = sum(size[record.index] for record in records)
        raise Stopped(
            f"stopped by SIGTERM when {done} of {sum(size.values())} rows were answered; they stay "
            f"in {config.output}, run the same command again, which goes on from there"
        ) from None
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
