"""One rank under Ray Train: what it is told, and what it tells.

It learns from the run folder that the command wants to stop, and from Ray that its machine is about
to be taken away; the trainer asks once a step, agrees with the other ranks, saves and ends with
`Stopped`.

Ray is told of a checkpoint when it is known to be committed: when the next save begins, or at the
end. So what Ray knows is one save late, and no step waits for a save. Nothing depends on it: Ray's
own reports are not durable when they return (a death within a second loses them), it uploads
nothing and deletes nothing, and what counts is our COMMIT.
"""

import contextlib
import posixpath
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from cascade_model.commit import Folder
from cascade_model.errors import InputError, Stopped
from jobs import run_folder
from pipelines.cluster import cores

if TYPE_CHECKING:
    from cascade_model.lease import Owner

CHECKPOINTS = "checkpoints"
_ASK_EVERY = {True: 0.5, False: 3.0}
"""Seconds between two looks for a wish to stop, by whether the run folder is local."""


class Saving(Protocol):
    """A checkpoint that is being written."""

    path: str
    step: int

    def wait(self) -> bool:
        """Whether it was committed, the same on every rank."""
        ...


def _never() -> str | None:
    return None


def _ignore(saving: Saving) -> None:
    """Nobody wants to know of it."""


@dataclass(frozen=True, kw_only=True)
class Started:
    """What a rank is given by whoever started it."""

    owner: "Owner | None" = None
    """The command that holds the run folder."""
    stop_wanted: Callable[[], str | None] = _never
    """A reason to save and stop at the end of this step, or none."""
    on_save: Callable[[Any], None] = _ignore
    """Called right after each save has begun."""


def run_rank(settings: dict[str, Any]) -> None:
    """One rank, called by Ray Train with what `launch` made.

    A user's mistake is written to the run folder before it is raised: the attempt that Ray starts
    next finds it and ends at once, in place of failing the same way again. A stop is no failure.
    """
    import ray.train
    import torch

    folder, launch = Folder(settings["folder"]), settings["launch"]
    run_folder.require_shared(folder, launch)
    if run_folder.has_outcome(folder):
        return
    context = ray.train.get_context()
    if context.get_world_rank() == 0:
        run_folder.begin(folder, launch)
    if settings["device"] == "cpu":
        torch.set_num_threads(max(1, cores() // context.get_local_world_size()))
    reports = Reports()
    try:
        with stop_wishes(folder, launch, is_first=context.get_world_rank() == 0) as stop_wanted:
            started = Started(owner=settings["owner"], stop_wanted=stop_wanted, on_save=reports)
            settings["train"](settings["config"], settings["device"], started)
        reports.finish()
    except Stopped as error:
        reports.finish()
        if context.get_world_rank() == 0:
            _tell_stopped(folder, launch, error)
    except InputError as error:
        run_folder.write_outcome(folder, error)
        raise


def _tell_stopped(folder: Folder, launch: str, error: Stopped) -> None:
    """Say that everything is saved: to a controller that waits to resize, or to the command."""
    wish = run_folder.wish_to_stop(folder, launch)
    if wish is not None and wish[1] == "resize":
        run_folder.ask_to_stop(folder, launch, wish[0], "done")
    else:
        run_folder.write_outcome(folder, error)


class Reports:
    """Tells Ray of each checkpoint that was committed, when the next save begins or at the end."""

    def __init__(self) -> None:
        self._last: Saving | None = None

    def __call__(self, saving: Saving) -> None:
        """A save has begun, so the one before it is done."""
        self._tell(self._last)
        self._last = saving

    def finish(self) -> None:
        """The last save is done."""
        self._tell(self._last)
        self._last = None

    def _tell(self, saving: Saving | None) -> None:
        import ray.train
        from ray.train import Checkpoint, CheckpointUploadMode

        if saving is None or not saving.wait():
            return
        context = ray.train.get_context()
        checkpoint = None
        if context.get_world_rank() == 0:
            storage: Any = context.get_storage()
            name = posixpath.basename(saving.path.rstrip("/"))
            path = posixpath.join(storage.experiment_fs_path, name)
            checkpoint = Checkpoint(path, filesystem=storage.storage_filesystem)
        ray.train.report(
            {"step": saving.step},
            checkpoint=checkpoint,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=_as_it_lies,
            delete_local_checkpoint_after_upload=False,  # by default Ray deletes what it was given
        )


def _as_it_lies(checkpoint: Any, name: str) -> Any:
    """Nothing to upload: the checkpoint was written where it stays."""
    return checkpoint


@contextlib.contextmanager
def stop_wishes(
    folder: Folder, launch: str, *, is_first: bool
) -> Iterator[Callable[[], str | None]]:
    """A function that gives the reason to stop, or none; it never waits.

    The first rank looks into the run folder, in a thread of its own; every rank sees whether Ray
    announced that a machine is taken away.
    """
    found: list[str] = []
    ended = threading.Event()

    def look() -> None:
        while not found and not ended.wait(_ASK_EVERY[folder.is_local]):
            with contextlib.suppress(Exception):  # a store that does not answer is asked again
                wish = run_folder.wish_to_stop(folder, launch)
                if wish is not None and wish[1] != "done":
                    found.append(wish[0])

    def reason() -> str | None:
        return found[0] if found else preemption()

    thread = threading.Thread(target=look, daemon=True)
    if is_first:
        thread.start()
    try:
        yield reason
    finally:
        ended.set()


def preemption() -> str | None:
    """Why the ranks must leave, if Ray says that a machine of theirs is being taken away.

    `ray.train.get_preemption_info` would be a barrier over all ranks through an actor in every
    step; the news itself lies in each rank, and the trainer agrees on reasons anyway.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    info = get_train_context().preemption_context.preemption_info
    if info is None:
        return None
    return f"the machine of rank {', '.join(map(str, info.preempted_ranks))} is being taken away"
