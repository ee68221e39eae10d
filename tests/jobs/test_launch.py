"""Where training meets Ray Train: the run folder, what is refused before it, and what ranks say."""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass

import pytest

from cascade_model.errors import CorpusMismatch, InputError
from jobs import launch, pretrain


@dataclass(frozen=True, kw_only=True)
class Settings:
    corpus: str = "shards"
    output: str = "/runs/a"
    initial_model: str | None = None
    num_workers: int = 2


def test_paths_become_absolute_and_urls_and_gaps_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = launch.with_absolute_paths(Settings(corpus="s3://bucket/shards", output="run"))
    assert found == Settings(corpus="s3://bucket/shards", output=str(tmp_path / "run"))
    assert launch.with_absolute_paths(Settings()).corpus == str(tmp_path / "shards")


def test_a_run_folder_is_checked_but_not_made(tmp_path):
    folder = tmp_path / "a/b"
    assert launch.run_folder(str(folder)) == folder
    assert not folder.exists()
    (tmp_path / "file").touch()
    for output in ("s3://bucket/run", str(tmp_path / "file"), str(tmp_path / "file/run")):
        with pytest.raises(InputError, match=output):
            launch.run_folder(output)


def test_without_workers_training_runs_here(tmp_path):
    def train(config, device):
        return {"config": config, "device": device, "process": os.getpid()}

    summary = launch.launch(train, 7, folder=tmp_path, num_workers=0)
    assert summary == {"config": 7, "device": "cpu", "process": os.getpid()}
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there_is_refused_without_ray(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="use_gpu=True"):
        launch.require_room(0, use_gpu=True)
    launch.require_room(0, use_gpu=False)


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


def test_a_refusal_travels_as_its_own_class_and_is_shown_once(tmp_path):
    path = tmp_path / "refused.json"
    launch._write_refusal(path, CorpusMismatch("a is not b"))
    with pytest.raises(CorpusMismatch, match="a is not b"):
        launch._raise_refusal(path)
    launch._raise_refusal(path)
    assert not list(tmp_path.iterdir())


def test_only_the_folder_with_this_launchs_mark_is_the_run_folder(tmp_path):
    (tmp_path / "launched").write_text("launch-1")
    launch.require_shared(tmp_path, "launch-1")
    for folder, mark in ((tmp_path, "launch-2"), (tmp_path / "none", "launch-1")):
        with pytest.raises(InputError, match=r"output=.* on the machine .* all machines share"):
            launch.require_shared(folder, mark)


@pytest.mark.ray
def test_ranks_that_do_not_see_the_run_folder_are_told_in_one_sentence(
    ray_local, tmp_path, monkeypatch
):
    """The command's mark goes to a place where ranks, with the true name, do not find it."""
    monkeypatch.setattr(launch, "_MARK", "on-another-disk")
    with pytest.raises(InputError, match="all machines share"):
        launch.launch(never, None, folder=tmp_path, num_workers=1, max_failures=0)
    assert [path.name for path in tmp_path.iterdir()] == ["ray"]


def dying(config, device):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.ray
def test_a_death_without_a_restart_fails_the_run(ray_local, tmp_path):
    """The control of the tests that kill a rank and see the run end all the same."""
    from ray import cloudpickle
    from ray.train import TrainingFailedError

    here = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(here)
    try:
        with pytest.raises(TrainingFailedError):
            launch.launch(dying, None, folder=tmp_path, num_workers=1, max_failures=0)
    finally:
        cloudpickle.unregister_pickle_by_value(here)
    assert not (tmp_path / "summary.json").exists()


never = dict  # an importable callable: no rank may reach it


def test_metrics_are_shown_as_they_come_and_once(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    values = dict.fromkeys(("loss", "lr", "tokens_per_second", "grad_norm", "data_wait_rate"), 0.5)
    lines = [{"step": step, **values} for step in (1, 2, 3)]
    file.write_text(json.dumps(lines[0]) + "\n")
    with launch._shown(file):
        with file.open("a") as more:
            more.write("".join(json.dumps(line) + "\n" for line in lines[1:]))
        time.sleep(0.1)
    shown = capsys.readouterr().err
    assert [line.split()[1] for line in shown.splitlines()] == ["2", "3"]
