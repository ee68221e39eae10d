"""The fault tables' own rules: where they strike, what they count, and that they can fail."""

import shutil

import pytest

from cascade_model.commit import Folder
from tests.benchmarks import faults_disk
from tests.benchmarks.fault_points import BEFORE_MANIFEST, IN_COMMIT, PHASES, counts_of
from tests.benchmarks.fault_runs import contents, finished, flags, left_half_written, write_texts
from tests.benchmarks.faults_data import VICTIMS, job_of, points_of, sequences
from tests.benchmarks.faults_poison import poison_rows
from tests.benchmarks.kill_rounds import control_round


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    write_texts(path, 800_000)
    return path


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    """A run in this machine's own time: its corpus, its points beside it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert finished(folder / "events", flags(source, folder / "corpus", "local")) == 0
    return folder / "corpus"


@pytest.mark.parametrize("count", [1, 3, 20, 50])
def test_enough_points_lie_in_a_commit_and_before_the_manifest(count):
    passed = dict.fromkeys(PHASES, 7)
    points = points_of(count, passed)
    assert points == points_of(count, passed)
    assert len(points) == count
    assert sum(p.phase in IN_COMMIT for p in points) >= count / 4
    assert sum(p.phase in BEFORE_MANIFEST for p in points) >= min(count - 1, 3 * count / 20)
    assert all(1 <= p.number <= 7 for p in points)
    assert {p.victim for p in points} == set(VICTIMS[:count])
    assert count < 2 or points != points_of(count, passed, seed=1)


def test_a_run_passes_every_point(undisturbed):
    passed = counts_of(undisturbed.parent / "events")
    assert all(passed[phase] for phase in PHASES)
    assert passed["data written"] == passed["data named"] == passed["record named"]
    assert passed["manifest written"] == passed["manifest named"] == 1


def test_what_is_lost_doubled_or_left_is_counted(undisturbed, tmp_path):
    folder = tmp_path / "corpus"
    shutil.copytree(undisturbed, folder)
    whole = sequences(undisturbed)
    assert set(whole.values()) == {1}
    assert sequences(folder) == whole
    assert contents(folder) == contents(undisturbed)
    shard = sorted(folder.glob("shard-train-*.arrow"))[0]
    shutil.copy(shard, folder / "shard-train-99999.arrow")
    assert max(sequences(folder).values()) == 2
    assert contents(folder) != contents(undisturbed)
    (folder / "shard-train-99999.arrow").unlink()
    assert left_half_written(folder) == 0
    shard.rename(folder / f".{shard.name}.{'0' * 32}.tmp")
    assert left_half_written(folder) == 1
    assert whole - sequences(folder)
    assert shard.name not in Folder(folder).list()


def test_without_the_protocol_a_kill_is_found_out(source, undisturbed, tmp_path):
    assert control_round(job_of(source), tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("is_tmpfs", [True, False])
def test_a_full_disk_is_told_and_gone_on_from(source, tmp_path, monkeypatch, is_tmpfs):
    if is_tmpfs and not faults_disk.has_small_disks(tmp_path):
        pytest.skip("no tmpfs of one's own here: user namespaces are not allowed")
    if not is_tmpfs:
        monkeypatch.setattr(faults_disk, "has_small_disks", lambda folder: False)
    resumed, control = faults_disk.disk_rows(tmp_path / "disk", source)
    assert resumed.ok
    assert control.ok


def test_poison_rows_are_set_aside_each_with_its_reason(tmp_path):
    rows = list(poison_rows(tmp_path / "poison", rows=3000, poison=30))
    assert [row.value for row in rows] == [30, 1, 1]
