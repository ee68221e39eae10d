"""The proxy's own rules, and what s3fs, pyarrow and the commit protocol make of its faults."""

import fsspec
import pyarrow as pa
import pyarrow.fs
import pytest
import s3fs

from cascade_model.commit import Folder
from tests.benchmarks.s3_faults import FAULTS, client_environment, proxied

PATIENCE = 0.4


@pytest.fixture
def through(s3_server, monkeypatch):
    """Point the clients at a proxy, and give a fresh bucket made past it."""

    def point(proxy, attempts=5) -> str:
        for name, value in client_environment(proxy.url, attempts=attempts).items():
            monkeypatch.setenv(name, value)
        waits = {"read_timeout": PATIENCE, "connect_timeout": PATIENCE}
        monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": waits})
        s3fs.S3FileSystem.clear_instance_cache()
        bucket = f"bucket-{id(proxy):x}"
        s3fs.S3FileSystem(key="test", secret="testtest", endpoint_url=s3_server).mkdir(bucket)
        return bucket

    yield point
    s3fs.S3FileSystem.clear_instance_cache()


def test_without_faults_the_proxy_is_the_server(s3_server, through):
    data = bytes(range(256)) * 40_000
    with proxied(s3_server, rate=0.0) as proxy:
        folder = Folder(f"s3://{through(proxy)}/corpus")
        record = folder.commit("a.bin", data)
        assert folder.read_bytes("a.bin") == data
        assert folder.sha256_of(record.object) == record.sha256
        assert folder.list() == sorted([record.object, "a.bin.record.json"])
        assert proxy.requests > 4
        assert proxy.faults.total() == 0


def test_the_same_seed_gives_the_same_faults(s3_server):
    lists = []
    for seed in (1, 1, 2):
        with proxied(s3_server, rate=0.1, seed=seed) as proxy:
            lists.append([proxy.next_fault() for _ in range(5000)])
    assert lists[0] == lists[1] != lists[2]
    assert set(lists[0]) == {None, *FAULTS}
    assert 400 < sum(fault is not None for fault in lists[0]) < 600


def test_only_requests_about_a_path_meet_faults(s3_server, through):
    with proxied(s3_server, rate=1.0, kinds=("503",), about="refused") as proxy:
        folder = Folder(f"s3://{through(proxy, attempts=1)}/corpus")
        folder.commit("a.bin", b"hello")
        assert proxy.faults.total() == 0
        with pytest.raises(OSError):  # noqa: PT011
            folder.commit("refused.bin", b"hello")
        assert proxy.faults.total() > 0


@pytest.mark.parametrize("fault", FAULTS)
def test_a_commit_survives_each_fault_of_each_of_its_requests(
    s3_server, through, monkeypatch, fault
):
    with proxied(s3_server, rate=0.0, hang=2 * PATIENCE) as proxy:
        folder = Folder(f"s3://{through(proxy)}/corpus")
        met = 0
        for at in range(1, 5):
            left = [at]

            def the_chosen_one(left=left):
                left[0] -= 1
                return fault if left[0] == 0 else None

            monkeypatch.setattr(proxy, "next_fault", the_chosen_one)
            folder.commit(f"{at}.bin", b"hello")
            assert folder.read_bytes(f"{at}.bin") == b"hello"
            met += left[0] <= 0
        assert met == 4


def arrow_store(proxy) -> pa.fs.S3FileSystem:
    """pyarrow's own client, as patient as s3fs is here."""
    return pa.fs.S3FileSystem(
        endpoint_override=proxy.url,
        access_key="test",
        secret_key="testtest",
        region="us-east-1",
        request_timeout=PATIENCE,
    )


TABLE = pa.table({"number": range(20_000)})


def written_and_read(store: pa.fs.S3FileSystem, path: str) -> pa.Table:
    """What is read of a table that was written there."""
    with store.open_output_stream(path) as file, pa.ipc.new_file(file, TABLE.schema) as writer:
        writer.write_table(TABLE)
    with store.open_input_file(path) as file:
        return pa.ipc.open_file(file).read_all()


def test_pyarrow_writes_and_reads_the_same_bytes_through_faults(s3_server, through):
    # Not 500 and 503: an error's text that is longer than the range that was asked for (8 bytes at
    # the end of an Arrow file) is no error to its client, but one that it does not try again.
    kinds = [fault for fault in FAULTS if not fault.startswith("50")]
    with proxied(s3_server, 0.1, seed=3, hang=2 * PATIENCE, kinds=kinds) as proxy:
        bucket = through(proxy)
        for number in range(12):
            assert written_and_read(arrow_store(proxy), f"{bucket}/{number}.arrow") == TABLE
        assert proxy.faults.total() > 2


def commit_many(folder: Folder) -> None:
    """Enough requests to meet some fault."""
    for number in range(100):
        folder.commit(f"{number}.bin", b"hello")


def test_a_client_that_tries_once_fails(s3_server, through):
    with proxied(s3_server, rate=0.3, seed=0, hang=2 * PATIENCE) as proxy:
        folder = Folder(f"s3://{through(proxy, attempts=1)}/corpus")
        with pytest.raises(OSError, match=r"a fault|reach|connect|Read timeout|closed"):
            commit_many(folder)
