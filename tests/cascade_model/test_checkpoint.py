"""A checkpoint is whole or not there; damage is found before anything is opened."""

import json
import shutil

import pytest
import torch

from cascade_model import checkpoint
from cascade_model.errors import CheckpointMismatch

X = torch.arange(6.0).reshape(2, 3)


def trained(seed: int = 0, steps: int = 2):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        take_step(model, optimizer)
    return model, optimizer


def take_step(model, optimizer):
    optimizer.zero_grad()
    model(X).square().sum().backward()
    optimizer.step()


def save(folder, step, keep_last=9, seed=0):
    model, optimizer = trained(seed)
    facts = {"step": step, "samples": 8 * step, "model": {"num_layers": 2}}
    return checkpoint.save(folder, model, optimizer, facts, keep_last)


def told_newest(folder):
    told = []
    return checkpoint.newest(folder, told.append), told


def test_loaded_run_goes_on_with_the_same_bits(tmp_path):
    model, optimizer = trained()
    checkpoint.save(tmp_path, model, optimizer, {"step": 2, "samples": 16}, 1)
    other, other_optimizer = trained(seed=7, steps=0)
    found = checkpoint.newest_on_all_ranks(tmp_path, print)
    checkpoint.load(found, other, other_optimizer)
    for _ in range(3):
        take_step(model, optimizer)
        take_step(other, other_optimizer)
    assert (found.step, found.samples) == (2, 16)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_weights_alone_can_be_read(tmp_path):
    path = save(tmp_path, 2)
    model, _ = trained(seed=3, steps=0)
    checkpoint.load_weights(checkpoint.verify(path), model)
    assert torch.equal(model[0].weight, trained()[0][0].weight)


def test_newest_complete_checkpoint_is_found(tmp_path):
    save(tmp_path, 2)
    save(tmp_path, 10)
    found, told = told_newest(tmp_path)
    assert found.step == 10
    assert told == []


def test_no_checkpoint_is_no_error(tmp_path):
    assert told_newest(tmp_path / "missing") == (None, [])


def test_only_the_last_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_uncommitted_folder_does_not_count_as_kept(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "step_00000002" / "COMMIT").unlink()
    save(tmp_path, 3, keep_last=2)
    assert names(tmp_path) == ["step_00000001", "step_00000003"]


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_the_one_just_written_is_never_discarded(tmp_path, keep_last):
    for step in (1, 2, 9):
        save(tmp_path, step)
    flip_a_bit(tmp_path / "step_00000009")  # so the run goes on from step 2
    save(tmp_path, 3, keep_last=keep_last)
    kept = ["step_00000001", "step_00000002", "step_00000003"][-keep_last:]
    assert names(tmp_path) == [*kept, "step_00000009"]
    assert told_newest(tmp_path)[0].step == 3


class Fenced(Exception):
    """Raised by a check that says no."""


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_a_writer_that_may_not_write_leaves_everything_as_it_was(tmp_path, allowed):
    """The first check comes before anything is written, the second before the rename."""
    save(tmp_path, 1)
    flip_a_bit(save(tmp_path, 2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    left = iter(range(allowed))

    def check():
        if next(left, None) is None:
            raise Fenced

    model, optimizer = trained()
    facts = {"step": 2, "samples": 16}
    if allowed == 2:  # the control
        checkpoint.save(tmp_path, model, optimizer, facts, 9, check)
        assert told_newest(tmp_path)[0].step == 2
        return
    with pytest.raises(Fenced):
        checkpoint.save(tmp_path, model, optimizer, facts, 9, check)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_a_checkpoint_has_its_name_only_when_it_is_whole(tmp_path, monkeypatch):
    """Wherever the writer dies, what has a final name verifies."""
    save(tmp_path, 1)
    steps = []
    for name in ("_write", "fsync", "_discard", "_retain"):

        def dying(*args, name=name, real=getattr(checkpoint, name)):
            steps.append(name)
            if len(steps) == die_at:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(checkpoint, name, dying)
    die_at, died = 0, 0
    while True:
        steps.clear()
        die_at += 1
        try:
            save(tmp_path, 2)
        except KeyboardInterrupt:
            died += 1
        else:
            break
        for path in tmp_path.glob("step_*"):
            if ".tmp-" not in path.name:
                checkpoint.verify(path)
        shutil.rmtree(tmp_path / "step_00000002", ignore_errors=True)
    assert died > 8


def test_leftovers_of_a_dead_writer_are_removed(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step_00000002.tmp-abcd" / "state").mkdir(parents=True)
    assert checkpoint.newest_on_all_ranks(tmp_path, print).step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def shard(path):
    return next(path.glob("state/*.distcp"))


def flip_a_bit(path):
    data = bytearray(shard(path).read_bytes())
    data[len(data) // 2] ^= 1
    shard(path).write_bytes(data)


def cut(path):
    shard(path).write_bytes(shard(path).read_bytes()[:-1])


def hostile_index(path):
    (path / "state" / ".metadata").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")


def change_config(path):
    facts = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**facts, "samples": 0}))


def change_manifest(path):
    (path / "manifest.json").write_text('{"files": {}}')


DAMAGES = {
    "bit flipped": flip_a_bit,
    "cut": cut,
    "missing": lambda path: shard(path).unlink(),
    "surplus": lambda path: (path / "state" / "extra").write_text("x"),
    "hostile index": hostile_index,
    "facts changed": change_config,
    "manifest changed": change_manifest,
    "manifest missing": lambda path: (path / "manifest.json").unlink(),
    "not committed": lambda path: (path / "COMMIT").unlink(),
    "commit empty": lambda path: (path / "COMMIT").write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found_and_the_one_before_is_taken(tmp_path, damage):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    damage(newest)
    with pytest.raises(CheckpointMismatch, match="step_00000002"):
        checkpoint.verify(newest)
    found, told = told_newest(tmp_path)
    assert found.step == 1
    assert len(told) == 1
    assert "falling back" in told[0]


def test_commit_of_another_checkpoint_is_refused(tmp_path):
    first, second = save(tmp_path, 1), save(tmp_path, 2, seed=5)
    shutil.copy(first / "COMMIT", second / "COMMIT")
    with pytest.raises(CheckpointMismatch, match="sha256 recorded"):
        checkpoint.verify(second)


def test_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    flip_a_bit(save(tmp_path, 1))
    save(tmp_path, 1)
    assert told_newest(tmp_path)[0].step == 1


def test_different_fact_is_refused_with_both_values(tmp_path):
    found = checkpoint.verify(save(tmp_path, 1))
    with pytest.raises(CheckpointMismatch, match=r"model.num_layers=2 and .*model.num_layers=6"):
        checkpoint.require_same(found, {"model": {"num_layers": 6}})
    checkpoint.require_same(found, {"model": {"num_layers": 2}})
