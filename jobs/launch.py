"""Where training meets Ray Train: the command's side.

Ray places the ranks, gives them a process group and restarts them after a death. What is durable is
decided by our own COMMIT: a restarted rank looks for the newest complete checkpoint in the run
folder by itself. A signal to the command, or a machine that Ray loses, is a wish that the ranks
meet at the end of their step (`ranks`).
"""

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade_model.checkpoint_files import has_committed
from cascade_model.commit import Folder
from cascade_model.errors import InputError, Stopped, Unfinished
from cascade_model.settings import check
from cascade_model.status_line import tell
from cascade_model.stopping import signals_noted
from jobs import run_folder
from jobs.ranks import CHECKPOINTS, Started, run_rank
from jobs.terminal import Terminal
from pipelines.cluster import require_resources, start_ray

if TYPE_CHECKING:
    from cascade_model.lease import Owner

Train = Callable[[Any, str, Started], dict[str, Any]]
"""(config, device type, what started it) -> summary; runs in every rank, in its process group."""

_PATHS = ("corpus", "output", "teacher", "initial_model", "targets")
# Ray Train asks for the ranks' machines again every 60 s; a cluster has this long to grow.
_STARTS = 30
_LOOK_EVERY = 0.5
_RAY_FILES = ("checkpoint_manager_snapshot.json", ".validate_storage_marker")


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where the ranks run, how many of them, and what they survive."""

    num_workers: int
    min_workers: int | None = None
    use_gpu: bool = False
    label_selector: dict[str, str] | None = None
    max_failures: int = 2
    max_preemptions: int = -1
    collective_timeout_s: float = 180.0
    resize_after_s: float = 60.0

    def __post_init__(self) -> None:
        check(
            self.num_workers >= 0,
            f"num_workers={self.num_workers} must be 0 (no Ray) or more; use 2",
        )
        check(
            self.min_workers is None or 1 <= self.min_workers <= self.num_workers,
            f"min_workers={self.min_workers} must be in 1..{self.num_workers}, which is "
            "num_workers; use 1, or leave it out for a fixed number of ranks",
        )
        check(
            not self.label_selector or self.num_workers > 0,
            "label_selector names machines of a Ray cluster and num_workers=0 uses no Ray; "
            "use num_workers=1",
        )
        for name in ("collective_timeout_s", "resize_after_s"):
            check(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be above 0; use 60")
        for name in ("max_failures", "max_preemptions"):
            value = getattr(self, name)
            check(value >= -1, f"{name}={value} must be 0 or more, or -1 for no limit")

    @property
    def device(self) -> str:
        """Kind of device of each rank."""
        return "cuda" if self.use_gpu else "cpu"

    @property
    def sizes(self) -> range:
        """Every number of ranks that the run may have."""
        most = max(self.num_workers, 1)
        return range(self.min_workers or most, most + 1)


def require_room(placement: Placement) -> None:
    """Raise `InputError` for more ranks than there is room for; call it before anything is written.

    Starts Ray. A cluster that may grow is not judged here: `launch` gives it half an hour.
    """
    num_workers, use_gpu = placement.sizes.start, placement.use_gpu
    if placement.num_workers == 0:
        _require_gpu(use_gpu)
        return
    start_ray(placement.num_workers)
    name = "num_workers" if placement.min_workers is None else "min_workers"
    asks = f"{name}={num_workers} with use_gpu={use_gpu}"
    if use_gpu:
        require_resources(0, num_workers, asks, "use fewer ranks or use_gpu=False")
    else:
        require_resources(num_workers, 0, asks, "use fewer ranks")


def launch(
    train: Train,
    config: Any,
    *,
    folder: Folder,
    placement: Placement,
    owner: "Owner | None" = None,
) -> dict[str, Any]:
    """Run `train(config, device, started)` on the ranks and return the run's summary.

    0 workers: in this process, without Ray. A user's mistake inside a rank comes out here as the
    same `InputError`, without Ray's traceback. Raises `Stopped` after a signal, when all is saved,
    and `Unfinished` when ranks died or hung more often than they may.
    """
    from cascade_model.run_record import SUMMARY

    if placement.num_workers == 0:
        _require_gpu(placement.use_gpu)
        return train(config, placement.device, Started(owner=owner))
    left = placement.max_preemptions
    while True:
        error = _launch_once(train, config, folder, placement, owner)
        if error is None:
            return json.loads(folder.read_bytes(SUMMARY))
        if not isinstance(error, _Preempted) or left == 0:
            raise error
        left -= 1
        tell(f"{error}; starting again on the other machines")


class _Preempted(Stopped):
    """The ranks saved and left because a machine is being taken away."""


def _launch_once(
    train: Train, config: Any, folder: Folder, placement: Placement, owner: "Owner | None"
) -> InputError | None:
    """One run of Ray Train; what its ranks left as their reason to end without a summary."""
    # A name used twice would silently continue Ray's own notes of the earlier run.
    name = f"launch-{time.time_ns()}"
    run_folder.mark(folder, name)
    try:
        settings = {
            "train": train,
            "config": config,
            "folder": folder.url,
            "device": placement.device,
            "launch": name,
            "owner": owner,
        }
        try:
            signal = _fit(settings, folder, placement)
        except Exception as error:
            told = run_folder.take_outcome(folder)
            raise told or _cause_of(error, placement, folder) or error from None
        outcome = run_folder.take_outcome(folder)
        if isinstance(outcome, Stopped) and signal is None:
            return _Preempted(str(outcome).partition(";")[0])
        return outcome
    finally:
        run_folder.unmark(folder, name)
        _remove_rays_notes(folder / CHECKPOINTS)


def _fit(settings: dict[str, Any], folder: Folder, placement: Placement) -> str | None:
    """Let Ray Train run, show what the ranks write, pass a signal on to them.

    Returns the signal that came, if one did. Ray runs in a thread of its own: in the main thread it
    would take SIGINT over, end the process with code 1, and never give the signal back.
    """
    trainer = _trainer(settings, folder, placement)
    failure: list[BaseException] = []
    ended = threading.Event()

    def run() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failure.append(error)
        finally:
            ended.set()

    terminal, asked = Terminal(folder), None
    with signals_noted() as signalled:
        threading.Thread(target=run, daemon=True).start()
        while not ended.wait(_LOOK_EVERY):
            terminal.show()
            if asked is None and (asked := signalled()):
                _pass_on(asked, folder, settings["launch"])
    terminal.show(is_last=True)
    if failure:
        raise failure[0]
    return asked


def _pass_on(signal: str, folder: Folder, launch: str) -> None:
    """Ask the ranks to stop; where none is at work yet, there is nothing to wait for."""
    run_folder.ask_to_stop(folder, launch, signal)
    if not run_folder.has_begun(folder, launch):
        raise Stopped(f"stopped by {signal} before the ranks had begun; run the same command again")
    tell(f"{signal}: saving at the end of this step")


def _trainer(settings: dict[str, Any], folder: Folder, placement: Placement) -> Any:
    timeout = placement.collective_timeout_s
    # Ray's default of 2 s is how long a death goes unseen; all are read when Ray Train starts. A
    # rank that stands still answers no question about its health and joins no report.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(timeout)
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(timeout)
    start_ray(placement.num_workers)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from jobs.resizing import SaveBeforeResize

    least, most = placement.sizes.start, placement.num_workers
    filesystem, path = _storage(folder)
    return TorchTrainer(
        run_rank,
        train_loop_config=settings,
        torch_config=TorchConfig(
            backend="nccl" if placement.use_gpu else "gloo", timeout_s=max(1, round(timeout))
        ),
        scaling_config=ScalingConfig(
            num_workers=most if least == most else (least, most),
            use_gpu=placement.use_gpu,
            label_selector=placement.label_selector,
            elastic_resize_monitor_interval_s=placement.resize_after_s,
        ),
        run_config=RunConfig(
            name=CHECKPOINTS,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(
                max_failures=placement.max_failures,
                max_preemption_failures=placement.max_preemptions,
                controller_failure_limit=_STARTS,
            ),
            # Typed for user callbacks only; Ray passes all others to its controller.
            callbacks=[SaveBeforeResize(folder.url, settings["launch"], timeout)],  # pyright: ignore
        ),
    )


def _storage(folder: Folder) -> tuple[Any, str]:
    """The run folder as Ray wants it. Its storage is our folder of checkpoints, as it registers
    none from elsewhere; notes that it left there are of another launch."""
    import fsspec
    import pyarrow.fs

    _remove_rays_notes(folder / CHECKPOINTS)
    if folder.is_local:
        return pyarrow.fs.LocalFileSystem(), folder.url
    system, path = fsspec.core.url_to_fs(folder.url)
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(system)), str(path)


def _remove_rays_notes(folder: Folder) -> None:
    for name in _RAY_FILES:
        folder.remove(name)
    folder.remove_if_empty()


def _cause_of(error: Exception, placement: Placement, folder: Folder) -> InputError | None:
    """What the user should know behind an error of Ray Train; none for a fault of ours."""
    ranks = getattr(error, "worker_failures", {})
    told = [failure for failure in ranks.values() if isinstance(failure, InputError)]
    if told:
        return told[0]
    asks = f"num_workers={placement.num_workers} with use_gpu={placement.use_gpu}"
    if "StartupTimeout" in type(getattr(error, "controller_failure", None)).__name__:
        return InputError(
            f"{asks}: the cluster did not give that many machines in half an hour; use fewer "
            "ranks, or let the cluster grow larger"
        )
    lost = _lost(error)
    if lost is not None:
        rank, failure = lost
        is_kept = has_committed(folder / CHECKPOINTS)
        end = "goes on from the newest checkpoint" if is_kept else "begins anew, as none was saved"
        reason = str(failure).strip().splitlines()[0].rstrip(".:")
        return Unfinished(
            f"{rank} was lost ({reason}) after max_failures={placement.max_failures} "
            f"restarts; look at its machine and run the same command again, which {end}"
        )
    return None


def _lost(error: Exception) -> tuple[str, Exception] | None:
    """The rank that was lost first, and how; none where it was something else that failed."""
    from ray.exceptions import RayActorError

    starting = getattr(error, "controller_failure", None)
    if isinstance(starting, RayActorError):  # one that died before Ray Train watched over it
        return "a rank", starting
    ranks = getattr(error, "worker_failures", {})
    if not ranks or not all(_is_loss(failure) for failure in ranks.values()):
        return None
    first = min(ranks, key=lambda rank: (_is_collateral(ranks[rank]), rank))
    return f"rank {first}", ranks[first]


def _is_loss(failure: Exception) -> bool:
    """Whether a rank died, hung, or failed because another one did."""
    return "WorkerHealthCheck" in type(failure).__name__ or _is_collateral(failure)


def _is_collateral(failure: Exception) -> bool:
    """Whether a rank failed in a collective, waiting for one that is gone."""
    name, text = type(failure).__name__, str(failure)
    words = ("gloo", "nccl", "Connection closed by peer", "Connection reset by peer")
    return name.startswith("Dist") or any(word.lower() in text.lower() for word in words)


def with_absolute_paths(config: Any) -> Any:
    """The same settings for a process in another folder: Ray Train gives each rank its own."""
    names = {field.name for field in dataclasses.fields(config)} & set(_PATHS)
    values = {name: getattr(config, name) for name in names}
    paths = {name: absolute(value) for name, value in values.items() if value}
    if config.cache.folder:
        folder = absolute(config.cache.folder)
        paths["cache"] = dataclasses.replace(config.cache, folder=folder)
    return dataclasses.replace(config, **paths)


def absolute(place: str) -> str:
    """A local path that holds in any folder, `~` as `Folder` reads it; a URL stays as it is."""
    return place if "://" in place else str(Path(os.path.expanduser(place)).absolute())


def _require_gpu(use_gpu: bool) -> None:
    if not use_gpu:
        return
    import torch

    check(
        torch.cuda.is_available(),
        "use_gpu=True and this machine has no CUDA device; use use_gpu=False",
    )
