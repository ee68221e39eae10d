"""Checkpoints and leases in an object store, on good days and bad ones."""

import dataclasses
import time

import fsspec
import pytest
import s3fs

from cascade_model import checkpoint, lease
from cascade_model.checkpoint import Keep
from cascade_model.commit import Folder
from cascade_model.errors import InputError, Unfinished
from cascade_model.lease import LeaseLost, Owner, begin, hold
from tests.benchmarks.s3_faults import FAULTS, client_environment, proxied
from tests.cascade_model.checkpoint_making import (
    allow,
    open_run,
    same_state,
    save,
    told_newest,
    trained,
)

PATIENCE = 0.4
QUICK = ("500 after", "drop", "cut")  # half a minute each; the others with -m slow


@pytest.fixture
def through(s3_server, monkeypatch):
    """Point the client at a proxy, and give a fresh run's URL, made past it."""

    def point(proxy, attempts=5) -> str:
        for name, value in client_environment(proxy.url, attempts=attempts).items():
            monkeypatch.setenv(name, value)
        waits = {"read_timeout": PATIENCE, "connect_timeout": PATIENCE}
        monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": waits})
        s3fs.S3FileSystem.clear_instance_cache()
        bucket = f"bucket-{id(proxy):x}"
        s3fs.S3FileSystem(key="test", secret="testtest", endpoint_url=s3_server).mkdir(bucket)
        return f"s3://{bucket}/run"

    yield point
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_run_in_a_store_saves_loads_keeps_and_tidies_as_on_a_disk(s3_url):
    run, other = trained(), trained(seed=7, steps=0)
    checkpoints = open_run(s3_url, keep=Keep(last=2))
    for step in (1, 2, 3):
        assert checkpoints.save(*run, {"step": step, "samples": step}).wait()
    assert Folder(s3_url).list() == ["step_00000002", "step_00000003"]
    Folder(f"{s3_url}/step_00000003").remove("COMMIT")
    found = open_run(s3_url).newest()
    assert found.step == 2
    assert Folder(s3_url).list() == ["step_00000002"]
    checkpoint.load(found, *other)
    assert same_state(run, other)


def test_a_damaged_object_is_found_and_replaced_when_its_step_comes_again(s3_url):
    for step in (1, 2):
        save(s3_url, step)
    found, _ = told_newest(s3_url)
    file = next(iter(found.files))
    data = bytearray(found.data.read_bytes(file))
    data[-1] ^= 1
    found.data.replace(file, bytes(data))
    again, [line] = told_newest(s3_url)
    assert again.step == 1
    assert "is damaged" in line
    save(s3_url, 2)
    assert told_newest(s3_url)[0].step == 2


def test_of_two_writers_of_a_step_the_one_that_lost_its_lease_cannot_commit(s3_url):
    """The first one's check passed before the other committed; its conditional put is refused."""
    run = trained()
    asked = iter(("before the data", "before COMMIT, but another is faster"))

    def check():
        when = next(asked, None)
        if when is None:
            raise LeaseLost("taken over")
        if "faster" in when:
            save(s3_url, 2, seed=5)

    zombie = open_run(s3_url, check=check)
    saving = zombie.save(*run, {"step": 2, "samples": 16})
    with pytest.raises(LeaseLost):
        saving.wait()
    found, told = told_newest(s3_url)
    other = trained(seed=7, steps=0)
    checkpoint.load(found, *other)
    assert same_state(other, trained(seed=5))
    assert told == []


def test_without_the_check_the_last_writer_would_win(s3_url):
    """The control."""
    run, other = trained(), trained(seed=7, steps=0)
    save(s3_url, 2, seed=5)
    open_run(s3_url, check=allow).save(*run, {"step": 2, "samples": 16}).wait()
    checkpoint.load(told_newest(s3_url)[0], *other)
    assert same_state(other, run)


@pytest.mark.parametrize(
    "fault", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAULTS]
)
def test_a_save_survives_each_fault_at_each_of_its_requests(s3_server, through, monkeypatch, fault):
    with proxied(s3_server, rate=0.0, hang=2 * PATIENCE) as proxy:
        url, run = through(proxy), trained()
        step, is_over = 0, False
        while not is_over:
            step += 1
            left = [step]

            def the_chosen_one(left=left):
                left[0] -= 1
                return fault if left[0] == 0 else None

            monkeypatch.setattr(proxy, "next_fault", the_chosen_one)
            checkpoints = open_run(url, keep=Keep(last=1, best=0))
            is_saved = checkpoints.save(*run, {"step": step, "samples": step}).wait()
            is_over = left[0] > 0
            monkeypatch.setattr(proxy, "next_fault", lambda: None)
            found, _ = told_newest(url)
            assert is_saved
            assert found.step == step
        assert step > 5


def test_a_store_that_fails_fails_the_save_and_training_goes_on(s3_server, through, monkeypatch):
    told: list[str] = []
    with proxied(s3_server, rate=0.0) as proxy:
        url, run = through(proxy, attempts=1), trained()
        checkpoints = open_run(url, tell=told.append)
        assert checkpoints.save(*run, {"step": 1, "samples": 1}).wait()
        monkeypatch.setattr(proxy, "next_fault", lambda: "503")
        assert not checkpoints.save(*run, {"step": 2, "samples": 2}).wait()
        with pytest.raises((Unfinished, OSError)):
            told_newest(url)  # a silent store says nothing about what is in it
        monkeypatch.setattr(proxy, "next_fault", lambda: None)
        assert told_newest(url)[0].step == 1
        assert checkpoints.save(*run, {"step": 3, "samples": 3}).wait()
        checkpoints.finish()
    assert len(told) == checkpoints.failures == 1
    assert "step_00000002 could not be saved" in told[0]


@pytest.fixture(params=["s3", "memory"])
def store(request, tmp_path) -> Folder:
    """A run folder in a store."""
    if request.param == "s3":
        return Folder(request.getfixturevalue("s3_url"))
    return Folder(f"memory://{tmp_path.name}/run")


def elsewhere(monkeypatch):
    """Owners of another machine, of which nobody knows whether they live."""
    here = Owner.here
    monkeypatch.setattr(Owner, "here", lambda: dataclasses.replace(here(), host="elsewhere"))


def test_one_holds_a_run_in_a_store_and_the_number_grows(store):
    with hold(store) as owner:
        with pytest.raises(InputError, match="is in use by process"), hold(store):
            pass
        first = begin(store, owner)
        first.check()
        second = begin(store, owner)
        with pytest.raises(LeaseLost):
            first.check()
        second.check()
    with hold(store) as owner:
        assert begin(store, owner).number == 5
    assert store.list() == ["lease-00000005.json"]


def test_signs_of_life_in_a_store_are_of_its_own_clock(store, monkeypatch):
    """A holder that gives none is replaced; one that does, by writing its record again, is not."""
    elsewhere(monkeypatch)
    monkeypatch.setattr(lease, "SILENCE", 2.5)
    monkeypatch.setattr(lease, "HEARTBEAT", 0.2)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # the machine's own clock is not asked
    with hold(store) as owner:
        begin(store, owner)
        time.sleep(4)
        with pytest.raises(InputError, match="on elsewhere"), hold(store):
            pass
    monkeypatch.setattr(lease, "HEARTBEAT", 1000)
    silent = hold(store)
    owner = silent.__enter__()
    attempt = begin(store, owner)
    time.sleep(4)
    with hold(store):
        with pytest.raises(LeaseLost):
            attempt.check()
        silent.__exit__(None, None, None)
        with pytest.raises(InputError), hold(store):  # its end freed nothing
            pass


def test_of_many_takers_of_a_store_one_gets_it(store):
    import threading

    start, got = threading.Barrier(6), []

    def take():
        start.wait()
        try:
            lease._draw(store, Owner.here(), lambda last: lease._refuse_the_living(store, last))
            got.append("held")
        except InputError:
            got.append("refused")

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == ["held", *["refused"] * 5]
