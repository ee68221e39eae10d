"""`cascade prepare` that stops at a chosen point of its work and waits to be killed there.

    python -m tests.benchmarks.fault_points EVENTS PHASE NUMBER [flags of cascade prepare]

Every process of the job (driver and tasks, here or on Ray) passes the points below and leaves a
file for each in the folder EVENTS. The one that is the NUMBER-th of PHASE says so in `paused`, with
its process id, and waits for the file `go`. NUMBER 0 stops nowhere and only counts.
"""

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cascade_model import commit, local_files
from cascade_model.commit import RECORD_SUFFIX, Folder, HashingWriter, Record
from cascade_model.manifest import MANIFEST

IN_TASK = ("task begun",)
IN_COMMIT = ("data half written", "data written", "data named", "record written")
BEFORE_MANIFEST = ("data complete", "manifest written")
AFTER_MANIFEST = ("manifest named",)
PHASES = IN_TASK + IN_COMMIT + ("record named",) + BEFORE_MANIFEST + AFTER_MANIFEST
PAUSED, GO = "paused", "go"
_PATIENCE = 120.0


def pass_point(events: Path, target: tuple[str, int], phase: str) -> None:
    """Leave a mark; stop if this is the point that was chosen."""
    number = 1
    while True:
        try:
            os.close(os.open(events / f"{phase} {number}", os.O_CREAT | os.O_EXCL))
            break
        except FileExistsError:
            number += 1
    if (phase, number) != target:
        return
    commit.replace_file(events / PAUSED, str(os.getpid()).encode())
    deadline = time.monotonic() + _PATIENCE
    while not (events / GO).exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def counts_of(events: Path) -> dict[str, int]:
    """How often a run passed each point."""
    names = [path.name.rpartition(" ")[0] for path in events.iterdir()]
    return {phase: names.count(phase) for phase in PHASES}


def install(events: Path, target: tuple[str, int]) -> None:
    """Put the points into this process's commit protocol, once."""
    if hasattr(commit, "_points"):
        return
    commit._points = True  # type: ignore[attr-defined]
    point = partial(pass_point, events, target)
    write, draft = HashingWriter.write, commit.draft
    commit_unit, publish = Folder.commit, Folder.publish
    units: set[str] = set()

    def kind_of(name: str) -> str | None:
        """What a file is to the protocol; none for what belongs to the job, not to its result."""
        if name.endswith(RECORD_SUFFIX):
            return "record"
        return "manifest" if name == MANIFEST else "data" if name in units else None

    def commit_known(self: Folder, name: str, *rest: Any, **named: Any) -> Record:
        units.add(name)
        return commit_unit(self, name, *rest, **named)

    def write_then_stop(self: HashingWriter, data: Any) -> int:
        is_first = self.bytes == 0
        size = write(self, data)
        if is_first:
            self._file.flush()
            point("data half written")
        return size

    @contextmanager
    def draft_with_stops(target: Path, writes: Callable[..., Any]) -> Iterator[Path]:
        kind = kind_of(target.name)
        with draft(target, writes) as finished:
            if kind:
                point(f"{kind} written")
            yield finished
            if kind:
                point(f"{kind} named")

    def publish_after_a_stop(self: Folder, name: str, data: bytes) -> None:
        if name == MANIFEST:
            point("data complete")
        publish(self, name, data)

    HashingWriter.write = write_then_stop  # type: ignore[method-assign]
    commit.draft = local_files.draft = draft_with_stops  # type: ignore[assignment]
    Folder.commit = commit_known  # type: ignore[method-assign]
    Folder.publish = publish_after_a_stop  # type: ignore[method-assign]


def step_with_points(
    step: Callable[[Any], Any],
    events: Path,
    target: tuple[str, int],
    is_protected: bool,
    order: Any,
) -> Any:
    """A task whose process, wherever it is, has the points too."""
    _prepare_process(events, target, is_protected)
    pass_point(events, target, "task begun")
    return step(order)


def _prepare_process(events: Path, target: tuple[str, int], is_protected: bool) -> None:
    install(events, target)
    if not is_protected:
        unprotect(partial(pass_point, events, target))


def unprotect(point: Callable[[str], None]) -> None:
    """The control: a job that writes in place and believes whatever record it finds."""

    def commit_in_place(
        self: Folder, name: str, write: Any, facts: dict[str, Any] | None = None
    ) -> Record:
        memory = io.BytesIO()
        memory.write(write) if isinstance(write, bytes) else write(memory)
        data = memory.getvalue()
        digest = commit.sha256_of(io.BytesIO(data))
        record = Record(name=name, object=name, bytes=len(data), sha256=digest, facts=facts or {})
        where = Path(self.path(name))
        Path(self.path(name + RECORD_SUFFIX)).write_bytes(record.to_json())
        with where.open("wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            point("data half written")
            file.write(data[len(data) // 2 :])
        return record

    def believe(self: Folder, name: str) -> Record | None:
        try:
            return Record(**json.loads(Path(self.path(name + RECORD_SUFFIX)).read_bytes()))
        except FileNotFoundError:
            return None

    Folder.commit = commit_in_place  # type: ignore[method-assign]
    Folder.record = believe  # type: ignore[method-assign]


def main(words: Sequence[str]) -> int:
    """The job, with its points."""
    from jobs import prepare as entry
    from pipelines import prepare as job

    events, target = Path(words[0]), (words[1], int(words[2]))
    is_protected = not os.environ.get("CASCADE_FAULTS_UNPROTECTED")
    events.mkdir(parents=True, exist_ok=True)
    _prepare_process(events, target, is_protected)
    run_tasks = job.run_tasks

    def run_with_points(step: Any, orders: Any, **settings: Any) -> Any:
        stopping = partial(step_with_points, step, events, target, is_protected)
        return run_tasks(stopping, orders, **settings)

    job.run_tasks = run_with_points
    return entry.main(list(words[3:]))


if __name__ == "__main__":
    from tests.benchmarks import fault_points

    # By its own name, not as __main__, so that a task finds the same functions elsewhere.
    raise SystemExit(fault_points.main(sys.argv[1:]))
