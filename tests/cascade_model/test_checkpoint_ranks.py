"""Two ranks save one checkpoint, any number of ranks loads it, and all agree how a save went."""

import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cascade_model import checkpoint, checkpoint_storage, parallel
from cascade_model.checkpoint_storage import Writer
from cascade_model.commit import Folder
from tests.cascade_model.checkpoint_making import X, open_run, told_newest
from tests.two_ranks import run_on_two_ranks


def made(seed: int):
    """A model whose second layer has a single row, of which one of two ranks holds nothing."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1))


def adam_of(model):
    groups = [{"params": [p]} for p in model.parameters()]
    return torch.optim.AdamW(groups, lr=0.1)


def step(model, adam, rows):
    adam.zero_grad()
    model(X[rows]).square().sum().backward()
    adam.step()


def sharded(seed: int):
    model = made(seed)
    fully_shard(model[0])
    fully_shard(model)
    assert isinstance(model[1].weight, DTensor)
    return model, adam_of(model)


def whole(model, adam) -> dict[str, torch.Tensor]:
    """Everything that training goes on from, on every rank."""
    tensors = {}
    for name, parameter in model.named_parameters():
        held = adam.state[parameter]
        for key, value in {"weight": parameter.detach(), **held}.items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            tensors[f"{name}/{key}"] = full.clone()
    return tensors


def keep(folder, name, model, adam):
    tensors = whole(model, adam)
    if parallel.rank() == 0:
        save_file(tensors, Path(folder, name))


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def write_for_longer_than_the_bound(rank, folder):
    """The second rank writes for three times as long as a rank may stand still."""
    model, adam = sharded(seed=1)
    checkpoints = open_run(f"{folder}/checkpoints", timeout=2.0)
    inner = checkpoint_storage._write

    def slow(*args):
        time.sleep(6.0 * rank)
        inner(*args)

    checkpoint_storage._write = slow
    assert checkpoints.save(model, adam, {"step": 1, "samples": 1}).wait()


def test_the_bound_is_for_standing_still_and_not_for_writing(tmp_path):
    run_on_two_ranks(write_for_longer_than_the_bound, tmp_path)
    assert checkpoint.newest(Folder(tmp_path / "checkpoints"), pytest.fail).step == 1


def on_two(rank, folder):
    """Load what one rank saved, save it as step 2, train on, and save step 4."""
    model, adam = sharded(seed=1)
    checkpoints = open_run(f"{folder}/checkpoints")
    checkpoint.load(checkpoints.newest(), model, adam)
    keep(folder, "loaded", model, adam)
    assert checkpoints.save(model, adam, {"step": 2, "samples": 2}).wait()
    for _ in range(2):
        step(model, adam, [rank])
    keep(folder, "step_4", model, adam)
    saving = checkpoints.save(model, adam, {"step": 4, "samples": 4})
    step(model, adam, [rank])
    assert saving.wait()
    keep(folder, "step_5", model, adam)


def on_two_again(rank, folder):
    """Go on from step 4."""
    model, adam = sharded(seed=2)
    checkpoint.load(open_run(f"{folder}/checkpoints").newest(), model, adam)
    step(model, adam, [rank])
    keep(folder, "step_5_again", model, adam)


def test_one_to_two_to_one_and_on_with_the_same_bits(tmp_path):
    model = made(seed=0)
    adam = adam_of(model)
    for _ in range(2):
        step(model, adam, [0, 1])
    open_run(tmp_path / "checkpoints").save(model, adam, {"step": 1, "samples": 1}).wait()
    run_on_two_ranks(on_two, tmp_path)
    assert equal(load_file(tmp_path / "loaded"), whole(model, adam))
    found, told = told_newest(tmp_path / "checkpoints")
    assert (found.step, sorted(found.files), told) == (
        4,
        ["rank_00000.safetensors", "rank_00001.safetensors"],
        [],
    )
    for name, at in (("loaded", "step_00000002"), ("step_4", "step_00000004")):
        other = made(seed=3)
        other_adam = adam_of(other)
        where = tmp_path / "checkpoints" / at
        checkpoint.load(checkpoint.verify(where), other, other_adam)
        assert equal(load_file(tmp_path / name), whole(other, other_adam))
    run_on_two_ranks(on_two_again, tmp_path)
    assert equal(load_file(tmp_path / "step_5"), load_file(tmp_path / "step_5_again"))


def refused_on_the_second(rank, folder):
    """The second rank alone finds the disk full; both must know, and go on."""
    model, adam = sharded(seed=0)
    told: list[str] = []
    checkpoints = open_run(f"{folder}/checkpoints", tell=told.append)
    results = []
    for number in (1, 2, 3):
        if (rank, number) == (1, 2):
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        results.append(checkpoints.save(model, adam, {"step": number, "samples": 1}).wait())
        if (rank, number) == (1, 2):
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    text = f"{results} {checkpoints.failures} {len(told)}"
    Path(folder, f"{rank}.txt").write_text(text)
    if rank == 0:
        assert "rank_00001" in told[0] or "File too large" in told[0]


def test_all_ranks_agree_that_a_save_failed_and_the_first_tells(tmp_path):
    run_on_two_ranks(refused_on_the_second, tmp_path)
    assert (tmp_path / "0.txt").read_text() == "[True, False, True] 1 1"
    assert (tmp_path / "1.txt").read_text() == "[True, False, True] 1 0"
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000001", "step_00000003"]


def killed_in_a_save(rank, folder):
    """The second rank dies with its data half written; the first must not wait for ever."""
    model, adam = sharded(seed=0)
    checkpoints = open_run(f"{folder}/checkpoints")
    assert checkpoints.save(model, adam, {"step": 1, "samples": 1}).wait()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # with which the parent ends who is left
    write = Writer.write_data

    def dying(self, plan, planner):
        done = write(self, plan, planner)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    Writer.write_data = dying
    saving = checkpoints.save(model, adam, {"step": 2, "samples": 2})
    began = time.monotonic()
    try:
        saving.wait()
    except RuntimeError as error:
        Path(folder, "first.txt").write_text(f"{type(error).__name__} {error}")
    Path(folder, "seconds.txt").write_text(str(time.monotonic() - began))
    os._exit(0)


def test_a_rank_that_dies_in_a_save_leaves_the_checkpoint_before_it(tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        run_on_two_ranks(killed_in_a_save, tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "seconds.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert float((tmp_path / "seconds.txt").read_text()) < 20
    assert (tmp_path / "first.txt").exists()
    found, told = told_newest(tmp_path / "checkpoints")
    assert (found.step, told) == (1, [])  # the first rank has cleared what was begun
