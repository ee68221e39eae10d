"""The ranks of a training run: their process group and the few collectives that are needed.

Everything works for one process without a group, so the trainer has a single path.
"""

import atexit
import contextlib
import gc
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cascade_model.errors import InputError, of_store, shared

Result = TypeVar("Result")
BEAT = 0.5
"""Seconds between two signs of life of a rank that the others wait for."""
_BUSY = "busy"


def join_group(device: torch.device, timeout: float | None = None) -> None:
    """Join the process group that `torchrun` announces, and leave it when the process ends.

    `timeout`: seconds that a rank waits for the others before it fails; none: torch's own. A no-op
    alone or where a group exists, which then is its maker's to end.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        # Imported later, the defaults of its functions would hold the group beyond its end.
        importlib.import_module("torch.distributed.nn.functional")
        patience = None if timeout is None else timedelta(seconds=timeout)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
        atexit.register(_leave_group)


def _leave_group() -> None:
    """End the group's threads while Python is whole; ended with it, they may abort the process.

    They end with the last object that holds the group: meshes of a sharded model are garbage.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


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

    It may take any time: the others hear every `BEAT` seconds that the first rank lives, so a
    group's timeout bounds its silence and not its work. If it fails, all fail: an `InputError` is
    the same on each, so none waits for one that stopped. A store that does not answer is one of
    those (`Unfinished`).
    """
    if world_size() == 1:
        return _told_in_a_sentence(work)
    if rank() == 0:
        with _signs_of_life():
            kind, told, failure = _outcome(work)
        _from_first((kind, told))
        if failure is not None:
            raise failure
        return told
    kind, told = _from_first(None)
    while kind == _BUSY:
        kind, told = _from_first(None)
    if kind == "mistake":
        raise shared(InputError.from_data(told))
    if kind == "fault":
        raise RuntimeError(told)
    return told


def _outcome(work: Callable[[], Any]) -> tuple[str, Any, Exception | None]:
    """What is told to the other ranks, and what is raised on this one."""
    try:
        return "result", _told_in_a_sentence(work), None
    except InputError as error:
        return "mistake", error.to_data(), shared(error)
    except Exception as error:
        return "fault", f"the first rank failed: {type(error).__name__}: {error}", error


@contextlib.contextmanager
def _signs_of_life() -> Iterator[None]:
    """While the body runs, this rank, the first, tells the others that it is at work.

    The body stays in its thread, where signals interrupt it; the signs come from another. One that
    cannot be sent is the last: a rank is lost then, which the next exchange says.
    """
    ended = threading.Event()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def tell() -> None:
        if device is not None:
            torch.cuda.set_device(device)  # each thread has a device of its own
        with contextlib.suppress(Exception):
            while not ended.wait(BEAT):
                _from_first((_BUSY, None))

    thread = threading.Thread(target=tell, name="signs of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _from_first(told: tuple[str, Any] | None) -> tuple[str, Any]:
    """The first rank's message, on every rank."""
    carried: list[Any] = [told]
    dist.broadcast_object_list(carried, src=0)
    return carried[0]


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
