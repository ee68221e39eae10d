"""Prompts -> completions: a plan of small parts, each answered and committed by one worker.

A part is a run of rows of one input file, and the unit of retry: its output is a pure function of
(weights, settings, rows), committed under a fixed name, so a part that is done twice gives the same
bytes and a part that is done is never done again: who is asked for it tells its record, since what
an endpoint answers need not be the same twice. A worker has several parts at hand, so that while
the last rows of one are finished the next fills the free places. A row that cannot be answered goes
to a dead-letter shard with its reason: rows in = rows out + dead rows.
"""

import asyncio
import dataclasses
import json
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cascade_model.commit import Folder
from cascade_model.errors import InputError, Unfinished
from pipelines.answers import Answerer, Source
from pipelines.cluster import quiet_ray_data
from pipelines.completions import (
    Format,
    PartRecord,
    commit_part,
    completion_row,
    read_record,
)
from pipelines.prompt_rows import Columns, DeadRow, read_part
from pipelines.prompts import Part
from pipelines.row_settings import Decoding

MAX_TASK_RETRIES = 3
"""So many actors more may die over a part: it is then likelier to kill them than to be unlucky."""
MAX_RESTARTS = 8
"""So often an actor begins anew: more than the retries, so that a part is what ends the job. At any
number but 0 Ray warns that Ray Data's arguments of an actor lie in the object store; the plan holds
them as long as it runs, so a new actor finds them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a worker needs to know besides its parts."""

    source: Source
    output: str
    columns: Columns
    common: Decoding
    """The settings of rows that have none of their own; each seed comes from the row's number."""
    format: Format
    rows_per_part: int

    @property
    def parts_at_once(self) -> int:
        """Parts at hand: one that ends, and beside it as many rows as there are places."""
        return 1 + -(-self.source.rows_at_once // self.rows_per_part)


class PartWorker:
    """Answers parts; the actor class of the Ray Data plan."""

    def __init__(self, work: Work) -> None:
        self._work, self._folder = work, Folder(work.output)
        self._refusal: InputError | None = None
        self._answerer: Answerer | None = None
        try:
            self._answerer = work.source.open()
            weakref.finalize(self, self._answerer.close)
        except InputError as error:
            # Raised by the first call: a constructor's error reaches nobody as it was.
            self._refusal = error
        self._ready = time.monotonic()

    async def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Ray Data's face: a batch of parts to their records, both as JSON.

        A user's mistake travels as data, since an error would arrive wrapped in Ray's words.
        """
        count = len(batch["part"])
        try:
            parts = [Part(**json.loads(text)) for text in batch["part"]]
            records = [await asyncio.to_thread(self.answer, part) for part in parts]
        except InputError as error:
            refusals = [json.dumps(error.to_data())] * count
            return {"record": [""] * count, "refusal": refusals, "seconds": [0.0] * count}
        written = [json.dumps(dataclasses.asdict(record)) for record in records]
        seconds = [time.monotonic() - self._ready] * count
        return {"record": written, "refusal": [""] * count, "seconds": seconds}

    def answer(self, part: Part) -> PartRecord:
        """Answer a part and commit it, or tell the record of one that is committed already."""
        work = self._work
        earlier = read_record(self._folder, part, work.format)
        if earlier is not None:  # by an actor that died before it could tell, or by another run
            return earlier
        if self._answerer is None:
            raise self._refusal or InputError("the worker has no answerer")
        items = list(read_part(part, work.columns, work.common))
        prompts = [item for item in items if not isinstance(item, DeadRow)]
        answers = dict(zip((p.row for p in prompts), self._answerer.answer(prompts), strict=True))
        done: list[dict[str, Any]] = []
        dead: list[DeadRow] = []
        for item in items:
            result = item if isinstance(item, DeadRow) else answers[item.row]
            if isinstance(item, DeadRow) or isinstance(result, DeadRow):
                dead.append(result)  # type: ignore[arg-type]
            else:
                done.append(completion_row(item, result))
        return commit_part(self._folder, part, work.format, done, dead)


def run_on_ray(
    parts: Sequence[Part], work: Work, num_workers: int
) -> Iterator[tuple[PartRecord, float]]:
    """The Ray Data plan: parts -> pool of workers -> records, as they come, each with the seconds
    since its worker was ready.

    `Unfinished` where workers die over and over, with the first rows that nobody answered.
    """
    quiet_ray_data()
    import ray.data
    from ray.exceptions import OutOfMemoryError, RayActorError
    from ray.util.annotations import RayDeprecationWarning

    rows = [{"part": json.dumps(dataclasses.asdict(part))} for part in parts]
    size, at_once = min(num_workers, len(parts)), work.parts_at_once
    left = {part.index: part for part in parts}
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    with warnings.catch_warnings():
        # Ray warns of free arguments, and has no others for the last two.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        data = data.map_batches(
            PartWorker,
            fn_constructor_kwargs={"work": work},
            batch_size=1,
            num_cpus=work.source.num_cpus,
            num_gpus=work.source.num_gpus,
            compute=ray.data.ActorPoolStrategy(
                size=size,
                max_tasks_in_flight_per_actor=at_once,
                max_concurrent_calls_per_actor=at_once,
            ),
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_TASK_RETRIES,
        )
    try:
        for row in data.iter_rows():
            if row["refusal"]:
                raise InputError.from_data(json.loads(row["refusal"]))
            record = PartRecord(**json.loads(row["record"]))
            del left[record.index]
            yield record, row["seconds"]
    except (RayActorError, OutOfMemoryError):
        pass  # what is left tells
    # Workers may have died after they committed a part and before they could tell.
    folder = Folder(work.output)
    for part in sorted(left.values(), key=lambda part: part.index):
        record = read_record(folder, part, work.format)
        if record is None:
            raise Unfinished(
                f"workers died over and over; the first rows without an answer are "
                f"{part.first_row} to {part.first_row + part.num_rows - 1}, in {part.url}: mend "
                "those or give a worker more memory, then run the same command again, which goes "
                "on from here"
            )
        yield record, 0.0
