"""The ranks of a training run: their process group and the few collectives that are needed.

Everything works for one process without a group, so the trainer has a single path.
"""

import atexit
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cascade_model.errors import InputError, of_store, shared

Result = TypeVar("Result")


def join_group(device: torch.device, timeout: float | None = None) -> None:
    """Join the process group that `torchrun` announces, and leave it when the process ends.

    `timeout`: seconds that a rank waits for the others before it fails; none: torch's own. A no-op
    alone or where a group exists, which then is its maker's to end.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        patience = None if timeout is None else timedelta(seconds=timeout)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
        atexit.register(_leave_group)


def _leave_group() -> None:
    """End the group's threads while Python is whole; ended with it, they may abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def on_first_rank(work: Callable[[], Result]) -> Result:
    """Do something on the first rank alone; its result on every rank, which all must call.

    If it fails, all fail: an `InputError` is the same on each, so none waits for one that stopped.
    A store that does not answer is one of those (`Unfinished`).
    """
    if world_size() == 1:
        return _told_in_a_sentence(work)
    told: list[Any] = [None, None, None]
    failure: Exception | None = None
    if rank() == 0:
        try:
            told[0] = _told_in_a_sentence(work)
        except InputError as error:
            failure, told[1] = shared(error), error.to_data()
        except Exception as error:
            failure, told[2] = error, f"the first rank failed: {type(error).__name__}: {error}"
    dist.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[1] is not None:
        raise shared(InputError.from_data(told[1]))
    if told[2] is not None:
        raise RuntimeError(told[2])
    return told[0]


def _told_in_a_sentence(work: Callable[[], Result]) -> Result:
    """What `work` returns; what a store's client raises in it becomes an `InputError`."""
    try:
        return work()
    except Exception as error:
        known = of_store(error)
        if known is None:
            raise
        raise known from error


def only_first_rank(work: Callable[[], Result]) -> Result:
    """`on_first_rank` for what cannot travel, such as an open file: the other ranks get None."""
    mine: list[Any] = [None]

    def keep() -> None:
        mine[0] = work()

    on_first_rank(keep)
    return mine[0]


def all_at_work(work: Callable[[], Result], group: dist.ProcessGroup, beat: float) -> Result:
    """Do something on every rank and go on when it is done on all, or raise this rank's error.

    All meet every `beat` seconds meanwhile, so the group's timeout bounds for how long a rank may
    stand still, and not for how long it may work. The error of a rank that is lost comes when this
    one's own work has ended.
    """
    with ThreadPoolExecutor(1) as pool:
        done, are_busy = pool.submit(work), True
        while are_busy:
            wait([done], timeout=beat)
            busy = torch.tensor(float(not done.done()))
            dist.all_reduce(busy, group=group)
            are_busy = bool(busy)
    return done.result()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of a small tensor over all ranks, the same bits on each."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def sum_named(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """The sums over all ranks of scalars of one type, the same bits on each, in one exchange."""
    totals = sum_over_ranks(torch.stack(list(values.values())))
    return dict(zip(values, totals.tolist(), strict=True))


def first_of(value: Result | None) -> Result | None:
    """The value of the lowest rank that has one, on every rank; each rank must call it."""
    if world_size() == 1:
        return value
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return next((each for each in found if each is not None), None)
