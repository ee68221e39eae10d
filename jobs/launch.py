"""Where training meets Ray Train: the only file that knows both.

Ray places the ranks, gives them a process group and restarts them after a death. What is durable is
decided by our own COMMIT, so nothing is reported to Ray: a restarted rank looks for the newest
complete checkpoint in the run folder by itself.
"""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cascade_model.commit import Folder
from cascade_model.errors import InputError
from cascade_model.metrics import progress_line, read_metrics
from pipelines.cluster import cores, require_resources, start_ray

Train = Callable[[Any, str], dict[str, Any]]
"""(config, device type) -> summary; runs in every rank, inside its process group."""

_REFUSAL = "refused.json"
_MARK = "launched"
_PATHS = ("corpus", "output", "teacher", "targets", "initial_model")
# Ray Train asks for the ranks' machines again every 60 s; a cluster has this long to grow.
_STARTS = 30


def run_folder(output: str) -> Path:
    """The run folder as an absolute path, not made yet; all ranks must see the same disk.

    Raises `InputError` for a URL, a file in the way, or a place that cannot be written.
    """
    if "://" in output:
        raise InputError(
            f"output={output} is a URL; a run folder must be a path on a disk that all workers see"
        )
    folder = Path(output).absolute()
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(
            f"output={output} cannot be made: {nearest} is no folder that can be written; "
            "choose another path"
        )
    return folder


def require_workers(num_workers: int) -> None:
    """Raise `InputError` for a number of ranks that cannot be."""
    if num_workers < 0:
        raise InputError(f"num_workers={num_workers} must be 0 (no Ray) or more; use 2")


def require_room(num_workers: int, use_gpu: bool) -> None:
    """Raise `InputError` for more ranks than there is room for; call it before anything is written.

    Starts Ray. A cluster that may grow is not judged here: `launch` gives it half an hour.
    """
    if num_workers == 0:
        _require_gpu(use_gpu)
        return
    start_ray(num_workers)
    asks = f"num_workers={num_workers} with use_gpu={use_gpu}"
    if use_gpu:
        require_resources(0, num_workers, asks, "use fewer ranks or use_gpu=False")
    else:
        require_resources(num_workers, 0, asks, "use fewer ranks")


def launch(
    train: Train,
    config: Any,
    *,
    folder: Path,
    num_workers: int,
    use_gpu: bool = False,
    max_failures: int = 2,
) -> dict[str, Any]:
    """Run `train(config, device)` on `num_workers` ranks and return the run's summary.

    0 workers: in this process, without Ray. A user's mistake inside a rank comes out here as the
    same `InputError`, without Ray's traceback.
    """
    require_workers(num_workers)
    device = "cuda" if use_gpu else "cpu"
    if num_workers == 0:
        _require_gpu(use_gpu)
        return train(config, device)
    refusal, mark = folder / _REFUSAL, folder / _MARK
    refusal.unlink(missing_ok=True)
    # A name used twice would silently continue Ray's own notes of the earlier run.
    name = f"launch-{time.time_ns()}"
    mark.write_text(name, encoding="utf-8")
    try:
        _fit(train, config, folder, num_workers, device, max_failures, name)
        _raise_refusal(refusal)
    finally:
        _unmark(mark, name)
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def _unmark(mark: Path, name: str) -> None:
    """Remove the mark, unless a run that took the folder over has put its own."""
    with contextlib.suppress(FileNotFoundError):
        if mark.read_text(encoding="utf-8") == name:
            mark.unlink()


def with_absolute_paths(config: Any) -> Any:
    """The same settings for a process in another folder: Ray Train gives each rank its own."""
    names = {field.name for field in dataclasses.fields(config)} & set(_PATHS)
    values = {name: getattr(config, name) for name in names}
    paths = {name: absolute(value) for name, value in values.items() if value}
    return dataclasses.replace(config, **paths)


def absolute(place: str) -> str:
    """A local path that holds in any folder; a URL stays as it is."""
    return place if "://" in place else str(Path(place).absolute())


def _fit(
    train: Train,
    config: Any,
    folder: Path,
    num_workers: int,
    device: str,
    max_failures: int,
    name: str,
) -> None:
    # Ray's default of 2 s is how long a death goes unseen; it is read when Ray Train starts.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    start_ray(num_workers)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    use_gpu = device == "cuda"
    trainer = TorchTrainer(
        _rank,
        train_loop_config={
            "train": train,
            "config": config,
            "folder": str(folder),
            "device": device,
            "mark": name,
        },
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu),
        run_config=RunConfig(
            name=name,
            storage_path=str(folder / "ray"),
            failure_config=FailureConfig(
                max_failures=max_failures, controller_failure_limit=_STARTS
            ),
        ),
    )
    try:
        with _shown(folder), _interruptible():
            trainer.fit()
    except Exception as error:
        _raise_refusal(folder / _REFUSAL)
        raise _mistake_in(error, num_workers, use_gpu) or error from None


def _mistake_in(error: Exception, num_workers: int, use_gpu: bool) -> InputError | None:
    """The user's mistake behind an error of Ray Train, or None."""
    ranks = getattr(error, "worker_failures", {})
    told = [failure for failure in ranks.values() if isinstance(failure, InputError)]
    if told:
        return told[0]
    if "StartupTimeout" in type(getattr(error, "controller_failure", None)).__name__:
        return InputError(
            f"num_workers={num_workers} with use_gpu={use_gpu}: the cluster did not give that many "
            "machines in half an hour; use fewer ranks, or let the cluster grow larger"
        )
    return None


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """An interrupt inside is a `KeyboardInterrupt`, as everywhere.

    Ray Train takes SIGINT over, stops its ranks, ends the process itself with code 1, and never
    gives the signal back.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _shown(folder: Path) -> Iterator[None]:
    """Show the first rank's lines of metrics here while the body runs.

    The workers' own output stays in Ray's logs, where Ray mixes it with its own of every actor.
    """
    ended = threading.Event()
    known = [line["step"] for line in read_metrics(Folder(folder))]
    thread = threading.Thread(
        target=_follow, args=(folder, known[-1] if known else 0, ended), daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _follow(folder: Path, shown: int, ended: threading.Event) -> None:
    last = False
    while not last:
        last = ended.wait(0.5)
        lines = read_metrics(Folder(folder))
        newest = lines[-1]["step"] if lines else 0
        if newest < shown:
            print(f"the ranks were started again; going on after step {newest}", file=sys.stderr)
            shown = newest
        for line in lines:
            if line["step"] > shown:
                print(progress_line(line), file=sys.stderr, flush=True)
                shown = line["step"]


def _rank(settings: dict[str, Any]) -> None:
    """One rank under Ray Train.

    A user's mistake is written to the run folder before it is raised: the attempt that Ray starts
    next finds it and ends at once, in place of failing the same way again.
    """
    import ray.train
    import torch

    folder = Path(settings["folder"])
    require_shared(folder, settings["mark"])
    refusal = folder / _REFUSAL
    if refusal.exists():
        return
    if settings["device"] == "cpu":
        ranks_here = ray.train.get_context().get_local_world_size()
        torch.set_num_threads(max(1, cores() // ranks_here))
    try:
        settings["train"](settings["config"], settings["device"])
    except InputError as error:
        _write_refusal(refusal, error)
        raise


def require_shared(folder: Path, mark: str) -> None:
    """Raise `InputError` in a rank that does not see the run folder of the command."""
    try:
        found = (folder / _MARK).read_text(encoding="utf-8")
    except OSError:
        found = ""
    if found != mark:
        raise InputError(
            f"output={folder} on the machine {socket.gethostname()} is not the run folder that the "
            "command made; give a folder on a disk that all machines share"
        )


def _write_refusal(path: Path, error: InputError) -> None:
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(error.to_data()))
    draft.replace(path)


def _raise_refusal(path: Path) -> None:
    if path.exists():
        refusal = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
        raise InputError.from_data(refusal)


def _require_gpu(use_gpu: bool) -> None:
    if not use_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        raise InputError("use_gpu=True and this machine has no CUDA device; use use_gpu=False")
