"""Training on a cluster that grows and shrinks: the ranks save first, and no step is lost."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest

from cascade_model.commit import Folder
from cascade_model.metrics import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A private folder with a short path (Unix sockets allow 107 bytes)."""
    made = Path(tempfile.mkdtemp(prefix="cascade-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


def test_ranks_follow_the_cluster_and_lose_no_step(folder, tiny_corpus):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "HOME": str(folder), "PYTHONPATH": str(ROOT)}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    script = Path(__file__).with_name("changing_nodes.py")
    done = subprocess.run(
        [sys.executable, str(script), tiny_corpus, str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["code"] == 75, said[-6000:]
    ranks = [count for count, _ in groupby(report["ranks"].values())]
    assert ranks == [1, 2, 1], said[-6000:]
    assert "is being taken away" in said
    assert "(SIGTERM); run the same command again" in " ".join(said.replace("│", "").split())
    assert "the ranks were started again" not in said  # which tells of lost steps
    steps = [line["step"] for line in read_metrics(Folder(folder / "run"))]
    assert steps == list(range(1, steps[-1] + 1))
