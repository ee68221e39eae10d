"""teach: what an autoregressive teacher says of a corpus, once and for many students (Ray Data)."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cascade_model.settings import check
from jobs.cli import command
from jobs.launch import absolute
from jobs.starting import require_context
from pipelines.cluster import cores, require_resources, start_ray

if TYPE_CHECKING:
    from cascade_model.corpus import Corpus
    from cascade_model.teacher_targets import TargetsManifest
    from pipelines.targets import Asking


@dataclass(frozen=True, kw_only=True, slots=True)
class TeachConfig:
    """Write a teacher's likeliest tokens beside a corpus, for `cascade distil --targets`; run it
    again to go on after a stop."""

    corpus: str
    """Folder or URL that `cascade prepare` wrote."""
    teacher: str
    """Model folder of an autoregressive model (block size 1, shifted logits) with the corpus's
    tokenizer."""
    output: str
    """Folder or fsspec URL of the targets: 6 k + 4 bytes a token, one file for each shard."""
    k: int = 16
    """Tokens named for each place; the others share one probability."""
    temperature: float = 1.0
    """The distributions are softmax(logits / temperature)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the teacher's weights."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the teacher runs; cuda asks Ray for a GPU for each worker."""
    sequences_per_forward: int = 16
    """Sequences in one forward pass; another number may round otherwise."""
    runner: Literal["ray", "local"] = "ray"
    """ray: workers side by side. local: this process, without Ray; the same bytes on one machine
    with as many threads."""
    num_workers: int = 1
    """Actors, each holding the teacher once."""
    threads_per_worker: int | None = None
    """Torch threads of an actor; none: the cores divided by the actors."""

    def __post_init__(self) -> None:
        for name in ("k", "sequences_per_forward", "num_workers"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        check(
            0.0 < self.temperature < float("inf"),
            f"temperature={self.temperature} must be above 0; use 1",
        )
        threads = self.threads_per_worker
        check(
            threads is None or threads >= 1,
            f"threads_per_worker={threads} must be at least 1, or left out",
        )


def run(config: TeachConfig) -> dict[str, Any]:
    """Answer the shards that are not answered yet, then write the manifest; returns a summary."""
    from cascade_model.commit import Folder, require_writable
    from cascade_model.corpus import Corpus
    from pipelines import targets

    require_writable(config.output)
    corpus = Corpus.open(config.corpus, targets.SPLIT)
    wanted, folder = manifest_of(config, corpus), Folder(config.output)
    named = {"corpus": f"corpus={config.corpus}", "teacher": f"teacher={config.teacher}"}
    found = targets.claim(folder, wanted, named)
    if found is None:
        missing = targets.missing_shards(folder, corpus)
        if missing:
            answer(config, asking_of(config, corpus), missing)
        found = targets.finish(folder, corpus, wanted)
    size = sum(shard.bytes for shard in found.shards)
    print(f"{config.output}: {corpus.num_tokens:,} tokens, k = {found.k}, {size / 1e6:,.1f} MB")
    return {"targets": config.output, "digest": found.digest, "bytes": size}


def manifest_of(config: TeachConfig, corpus: "Corpus") -> "TargetsManifest":
    """What will be written, its shards still missing; refuses a teacher that cannot teach."""
    from cascade_model.distillation import require_autoregressive
    from cascade_model.model import never_emitted
    from cascade_model.teacher_targets import TargetsManifest
    from cascade_model.weights import read_config, weights_digest
    from pipelines.targets import SPLIT

    teacher = read_config(config.teacher)
    require_autoregressive(teacher)
    require_context(f"teacher={config.teacher}", teacher, corpus, config.corpus)
    corpus.require_tokenizer(teacher.tokenizer_sha256, f"teacher={config.teacher}")
    banned = sorted({*never_emitted(teacher), *marks_of(corpus)})
    outcomes = teacher.vocab_size - len(banned)
    check(config.k <= outcomes, f"k={config.k} is above the {outcomes} tokens; use {outcomes}")
    return TargetsManifest(
        corpus=corpus.digest,
        split=SPLIT,
        teacher=weights_digest(config.teacher),
        tokenizer_sha256=teacher.tokenizer_sha256,
        sequence_length=corpus.sequence_length,
        vocab_size=teacher.vocab_size,
        banned=tuple(banned),
        k=config.k,
        temperature=config.temperature,
        precision=config.precision,
        shards=(),
    )


def marks_of(corpus: "Corpus") -> tuple[int, ...]:
    """Tokens before the parts of a rearranged text: students of such a corpus never emit them, also
    where their teacher, of plain texts, can."""
    return () if corpus.manifest.infill is None else corpus.manifest.infill.ids


def asking_of(config: TeachConfig, corpus: "Corpus") -> "Asking":
    """The settings as a worker in another folder takes them."""
    from pipelines.targets import Asking

    names = ("k", "temperature", "precision", "device", "sequences_per_forward")
    return Asking(
        corpus=absolute(config.corpus),
        teacher=absolute(config.teacher),
        output=absolute(config.output),
        banned=marks_of(corpus),
        **{name: getattr(config, name) for name in names},
    )


def answer(config: TeachConfig, asking: "Asking", missing: list[int]) -> None:
    """Have the missing shards answered, a line for each."""
    from pipelines import targets

    began, count = time.perf_counter(), 0

    def done() -> None:
        nonlocal count
        count += 1
        seconds = time.perf_counter() - began
        print(f"{count}/{len(missing)} shards, {seconds:.0f} s", flush=True)

    threads = config.threads_per_worker or max(1, cores() // config.num_workers)
    if config.runner == "local":
        targets.run_here(asking, missing, threads, done)
        return
    workers = min(config.num_workers, len(missing))
    start_ray(num_cpus=threads * workers)
    require_resources(
        threads * workers,
        workers if config.device == "cuda" else 0,
        f"num_workers={config.num_workers} with {threads} threads each on {config.device}",
        "use fewer workers or threads_per_worker, or device=cpu",
    )
    targets.run_on_ray(asking, missing, threads, config.num_workers, done)


main = command(TeachConfig, run)

if __name__ == "__main__":
    raise SystemExit(main())
