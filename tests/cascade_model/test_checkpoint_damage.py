"""200 damaged checkpoints, drawn by a seed: each is found, and the run falls back past it.

What hashes without a key cannot find is named too: numbers that were changed by somebody who then
recomputed every hash. They are numbers; nothing that is read can run code.
"""

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from cascade_model import checkpoint, checkpoint_reading
from cascade_model.checkpoint_files import layout
from cascade_model.commit import Folder
from cascade_model.errors import CheckpointMismatch
from tests.cascade_model.checkpoint_damage import (
    FORGERIES,
    HIDDEN,
    PLAIN,
    data_of,
    with_manifest,
)
from tests.cascade_model.checkpoint_making import open_run, save, told_newest, trained
from tests.two_ranks import run_on_two_ranks

SEED = 20261122
KINDS = {**PLAIN, **HIDDEN}


def two_steps(rank, folder):
    """Steps 1 and 2, each of two files."""
    checkpoints = open_run(f"{folder}/checkpoints")
    for step in (1, 2):
        model, adam = trained(seed=step, steps=step)
        checkpoints.save(model, adam, {"step": step, "samples": 8 * step}).wait()


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A run of two checkpoints that are whole."""
    folder = tmp_path_factory.mktemp("sound")
    run_on_two_ranks(two_steps, folder)
    return folder / "checkpoints"


def damaged(sound, folder, kind, damage, number):
    """A copy of the run whose newest checkpoint is damaged."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder)
    damage(folder / "step_00000002", random.Random(f"{SEED} {kind} {number}"))
    return folder


def test_the_copy_itself_is_whole(sound):
    found, told = told_newest(sound)
    assert (found.step, len(found.files), told) == (2, 2, [])


class Overtaken(Folder):
    """A step's folder whose writer commits behind the reader's first listing."""

    def files(self):
        before = list(super().files())
        for name, text in self.late.items():
            target = Path(self.path(name))
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(text)
        self.late.clear()
        return iter(before)


def test_a_reader_who_looks_while_a_save_is_committed_sees_it_whole(sound, tmp_path):
    step = tmp_path / "step_00000002"
    shutil.copytree(sound / step.name, step)
    files = [path for path in step.rglob("*") if path.is_file()]
    folder = Overtaken(str(step))
    folder.late = {str(path.relative_to(step)): path.read_bytes() for path in files}
    for path in files[1:]:
        path.unlink()
    assert checkpoint_reading.verify(folder).step == 2
    assert folder.late == {}


def test_each_of_200_damages_is_found_and_the_run_falls_back(sound, tmp_path):
    kinds, counts = list(KINDS.items()), Counter()
    for number in range(200):
        kind, damage = kinds[number % len(kinds)]
        folder = damaged(sound, tmp_path / "run", kind, damage, number)
        found, told = told_newest(folder)
        assert found is not None, (kind, number)
        assert found.step == 1, (kind, number)
        assert len(told) == 1, (kind, number, told)
        assert "falling back" in told[0]
        assert "step_00000002" in told[0]
        checkpoint.load(found, *trained(seed=9, steps=0))
        counts[kind] += 1
    assert sum(counts.values()) == 200
    assert min(counts.values()) >= 8


@pytest.mark.parametrize("kind", KINDS)
def test_where_all_are_damaged_no_run_begins_anew(sound, tmp_path, kind):
    """But where no COMMIT is left, there is nothing to lose."""
    folder = damaged(sound, tmp_path / "run", kind, KINDS[kind], 0)
    shutil.rmtree(folder / "step_00000001")
    try:
        found, error = open_run(folder).newest(), None
    except CheckpointMismatch as raised:
        found, error = None, str(raised)
    assert found is None
    assert (error is not None) == (folder / "step_00000002" / "COMMIT").exists()
    assert (folder / "step_00000002").exists() == (error is not None)


def test_the_refusal_says_how_many_where_and_what_helps(sound, tmp_path):
    folder = damaged(sound, tmp_path / "run", "zeros", KINDS["zeros"], 0)
    KINDS["bit flip"](folder / "step_00000001", random.Random(1))
    unfinished = folder / "step_00000003" / "00000001-0123456789abcdef-0001"
    unfinished.mkdir(parents=True)
    with pytest.raises(CheckpointMismatch) as caught:
        open_run(folder).newest()
    for words in (str(folder), "2 committed, all damaged", "restore one", "remove that folder"):
        assert words in str(caught.value)
    shutil.rmtree(folder)
    assert open_run(folder).newest() is None


def lenient(monkeypatch):
    """Verification off: what COMMIT names is taken as it is."""
    monkeypatch.setattr(checkpoint_reading, "_compare", lambda *_: None)
    monkeypatch.setattr(checkpoint_reading, "_refuse_foreign", lambda *_: None)
    monkeypatch.setattr(checkpoint_reading, "_verify_file", lambda *_: None)


def test_without_the_hashes_most_plain_damage_gets_through(sound, tmp_path, monkeypatch):
    """The control: it is the hashes that find it."""
    lenient(monkeypatch)
    through = 0
    for kind in ("bit flip", "zeros", "longer", "swapped with an older"):
        for number in range(10):
            found, _ = told_newest(damaged(sound, tmp_path / "run", kind, KINDS[kind], number))
            try:
                assert found.step == 2
                checkpoint.load(found, *trained(seed=9, steps=0))
                through += 1
            except (AssertionError, CheckpointMismatch):
                pass
    assert through > 20


@pytest.mark.parametrize("kind", FORGERIES)
def test_forged_numbers_under_hashes_that_agree_are_only_numbers(sound, tmp_path, kind):
    """Nothing can find these, as there is no key; the load stays a load."""
    found, told = told_newest(damaged(sound, tmp_path / "run", kind, FORGERIES[kind], 0))
    assert (found.step, told) == (2, [])
    checkpoint.load(found, *trained(seed=9, steps=0))


def test_an_index_that_fits_itself_but_not_the_model_is_refused_at_load(sound, tmp_path):
    """Index, headers, files and hashes agree; the model's own shapes do not."""
    folder = damaged(sound, tmp_path / "run", "", lambda *_: None, 0)
    data = data_of(folder / "step_00000002")
    name = "model/1.bias"
    found = checkpoint.verify(folder / "step_00000002")
    [chunk] = found.index[name].chunks

    def rename(manifest):
        manifest["index"]["model/1.bias_"] = manifest["index"].pop(name)

    old = layout(found.index, chunk.file)
    with_manifest(folder / "step_00000002", rename)
    index = dict(found.index)
    index["model/1.bias_"] = index.pop(name)
    new = layout(index, chunk.file)
    path = data / chunk.file
    assert [size for *_, size in old.parts] == [size for *_, size in new.parts]
    path.write_bytes(new.header + path.read_bytes()[len(old.header) :])
    with_manifest(folder / "step_00000002", lambda manifest: None)
    found, told = told_newest(folder)
    assert (found.step, told) == (2, [])
    with pytest.raises(CheckpointMismatch, match=r"model/1\.bias"):
        checkpoint.load(found, *trained(seed=9, steps=0))


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def hostile(folder, canary):
    """A checkpoint of PyTorch's own format, whose index is a pickle that runs code."""
    import pickle

    folder.mkdir(parents=True)
    (folder / ".metadata").write_bytes(pickle.dumps(Canary(canary)))
    (folder / "__0_0.distcp").write_bytes(pickle.dumps(Canary(canary)))


@pytest.mark.parametrize("place", ["step", "attempt"])
def test_a_hostile_pickle_beside_a_manifest_that_agrees_is_refused_and_not_run(
    sound, tmp_path, place
):
    folder = damaged(sound, tmp_path / "run", "", lambda *_: None, 0)
    step = folder / "step_00000002"
    where = step if place == "step" else data_of(step)
    hostile(tmp_path / "hostile", tmp_path / "canary")
    shutil.copy(tmp_path / "hostile" / ".metadata", where / ".metadata")
    found, [line] = told_newest(folder)
    assert found.step == 1
    assert ".metadata" in line
    assert not (tmp_path / "canary").exists()


def test_a_foreign_checkpoint_is_refused_in_one_sentence_and_stays(tmp_path):
    """And no run begins anew beside it."""
    step = tmp_path / "run" / "step_00000005"
    hostile(step, tmp_path / "canary")
    with pytest.raises(CheckpointMismatch, match="never writes and does not open") as caught:
        checkpoint.verify(step)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointMismatch, match=r"\.metadata"):
        open_run(tmp_path / "run").newest()
    save(tmp_path / "run", 6)
    assert (step / ".metadata").exists()
    assert not (tmp_path / "canary").exists()


def test_the_canary_would_sing(tmp_path):
    """The control: PyTorch's own reader runs it."""
    from torch.distributed.checkpoint import FileSystemReader

    hostile(tmp_path / "hostile", tmp_path / "canary")
    FileSystemReader(tmp_path / "hostile").read_metadata()
    assert (tmp_path / "canary").exists()


def test_a_file_that_changes_between_proof_and_load_is_found(sound, tmp_path):
    folder = damaged(sound, tmp_path / "run", "", lambda *_: None, 0)
    found, _ = told_newest(folder)
    path = sorted(data_of(folder / "step_00000002").glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointMismatch, match="is damaged"):
        checkpoint.load(found, *trained(seed=9, steps=0))


def test_checkpoints_of_the_version_before_are_refused_by_name(tmp_path):
    step = tmp_path / "step_00000004"
    (step / "state").mkdir(parents=True)
    for name in ("COMMIT", "config.json", "manifest.json", "state/.metadata"):
        (step / name).write_text("{}")
    with pytest.raises(CheckpointMismatch, match=r"config\.json, which this program never writes"):
        checkpoint.newest(Folder(tmp_path), print)
