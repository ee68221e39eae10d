"""One writer a folder: the living are refused, the silent replaced, and the replaced stay out."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cascade_model import lease
from cascade_model.commit import Folder
from cascade_model.errors import InputError
from cascade_model.lease import LeaseLost, Owner, begin, hold

HERE = Path(__file__).parent


def records(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("lease-*.json"))


def make_silent(folder, seconds):
    """Let the last sign of life be this long ago."""
    [path] = folder.glob("lease-*.json")
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_living_run_is_refused_with_who_and_since_when(tmp_path):
    with hold(Folder(tmp_path / "run")) as owner:
        with pytest.raises(InputError) as caught, hold(Folder(tmp_path / "run")):
            pass
        for words in (f"process {os.getpid()} on {owner.host}", owner.since, "end that run"):
            assert words in str(caught.value)
        assert records(tmp_path / "run") == ["lease-00000001.json"]


def test_a_run_that_ended_frees_the_folder_and_the_number_grows(tmp_path):
    with hold(Folder(tmp_path)):
        pass
    with pytest.raises(KeyError), hold(Folder(tmp_path)):
        raise KeyError("failed")
    with hold(Folder(tmp_path)) as owner:
        assert begin(Folder(tmp_path), owner).number == 4
    assert records(tmp_path) == ["lease-00000004.json"]


def test_a_silent_run_is_replaced_and_a_quiet_one_is_not(tmp_path, monkeypatch):
    elsewhere = dataclasses.replace(Owner.here(), host="elsewhere")
    monkeypatch.setattr(Owner, "here", lambda: elsewhere)
    first = hold(Folder(tmp_path))
    first.__enter__()
    monkeypatch.undo()
    make_silent(tmp_path, lease.SILENCE - 5)
    with pytest.raises(InputError, match=r"on elsewhere.*last sign of life 5\d s ago"):
        hold(Folder(tmp_path)).__enter__()
    make_silent(tmp_path, lease.SILENCE + 5)
    with hold(Folder(tmp_path)) as owner:
        begin(Folder(tmp_path), owner).check()
        first.__exit__(None, None, None)
        begin(Folder(tmp_path), owner)  # the first one's end freed nothing


def test_a_dead_process_of_this_machine_is_replaced_at_once(tmp_path, monkeypatch):
    dead = subprocess.Popen(["true"])
    dead.wait()
    for namespace, is_replaced in (("pid:[1]", False), (Owner.here().namespace, True)):
        folder = tmp_path / str(is_replaced)
        gone = dataclasses.replace(Owner.here(), pid=dead.pid, namespace=namespace)
        lease._draw(Folder(folder), gone, lambda last: None)
        if is_replaced:
            with hold(Folder(folder)):
                pass
        else:  # another container's process of that number says nothing about this one
            with pytest.raises(InputError, match=f"process {dead.pid}"), hold(Folder(folder)):
                pass


def test_a_process_of_another_machine_of_the_same_name_is_not_taken_for_dead(tmp_path, monkeypatch):
    """Outside of containers the namespaces of processes are numbered alike everywhere."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / "boot_id").write_text("11111111-2222-3333-4444-555555555555\n")
    monkeypatch.setattr(lease, "BOOT_ID", tmp_path / "boot_id")
    there = dataclasses.replace(Owner.here(), pid=gone.pid)
    monkeypatch.undo()
    assert there.host == Owner.here().host
    lease._draw(Folder(tmp_path / "run"), there, lambda last: None)
    with pytest.raises(InputError, match=f"process {gone.pid}"), hold(Folder(tmp_path / "run")):
        pass


def test_signs_of_life_keep_a_lease_fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT", 0.02)
    with hold(Folder(tmp_path)) as owner:
        begin(Folder(tmp_path), owner)  # the owner keeps its ranks' number alive, too
        make_silent(tmp_path, 1000)
        [path] = tmp_path.glob("lease-*.json")
        deadline = time.monotonic() + 60
        while time.time() - path.stat().st_mtime > 100 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - path.stat().st_mtime < 100


def test_a_new_start_of_the_same_run_fences_off_the_one_before(tmp_path):
    with hold(Folder(tmp_path)) as owner:
        first = begin(Folder(tmp_path), owner)
        first.check()
        second = begin(Folder(tmp_path), owner)
        with pytest.raises(LeaseLost, match="taken over by process"):
            first.check()
        second.check()


@pytest.mark.parametrize("place", ["local", "memory"])
def test_of_two_starts_of_one_run_at_once_one_is_fenced_off(place, tmp_path, monkeypatch):
    """The slower one looked at the lease and stands still before it creates the next record."""
    folder = Folder(tmp_path if place == "local" else f"memory://{tmp_path.name}/run")
    create, newer = Folder.create, []

    def overtaken(self, name, data):
        monkeypatch.setattr(Folder, "create", create)
        newer.append(begin(folder, owner))
        return create(self, name, data)

    with hold(folder) as owner:
        monkeypatch.setattr(Folder, "create", overtaken)
        attempts = [begin(folder, owner), *newer]
        assert len({attempt.number for attempt in attempts}) == 2
        older, last = sorted(attempts, key=lambda attempt: attempt.number)
        last.check()
        with pytest.raises(LeaseLost):
            older.check()


def run_that_is_replaced(path):
    folder = Folder(path)
    with hold(folder) as owner:
        attempt = begin(folder, owner)
        make_silent(path, 1000)
        # The control: as long as nobody took the folder, silence alone takes nothing away.
        attempt.check()
        with hold(folder) as second:
            with pytest.raises(LeaseLost):
                attempt.check()
            with pytest.raises(LeaseLost):
                begin(folder, owner)
            begin(folder, second).check()
        raise OSError("whatever comes of it")


def test_a_run_that_was_replaced_can_neither_write_nor_start_ranks_and_says_so(tmp_path):
    with pytest.raises(InputError, match=r"was taken over by process .* choose another output"):
        run_that_is_replaced(tmp_path)


class Silent(Exception):
    """What a store's client raises that gets no answer."""


def fall_silent(monkeypatch):
    """From now on no folder can be listed, read or written."""

    def refuse(*words, **named):
        raise Silent

    for name in ("list", "read_bytes", "replace", "create"):
        monkeypatch.setattr(Folder, name, refuse)


def test_a_store_that_falls_silent_hides_neither_the_first_error_nor_a_good_end(
    tmp_path, monkeypatch
):
    def run(error):
        with hold(Folder(tmp_path)):
            fall_silent(monkeypatch)
            if error:
                raise error

    with pytest.raises(KeyError, match="the first") as caught:
        run(KeyError("the first"))
    assert caught.value.__context__ is None
    monkeypatch.undo()
    with pytest.raises(InputError, match="is in use by process"):
        hold(Folder(tmp_path)).__enter__()  # nobody could free it
    make_silent(tmp_path, lease.SILENCE + 5)
    run(None)


def test_a_deleted_lease_is_a_lost_one(tmp_path):
    with hold(Folder(tmp_path)) as owner:
        attempt = begin(Folder(tmp_path), owner)
        (tmp_path / "lease-00000002.json").unlink()
        with pytest.raises(LeaseLost, match="its lease was deleted"):
            attempt.check()


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "lease-00000001.json").write_text("{")
    with pytest.raises(InputError, match=r"lease-00000001\.json is damaged; delete it"):
        hold(Folder(tmp_path)).__enter__()


RACER = """
import sys, time
from pathlib import Path
from cascade_model.commit import Folder
from cascade_model.errors import InputError
from cascade_model.lease import hold
folder, go = Folder(sys.argv[1]), Path(sys.argv[2])
while not go.exists():
    pass
try:
    with hold(folder):
        print("held", flush=True)
        time.sleep(60)
except InputError as error:
    print("refused", flush=True)
"""


def test_of_many_processes_at_once_one_gets_the_folder(tmp_path):
    go, words = tmp_path / "go", [sys.executable, "-c", RACER, str(tmp_path / "run")]
    racers = [
        subprocess.Popen([*words, str(go)], stdout=subprocess.PIPE, text=True) for _ in range(6)
    ]
    time.sleep(0.5)
    go.touch()
    said = [racer.stdout.readline().strip() for racer in racers]
    for racer in racers:
        racer.kill()
        racer.communicate()
    assert sorted(said) == ["held", *["refused"] * 5]


TRAINING = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from tests.cascade_model.training_runs import elbo, make
from cascade_model import lease
from cascade_model.corpus import Corpus
lease.HEARTBEAT, lease.SILENCE = 0.1, 0.5
calls = iter(range(1000))

def pausing(model, batch):
    if next(calls) == {pause_at}:
        while not Path({folder!r}, "checkpoints/step_00000002/COMMIT").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGSTOP)
    return elbo(model, batch)

if {is_unfenced}:
    lease.Attempt.check = lambda self: None
make(Corpus.open({corpus!r}), Path({folder!r}), loss_fn=pausing).fit()
"""


def start_training(folder, corpus, pause_at=-1, is_unfenced=False) -> subprocess.Popen:
    text = TRAINING.format(
        tests=str(HERE.parent.parent), corpus=corpus, folder=str(folder), pause_at=pause_at,
        is_unfenced=is_unfenced,
    )  # fmt: skip
    return subprocess.Popen([sys.executable, "-c", text], stderr=subprocess.PIPE, text=True)


def contents(folder) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def replace_a_paused_run(folder, corpus, is_unfenced):
    """A run stops in its third step, is replaced, and goes on when the other has finished.

    Returns the folder's files before and after it went on, its exit code, and what it said.
    """
    folder.mkdir()
    first = start_training(folder, corpus, pause_at=5, is_unfenced=is_unfenced)
    try:
        assert os.WIFSTOPPED(os.waitpid(first.pid, os.WUNTRACED)[1])
        assert (folder / "checkpoints" / "step_00000002" / "COMMIT").exists()
        time.sleep(1)
        second = start_training(folder, corpus)
        assert "resuming" in second.communicate(timeout=120)[1]
        assert second.returncode == 0
        before = contents(folder)
        os.kill(first.pid, signal.SIGCONT)
        said = first.communicate(timeout=120)[1]
        return before, contents(folder), first.returncode, said
    finally:
        first.kill()
        first.communicate()


def test_a_run_that_wakes_up_replaced_writes_nothing_and_says_why(tiny_corpus, tmp_path):
    before, after, code, said = replace_a_paused_run(tmp_path / "run", tiny_corpus, False)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 6
    assert after == before
    assert code == 1
    assert f"output={tmp_path}/run was taken over by process" in said


def test_without_the_check_it_would_write_over_the_others_work(tiny_corpus, tmp_path):
    before, after, _, _ = replace_a_paused_run(tmp_path / "run", tiny_corpus, True)
    assert after != before


def test_a_second_run_of_a_folder_in_use_changes_nothing(tiny_corpus, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    first = start_training(folder, tiny_corpus, pause_at=5)
    try:
        assert os.WIFSTOPPED(os.waitpid(first.pid, os.WUNTRACED)[1])
        [path] = folder.glob("lease-*.json")
        os.utime(path)
        before = contents(folder)
        second = start_training(folder, tiny_corpus)
        os.utime(path, (time.time() + 30,) * 2)  # a stopped process gives no signs of life
        said = second.communicate(timeout=120)[1]
        assert second.returncode == 1
        assert f"is in use by process {first.pid} on" in said
        assert contents(folder) == before
    finally:
        first.kill()
        first.communicate()
    third = start_training(folder, tiny_corpus)  # the first one is dead, so at once
    assert "resuming" in third.communicate(timeout=120)[1]
    assert third.returncode == 0
