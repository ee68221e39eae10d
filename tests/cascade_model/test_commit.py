"""Nothing half-written is ever read: locally, in memory, and on an S3 server on loopback."""

import os
import threading
import uuid

import pytest

from cascade_model.commit import RECORD_SUFFIX, Folder
from cascade_model.errors import InputError


@pytest.fixture(scope="session")
def s3_server():
    """moto's S3 server on a free port of loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_url(s3_server, monkeypatch):
    """A fresh bucket; the client finds the server through the usual environment."""
    import fsspec
    import s3fs

    for name, value in (
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "testtest"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", s3_server),
    ):
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    fsspec.filesystem("s3").mkdir(bucket)
    yield f"s3://{bucket}/corpus"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request, tmp_path) -> Folder:
    if request.param == "s3":
        return Folder(request.getfixturevalue("s3_url"))
    local = str(tmp_path / "corpus")
    return Folder(local if request.param == "local" else f"memory://{uuid.uuid4().hex}/corpus")


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
