"""Work done by two processes at once, as FSDP2 has it."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

Work = Callable[[int, str], None]
"""Called in each process with its rank and a folder for what it finds; at module level."""


def run_on_two_ranks(work: Work, folder: Path) -> None:
    """Run `work` on two gloo ranks; the error of either is raised."""
    address = f"file://{folder}/rendezvous-{uuid.uuid4().hex}"  # what an end leaves is no beginning
    torch.multiprocessing.spawn(_rank, (work, str(folder), address), nprocs=2)


def _rank(rank: int, work: Work, folder: str, address: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    work(rank, folder)
    dist.barrier()
    os._exit(0)  # Python's own end may abort: gloo's threads drop their last tensors meanwhile
