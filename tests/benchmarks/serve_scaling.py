"""serve-scaling: deploy -> scale up -> scale to zero -> back, told as it happens.

    make serve-scaling

A tiny model behind the shipped autoscaling policy with short delays. Every request must be
answered, also those that come while there is no sampler at all.
"""

import asyncio
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from jobs.serve import serve_document, start_ray_for
from jobs.serve_config import ScalingConfig
from tests.benchmarks.report import Row, publish
from tests.benchmarks.serve_client import Told, streams
from tests.benchmarks.serve_runs import (
    config_of,
    replicas,
    requests,
    running,
    serving,
    write_model,
)
from tests.benchmarks.waiting import wait_until

MOST = 3


class Transcript:
    """What happens, with the seconds since the deployment began; replicas are watched."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._seen: dict[str, int] = {}
        self.most = 0

    def says(self, text: str) -> None:
        """One line."""
        print(f"{time.monotonic() - self._began:6.1f} s  {text}", flush=True)

    def look(self) -> None:
        """A line where the samplers are others than before."""
        now = replicas("sampler")
        if now != self._seen:
            told = ", ".join(f"{count} {state.lower()}" for state, count in sorted(now.items()))
            self.says(f"samplers: {told or 'none'}")
        self._seen = now
        self.most = max(self.most, running())

    def until(self, is_so: Callable[[], bool], seconds: float) -> bool:
        """Watch until it is so, or the time is over."""

        def looked() -> bool:
            self.look()
            return is_so()

        try:
            wait_until(looked, seconds)
        except TimeoutError:
            return False
        return True


def asked(transcript: Transcript, url: str, count: int, tokens: int) -> list[Told]:
    """Streams, watched until they have ended."""
    found: list[Told] = []
    wanted = requests(count, max_tokens=tokens)
    thread = threading.Thread(target=lambda: found.extend(asyncio.run(streams(url, wanted))))
    thread.start()
    transcript.until(lambda: not thread.is_alive(), 300)
    thread.join()
    whole = sum(told.is_whole for told in found)
    transcript.says(f"{whole} of {count} streams whole")
    return found


def main() -> int:
    """The transcript, and a table of what it must have shown."""
    import ray

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.pop("RAY_ADDRESS", None)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="scaling", dir="/tmp") as temporary:
        folder = Path(temporary)
        os.environ["RAY_TMPDIR"] = temporary  # short enough for Ray's sockets
        scaling = ScalingConfig(up_seconds=1.0, down_seconds=4.0, to_zero_seconds=4.0)
        config = config_of(
            write_model(folder / "tiny"),
            folder,
            min_replicas=0,
            max_replicas=MOST,
            streams_per_replica=4,
            scaling=scaling,
        )
        start_ray_for(serve_document(config))
        transcript = Transcript()
        try:
            with serving(config) as url:
                transcript.says("deployed with min_replicas 0")
                transcript.look()
                transcript.says("one request to an endpoint without a sampler")
                first = asked(transcript, url, 1, 16)
                transcript.says("24 long streams, 4 places a sampler")
                many = asked(transcript, url, 24, 400)
                transcript.says("nobody asks")
                is_empty = transcript.until(lambda: running() == 0, 120)
                transcript.says("8 requests to an endpoint without a sampler")
                back = asked(transcript, url, 8, 16)
                transcript.says("ending")
        finally:
            ray.shutdown()
    told = [*first, *many, *back]
    rows.append(Row("requests", len(told), "requests"))
    lost = sum(not each.is_whole for each in told)
    rows.append(Row("... lost", lost, "", bar=0, is_limit=True))
    rows.append(Row("samplers at the most", transcript.most, f"of {MOST}", bar=2))
    rows.append(Row("down to none", int(is_empty), "of 1", bar=1))
    return publish("serve_scaling", rows)


if __name__ == "__main__":
    raise SystemExit(main())
