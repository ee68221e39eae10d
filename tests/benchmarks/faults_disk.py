"""A full disk: one clear sentence, and the same command goes on once there is space.

The small disk is a tmpfs in a mount namespace of its own, which needs no rights where user
namespaces are allowed; elsewhere a limit on the size of files, which writing past meets in the same
way (EFBIG for ENOSPC).
"""

import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.benchmarks.fault_runs import ROOT, contents, environment, finished, flags
from tests.benchmarks.report import Row

_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
_SENTENCE = ("cannot be written", "run the same command again, which goes on from here")


def has_small_disks(folder: Path) -> bool:
    """Whether a tmpfs can be mounted in a namespace here."""
    words = [*_NAMESPACE, "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def script(folder: Path, job: Sequence[str], size: int, is_tmpfs: bool) -> str:
    """Run the job on a small disk, make the disk large, run it again, keep what it made."""
    run = f"{shlex.join(job)} >> {folder}/log 2>&1"
    told = f"; echo $? >> {folder}/codes"
    disk = folder / "disk"
    if not is_tmpfs:  # the largest file alone counts
        small = f"(ulimit -f {max(1, size >> 10)}; {run})"
        return f"{small}{told}; {run}{told}; cp -r {disk} {folder}/kept"
    mount = f"mount -t tmpfs -o size={size} tmpfs {disk}"
    larger = f"mount -o remount,size=1g {disk}"
    return f"{mount} && {{ {run}{told}; {larger}; {run}{told}; cp -r {disk} {folder}/kept; }}"


def goes_on(
    folder: Path, source: Path, undisturbed: Path, size: int, *, is_protected: bool
) -> bool:
    """Whether the first run says clearly that the disk is full and the second ends as if not."""
    (folder / "disk").mkdir(parents=True)
    job = [sys.executable, "-m", "tests.benchmarks.fault_points", str(folder / "events"), "none"]
    job += ["0", *flags(source, folder / "disk/corpus", "local")]
    is_tmpfs = has_small_disks(folder / "disk")
    command = ["bash", "-c", script(folder, job, size, is_tmpfs)]
    command = [*_NAMESPACE, *command] if is_tmpfs else command
    settings = environment() | ({} if is_protected else {"CASCADE_FAULTS_UNPROTECTED": "1"})
    subprocess.run(command, cwd=ROOT, env=settings, check=True, timeout=600)
    # The command line draws a frame around the sentence.
    text = " ".join((folder / "log").read_text().replace("│", " ").split())
    codes = (folder / "codes").read_text().split()
    is_clear = all(words in text for words in _SENTENCE) and "Traceback" not in text
    is_same = contents(folder / "kept/corpus") == contents(undisturbed)
    return codes == ["2", "0"] and is_clear and is_same


def disk_rows(folder: Path, source: Path) -> Iterator[Row]:
    """Full in the first round of tasks and in the second; the control has no commit protocol."""
    undisturbed = folder / "undisturbed" / "corpus"
    if finished(folder / "undisturbed" / "events", flags(source, undisturbed, "local")):
        raise SystemExit("the undisturbed run failed")
    files = [path for path in undisturbed.rglob("*") if path.is_file()]
    is_tmpfs = has_small_disks(folder)
    whole = sum(path.stat().st_size for path in files)
    largest = max(path.stat().st_size for path in files)
    sizes = (0.4 * whole, 1.2 * whole) if is_tmpfs else (0.5 * largest, 0.9 * largest)
    made = [
        goes_on(folder / f"size-{place}", source, undisturbed, int(size), is_protected=True)
        for place, size in enumerate(sizes)
    ]
    what = "tmpfs" if is_tmpfs else "limit on file size"
    yield Row(f"disk full ({what}): clear sentence, then the same bytes", sum(made), "of 2", bar=2)
    bad = goes_on(folder / "control", source, undisturbed, int(sizes[0]), is_protected=False)
    yield Row("control: without the commit protocol it fails", int(not bad), "of 1", bar=1)
