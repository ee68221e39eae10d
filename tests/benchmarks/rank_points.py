"""Points in a rank of `cascade pretrain` where it can be stopped, to be killed there or damaged.

A rank that comes to a point leaves a file for it in the folder of events; the one that was chosen
says so with its process id and waits (`fault_points.pass_point`). The sequence ids of every batch
that the loss is given are logged as well.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from cascade_model import checkpoint_commit, local_files, loss, parallel
from cascade_model.batch import TrainBatch
from cascade_model.checkpoint import Saving
from cascade_model.checkpoint_files import COMMIT, MANIFEST, step_name
from cascade_model.commit import Folder
from cascade_model.hashing import HashingWriter
from cascade_model.metrics import MetricsLog
from cascade_model.objective import LossParts
from cascade_model.staging import HostCopy
from tests.benchmarks.fault_points import pass_point

IN_STEP = ("forward", "backward", "collective", "optimiser")
AFTER_DATA = ("manifest written", "COMMIT written")
"""All data are there and COMMIT is not."""
IN_SAVE = ("staging", "data half written", "data written", *AFTER_DATA, "COMMIT named")
IN_SAVE += ("retention half done",)
IN_METRICS = ("metrics begun", "metrics written")
PHASES = IN_STEP + IN_SAVE + IN_METRICS
OF_FIRST_RANK = (*AFTER_DATA, "COMMIT named", "retention half done", *IN_METRICS)
"""No other rank comes there."""
NOWHERE = ("none", 0)


def name_of(phase: str, rank: int) -> str:
    """A phase of one rank, as it stands in the events."""
    return f"{phase} of rank {rank}"


def counts_of(events: Path, ranks: int) -> dict[tuple[str, int], int]:
    """How often each rank of a run passed each phase."""
    names = [path.name.rpartition(" ")[0] for path in events.iterdir()]
    pairs = [(phase, rank) for phase in PHASES for rank in range(ranks)]
    return {pair: names.count(name_of(*pair)) for pair in pairs}


def ids_of(events: Path, ranks: int) -> list[list[list[int]]]:
    """Sequence ids of each batch that each rank consumed, in order."""
    logs = [events / f"ids-{rank}.jsonl" for rank in range(ranks)]
    return [
        [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        for log in logs
    ]


def install(events: Path, target: tuple[str, int], rank: int) -> Callable[[str], None]:
    """Put the points into this process, once; returns the one function that all of them call."""

    def point(phase: str) -> None:
        pass_point(events, target, name_of(phase, rank))

    _in_the_step(point, events / f"ids-{rank}.jsonl")
    _in_a_save(point)
    _in_the_metrics(point)
    return point


def _in_the_step(point: Callable[[str], None], log: Path) -> None:
    diffusion_loss, sum_over_ranks = loss.diffusion_loss, parallel.sum_over_ranks

    def loss_with_stops(model: Any, batch: TrainBatch, **settings: Any) -> LossParts:
        point("forward")
        with log.open("a") as file:
            file.write(f"{batch.sequence_ids.tolist()}\n")
        parts = diffusion_loss(model, batch, **settings)
        parts.sum.register_hook(lambda gradient: point("backward"))
        return parts

    def sum_after_a_stop(values: torch.Tensor) -> torch.Tensor:
        point("collective")
        return sum_over_ranks(values)

    loss.diffusion_loss = loss_with_stops
    parallel.sum_over_ranks = sum_after_a_stop
    register_optimizer_step_pre_hook(lambda *rest: point("optimiser"))


class _Halfway:
    """A file that stops behind its second piece: the header is there, and some of the data."""

    def __init__(self, file: BinaryIO, point: Callable[[str], None]) -> None:
        self._file, self._point, self._pieces = file, point, 0

    def write(self, data: Any) -> int:
        """Write, and stop once."""
        size, self._pieces = self._file.write(data), self._pieces + 1
        if self._pieces == 2:
            self._point("data half written")
        return size


def _in_a_save(point: Callable[[str], None]) -> None:
    stage, put, discard = HostCopy.stage, Folder.put, checkpoint_commit.discard
    link_new, create = local_files.link_new, Folder.create

    def stage_after_a_stop(self: HostCopy, state_dict: dict[str, Any]) -> dict[str, Any]:
        point("staging")
        return stage(self, state_dict)

    def put_with_stops(self: Folder, name: str, write: Callable[[BinaryIO], Any]) -> HashingWriter:
        if name == MANIFEST:
            written = put(self, name, write)
            point("manifest written")
            return written
        written = put(self, name, lambda file: write(_Halfway(file, point)))  # type: ignore[arg-type]
        point("data written")
        return written

    def link_with_stops(finished: Path, target: Path) -> None:
        if target.name == COMMIT:
            point("COMMIT written")
        link_new(finished, target)
        if target.name == COMMIT:
            point("COMMIT named")

    def create_with_stops(self: Folder, name: str, data: bytes) -> bytes:
        """In a store, which has no drafts."""
        if self.is_local or name != COMMIT:
            return create(self, name, data)
        point("COMMIT written")
        found = create(self, name, data)
        point("COMMIT named")
        return found

    def discard_with_a_stop(folder: Folder, step: int) -> None:
        (folder / step_name(step)).remove(COMMIT)
        point("retention half done")
        discard(folder, step)

    HostCopy.stage = stage_after_a_stop  # type: ignore[method-assign]
    Folder.put = put_with_stops  # type: ignore[method-assign]
    Folder.create = create_with_stops  # type: ignore[method-assign]
    local_files.link_new = link_with_stops
    checkpoint_commit.discard = discard_with_a_stop


def _in_the_metrics(point: Callable[[str], None]) -> None:
    write = MetricsLog.write

    def write_with_stops(self: MetricsLog, *rest: Any, **named: Any) -> None:
        point("metrics begun")
        write(self, *rest, **named)
        point("metrics written")

    MetricsLog.write = write_with_stops  # type: ignore[method-assign]


def spoil_a_loss(forward: int) -> None:
    """Let the loss of this rank's `forward`-th forward pass be NaN."""
    inner, passes = loss.diffusion_loss, iter(range(1, 1 << 30))

    def spoilt(model: Any, batch: TrainBatch, **settings: Any) -> LossParts:
        parts = inner(model, batch, **settings)
        factor = float("nan") if next(passes) == forward else 1.0
        return LossParts(**{**_fields(parts), "sum": parts.sum * factor})

    loss.diffusion_loss = spoilt


def spoil_a_gradient(step: int) -> None:
    """The control: a NaN that comes behind every check, at this rank's `step`-th update."""
    updates = iter(range(1, 1 << 30))

    def spoil(optimizer: torch.optim.Optimizer, *rest: Any) -> None:
        if next(updates) == step:
            optimizer.param_groups[0]["params"][0].grad.fill_(float("nan"))

    register_optimizer_step_pre_hook(spoil)


def let_saves_raise() -> None:
    """The control: a failed save ends the run, as it would without the agreement of the ranks."""

    def wait(self: Saving) -> bool:
        self._ended.wait()
        if self.reason is not None:
            raise RuntimeError(self.reason)
        return True

    Saving.wait = wait  # type: ignore[method-assign]


def _fields(parts: LossParts) -> dict[str, Any]:
    return {name: getattr(parts, name) for name in parts.__dataclass_fields__}


def fill_disk(first: int, last: int, filler: Path | None) -> None:
    """Leave no room on the disk from one forward pass to another.

    With `filler` a file takes what is left; without, this process may write no large file.
    """
    import resource

    inner, passes = loss.diffusion_loss, iter(range(1, 1 << 30))
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def limited(model: Any, batch: TrainBatch, **settings: Any) -> LossParts:
        number = next(passes)
        if number == first:
            _fill(filler) if filler else resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        if number == last:
            filler.unlink() if filler else resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        return inner(model, batch, **settings)

    loss.diffusion_loss = limited


def _fill(target: Path) -> None:
    """Write until the disk is full."""
    handle = os.open(target, os.O_WRONLY | os.O_CREAT)
    try:
        for size in (1 << 16, 1 << 10, 1):
            _write_all(handle, bytes(size))
    finally:
        os.close(handle)


def _write_all(handle: int, piece: bytes) -> None:
    while True:
        try:
            os.write(handle, piece)
        except OSError:
            return
