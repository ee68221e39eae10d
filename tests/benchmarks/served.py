"""A `cascade serve` of its own process, for outside tools that are pointed at it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.serve_client import KEY
from tests.benchmarks.serve_runs import free_port


@dataclass(frozen=True, slots=True)
class Served:
    """A server of its own process on loopback."""

    port: int
    pid: int

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"


@contextlib.contextmanager
def cascade_serve(model: str, log: Path, *flags: str, seconds: float = 240) -> Iterator[Served]:
    """An endpoint that is ready; ended by SIGTERM on leaving."""
    port = free_port()
    words = [sys.executable, "-m", "jobs.serve", "--model", model, "--model-name", "served"]
    words += ["--port", str(port), "--max-replicas", "1", *flags]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
    with log.open("w") as out:
        server = subprocess.Popen(
            words,
            env={**environment, "CASCADE_API_KEYS": KEY},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    served = Served(port, server.pid)
    try:
        deadline = time.monotonic() + seconds
        while not _is_ready(served.url):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.5)
        yield served
    finally:
        server.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(90)
        if server.poll() is None:
            server.kill()


def _is_ready(url: str) -> bool:
    asked = urllib.request.Request(f"{url}/ready", headers={"Authorization": f"Bearer {KEY}"})
    try:
        with urllib.request.urlopen(asked, timeout=5) as told:
            return told.status == 200
    except (urllib.error.URLError, OSError):
        return False
