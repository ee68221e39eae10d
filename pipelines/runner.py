"""Run many small tasks, in this process or as Ray Data tasks, with the same results.

A task's order and result travel as JSON. A user's mistake comes back as a sentence, not as an
exception, so that Ray neither retries it nor wraps it in a traceback.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, cast

from cascade_model.errors import InputError, of_store
from pipelines.cluster import quiet_ray_data, start_ray

Step = Callable[[dict[str, Any]], dict[str, Any]]


def run_tasks(
    step: Step,
    orders: Sequence[dict[str, Any]],
    *,
    runner: Literal["ray", "local"],
    num_workers: int,
    on_result: Callable[[dict[str, Any]], None] = lambda result: None,
) -> list[dict[str, Any]]:
    """The results in the order of `orders`; raises the first task's `InputError` as it was.

    `on_result` is called with each result as soon as it is there, in any order.
    """
    lines = [json.dumps(order) for order in orders]
    if not lines:
        return []
    run = _on_ray(step, lines, num_workers) if runner == "ray" else _here(step, lines)
    results: dict[int, dict[str, Any]] = {}
    for index, line in run:
        result = json.loads(line)
        if "error" in result:
            raise InputError.from_data(result["error"])
        results[index] = result
        on_result(result)
    return [results[index] for index in range(len(lines))]


def _attempt(step: Step, line: str) -> str:
    """One task, its user's mistakes turned into a result."""
    try:
        return json.dumps(step(json.loads(line)))
    except InputError as error:
        return json.dumps({"error": error.to_data()})
    except Exception as error:
        told = of_store(error)
        if told is None:
            raise
        return json.dumps({"error": told.to_data()})


def _here(step: Step, lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    for index, line in enumerate(lines):
        yield index, _attempt(step, line)


def _on_ray(step: Step, lines: list[str], num_workers: int) -> Iterator[tuple[int, str]]:
    """One Ray Data task per order: the task is the unit of retry."""
    start_ray(num_workers)
    quiet_ray_data()
    import ray.data

    rows = [{"index": index, "order": line} for index, line in enumerate(lines)]
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        cast(Any, _batch),
        fn_kwargs={"step": step},
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.TaskPoolStrategy(size=min(num_workers, len(rows))),
    )
    for row in done.iter_rows():
        yield int(row["index"]), str(row["result"])


def _batch(batch: dict[str, Any], step: Step) -> dict[str, Any]:
    """What a Ray task does: its worker is one of many, so the tokenizer keeps to one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    results = [_attempt(step, str(line)) for line in batch["order"]]
    return {"index": batch["index"], "result": results}
