"""A checkpoint is whole or not there, and training goes on with the same bits."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cascade_model import checkpoint
from cascade_model.checkpoint import Keep
from cascade_model.checkpoint_storage import Writer
from cascade_model.commit import Folder
from cascade_model.errors import CheckpointMismatch, Unfinished
from cascade_model.lease import LeaseLost, begin, hold
from cascade_model.staging import HostCopy
from tests.cascade_model.checkpoint_making import (
    attempt,
    open_run,
    same_state,
    save,
    take_step,
    told_newest,
    trained,
)

ROOT = Path(__file__).parents[2]
FACTS = {"step": 2, "samples": 16}


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_loaded_run_goes_on_with_the_same_bits(tmp_path):
    run, other = trained(), trained(seed=7, steps=0)
    assert open_run(tmp_path).save(*run, FACTS).wait()
    found = open_run(tmp_path).newest()
    checkpoint.load(found, *other)
    assert same_state(run, other)
    for _ in range(3):
        take_step(*run)
        take_step(*other)
    assert (found.step, found.samples) == (2, 16)
    assert same_state(run, other)


def test_a_parameter_that_was_moved_less_often_keeps_its_own_count_of_steps(tmp_path):
    """As an expert that got no token; its bias correction would be another's otherwise."""
    run, other = trained(), trained(seed=7, steps=0)
    run[1].state[run[0][0].bias]["step"] -= 1
    open_run(tmp_path).save(*run, FACTS).wait()
    checkpoint.load(open_run(tmp_path).newest(), *other)
    assert [float(other[1].state[p]["step"]) for p in other[0].parameters()] == [2, 1, 2, 2]


def test_a_run_that_took_no_step_can_be_saved(tmp_path):
    run, other = trained(steps=0), trained(seed=7, steps=1)
    open_run(tmp_path).save(*run, FACTS).wait()
    checkpoint.load(open_run(tmp_path).newest(), *other)
    take_step(*run)
    take_step(*other)
    assert same_state(run, other)


def test_weights_alone_can_be_read(tmp_path):
    save(tmp_path, 2)
    model, _ = trained(seed=3, steps=0)
    checkpoint.load_weights(told_newest(tmp_path)[0], model)
    assert torch.equal(model[0].weight, trained()[0][0].weight)


@contextmanager
def held_back(monkeypatch):
    """Nothing is written until the event that this gives is set."""
    go, write = threading.Event(), Writer.write_data

    def waiting(self, plan, planner):
        assert go.wait(30)
        return write(self, plan, planner)

    monkeypatch.setattr(Writer, "write_data", waiting)
    yield go
    go.set()


class Alias(HostCopy):
    """The control: no copy at all."""

    def _buffer(self, like):
        return like


@pytest.mark.parametrize("copy", [HostCopy, Alias])
def test_what_is_saved_is_the_state_at_the_call(tmp_path, monkeypatch, copy):
    run, other = trained(), trained(seed=7, steps=0)
    with held_back(monkeypatch) as go:
        checkpoints = open_run(tmp_path)
        checkpoints._stager = copy()
        saving = checkpoints.save(*run, FACTS)
        for _ in range(3):
            take_step(*run)
        assert told_newest(tmp_path)[0] is None
        go.set()
        assert saving.wait()
    checkpoint.load(told_newest(tmp_path)[0], *other)
    assert same_state(trained(), other) is (copy is HostCopy)


def test_a_save_waits_for_the_one_before_it_and_uses_its_memory_again(tmp_path, monkeypatch):
    run = trained()
    with held_back(monkeypatch) as go:
        checkpoints = open_run(tmp_path)
        checkpoints.save(*run, {"step": 1, "samples": 8})
        places = {name: part.data.data_ptr() for name, part in checkpoints._stager._parts.items()}
        second = threading.Thread(target=checkpoints.save, args=(*run, FACTS))
        second.start()
        second.join(0.3)
        assert second.is_alive()
        go.set()
        second.join(30)
        checkpoints.finish()
    parts = checkpoints._stager._parts
    assert {name: part.data.data_ptr() for name, part in parts.items()} == places
    assert len(places) == len(set(places.values())) == 13
    assert told_newest(tmp_path)[0].step == 2


def test_no_checkpoint_is_no_error(tmp_path):
    assert told_newest(tmp_path / "missing") == (None, [])
    assert open_run(tmp_path / "missing").newest() is None


def test_the_newest_of_several_is_found(tmp_path):
    for step in (2, 10):
        save(tmp_path, step)
    found, told = told_newest(tmp_path)
    assert (found.step, told) == (10, [])


def test_only_what_the_rule_keeps_stays(tmp_path):
    checkpoints = open_run(tmp_path, keep=Keep(last=2, every=4, best=1))
    losses = {1: 9.0, 2: 1.0, 3: 8.0, 4: 7.0, 5: None, 6: 5.0, 7: float("nan")}
    for step, loss in losses.items():
        checkpoints.save(*trained(), {"step": step, "samples": step}, loss).wait()
    kept = [int(name.removeprefix("step_")) for name in names(tmp_path)]
    assert kept == [2, 4, 6, 7]  # best, every fourth, last two


def test_an_uncommitted_folder_does_not_count_as_kept(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "step_00000002" / "COMMIT").unlink()
    save(tmp_path, 3, keep=Keep(last=2))
    assert names(tmp_path) == ["step_00000001", "step_00000003"]


@pytest.mark.parametrize("last", [1, 2, 3])
def test_the_one_just_written_is_never_discarded(tmp_path, last):
    for step in (1, 2, 9):
        save(tmp_path, step)
    flip_a_bit(tmp_path / "step_00000009")  # so the run goes on from step 2
    checkpoints = open_run(tmp_path, keep=Keep(last=last))
    assert checkpoints.newest().step == 2
    checkpoints.save(*trained(), {"step": 3, "samples": 24}).wait()
    kept = ["step_00000001", "step_00000002", "step_00000003"][-last:]
    assert names(tmp_path) == [*kept, "step_00000009"]
    assert told_newest(tmp_path)[0].step == 3


def test_a_damaged_one_takes_no_place_among_those_that_are_kept(tmp_path):
    for step in (2, 4):
        save(tmp_path, step)
    flip_a_bit(tmp_path / "step_00000004")
    checkpoints = open_run(tmp_path, keep=Keep(last=2))
    assert checkpoints.newest().step == 2
    checkpoints.save(*trained(), {"step": 5, "samples": 40}).wait()
    assert names(tmp_path) == ["step_00000002", "step_00000005"]


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    save(tmp_path, 1)
    flip_a_bit(tmp_path / "step_00000001")
    save(tmp_path, 1)
    assert told_newest(tmp_path)[0].step == 1
    attempt(tmp_path / "step_00000001")  # the damaged attempt is gone


class Fenced(Exception):
    """Raised by a check that says no."""


@pytest.mark.parametrize("allowed", [0, 1, 2, 3])
def test_a_writer_that_may_not_write_leaves_everything_as_it_was(tmp_path, allowed):
    """Asked before anything is written, before COMMIT, and before another's COMMIT is replaced."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    flip_a_bit(tmp_path / "step_00000002")
    before, left = contents(tmp_path), iter(range(allowed))

    def check():
        if next(left, None) is None:
            raise Fenced

    saving = open_run(tmp_path, check=check).save(*trained(), FACTS)
    if allowed == 3:  # the control
        assert saving.wait()
        assert told_newest(tmp_path)[0].step == 2
        return
    with pytest.raises(Fenced):
        saving.wait()
    assert contents(tmp_path) == before


def test_an_attempt_that_was_replaced_cannot_commit(tmp_path):
    """With a real lease; its first save is the control."""
    run = trained()
    with hold(Folder(tmp_path)) as owner:
        zombie = begin(Folder(tmp_path), owner)
        folder = tmp_path / "checkpoints"
        checkpoints = open_run(folder, check=zombie.check)
        assert checkpoints.save(*run, {"step": 1, "samples": 8}).wait()
        begin(Folder(tmp_path), owner)
        before, saving = contents(folder), checkpoints.save(*run, FACTS)
        with pytest.raises(LeaseLost, match="taken over"):
            saving.wait()
        with pytest.raises(LeaseLost):
            checkpoints.finish()
        assert contents(folder) == before
        with pytest.raises(LeaseLost):
            checkpoints.newest()


def test_a_score_that_comes_later_changes_nothing_else(tmp_path):
    for step, score in ((1, 0.5), (2, None), (3, 2.0)):
        save(tmp_path, step, score=score)
    before = contents(tmp_path)
    checkpoints = open_run(tmp_path, Keep(last=1, best=1))
    checkpoints.rate(checkpoint.verify(tmp_path / "step_00000002"), 0.25)
    changed = {path for path, data in contents(tmp_path).items() if before.get(path) != data}
    assert changed == {tmp_path / "step_00000002" / "COMMIT"}
    assert len(contents(tmp_path)) == len(before)
    assert checkpoint.verify(tmp_path / "step_00000002").score == 0.25
    assert checkpoints.save(*trained(), {"step": 4, "samples": 32}).wait()
    assert names(tmp_path) == ["step_00000002", "step_00000004"]


def test_a_score_that_cannot_be_written_is_told_and_one_that_is_none_is_not_written(tmp_path):
    save(tmp_path, 1)
    before, told = contents(tmp_path), []
    found = checkpoint.verify(tmp_path / "step_00000001")
    checkpoints = open_run(tmp_path, tell=told.append)
    checkpoints.rate(found, float("nan"))
    assert (contents(tmp_path), told) == (before, [])
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    checkpoints.rate(found, 0.5)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert contents(tmp_path) == before
    assert "step_00000001 could not be given its held-out loss" in told[0]


def test_an_attempt_that_was_replaced_cannot_rate(tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    found = checkpoint.verify(folder / "step_00000001")
    with hold(Folder(tmp_path)) as owner:
        zombie = begin(Folder(tmp_path), owner)
        begin(Folder(tmp_path), owner)
        with pytest.raises(LeaseLost):
            open_run(folder, check=zombie.check).rate(found, 0.5)
    assert checkpoint.verify(folder / "step_00000001").score is None


def test_leftovers_of_a_dead_writer_are_removed(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "step_00000002" / "COMMIT").unlink()
    dead = attempt(tmp_path / "step_00000002").rename(
        tmp_path / "step_00000001" / "00000001-0123456789abcdef-0001"
    )
    save(tmp_path, 3)
    (tmp_path / "step_00000003" / "COMMIT").unlink()
    assert open_run(tmp_path).newest().step == 1
    assert names(tmp_path) == ["step_00000001"]
    assert not dead.exists()


def test_what_another_attempt_leaves_beside_does_no_harm(tmp_path):
    save(tmp_path, 1)
    beside = tmp_path / "step_00000001" / "00000000-0123456789abcdef-0001"
    shutil.copytree(attempt(tmp_path / "step_00000001"), beside)
    flip_a_bit(tmp_path / "step_00000001", beside)
    assert told_newest(tmp_path)[0].step == 1
    flip_a_bit(tmp_path / "step_00000001")  # the control: in the attempt that counts it does
    with pytest.raises(CheckpointMismatch):
        checkpoint.verify(tmp_path / "step_00000001")


def attempt_that_counts(path) -> Path:
    return path / json.loads((path / "COMMIT").read_text())["attempt"]


def flip_a_bit(path, folder=None):
    file = (folder or attempt_that_counts(path)) / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@contextmanager
def largest_file(size):
    """A limit on the size of files, which writing past meets as it meets a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 1000, 2000])
def test_a_full_disk_fails_the_save_in_one_line_and_training_goes_on(tmp_path, size):
    told, run = [], trained()
    checkpoints = open_run(tmp_path, tell=told.append)
    assert checkpoints.save(*run, {"step": 1, "samples": 8}).wait()
    before = contents(tmp_path)
    with largest_file(size):  # data, data, manifest
        assert not checkpoints.save(*run, FACTS).wait()
    assert contents(tmp_path) == before
    assert checkpoints.failures == 1
    [line] = told
    for words in ("step_00000002 could not be saved", "File too large", "training goes on"):
        assert words in line
    with pytest.raises(Unfinished, match="run the same command again"):
        checkpoints.finish()
    assert checkpoints.save(*run, {"step": 3, "samples": 24}).wait()
    checkpoints.finish()
    assert told_newest(tmp_path)[0].step == 3


DYING = """
import os, signal, sys

from cascade_model.commit import Folder
from tests.cascade_model.checkpoint_making import save

folder, point = sys.argv[1:]
names = {"data": "rank_00000.safetensors", "manifest": "manifest.json", "commit": "COMMIT"}

def deadly(real, is_after):
    def act(self, name, *rest):
        is_here = names[point.partition(" ")[2]] == name and point.startswith("after") == is_after
        result = real(self, name, *rest) if is_after or not is_here else None
        if is_here:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return act

save(folder, 1)
for name in ("put", "create"):
    real = getattr(Folder, name)
    setattr(Folder, name, deadly(deadly(real, False), True))
save(folder, 2)
"""


@pytest.mark.parametrize(
    ("point", "newest"),
    [
        ("before data", 1),
        ("after data", 1),
        ("after manifest", 1),
        ("before commit", 1),
        ("after commit", 2),
    ],
)
def test_a_process_that_is_killed_in_a_save_leaves_the_one_before_or_the_new_one(
    tmp_path, point, newest
):
    words = [sys.executable, "-c", DYING, str(tmp_path), point]
    assert subprocess.run(words, cwd=ROOT).returncode == -signal.SIGKILL
    assert told_newest(tmp_path)[0].step == newest
    assert open_run(tmp_path).newest().step == newest
    assert len(names(tmp_path)) == newest


def test_a_fault_of_ours_is_not_taken_for_the_disks(tmp_path, monkeypatch):
    def wrong(self, plan, planner):
        raise ZeroDivisionError

    checkpoints = open_run(tmp_path)
    monkeypatch.setattr(Writer, "write_data", wrong)
    saving = checkpoints.save(*trained(), FACTS)
    with pytest.raises(ZeroDivisionError):
        saving.wait()


def test_optimiser_state_that_has_no_place_is_refused(tmp_path):
    model, _ = trained()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    take_step(model, optimizer)
    with pytest.raises(ValueError, match="momentum_buffer"):
        open_run(tmp_path).save(model, optimizer, FACTS)


def test_other_tensors_are_refused_with_both_shapes(tmp_path):
    save(tmp_path, 1)
    found, (model, adam) = told_newest(tmp_path)[0], trained()
    for other in (torch.nn.Linear(3, 5), torch.nn.Linear(3, 4).to(torch.bfloat16)):
        wrong = torch.nn.Sequential(other, model[1])
        with pytest.raises(CheckpointMismatch, match=r"model/0\.bias as \('F32', \(4,\)\)"):
            checkpoint.load_weights(found, wrong)
    with pytest.raises(CheckpointMismatch, match=r"exp_avg/0\.bias.*None"):
        checkpoint.load(found, model, torch.optim.AdamW(model[1].parameters()))
    checkpoint.load(found, model, adam)


def test_a_different_fact_is_refused_with_both_values(tmp_path):
    save(tmp_path, 1)
    found = told_newest(tmp_path)[0]
    with pytest.raises(CheckpointMismatch, match=r"model.num_layers=2 and .*model.num_layers=6"):
        checkpoint.require_same(found, {"model": {"num_layers": 6}})
    checkpoint.require_same(found, {"model": {"num_layers": 2}})


def test_a_tied_weight_is_saved_once(tmp_path):
    model, _ = trained()
    model.tied = model[0]
    adam = torch.optim.AdamW(model.parameters())
    open_run(tmp_path).save(model, adam, FACTS).wait()
    assert not [name for name in told_newest(tmp_path)[0].index if "tied" in name]


def test_data_files_are_safetensors_for_everybody(tmp_path):
    from safetensors.torch import load_file

    save(tmp_path, 1)
    tensors = load_file(attempt(tmp_path / "step_00000001") / "rank_00000.safetensors")
    model, adam = trained()
    assert torch.equal(tensors["model/0.weight"], model[0].weight)
    assert torch.equal(tensors["exp_avg/1.bias"], adam.state[model[1].bias]["exp_avg"])


def test_checkpoints_in_memory_are_as_those_on_a_disk(tmp_path):
    url = f"memory://{tmp_path.name}/checkpoints"
    for step in (1, 2, 3):
        save(url, step, keep=Keep(last=2))
    assert [found.step for found in (told_newest(url)[0],)] == [3]
    assert Folder(url).list() == ["step_00000002", "step_00000003"]
