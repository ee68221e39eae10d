"""The ranks of a training run: process group, sharding and the few collectives that are needed.

Everything works for one process without a group, so the trainer has a single path.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cascade_model.errors import InputError

Result = TypeVar("Result")


def join_group(device: torch.device) -> None:
    """Join the process group that `torchrun` announces; a no-op alone or where one exists."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


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
    """
    if world_size() == 1:
        return work()
    told: list[Any] = [None, None, None]
    failure: Exception | None = None
    if rank() == 0:
        try:
            told[0] = work()
        except InputError as error:
            failure, told[1] = error, error.to_data()
        except Exception as error:
            failure, told[2] = error, f"the first rank failed: {type(error).__name__}: {error}"
    dist.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[1] is not None:
        raise InputError.from_data(told[1])
    if told[2] is not None:
        raise RuntimeError(told[2])
    return told[0]


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of a small tensor over all ranks, the same bits on each."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def shard(model: nn.Module, layers: Iterable[nn.Module], device: torch.device) -> None:
    """FSDP2: each layer is a unit, the rest (embedding, last norm, head) is the root's.

    With one rank the model stays as it is. Every rank must hold equal weights beforehand.
    """
    if world_size() == 1:
        return
    mesh = init_device_mesh(device.type, (world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def full_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights, whole and on the CPU, on every rank; each rank must call it."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
        for name, value in model.state_dict().items()
    }


def gradient_norm(model: nn.Module) -> torch.Tensor:
    """The 2-norm of all gradients of all ranks, float32 scalar; the same bits on each rank."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, norm_type=2.0)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def scale_gradients(model: nn.Module, factor: float) -> None:
    """Multiply every gradient in place."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
