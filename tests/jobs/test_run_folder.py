"""The small files by which a command and its ranks speak, on a disk and in a store."""

import pytest

from cascade_model.commit import Folder
from cascade_model.errors import CorpusMismatch, InputError, Stopped
from jobs import run_folder


@pytest.fixture(params=["disk", "store"])
def folder(request, tmp_path):
    if request.param == "disk":
        return Folder(tmp_path / "run")
    return Folder(request.getfixturevalue("s3_url"))


def test_a_run_folder_is_checked_but_not_made(tmp_path, s3_url):
    path = tmp_path / "a/b"
    assert run_folder.run_folder(str(path)).url == str(path)
    assert not path.exists()
    assert run_folder.run_folder(s3_url).url == s3_url
    (tmp_path / "file").touch()
    for output in (str(tmp_path / "file"), str(tmp_path / "file/run"), "nowhere://bucket/run"):
        with pytest.raises(InputError, match=output):
            run_folder.run_folder(output)


def test_only_the_folder_with_this_launchs_mark_is_the_run_folder(folder):
    run_folder.mark(folder, "launch-1")
    run_folder.require_shared(folder, "launch-1")
    for other, launch in ((folder, "launch-2"), (folder / "none", "launch-1")):
        with pytest.raises(InputError, match=r"output=.* on the machine .* all machines share"):
            run_folder.require_shared(other, launch)


def test_an_outcome_travels_as_its_own_class_and_is_taken_once(folder):
    assert run_folder.take_outcome(folder) is None
    for error in (CorpusMismatch("a is not b"), Stopped.at(3, "SIGTERM")):
        run_folder.write_outcome(folder, error)
        assert run_folder.has_outcome(folder)
        told = run_folder.take_outcome(folder)
        assert (type(told), str(told)) == (type(error), str(error))
        assert run_folder.take_outcome(folder) is None
    assert folder.list() == []


def test_only_a_wish_to_the_own_launch_counts(folder):
    assert run_folder.wish_to_stop(folder, "launch-2") is None
    run_folder.ask_to_stop(folder, "launch-1", "SIGTERM")
    assert run_folder.wish_to_stop(folder, "launch-2") is None
    run_folder.ask_to_stop(folder, "launch-2", "3 ranks", "resize")
    assert run_folder.wish_to_stop(folder, "launch-2") == ("3 ranks", "resize")
    run_folder.forget_stop(folder)
    assert run_folder.wish_to_stop(folder, "launch-2") is None


def test_a_mark_takes_away_what_earlier_launches_left_and_nothing_of_later_ones(folder):
    run_folder.write_outcome(folder, InputError("of yesterday"))
    run_folder.mark(folder, "launch-1")
    assert run_folder.take_outcome(folder) is None
    assert not run_folder.has_begun(folder, "launch-1")
    run_folder.begin(folder, "launch-1")
    assert run_folder.has_begun(folder, "launch-1")
    run_folder.mark(folder, "launch-2")
    run_folder.unmark(folder, "launch-1")
    run_folder.require_shared(folder, "launch-2")
    run_folder.unmark(folder, "launch-2")
    assert folder.list() == []
