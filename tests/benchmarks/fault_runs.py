"""Runs of a job as processes of their own, and what they leave: for fault tables."""

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from cascade_model.commit import Folder

ROOT = Path(__file__).parents[2]
PREPARE = "tests.benchmarks.fault_points"
"""The module that runs `cascade prepare` with its points."""
_TOLD_ANEW = ("report.json", "report.html")
"""They tell a run's times, so no two runs write the same."""


def environment() -> dict[str, str]:
    """One thread, a Ray of the run's own, and no bucket or cluster of the user's."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token"}
    settings.pop("RAY_ADDRESS", None)
    return settings


def write_texts(target: Path, most_bytes: int) -> None:
    """Real text: modules of the standard library (PSF licence) as JSONL."""
    left = most_bytes
    with target.open("w") as file:
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            text = path.read_text(encoding="utf-8", errors="ignore")
            if left <= 0:
                break
            left -= len(text)
            file.write(json.dumps({"text": text}) + "\n")


def flags(source: Path | str, output: str | Path, runner: str) -> list[str]:
    """The job: many small parts, so that there is much to interrupt."""
    words = ["--source.paths", str(source), "--output", str(output), "--runner", runner]
    words += ["--tokenizer", "bytes", "--sequence-length", "128", "--noise.block-size", "8"]
    return [*words, "--part-bytes", "150000", "--held-out-rate", "0.1", "--num-workers", "2"]


def started(
    events: Path,
    target: tuple[str, int],
    words: Sequence[str],
    module: str = PREPARE,
    **settings: str,
) -> subprocess.Popen:
    """The job with its points, as a process of its own; `settings` go to its environment."""
    command = [sys.executable, "-m", module, str(events)]
    command += [target[0], str(target[1]), *words]
    events.mkdir(parents=True, exist_ok=True)
    log = (events.parent / f"{events.name}.log").open("ab")
    with log:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment() | settings,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def finished(events: Path, words: Sequence[str], module: str = PREPARE, **settings: str) -> int:
    """The exit code of a run that nobody disturbs."""
    return started(events, ("none", 0), words, module, **settings).wait(timeout=600)


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file by name, but of those that tell a run's times.

    Nor does a killed process's unfinished file count, which no reader looks at.
    """
    found = {}
    for path in _finished_files(folder):
        if path.name not in _TOLD_ANEW:
            name = str(path.relative_to(folder))
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def left_half_written(folder: Path) -> int:
    """Files that killed processes did not finish, known by the commit protocol's own names."""
    files = {path for path in folder.rglob("*") if path.is_file()}
    return len(files - set(_finished_files(folder)))


def _finished_files(folder: Path) -> list[Path]:
    """Every file under a folder that the commit protocol calls one."""
    places = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    paths = [place / name for place in places for name in Folder(place).list()]
    return [path for path in paths if path.is_file()]
