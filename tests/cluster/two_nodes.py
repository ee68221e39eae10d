"""Run by `test_two_nodes.py` as a process of its own: prepare -> pretrain on two Ray nodes.

usage: python two_nodes.py DOCUMENTS.jsonl FOLDER
Writes FOLDER/report.json: the nodes, and the node of each rank.
"""

import json
import os
import sys
from pathlib import Path

from pipelines.cluster import settle_authentication

settle_authentication(os.environ)  # before any import of ray: one fresh token for both nodes


def main(documents: str, folder: Path) -> int:
    """Start head and worker with one CPU each, so that two ranks cannot share a node."""
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
    try:
        cluster.add_node(num_cpus=1, object_store_memory=200 << 20)
        cluster.wait_for_nodes()
        os.environ["RAY_ADDRESS"] = str(cluster.address)
        return run_jobs(documents, folder)
    finally:
        import ray

        ray.shutdown()
        cluster.shutdown()


def run_jobs(documents: str, folder: Path) -> int:
    """Both stages as a user would call them, then the report."""
    import ray

    from jobs import prepare, pretrain

    corpus, run = str(folder / "corpus"), str(folder / "run")
    argv = ["--output", corpus, "--source.paths", documents, "--tokenizer", "bytes"]
    argv += ["--sequence-length", "64", "--noise.block-size", "4", "--part-bytes", "100000"]
    argv += ["--held-out-rate", "0.1", "--runner", "ray"]
    code = prepare.main(argv)
    if code:
        return code
    argv = ["--corpus", corpus, "--output", run, "--num-workers", "2"]
    argv += ["--model.hidden-size", "64", "--model.num-layers", "1", "--model.num-heads", "2"]
    argv += ["--model.num-kv-heads", "2", "--model.head-dim", "32"]
    argv += ["--model.intermediate-size", "128", "--trainer.num-steps", "40"]
    argv += ["--trainer.sequences-per-step", "8", "--trainer.sequences-per-forward", "4"]
    argv += ["--trainer.checkpoint-every", "20", "--trainer.log-every", "1"]
    code = pretrain.main(argv)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    report = {"nodes": nodes, "ranks": ranks_by_node()}
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return code


def ranks_by_node() -> list[str]:
    """Node of each Ray Train rank, from the control store's own table of actors."""
    from ray._private.state import actors

    table = actors().values()
    return [a["Address"]["NodeID"] for a in table if "RayTrainWorker" in a["ActorClassName"]]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], Path(sys.argv[2])))
