"""A corpus and its teacher -> what the teacher says of every token: one unit for each shard.

A shard is the unit of retry: its targets are a pure function of (weights, settings, shard), always
made in the same forward passes, and committed under a fixed name. So a shard that is done twice
gives the same bytes, and one that is done is never done again. The manifest comes last.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cascade_model.commit import Folder, Record
from cascade_model.corpus import Corpus
from cascade_model.errors import InputError
from cascade_model.settings import check
from cascade_model.teacher_targets import (
    TARGETS,
    TargetRows,
    TargetsManifest,
    entries_of,
    publish_targets,
    read_targets,
    rows_per_batch,
    target_name,
    target_schema,
    write_targets,
)
from pipelines.cluster import quiet_ray_data
from pipelines.differences import differences

if TYPE_CHECKING:
    from cascade_model.networks import Network

JOB = "job.json"
SPLIT = "train"


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """What a teacher is asked about a corpus: all that the bytes depend on, and where they go."""

    corpus: str
    teacher: str
    output: str
    k: int
    temperature: float
    precision: Literal["float32", "bfloat16"]
    device: Literal["cpu", "cuda"]
    sequences_per_forward: int
    banned: tuple[int, ...] = ()
    """Ids that the teacher could emit and the corpus's students cannot."""


class ShardTeacher:
    """Holds the teacher once and answers shards; the actor class of the Ray Data plan."""

    def __init__(self, asking: Asking, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._asking = asking
        self._refusal: InputError | None = None
        try:
            self._corpus = Corpus.open(asking.corpus, SPLIT)
            self._teacher = _loaded(asking)
        except InputError as error:
            # Raised by the first call: a constructor's error reaches nobody as it was.
            self._refusal = error
        self._folder = Folder(asking.output)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Ray Data's face: a batch of shard numbers, their refusals as JSON or empty.

        A user's mistake travels as data, since an error would arrive wrapped in Ray's words.
        """
        try:
            for index in batch["shard"]:
                self.answer(int(index))
        except InputError as error:
            return {**batch, "refusal": [json.dumps(error.to_data())] * len(batch["shard"])}
        return {**batch, "refusal": [""] * len(batch["shard"])}

    def answer(self, index: int) -> Record:
        """Commit the targets of one shard of the corpus."""
        if self._refusal is not None:
            raise self._refusal
        if not self._folder.exists(JOB):
            raise InputError(f"{self._folder.url} has no {JOB}; the job ended while this shard ran")
        corpus = self._corpus
        shard = corpus.manifest.splits[SPLIT].shards[index]
        schema = target_schema(corpus.sequence_length, self._asking.k)
        first, last = shard.first_sequence, shard.first_sequence + shard.rows
        size = rows_per_batch(corpus.sequence_length, self._asking.k)
        ids = np.arange(first, last, dtype=np.uint64)
        batches = (
            (ids[i : i + size], self._rows(ids[i : i + size])) for i in range(0, len(ids), size)
        )
        return write_targets(self._folder, shard, schema, batches)

    def _rows(self, ids: np.ndarray) -> TargetRows:
        """The targets of one record batch, in forward passes of so many sequences."""
        from cascade_model.batch import TrainBatch
        from cascade_model.stored_teaching import teach

        size, parts = self._asking.sequences_per_forward, []
        for start in range(0, len(ids), size):
            some = ids[start : start + size]
            ranks = np.zeros(len(some), dtype=np.uint64)  # the masks are not looked at
            clean = self._corpus.masked(some, ranks, self._corpus.recipe, 0)
            batch = TrainBatch.from_numpy(clean, self._asking.device)
            asked = self._asking.k, self._asking.temperature, self._asking.banned
            parts.append(teach(self._teacher, batch, *asked))
        names = ("ids", "log_probs", "rest")
        return TargetRows(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))


def _loaded(asking: Asking) -> "Network":
    """The frozen teacher."""
    import torch

    from cascade_model.weights import load_model

    teacher = load_model(asking.teacher, getattr(torch, asking.precision))[0]
    return teacher.to(asking.device).eval().requires_grad_(False)


def claim(
    folder: Folder, manifest: TargetsManifest, named: Mapping[str, str]
) -> TargetsManifest | None:
    """Bind the output folder to this job; the manifest if it is finished already.

    `InputError` names the settings in which an earlier job in this folder differs (`differences`,
    which reads `named`).
    """
    job = _identity(manifest)
    if folder.exists(JOB):
        told = differences(json.loads(folder.read_bytes(JOB)), job, named)
        check(
            not told,
            f"output={folder.url} holds other targets: {'; '.join(told)}; give another output "
            "folder",
        )
        return read_targets(folder.url) if folder.exists(TARGETS) else None
    names = folder.list()
    if names:
        raise InputError(
            f"output={folder.url} holds {names[0]!r} and no targets; give another folder"
        )
    folder.publish(JOB, json.dumps(job, sort_keys=True, indent=1).encode())
    return None


def _identity(manifest: TargetsManifest) -> dict[str, Any]:
    """What the bytes depend on, as it is read back from JSON."""
    values = json.loads(manifest.to_json())
    return {name: value for name, value in values.items() if name not in ("digest", "shards")}


def missing_shards(folder: Folder, corpus: Corpus) -> list[int]:
    """The numbers of the shards that have no targets yet."""
    shards = corpus.manifest.splits[SPLIT].shards
    return [i for i, shard in enumerate(shards) if folder.record(target_name(shard.name)) is None]


def finish(folder: Folder, corpus: Corpus, manifest: TargetsManifest) -> TargetsManifest:
    """Write the manifest over all units, which are all there."""
    shards = corpus.manifest.splits[SPLIT].shards
    records = [folder.record(target_name(shard.name)) for shard in shards]
    whole = [record for record in records if record is not None]
    if len(whole) != len(shards):
        raise RuntimeError(f"{len(shards) - len(whole)} of {len(shards)} shards have no targets")
    finished = dataclasses.replace(manifest, shards=entries_of(whole))
    publish_targets(folder, finished)
    return finished


def run_here(asking: Asking, missing: list[int], threads: int, done: Callable[[], None]) -> None:
    """All shards one after the other, in this process."""
    teacher = ShardTeacher(asking, threads)
    for index in missing:
        teacher.answer(index)
        done()


def run_on_ray(
    asking: Asking, missing: list[int], threads: int, num_workers: int, done: Callable[[], None]
) -> None:
    """The Ray Data plan: shards -> pool of teacher-holding actors, each committing what it made."""
    for _ in _answers(asking, missing, threads, num_workers):
        done()


def _answers(
    asking: Asking, missing: list[int], threads: int, num_workers: int
) -> Iterator[dict[str, Any]]:
    quiet_ray_data()
    import ray.data

    rows = [{"shard": index} for index in missing]
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        ShardTeacher,
        fn_constructor_kwargs={"asking": asking, "threads": threads},
        batch_size=1,
        num_cpus=threads,
        num_gpus=1 if asking.device == "cuda" else 0,
        compute=ray.data.ActorPoolStrategy(size=min(num_workers, len(missing))),
    )
    for row in data.iter_rows():
        if row["refusal"]:
            raise InputError.from_data(json.loads(row["refusal"]))
        yield row
