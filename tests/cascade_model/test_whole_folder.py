"""A folder is whole or not there."""

import signal
import subprocess
import sys

import pytest

from cascade_model.commit import Folder
from cascade_model.errors import InputError
from cascade_model.whole_folder import whole_folder


def always(_):
    return True


def never(_):
    return False


def test_the_work_takes_the_place_when_it_is_done(tmp_path):
    target = tmp_path / "made"
    with whole_folder(target, never, "thing") as work:
        (work / "file").write_text("new")
        assert not target.exists()
    assert (target / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failure_leaves_what_was_there(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made/file").write_text("old")

    def fail():
        with whole_folder(tmp_path / "made", always, "thing") as work:
            (work / "file").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "made/file").read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["made"]


KILLED = """
import os, signal, sys
from pathlib import Path
from cascade_model import whole_folder as module
rename, calls = os.rename, iter(range(9))

def die_at(call):
    def renaming(one, other):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(one, other)
    return renaming

def die_behind(path):
    if path == Path(sys.argv[1]).parent:
        os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "between":
    os.rename = die_at(1)
else:
    module.fsync = die_behind
with module.whole_folder(sys.argv[1], lambda _: True, "thing") as work:
    (work / "file").write_text("newer")
"""


@pytest.mark.parametrize("moment", ["between", "behind"])
def test_what_a_kill_left_of_the_old_goes_with_the_next_replacement(moment, tmp_path):
    """Killed between the two renames, or behind them; what others left beside it is theirs."""
    target = tmp_path / "made"
    target.mkdir()
    (target / "file").write_text("old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(target), moment], check=False)
    assert killed.returncode == -signal.SIGKILL
    [left] = tmp_path.glob(".made.*.old.tmp")
    assert (left / "file").read_text() == "old"
    others = [tmp_path / f".{name}.{'0' * 32}.old.tmp" for name in ("made.x", "x.made")]
    for other in others:
        other.mkdir()

    def fail():
        with whole_folder(target, always, "thing"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert left.exists()
    with whole_folder(target, always, "thing") as work:
        (work / "file").write_text("newest")
    assert (target / "file").read_text() == "newest"
    assert sorted(tmp_path.glob(".*.old.tmp")) == sorted(others)


def test_only_its_own_kind_is_replaced(tmp_path):
    (tmp_path / "file").write_text("old")
    with (
        pytest.raises(InputError, match="exists and is no thing"),
        whole_folder(tmp_path, never, "thing"),
    ):
        pass
    with whole_folder(tmp_path, always, "thing") as work:
        (work / "other").write_text("new")
    assert [f.name for f in tmp_path.iterdir()] == ["other"]


def test_a_folder_without_a_seal_must_be_local():
    with (
        pytest.raises(InputError, match="must be a local folder"),
        whole_folder("s3://bucket/made", never, "thing"),
    ):
        pass


def test_in_a_store_the_seal_goes_first_and_comes_last(tmp_path, monkeypatch):
    target = f"memory://{tmp_path.name}/made"
    with whole_folder(target, never, "thing", seal="manifest.json") as work:
        for name in ("a", "manifest.json", "z"):
            (work / name).write_text("old")
    put, seen = Folder.put, []

    def watched(self, name, write):
        seen.append((name, "manifest.json" in self.list()))
        return put(self, name, write)

    monkeypatch.setattr(Folder, "put", watched)
    with whole_folder(target, always, "thing", seal="manifest.json") as work:
        for name in ("b", "manifest.json", "z"):
            (work / name).write_text("new")
    assert seen == [("b", False), ("z", False), ("manifest.json", False)]
    assert Folder(target).list() == ["b", "manifest.json", "z"]
    assert Folder(target).read_bytes("z") == b"new"
    with (
        pytest.raises(InputError, match="exists and is no thing"),
        whole_folder(target, never, "thing", seal="manifest.json"),
    ):
        pass


def test_an_upload_that_breaks_off_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    target = f"memory://{tmp_path.name}/broken"

    def fail(self, name, write):
        if name == "manifest.json":
            raise OSError("lost")
        return put(self, name, write)

    put = Folder.put
    monkeypatch.setattr(Folder, "put", fail)

    def make():
        with whole_folder(target, never, "thing", seal="manifest.json") as work:
            for name in ("a", "manifest.json"):
                (work / name).write_text("new")

    with pytest.raises(OSError, match="lost"):
        make()
    assert Folder(target).list() == ["a"]
