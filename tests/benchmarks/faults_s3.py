"""`prepare` to an S3 that fails a tenth of the requests: the same bytes as to one that does not.

The text is read from there too. Objects have names of their attempts in a store, so bytes are
compared unit by unit through the manifest. The control is a client that tries each request once.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import s3fs

from cascade_model.commit import sha256_of
from tests.benchmarks.fault_runs import finished, flags
from tests.benchmarks.report import Row
from tests.benchmarks.s3_faults import FaultyProxy, client_environment, moto_server, proxied

RATE = 0.1
_TEXTS = "texts/documents.jsonl"


def store_at(url: str) -> s3fs.S3FileSystem:
    """A client of the server itself, past every proxy."""
    return s3fs.S3FileSystem(
        key="test", secret="testtest", endpoint_url=url, use_listings_cache=False
    )


def prepared(server: str, through: str, folder: Path, attempts: int = 5) -> str:
    """Run the job into a new bucket; its digest, or what went wrong."""
    bucket = f"bucket-{folder.name}"
    store = store_at(server)
    store.mkdir(bucket)
    words = flags(f"s3://{_TEXTS}", f"s3://{bucket}/corpus", "local")
    settings = client_environment(through, attempts=attempts)
    code = finished(folder / "events", words, **settings)
    return f"exit {code}" if code else checked(store, f"{bucket}/corpus")


def checked(store: s3fs.S3FileSystem, folder: str) -> str:
    """The digest of the manifest whose every shard lies there with the bytes that it names."""
    manifest = json.loads(store.cat_file(f"{folder}/manifest.json"))
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            with store.open(f"{folder}/{shard['object']}", "rb") as file:
                if sha256_of(file) != shard["sha256"]:
                    return f"{shard['object']} is damaged"
    return manifest["digest"]


def left_over(store: s3fs.S3FileSystem, folder: str) -> int:
    """Attempts' objects that no record names: they cost space, and nothing reads them."""
    names = [path.rpartition("/")[2] for path in store.ls(folder, detail=False)]
    records = [name for name in names if name.endswith(".record.json")]
    named = {json.loads(store.cat_file(f"{folder}/{name}"))["object"] for name in records}
    return sum("~" in name and name not in named for name in names)


def told(proxy: FaultyProxy) -> str:
    """What the clients met."""
    return f"{proxy.faults.total()} of {proxy.requests} requests failed: {dict(proxy.faults)}"


def s3_rows(folder: Path, source: Path, seeds: int) -> Iterator[Row]:
    """One run per seed, all against one undisturbed run, and the control."""
    with moto_server() as server:
        store_at(server).mkdir(_TEXTS.partition("/")[0])
        store_at(server).put_file(str(source), _TEXTS)
        wanted = prepared(server, server, folder / "undisturbed")
        same = leftovers = faults = requests = 0
        for seed in range(seeds):
            with proxied(server, RATE, seed) as proxy:
                found = prepared(server, proxy.url, folder / f"seed-{seed}")
            print(f"s3 {seed + 1}/{seeds} {told(proxy)}", flush=True)
            same += found == wanted
            faults, requests = faults + proxy.faults.total(), requests + proxy.requests
            leftovers += left_over(store_at(server), f"bucket-seed-{seed}/corpus")
        with proxied(server, RATE, 0) as proxy:
            once = prepared(server, proxy.url, folder / "control", attempts=1)
    yield Row("S3 failing 10 % of requests: same bytes", same, f"of {seeds}", bar=seeds)
    yield Row("S3: requests that met a fault", 100 * faults / requests, "%")
    yield Row("S3: objects of lost attempts left behind", leftovers, "objects")
    yield Row("control: a client that tries once fails", int(once != wanted), "of 1", bar=1)
