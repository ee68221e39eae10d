"""Shared fixtures: one local Ray, a browser, one small real corpus, one tiny model."""

import json
import os
import sysconfig
import tempfile
import uuid
from pathlib import Path

import pytest

from pipelines.cluster import settle_authentication

# Before any import of ray: token mode, as the commands choose it, and never a user's own cluster.
os.environ.pop("RAY_ADDRESS", None)
os.environ["RAY_AUTH_MODE"] = "token"
settle_authentication(os.environ)
# Tiny models run faster on one thread, and worker processes do not fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")


def pytest_collection_modifyitems(items):
    """Tests that fork come first: a fork beside Ray's threads may leave its RPC hanging."""
    items.sort(key=lambda item: item.get_closest_marker("forks") is None)


@pytest.fixture(scope="session")
def ray_local():
    """One local Ray of four logical CPUs for the whole run, in a private short folder."""
    import ray

    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        ray.init(
            "local", num_cpus=4, include_dashboard=False, _temp_dir=folder, log_to_driver=False
        )
        yield ray
        ray.shutdown()


@pytest.fixture(scope="module")
def chromium():
    """A headless browser for one module: while it runs, its thread has an event loop."""
    from tests.jobs import browser as browsers

    found = browsers.executable()
    if found is None and not os.environ.get(browsers.REQUIRED):
        pytest.skip("no browser: `make setup` fetches one on x86-64, or install `chromium`")
    assert found is not None, f"{browsers.REQUIRED} is set and there is no browser"
    with browsers.started(found) as running:
        yield running


@pytest.fixture(scope="session")
def real_documents() -> list[str]:
    """About forty modules of the standard library that every Python 3.11 has (PSF licence)."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(folder.glob("*.py"), key=lambda path: path.name)
    texts = [path.read_text(encoding="utf-8") for path in names[:60]]
    return [text for text in texts if 500 < len(text) < 60_000][:40]


@pytest.fixture(scope="session")
def documents_jsonl(real_documents, tmp_path_factory) -> Path:
    """The real documents as one JSONL file."""
    path = tmp_path_factory.mktemp("documents") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in real_documents))
    return path


@pytest.fixture(scope="session")
def tiny_corpus(documents_jsonl, tmp_path_factory) -> str:
    """A prepared corpus: byte-level BPE of 512, sequences of 64, blocks of 4."""
    from jobs import prepare

    output = tmp_path_factory.mktemp("corpus") / "corpus"
    argv = ["--output", str(output), "--source.paths", str(documents_jsonl)]
    argv += ["--tokenizer", "train", "--vocab-size", "512", "--sequence-length", "64"]
    argv += ["--noise.block-size", "4", "--held-out-rate", "0.1", "--runner", "local"]
    assert prepare.main(argv) == 0
    return str(output)


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
