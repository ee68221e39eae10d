"""The same two jobs on a cluster of two nodes (two raylets on this host), one rank on each."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A private folder with a short path (Unix sockets allow 107 bytes)."""
    made = Path(tempfile.mkdtemp(prefix="cascade-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


def test_prepare_and_pretrain_spread_over_two_nodes(folder, documents_jsonl):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
    }
    script = Path(__file__).with_name("two_nodes.py")
    done = subprocess.run(
        [sys.executable, str(script), str(documents_jsonl), str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=360,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert len(report["nodes"]) == 2
    assert sorted(report["ranks"]) == sorted(report["nodes"]), "one rank on each node"

    manifest = json.loads((folder / "corpus" / "manifest.json").read_text(encoding="utf-8"))
    assert len(manifest["splits"]["train"]["shards"]) >= 4
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [record["loss"] for line in lines if "loss" in (record := json.loads(line))]
    assert len(losses) == 40
    assert mean(losses[-10:]) < mean(losses[:10])
    assert (folder / "run" / "checkpoints" / "step_00000040" / "COMMIT").is_file()
