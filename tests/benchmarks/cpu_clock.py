"""What a command takes: wall, processor time with everything it starts, and peak memory.

Processes that end before their parent are in the parent's own account (`wait4`). A cluster's
daemons are not waited for, so the whole tree is also looked at five times a second; the larger of
the two sums counts.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TICKS = os.sysconf("SC_CLK_TCK")
_PERIOD = 0.2


@dataclass(frozen=True, slots=True)
class Spent:
    """What an arm took, without its imports."""

    cpu: float
    """Seconds of processor time, user and system."""
    wall: float
    """Seconds."""
    peak: float
    """Most MiB resident in any one process."""
    tokens: int


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Processor time of this process, all its threads together."""
    began = time.process_time()
    work()
    return time.process_time() - began


class TreeClock:
    """Processor time of a process and all its descendants, the ones that are gone included."""

    def __init__(self, pid: int) -> None:
        self._pid, self._seen = pid, {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(_PERIOD):
            self._look(self._pid)

    def _look(self, pid: int) -> None:
        with suppress(OSError, ValueError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            self._seen[pid, fields[19]] = (int(fields[11]) + int(fields[12])) / _TICKS
            for task in os.listdir(f"/proc/{pid}/task"):
                with suppress(OSError):
                    children = Path(f"/proc/{pid}/task/{task}/children").read_text()
                    for child in children.split():
                        self._look(int(child))

    def stop(self) -> float:
        """Seconds, as last seen of each process."""
        self._stop.set()
        self._thread.join()
        return sum(self._seen.values())


def spent(
    module: str, arm: str, settings: Mapping[str, Any], environment: Mapping[str, str]
) -> Spent:
    """Run `python -m module arm settings` and take its account; its last line is JSON."""
    command: Sequence[str] = [sys.executable, "-m", module, arm, json.dumps(settings)]
    surroundings = {**os.environ, **environment}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env=surroundings, text=True
        ) as process,
    ):
        clock = TreeClock(process.pid)
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seen = clock.stop()
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{log.read()}{arm} failed with {process.returncode}")
    told = json.loads(lines[-1])
    cpu = max(usage.ru_utime + usage.ru_stime, seen) - told["before"]
    return Spent(cpu, told["seconds"], usage.ru_maxrss / 1024, told["tokens"])
