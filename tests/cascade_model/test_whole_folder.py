"""A folder is whole or not there."""

import pytest

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


def test_an_object_store_is_refused():
    with (
        pytest.raises(InputError, match="must be a local folder"),
        whole_folder("s3://bucket/made", never, "thing"),
    ):
        pass
