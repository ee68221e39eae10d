"""The checkpoints of a run: saved while training goes on, whole or not there.

A save is one copy of the state, and the rest in a thread: every rank writes its file, then the
first rank writes the manifest and, last, COMMIT (`checkpoint_files` has the layout). Locally COMMIT
gets its name by a link, in a store by a conditional put, each after the lease was checked. The
thread has a process group of its own (gloo), so its talk never meets that of training.

A save that the disk or the store refuses is agreed by all ranks and told in one line; what was
committed before stays and training goes on. A run that lost its folder to another stops.
"""

import contextlib
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.optim import Optimizer

from cascade_model import parallel
from cascade_model.checkpoint_commit import Sealing, clear, rate, retain, tidy
from cascade_model.checkpoint_files import COMMIT, Checkpoint, Entry, File, step_name, steps_in
from cascade_model.checkpoint_reading import OtherFormat, verify
from cascade_model.checkpoint_state import load, load_weights, state_of
from cascade_model.checkpoint_storage import STATE, PartsPlanner, Writer, cause_of
from cascade_model.commit import Folder
from cascade_model.errors import CheckpointMismatch, InputError, Unfinished, shared
from cascade_model.retention import Keep
from cascade_model.settings import shown
from cascade_model.staging import HostCopy

__all__ = [
    "Checkpoint",
    "Checkpoints",
    "Keep",
    "Saving",
    "load",
    "load_weights",
    "newest",
    "require_same",
    "verify",
]


class Saving:
    """A save that is on its way."""

    def __init__(self, path: str, step: int) -> None:
        self.path = path
        """The step's folder, a local path or a URL."""
        self.step = step
        self.reason: str | None = None
        """Why it failed, once it has."""
        self._error: BaseException | None = None
        self._ended = threading.Event()

    def wait(self) -> bool:
        """Wait for the end; True when the checkpoint is committed, False when the save failed.

        All ranks get the same answer. Raises what is no fault of the storage: `LeaseLost`, or the
        loss of another rank.
        """
        self._ended.wait()
        if self._error is not None:
            raise self._error
        return self.reason is None

    def end(self, reason: str | None, error: BaseException | None = None) -> None:
        """Tell those who wait how it went."""
        self.reason, self._error = reason, error
        self._ended.set()


class Checkpoints:
    """A run's `checkpoints/` folder. Every rank makes one, and all call its methods in one order.

    `check` raises where this process may no longer write (`Attempt.check`); `tell` shows a line to
    the person who watches, from the first rank alone. `attempt` is the lease's number, for the
    names of folders. `timeout` bounds for how long a rank may stand still in a save (seconds), or
    the first one take for the manifest, COMMIT and the removal of old ones; the writing of the data
    and their reading may take any time.
    """

    def __init__(
        self,
        folder: Folder,
        keep: Keep,
        check: Callable[[], None],
        tell: Callable[[str], None],
        *,
        attempt: int = 0,
        timeout: float = 180.0,
    ) -> None:
        self.failures = 0
        """Saves that failed so far."""
        self._folder, self._keep, self._check, self._tell = folder, keep, check, tell
        self._group = _own_group(timeout)
        self._beat = timeout / 10
        self._attempt = f"{attempt:08d}-{self._same_on_all(secrets.token_hex(8))}"
        self._saves = 0
        self._stager = HostCopy()
        self._last: Saving | None = None
        self._damaged: set[int] = set()

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint, decided by the first rank for all.

        Damaged ones are told and passed over; leftovers of dead writers are removed, so only the
        holder of the run folder may call this. Raises `CheckpointMismatch` when there are only
        checkpoints of another format, or only damaged ones.
        """

        def tidy_and_find() -> Checkpoint | None:
            self._check()
            tidy(self._folder)
            found = newest(self._folder, self._tell)
            before = found.step if found else -1
            self._damaged = {step for step in steps_in(self._folder) if step > before}
            return found

        return parallel.on_first_rank(tidy_and_find)

    def load(self, found: Checkpoint, model: nn.Module, optimizer: Optimizer) -> None:
        """Put a checkpoint into a model that is sharded as it will be, and its optimiser, in place.

        Every rank must call this. Raises as `checkpoint_state.load`.
        """
        load(found, model, optimizer, self._at_work)

    def save(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        facts: dict[str, Any],
        score: float | None = None,
    ) -> Saving:
        """Copy the state of all ranks and begin to write it; every rank must call this.

        Waits for the save before it first. `facts` holds at least `step` and `samples` and must be
        JSON; the first rank's count. `score` is a held-out loss, for `Keep.best`.
        """
        if self._last is not None:
            self._last.wait()
        self._saves += 1
        step = facts["step"]
        target = self._folder / step_name(step)
        attempt = f"{self._attempt}-{self._saves:04d}"
        self._last = saving = Saving(target.url, step)
        sealed = Sealing(target, attempt, facts, score, self._check)

        def seal(index: dict[str, Entry], files: dict[str, File]) -> None:
            sealed(index, files)
            self._damaged.discard(step)
            try:
                retain(self._folder, self._keep, step, self._damaged)
            except Exception as error:  # the new one is committed whatever becomes of the old ones
                self._tell(f"old checkpoints in {self._folder.url} could not be removed ({error})")

        future = async_save(
            {STATE: state_of(model, optimizer)},
            storage_writer=Writer(target / attempt, self._check, seal, self._at_work),
            planner=PartsPlanner(),
            process_group=self._group,
            async_stager=self._stager,
            no_dist=self._group is None,
        )
        assert isinstance(future, Future)
        future.add_done_callback(partial(self._end, saving, sealed))
        return saving

    def rate(self, found: Checkpoint, score: float) -> None:
        """Write the held-out loss of a checkpoint beside it, for `Keep.best`; every rank must call.

        What the storage refuses is told; the checkpoint stays without a score then.
        """

        def write() -> None:
            self._check()
            try:
                rate(Folder(found.path), found.step, score)
            except Exception as error:  # each store has errors of its own
                self._tell(f"{found.path} could not be given its held-out loss ({error})")

        parallel.on_first_rank(write)

    def finish(self) -> None:
        """Wait for the last save; `Unfinished` if it failed."""
        if self._last is not None and not self._last.wait():
            raise shared(
                Unfinished(
                    f"{self._last.path} could not be saved ({self._last.reason}), so the last "
                    "steps are in no checkpoint; free some space or mend the storage and run the "
                    "same command again, which goes on from the newest one, if there is one"
                )
            )

    def _at_work(self, work: Callable[[], Any]) -> Any:
        if self._group is None:
            return work()
        return parallel.all_at_work(work, self._group, self._beat)

    def _end(self, saving: Saving, sealed: Sealing, future: Future) -> None:
        """In the thread that saved, on every rank."""
        error = cause_of(future.exception())
        is_of_storage = isinstance(error, InputError)
        try:
            if error is not None and self._is_first and not sealed.is_tried:
                with contextlib.suppress(Exception):  # what stays is tidied at the next start
                    clear(sealed.target, sealed.attempt)
            if is_of_storage:
                self.failures += 1
                if self._is_first:
                    self._tell(
                        f"{saving.path} could not be saved ({error}); training goes on, and what "
                        "was saved before stays"
                    )
        finally:
            saving.end(str(error) if error else None, None if is_of_storage else error)

    @property
    def _is_first(self) -> bool:
        return parallel.rank() == 0

    def _same_on_all(self, value: str) -> str:
        told = [value]
        if self._group is not None:
            dist.broadcast_object_list(told, src=0, group=self._group)
        return told[0]


def newest(folder: Folder, tell: Callable[[str], None]) -> Checkpoint | None:
    """The newest complete checkpoint of a folder; damaged ones are told and passed over.

    Raises `CheckpointMismatch` when there are checkpoints and the only ones that are left are of
    another format, or every one that was committed is damaged, so that no run begins anew beside
    them and replaces them. Saves that never came to their COMMIT do not count.
    """
    foreign: OtherFormat | None = None
    damaged = 0
    steps = steps_in(folder)
    for step in reversed(steps):
        target = folder / step_name(step)
        try:
            return verify(target)
        except CheckpointMismatch as error:
            foreign = error if isinstance(error, OtherFormat) else foreign
            damaged += COMMIT in target.list()
            left = "falling back to the one" if step > steps[0] else "there is none"
            tell(f"{error}; {left} before it")
    if foreign is not None:
        raise foreign
    if damaged:
        raise CheckpointMismatch(
            f"none of the checkpoints in {folder.url} is whole ({damaged} committed, all damaged); "
            "restore one of them, or remove that folder to begin anew"
        )
    return None


def require_same(checkpoint: Checkpoint, expected: dict[str, Any]) -> None:
    """Refuse to resume when a fact differs; the sentence shows both values.

    Raises `CheckpointMismatch` for the first differing fact, nested settings by their full name.
    """
    for name, want in expected.items():
        have = checkpoint.facts.get(name)
        if have == want:
            continue
        if isinstance(have, dict) and isinstance(want, dict):
            key = next(k for k in sorted({*have, *want}) if have.get(k) != want.get(k))
            name, have, want = f"{name}.{key}", have.get(key), want.get(key)
        raise CheckpointMismatch(
            f"checkpoint {checkpoint.path} was made with {name}={shown(have)!r} and this run has "
            f"{name}={shown(want)!r}; set it back or choose a new output folder"
        )


def _own_group(timeout: float) -> dist.ProcessGroup | None:
    if not dist.is_initialized():
        return None
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    assert isinstance(group, dist.ProcessGroup)
    return group
