"""Starts ranks of `cascade pretrain` as `torchrun` does, from one process that has torch at hand.

    python -m tests.benchmarks.rank_launcher      a line of JSON for each order and each answer

Imports take most of a short run's time, so this process imports once and forks each rank, before
any thread of its own. A rank is a real process with its own process group of torch, and dies a real
death. Nothing is restarted here: whoever gives the orders does that.

    {"words": [flags], "ranks": 2, "events": DIR, "target": ["forward of rank 0", 3], ...}
    -> {"started": [pids]}      then, when each ends: {"ended": pid, "code": exit code or -signal}
"""

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from tests.benchmarks import naive_saves, rank_points

POLL = 0.02
_WHAT_A_RANK_IMPORTS = (
    "jobs.pretrain",
    "jobs.training",
    "cascade_model.trainer",
    "cascade_model.families",
    "cascade_model.loss_curve",
    "torch.utils.tensorboard",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "s3fs",
)


def main() -> int:
    """Serve until the orders end; ranks that are left are killed."""
    for name in _WHAT_A_RANK_IMPORTS:
        importlib.import_module(name)

    if threading.active_count() > 1:
        raise RuntimeError("a thread was started before the first fork")
    answers, living = os.fdopen(os.dup(1), "w", buffering=1), set()
    try:
        while True:
            for pid, code in list(_ended(living)):
                living.discard(pid)
                answers.write(json.dumps({"ended": pid, "code": code}) + "\n")
            if not select.select([sys.stdin], [], [], POLL)[0]:
                continue
            line = sys.stdin.readline()
            if not line:
                return 0
            pids = _start(json.loads(line))
            living.update(pids)
            answers.write(json.dumps({"started": pids}) + "\n")
    finally:
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _ended(living: set[int]) -> Any:
    for pid in living:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            yield pid, os.waitstatus_to_exitcode(status)


def _start(order: dict[str, Any]) -> list[int]:
    """Fork the ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(order["ranks"]):
        pid = os.fork()
        if not pid:
            os._exit(_live(order, rank, port))
        pids.append(pid)
    return pids


def _live(order: dict[str, Any], rank: int, port: int) -> int:
    """The whole life of a rank; its exit code."""
    events = Path(order["events"])
    log = os.open(events / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= order.get("environment", {})
    if order["ranks"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(order["ranks"])}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        return _train(order, rank, events)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _train(order: dict[str, Any], rank: int, events: Path) -> int:
    import torch.distributed as dist

    from jobs import pretrain

    point = rank_points.install(events, tuple(order["target"]), rank)
    if order.get("is_naive"):
        naive_saves.install(point)
    for fault, settings in order.get("faults", {}).items():
        if settings.get("rank", rank) == rank:
            _FAULTS[fault](settings)
    try:
        code = pretrain.main(order["words"])
    except SystemExit as end:  # so ranks leave that end for a reason which all of them share
        code = int(end.code or 0)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


def _disk(settings: dict[str, Any]) -> None:
    filler = settings["filler"]
    rank_points.fill_disk(settings["first"], settings["last"], Path(filler) if filler else None)


_FAULTS = {
    "loss": lambda settings: rank_points.spoil_a_loss(settings["forward"]),
    "gradient": lambda settings: rank_points.spoil_a_gradient(settings["step"]),
    "disk": _disk,
    "raising": lambda settings: rank_points.let_saves_raise(),
}

if __name__ == "__main__":
    raise SystemExit(main())
