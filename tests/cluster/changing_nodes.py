"""Run by `test_changing_nodes.py` as a process of its own: training while nodes come and go.

usage: python changing_nodes.py CORPUS FOLDER
Starts on one node, adds a second one, announces that it will be taken away, and ends the command
with SIGTERM. Writes FOLDER/report.json: the exit code, and the number of ranks by step.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.cluster import settle_authentication

settle_authentication(os.environ)  # before any import of ray: one fresh token for both nodes

PATIENCE = 150.0
DRAIN_SECONDS = 120


def main(corpus: str, folder: Path) -> int:
    """Train in a process of its own while this one changes the cluster."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "include_dashboard": False,
            "temp_dir": str(folder / "ray"),
            "object_store_memory": 200 << 20,
        },
    )
    run = folder / "run"
    argv = ["--corpus", corpus, "--output", str(run), "--num-workers", "2"]
    argv += ["--min-workers", "1", "--resize-after-s", "3", "--model.hidden-size", "16"]
    argv += ["--model.num-layers", "1", "--model.num-heads", "2", "--model.num-kv-heads", "2"]
    argv += ["--model.head-dim", "8", "--trainer.num-steps", "1000000"]
    argv += ["--trainer.sequences-per-step", "4", "--trainer.sequences-per-forward", "2"]
    argv += ["--trainer.checkpoint-every", "25", "--trainer.log-every", "1"]
    argv += ["--trainer.keep-last", "1000"]
    environment = os.environ | {"RAY_ADDRESS": str(cluster.address)}
    process = subprocess.Popen([sys.executable, "-m", "jobs.pretrain", *argv], env=environment)
    try:
        change(cluster, run)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=PATIENCE)
        report = {"code": code, "ranks": ranks_by_step(run)}
        (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
        cluster.shutdown()
    return 0


def change(cluster: Any, run: Path) -> None:
    """One node, then two, then one again."""
    wait(lambda: ranks_by_step(run).values(), {1})
    node = cluster.add_node(num_cpus=1, object_store_memory=200 << 20)
    wait(lambda: ranks_by_step(run).values(), {2})
    before = max(ranks_by_step(run))
    announce(str(cluster.address), node.node_id)
    wait(lambda: [count for step, count in ranks_by_step(run).items() if step > before], {1})


def announce(address: str, node_id: str) -> None:
    """Tell Ray that a node is about to be taken away, as a cloud's notice of preemption does."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int((time.time() + DRAIN_SECONDS) * 1000)
    accepted, why = GcsClient(address=address).drain_node(node_id, reason, "preemption", deadline)
    assert accepted, why


def wait(found: Callable[[], Any], wanted: set[int]) -> None:
    """Until a checkpoint by so many ranks is there."""
    ends = time.monotonic() + PATIENCE
    while not wanted <= set(found()):
        assert time.monotonic() < ends, f"no checkpoint by {wanted} ranks"
        time.sleep(0.3)


def ranks_by_step(run: Path) -> dict[int, int]:
    """The number of ranks that wrote each committed checkpoint."""
    found = {}
    for commit in sorted((run / "checkpoints").glob("step_*/COMMIT")):
        attempt = json.loads(commit.read_text())["attempt"]
        facts = json.loads((commit.parent / attempt / "manifest.json").read_text())["facts"]
        found[facts["step"]] = facts["world_size"]
    return found


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], Path(sys.argv[2])))
