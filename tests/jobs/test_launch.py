"""Where training meets Ray Train: what is refused before it, and how ranks stop, hang and die."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cascade_model.commit import Folder
from cascade_model.errors import InputError, Stopped, Unfinished
from cascade_model.shard_cache import CacheConfig
from jobs import launch, pretrain, run_folder
from jobs.launch import Placement
from jobs.terminal import Terminal


@dataclass(frozen=True, kw_only=True)
class Settings:
    corpus: str = "shards"
    output: str = "/runs/a"
    initial_model: str | None = None
    num_workers: int = 2
    cache: CacheConfig = field(default_factory=CacheConfig)


def test_paths_become_absolute_and_urls_and_gaps_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = launch.with_absolute_paths(Settings(corpus="s3://bucket/shards", output="run"))
    assert found == Settings(corpus="s3://bucket/shards", output=str(tmp_path / "run"))
    assert launch.with_absolute_paths(Settings()).corpus == str(tmp_path / "shards")
    own = CacheConfig(folder="cache", max_bytes=1 << 20)
    kept = launch.with_absolute_paths(Settings(cache=own)).cache
    assert kept == CacheConfig(folder=str(tmp_path / "cache"), max_bytes=1 << 20)


def test_a_path_from_home_is_the_same_for_the_checks_and_for_the_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    places = ("~/shards", "~", "runs/~/x", str(tmp_path / "a"))
    for place in places:
        assert Folder(launch.absolute(place)).url == Folder(place).url
    assert launch.absolute("~/shards") == str(tmp_path / "shards")


def test_without_workers_training_runs_here(tmp_path):
    def train(config, device, started):
        return {"config": config, "device": device, "owner": started.owner}

    here = Placement(num_workers=0)
    summary = launch.launch(train, 7, folder=Folder(tmp_path), placement=here)
    assert summary == {"config": 7, "device": "cpu", "owner": None}
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there_is_refused_without_ray(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="use_gpu=True"):
        launch.require_room(Placement(num_workers=0, use_gpu=True))
    launch.require_room(Placement(num_workers=0))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_workers": -2}, "num_workers=-2"),
        ({"num_workers": 2, "min_workers": 3}, "min_workers=3 must be in 1..2"),
        ({"num_workers": 2, "min_workers": 0}, "min_workers=0 must be in 1..2"),
        ({"num_workers": 0, "label_selector": {"a": "b"}}, "num_workers=0 uses no Ray"),
        ({"num_workers": 1, "max_failures": -2}, "max_failures=-2"),
        ({"num_workers": 1, "collective_timeout_s": 0.0}, "collective_timeout_s=0.0"),
    ],
)
def test_placements_that_cannot_be_are_refused(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        Placement(**settings)


def test_sizes_are_every_number_of_ranks_that_a_run_may_have():
    assert list(Placement(num_workers=4, min_workers=2).sizes) == [2, 3, 4]
    assert list(Placement(num_workers=4).sizes) == [4]
    assert list(Placement(num_workers=0).sizes) == [1]


@pytest.mark.ray
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [(["--num-workers", "99", "--use-gpu", "True"], "99 GPUs"), (["--num-workers", "99"], "CPUs")],
    ids=["gpu", "cpu"],
)
def test_more_ranks_than_there_is_room_for_leave_nothing_behind(
    ray_local, tiny_corpus, tmp_path, capsys, settings, sentence
):
    words = ["--corpus", tiny_corpus, "--output", str(tmp_path / "run"), *settings]
    words += ["--trainer.sequences-per-step", "99", "--trainer.sequences-per-forward", "1"]
    assert pretrain.main(words) == 2
    shown = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert "num_workers=99" in shown
    assert sentence in shown
    assert not (tmp_path / "run").exists()


@pytest.fixture
def ray_knows_this_file(ray_local):
    """Workers cannot import a test file: its functions travel by value."""
    from ray import cloudpickle

    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield ray_local
    cloudpickle.unregister_pickle_by_value(module)


never = dict  # an importable callable: no rank may reach it


@pytest.mark.ray
def test_ranks_that_do_not_see_the_run_folder_are_told_in_one_sentence(
    ray_local, tmp_path, monkeypatch
):
    """The command's mark goes to a place where ranks, with the true name, do not find it."""
    monkeypatch.setattr(run_folder, "_MARK", "on-another-disk")
    alone = Placement(num_workers=1, max_failures=0)
    with pytest.raises(InputError, match="all machines share"):
        launch.launch(never, None, folder=Folder(tmp_path), placement=alone)
    assert list(tmp_path.iterdir()) == []


def dying(config, device, started):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.ray
def test_a_death_without_a_restart_fails_the_run(ray_knows_this_file, tmp_path):
    """The control of the tests that kill a rank and see the run end all the same."""
    alone = Placement(num_workers=1, max_failures=0)
    with pytest.raises(Unfinished, match=r"rank (0 )?was lost .*, which begins anew, as none"):
        launch.launch(dying, None, folder=Folder(tmp_path), placement=alone)
    assert list(tmp_path.iterdir()) == []


def test_a_death_while_the_ranks_start_is_a_loss_too():
    """Ray Train's controller then fails itself, as it does not watch over them yet."""
    from ray.exceptions import ActorDiedError
    from ray.train import ControllerError

    rank, failure = launch._lost(ControllerError(ActorDiedError()))
    assert (rank, type(failure)) == ("a rank", ActorDiedError)
    assert launch._lost(ControllerError(ValueError("a fault of ours"))) is None


def faulty(config, device, started):
    raise ZeroDivisionError("a fault of ours")


@pytest.mark.ray
def test_a_fault_in_a_rank_stays_a_fault_with_its_traceback(ray_knows_this_file, tmp_path):
    from ray.train import TrainingFailedError

    alone = Placement(num_workers=1, max_failures=0)
    with pytest.raises(TrainingFailedError, match="a fault of ours"):
        launch.launch(faulty, None, folder=Folder(tmp_path), placement=alone)


def stepping(folder, device, started):
    """Ranks in step as the trainer has them: a reason of one is a reason of all."""
    import torch
    import torch.distributed as dist

    from cascade_model import parallel

    step = 0
    while True:
        step += 1
        wish = started.stop_wanted()
        asked = parallel.sum_over_ranks(torch.tensor(float(wish is not None)))
        Path(folder, f"rank-{dist.get_rank()}").write_text(f"{os.getpid()} {step}")
        if asked > 0:
            raise Stopped.at(step, str(parallel.first_of(wish)))
        time.sleep(0.05)


def pids(folder):
    found = {}
    for number in (0, 1):
        with contextlib.suppress(OSError, ValueError):
            found[number] = int((folder / f"rank-{number}").read_text().split()[0])
    return found


def when_at_work(folder, act, count=2):
    """Call `act(pids of the ranks)` in a thread, once all of them have taken a step."""

    def watch():
        deadline = time.monotonic() + 240
        while len(found := pids(folder)) < count:
            if time.monotonic() > deadline:  # what waits for the act ends by the test's own limit
                return
            time.sleep(0.1)
        act(found)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.ray
def test_sigterm_to_the_command_lets_the_ranks_save_and_ends_in_one_sentence(
    ray_knows_this_file, tmp_path, capsys
):
    before = signal.getsignal(signal.SIGTERM)
    thread = when_at_work(tmp_path, lambda found: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match=r"stopped at step \d+ \(SIGTERM\); run the same") as caught:
        launch.launch(
            stepping, str(tmp_path), folder=Folder(tmp_path), placement=Placement(num_workers=2)
        )
    thread.join()
    assert caught.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert "SIGTERM: saving" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rank-0", "rank-1"]
    steps = {(tmp_path / f"rank-{number}").read_text().split()[1] for number in (0, 1)}
    assert len(steps) == 1  # both at the same boundary


@pytest.mark.ray
def test_a_rank_that_stands_still_ends_the_run_with_its_cause_and_leaves_no_orphan(
    ray_knows_this_file, tmp_path
):
    stopped = {}

    def stop(found):
        stopped.update(found, at=time.monotonic())
        os.kill(found[1], signal.SIGSTOP)

    two = Placement(num_workers=2, max_failures=0, collective_timeout_s=5.0)
    thread = when_at_work(tmp_path, stop)
    try:
        with pytest.raises(Unfinished, match=r"rank [01] was lost .* max_failures=0"):
            launch.launch(stepping, str(tmp_path), folder=Folder(tmp_path), placement=two)
        thread.join()
        assert time.monotonic() - stopped["at"] < 60
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and any(is_alive(stopped[n]) for n in (0, 1)):
            time.sleep(0.2)
        assert not any(is_alive(stopped[number]) for number in (0, 1))
    finally:
        with contextlib.suppress(ProcessLookupError, KeyError):
            os.kill(stopped[1], signal.SIGKILL)


def preempted_once(folder, device, started):
    """Steps; the first time one rank hears from Ray that its machine is taken away."""
    import ray.train

    mark = Path(folder, "preempted")
    if not mark.exists():
        import torch.distributed as dist
        from ray.train.v2._internal.execution.context import get_train_context
        from ray.train.v2.api.preemption import PreemptionInfo

        dist.barrier()
        if ray.train.get_context().get_world_rank() == 1:
            mark.write_text("once")
            get_train_context().preemption_context.preemption_info = PreemptionInfo(
                deadline_ms=None, preempted_node_to_ranks={"a": [1]}
            )
        return stepping(folder, device, started)
    if ray.train.get_context().get_world_rank() == 0:
        Path(folder, "summary.json").write_text('{"ended": true}')
    return {}


@pytest.mark.ray
@pytest.mark.slow
def test_ranks_of_a_machine_that_is_taken_away_save_and_start_elsewhere(
    ray_knows_this_file, tmp_path, capsys
):
    summary = launch.launch(
        preempted_once, str(tmp_path), folder=Folder(tmp_path), placement=Placement(num_workers=2)
    )
    assert summary == {"ended": True}
    told = capsys.readouterr().err
    assert "the machine of rank 1 is being taken away" in told
    assert "starting again on the other machines" in told


def test_metrics_are_shown_as_they_come_and_once(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    values = dict.fromkeys(("loss", "lr", "tokens_per_second", "grad_norm", "data_wait_rate"), 0.5)
    lines = [{"step": step, **values} for step in (1, 2, 3)]
    file.write_text(json.dumps(lines[0]) + "\n")
    terminal = Terminal(Folder(tmp_path))
    for line in lines[1:]:
        with file.open("a") as more:
            more.write(json.dumps(line) + "\n")
        terminal.show()
        terminal.show()
    shown = capsys.readouterr().err
    assert [line.split()[1] for line in shown.splitlines()] == ["2", "3"]
    file.write_text(json.dumps(lines[0]) + "\n")  # a rank died and went on from a checkpoint
    terminal.show(is_last=True)
    assert "the ranks were started again; going on after step 1" in capsys.readouterr().err
