"""Checkpoints that are damaged or hostile: found, passed over, and never run.

The damages are those of `checkpoint_damage`, drawn by a seed. Each row has a control: the reader
without its hashes, or torch's own reader.
"""

import json
import pickle
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from cascade_model import checkpoint_reading
from cascade_model.checkpoint import newest
from cascade_model.checkpoint_files import COMMIT, MANIFEST, File, commit_bytes, step_name, steps_in
from cascade_model.commit import Folder
from cascade_model.errors import InputError
from cascade_model.hashing import sha256_of
from tests.benchmarks.rank_points import name_of
from tests.benchmarks.rank_runs import Launcher, Result, flags, result_of
from tests.benchmarks.report import Row
from tests.cascade_model.checkpoint_damage import HIDDEN, PLAIN

SEED = 20
DAMAGES = 200
_OF_NUMBERS = "zeros"
"""A kind that hardly anything but a hash can find."""
_RESUMED = 3
"""Damaged runs that are trained to their end."""


def damage_rows(
    launcher: Launcher, corpus: str, folder: Path, undisturbed: Result
) -> Iterator[Row]:
    """Damages of a run that was killed after two checkpoints of two files."""
    words = [*flags(corpus, folder / "run"), "--trainer.checkpoint-every", "1"]
    ranks = launcher.start(words, folder / "events", target=(name_of("forward", 0), 4))
    if ranks.until_paused():
        ranks.signal(signal.SIGKILL, 0)
    ranks.go()
    ranks.wait()
    ranks.kill_all()
    checkpoints = folder / "run/checkpoints"
    keep_two(checkpoints)
    kinds = list({**PLAIN, **HIDDEN})
    found = sum(
        is_found(damaged(checkpoints, folder / "copy", kinds[number % len(kinds)], number))
        for number in range(DAMAGES)
    )
    yield Row(f"damaged newest checkpoint, {len(kinds)} kinds: found, the one before taken", found,
              f"of {DAMAGES}", bar=DAMAGES)  # fmt: skip
    with believing():
        believed = sum(
            not is_found(damaged(checkpoints, folder / "copy", _OF_NUMBERS, number))
            for number in range(10)
        )
    yield Row("control: without the hashes damage gets through", believed, "of 10", bar=5)
    same = 0
    for number in range(_RESUMED):
        run = folder / f"again-{number}"
        shutil.copytree(folder / "run", run)
        damage(run / "checkpoints", kinds[number * 5], number)
        again = [*flags(corpus, run), "--trainer.checkpoint-every", "1"]
        codes = launcher.run(again, folder / f"events-{number}")
        log = (folder / f"events-{number}/rank-0.log").read_text()
        same += codes == [0, 0] and "(step 1, " in log and result_of(run) == undisturbed
    yield Row("damaged newest checkpoint: trained on, weights and log lines as undisturbed", same,
              f"of {_RESUMED}", bar=_RESUMED)  # fmt: skip


def keep_two(checkpoints: Path) -> None:
    """Steps 1 and 2, which the damages know; later ones go."""
    for step in steps_in(Folder(checkpoints)):
        if step > 2:
            shutil.rmtree(checkpoints / step_name(step))


def damaged(checkpoints: Path, target: Path, kind: str, number: int) -> Path:
    """A copy whose newest checkpoint is damaged."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(checkpoints, target)
    damage(target, kind, number)
    return target


def damage(checkpoints: Path, kind: str, number: int) -> None:
    """Damage step 2 in place."""
    draw = random.Random(f"{SEED} {kind} {number}")
    {**PLAIN, **HIDDEN}[kind](checkpoints / step_name(2), draw)


def is_found(checkpoints: Path) -> bool:
    """Whether the reader tells of the damage and takes the checkpoint before."""
    told: list[str] = []
    try:
        taken = newest(Folder(checkpoints), told.append)
    except InputError:
        return False
    return taken is not None and taken.step == 1 and len(told) == 1


@contextmanager
def believing() -> Iterator[None]:
    """The control: a reader that compares nothing."""

    def nothing(*values: Any) -> None:
        """Believe it."""

    with ExitStack() as undone:
        for name in ("_compare", "_refuse_foreign", "_verify_file"):
            undone.callback(setattr, checkpoint_reading, name, getattr(checkpoint_reading, name))
            setattr(checkpoint_reading, name, nothing)
        yield


class Canary:
    """A pickle that makes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self._path), "w")


def hostile_rows(launcher: Launcher, corpus: str, folder: Path) -> Iterator[Row]:
    """Checkpoints of one run, made over so that torch's own reader would run code."""
    words = flags(corpus, folder / "run")
    launcher.run(words, folder / "events")
    refused = silent = opened = 0
    kinds = (beside_commit, inside_attempt)
    for kind in kinds:
        canary, copy = folder / f"canary-{kind.__name__}", folder / kind.__name__
        shutil.copytree(folder / "run", copy)
        kind(copy / "checkpoints", Canary(canary))
        is_refused = _is_refused(copy / "checkpoints")
        foreign = next((copy / "checkpoints").rglob(".metadata")).parent
        shutil.copytree(foreign, folder / f"foreign-{kind.__name__}")
        events = folder / f"events-{kind.__name__}"
        launcher.run(flags(corpus, copy, steps=14), events)
        refused += is_refused and "resuming from" not in (events / "rank-0.log").read_text()
        silent += not canary.exists()
        _read_with_torch(folder / f"foreign-{kind.__name__}")
        opened += canary.exists()
    yield Row("hostile pickle in .metadata, all hashes true: refused", refused,
              f"of {len(kinds)}", bar=len(kinds))  # fmt: skip
    yield Row("hostile pickle: its code did not run", silent, f"of {len(kinds)}", bar=len(kinds))
    yield Row("control: torch's own reader runs it", opened, f"of {len(kinds)}", bar=len(kinds))


def beside_commit(checkpoints: Path, canary: Canary) -> None:
    """In every step's folder, where torch's format has it."""
    for step in steps_in(Folder(checkpoints)):
        (checkpoints / step_name(step) / ".metadata").write_bytes(pickle.dumps(canary))


def inside_attempt(checkpoints: Path, canary: Canary) -> None:
    """Among the data files, in a manifest and under a COMMIT that are true for it."""
    for step in steps_in(Folder(checkpoints)):
        folder = checkpoints / step_name(step)
        (folder / ".metadata").unlink(missing_ok=True)
        commit = json.loads((folder / COMMIT).read_text())
        data = folder / commit["attempt"]
        (data / ".metadata").write_bytes(pickle.dumps(canary))
        manifest = json.loads((data / MANIFEST).read_text())
        with (data / ".metadata").open("rb") as file:
            size = (data / ".metadata").stat().st_size
            manifest["files"][".metadata"] = {"bytes": size, "sha256": sha256_of(file)}
        (data / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        with (data / MANIFEST).open("rb") as file:
            recorded = File(bytes=(data / MANIFEST).stat().st_size, sha256=sha256_of(file))
        text = commit_bytes(step, commit["attempt"], recorded, commit["score"])
        (folder / COMMIT).write_bytes(text)


def _is_refused(checkpoints: Path) -> bool:
    """Whether our reader finds nothing that it would go on from."""
    try:
        return newest(Folder(checkpoints), lambda line: None) is None
    except InputError:
        return True


def _read_with_torch(folder: Path) -> None:
    """What opens a foreign checkpoint elsewhere."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    with suppress(Exception):  # the code has run by then
        FileSystemReader(folder).read_metadata()
