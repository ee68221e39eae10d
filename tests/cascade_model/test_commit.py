"""Nothing half-written is ever read: locally, in memory, and on an S3 server on loopback."""

import os
import resource
import threading
import uuid
from contextlib import contextmanager

import pytest

from cascade_model.commit import (
    RECORD_SUFFIX,
    Folder,
    create_file,
    draft,
    replace_file,
    require_writable,
)
from cascade_model.errors import InputError, Unfinished


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request, tmp_path) -> Folder:
    if request.param == "s3":
        return Folder(request.getfixturevalue("s3_url"))
    local = str(tmp_path / "corpus")
    return Folder(local if request.param == "local" else f"memory://{uuid.uuid4().hex}/corpus")


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_unit_whose_file_was_lost_is_committed_anew(folder, is_cut):
    first = folder.commit("a.bin", b"hello", {"rows": 1})
    folder.remove(first.object)
    if is_cut:
        folder._fs.pipe_file(folder.path(first.object), b"hel")
    assert folder.record("a.bin") is None
    again = folder.commit("a.bin", b"hello", {"rows": 1})
    assert folder.record("a.bin") == again
    assert folder.read_bytes("a.bin") == b"hello"


def test_a_committed_unit_is_read_back_with_its_record(folder):
    record = folder.commit("a.bin", lambda file: file.write(b"hello"), {"rows": 3})
    assert folder.read_bytes("a.bin") == b"hello"
    assert folder.exists("a.bin")
    assert folder.record("a.bin") == record
    assert (record.bytes, record.facts) == (5, {"rows": 3})
    assert folder.sha256_of(record.object) == record.sha256


def test_a_unit_without_a_record_is_not_there(folder):
    assert folder.record("a.bin") is None
    assert not folder.exists("a.bin")
    assert folder.list() == []
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("a.bin")


def test_committing_the_same_bytes_again_changes_nothing(folder):
    first = folder.commit("a.bin", b"hello")
    names = folder.list()
    assert folder.commit("a.bin", b"hello") == first
    assert folder.list() == names


def test_other_bytes_under_a_committed_name_are_refused(folder):
    folder.commit("a.bin", b"hello")
    with pytest.raises(InputError, match="committed with sha256"):
        folder.commit("a.bin", b"other")
    assert folder.read_bytes("a.bin") == b"hello"


def test_a_writer_that_fails_leaves_no_unit(folder):
    def write(file):
        file.write(b"half")
        raise KeyError("lost")

    with pytest.raises(KeyError):
        folder.commit("a.bin", write)
    assert folder.record("a.bin") is None
    assert "a.bin" not in folder.list()


def test_a_published_file_appears_once_and_keeps_its_content(folder):
    folder.publish("manifest.json", b"{}")
    folder.publish("manifest.json", b"{}")
    with pytest.raises(InputError, match="other content"):
        folder.publish("manifest.json", b"[]")
    assert folder.read_bytes("manifest.json") == b"{}"


def test_sixteen_writers_at_once_agree_on_one_unit(folder):
    records, start = [], threading.Barrier(16)

    def work():
        start.wait()
        records.append(folder.commit("a.bin", b"same"))

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(records) == 16
    assert len({record.object for record in records}) == 1
    assert folder.list() == sorted([records[0].object, "a.bin" + RECORD_SUFFIX])


def test_a_cut_file_does_not_count_as_committed(tmp_path):
    folder = Folder(tmp_path)
    folder.commit("a.bin", b"hello")
    os.truncate(tmp_path / "a.bin", 3)
    assert folder.record("a.bin") is None
    folder.commit("a.bin", b"hello")
    assert folder.read_bytes("a.bin") == b"hello"


def test_an_unknown_outcome_is_read_back_and_never_deleted(s3_url, monkeypatch):
    folder = Folder(s3_url)
    put = folder._fs.pipe_file

    def put_then_lose_the_answer(path, data, mode):
        put(path, data, mode=mode)
        raise TimeoutError

    monkeypatch.setattr(folder._fs, "pipe_file", put_then_lose_the_answer)
    folder.commit("a.bin", b"hello")
    assert Folder(s3_url).read_bytes("a.bin") == b"hello"


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / ("a.bin" + RECORD_SUFFIX)).write_text("{")
    with pytest.raises(InputError, match=r"a\.bin\.record\.json is damaged"):
        Folder(tmp_path).record("a.bin")


def test_an_unknown_protocol_is_one_sentence():
    with pytest.raises(InputError, match="use a local path or an fsspec URL"):
        Folder("nonsense://x")


def test_only_our_own_unfinished_files_are_left_out_of_a_list(tmp_path):
    ours = (f".a.bin.{uuid.uuid4().hex}.tmp", f".model.{uuid.uuid4().hex}.old.tmp")
    theirs = ("thesis.tmp", ".notes.tmp", "a.bin")
    for name in (*ours, *theirs):
        (tmp_path / name).touch()
    assert Folder(tmp_path).list() == sorted(theirs)


@pytest.mark.parametrize("name", ["", ".", "/", "./"])
def test_the_folder_itself_is_never_removed(folder, name):
    folder.publish("a.txt", b"1")
    with pytest.raises(ValueError, match="no name inside"):
        folder.remove(name)
    assert folder.list() == ["a.txt"]
    folder.remove("a.txt")
    folder.remove("a.txt")
    assert folder.list() == []


def test_only_an_empty_folder_is_removed_with_its_files_gone(tmp_path):
    folder = Folder(tmp_path / "new")
    folder.publish("a.txt", b"1")
    folder.remove_if_empty()
    assert folder.list() == ["a.txt"]
    folder.remove("a.txt")
    folder.remove_if_empty()
    assert not folder.is_there()
    folder.remove_if_empty()


def test_a_folder_that_can_be_written_is_left_as_it_was(folder):
    require_writable(folder.url)
    assert folder.list() == []
    folder.publish("a.txt", b"1")
    require_writable(folder.url)
    assert folder.list() == ["a.txt"]


def test_asking_for_a_new_folder_does_not_make_it(tmp_path):
    require_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["/dev/null/x", "/proc/x/corpus", "/proc", "/" + "x" * 300])
def test_a_place_that_cannot_be_written_is_one_sentence(output):
    with pytest.raises(InputError, match=f"output={output} cannot be written"):
        require_writable(output)


def test_a_file_in_the_way_and_a_bucket_that_is_not_there_are_named(tmp_path, s3_url):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="Not a directory"):
        require_writable(tmp_path / "file")
    with pytest.raises(InputError, match="output=s3://no-such-bucket/x cannot be written"):
        require_writable("s3://no-such-bucket/x")


def test_a_file_is_created_once_and_replaced_whole(tmp_path):
    path = tmp_path / "new" / "a.json"
    create_file(path, b"1")
    with pytest.raises(FileExistsError):
        create_file(path, b"2")
    assert path.read_bytes() == b"1"
    replace_file(path, b"3")
    assert path.read_bytes() == b"3"
    assert os.listdir(path.parent) == ["a.json"]


def test_a_draft_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    replace_file(tmp_path / "a.json", b"old")

    def write(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), draft(tmp_path / "a.json", write):
        pass
    assert (tmp_path / "a.json").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_replaced_file_is_whole_and_new(folder):
    for data in (b"first", b"second and longer", b"3"):
        folder.replace("report.json", data)
        assert folder.read_bytes("report.json") == data
    assert folder.list() == ["report.json"]


@contextmanager
def largest_file(size):
    """A limit on the size of files, which writing past meets as it meets a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("way", ["commit", "publish", "replace"])
def test_a_full_disk_is_one_sentence_and_what_was_committed_stays(tmp_path, way):
    folder = Folder(tmp_path)
    folder.commit("a.bin", b"hello")
    before = folder.list()
    with (
        largest_file(1000),
        pytest.raises(Unfinished, match=r"b\.bin cannot be written \(File too large\); free some"),
    ):
        getattr(folder, way)("b.bin", b"x" * 4000)
    assert sorted(os.listdir(tmp_path)) == before
    getattr(folder, way)("b.bin", b"x" * 4000)
    assert folder.read_bytes("b.bin") == b"x" * 4000


def test_another_fault_of_the_disk_is_not_called_full(tmp_path):
    def write(file):
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output") as caught:
        Folder(tmp_path).commit("a.bin", write)
    assert not isinstance(caught.value, InputError)
