"""Saves that meet a full disk or a store that fails: training goes on.

Each row has a control: the same check, where the protection is off.
"""

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tests.benchmarks.faults_disk import _NAMESPACE, has_small_disks
from tests.benchmarks.faults_s3 import RATE, store_at, told
from tests.benchmarks.rank_points import name_of
from tests.benchmarks.rank_runs import Launcher, Result, flags, result_of
from tests.benchmarks.report import Row
from tests.benchmarks.s3_faults import client_environment, moto_server, proxied

FULL_FROM, KILLED, FULL_TO = 5, 10, 11
"""Forward passes: the disk is full from the first to the last, so that at least one save meets it;
in between a rank is killed."""
_DISK_BYTES = 64 << 20
_FAILED = "could not be saved"
_STARTS = 4
"""How often the command is given when the store fails."""


def save_rows(
    launcher: Launcher, corpus: str, folder: Path, undisturbed: Result, count: int
) -> Iterator[Row]:
    """All of them."""
    yield from disk_rows(corpus, folder / "disk", undisturbed)
    yield from store_rows(launcher, corpus, folder / "store", undisturbed, max(1, count // 10))


def disk_rows(corpus: str, folder: Path, undisturbed: Result) -> Iterator[Row]:
    """A disk that is full for a while, on a tmpfs of one's own; elsewhere a limit on file sizes."""
    disk = folder / "disk"
    disk.mkdir(parents=True)
    is_tmpfs = has_small_disks(disk)
    mount = f"mount -t tmpfs -o size={_DISK_BYTES} tmpfs {shlex.quote(str(disk))}"
    before = [*_NAMESPACE, "bash", "-c", f'{mount} && exec "$@"', "bash"] if is_tmpfs else []
    with Launcher(before) as launcher:
        # A disk of the launcher's own is seen from here through its root.
        seen = Path(f"/proc/{launcher.pid}/root{disk}") if is_tmpfs else disk
        filler = str(disk / "filler") if is_tmpfs else None
        full = {"disk": {"rank": 0, "filler": filler, "first": FULL_FROM, "last": FULL_TO}}
        if not is_tmpfs:  # each rank has a limit of its own
            full["disk"].pop("rank")
        what = f"disk full ({'tmpfs' if is_tmpfs else 'limit on file size'})"
        words, events = flags(corpus, disk / "run"), folder / "events"
        codes = launcher.run(words, events, faults=full)
        text = (events / "rank-0.log").read_text()
        same = codes == [0, 0] and result_of(seen / "run") == undisturbed
        yield Row(f"{what}: training goes on, weights and log lines as undisturbed", int(same),
                  "of 1", bar=1)  # fmt: skip
        yield Row(f"{what}: saves that failed, each told", text.count(_FAILED), "saves", bar=1)
        intact = _killed_while_full(launcher, corpus, disk, seen, folder, full)
        same = intact and result_of(seen / "killed") == undisturbed
        yield Row(f"{what}: killed meanwhile, goes on from the checkpoint before", int(same),
                  "of 1", bar=1)  # fmt: skip
        words = flags(corpus, disk / "naive")
        codes = launcher.run(words, folder / "events-naive", faults=full, is_naive=True)
        bad = codes != [0, 0] or result_of(seen / "naive") != undisturbed
        yield Row("control: without the commit protocol the full disk ends it", int(bad), "of 1",
                  bar=1)  # fmt: skip


def _killed_while_full(
    launcher: Launcher, corpus: str, disk: Path, seen: Path, folder: Path, full: dict
) -> bool:
    """Kill a rank while the disk is full, make room, run again; whether it went on from the
    newest checkpoint of before."""
    words, events = flags(corpus, disk / "killed"), folder / "events-killed"
    target = (name_of("forward", 1), KILLED)
    ranks = launcher.start(words, events, target=target, faults=full)
    if ranks.until_paused():
        ranks.signal(signal.SIGKILL, 1)
    ranks.go()
    ranks.wait()
    ranks.kill_all()
    with suppress(FileNotFoundError):
        (seen / "filler").unlink()
    again = launcher.run(words, folder / "events-again")
    log = (folder / "events-again/rank-0.log").read_text()
    return again == [0, 0] and f"(step {FULL_FROM - 1}, " in log


def store_rows(
    launcher: Launcher, corpus: str, folder: Path, undisturbed: Result, seeds: int
) -> Iterator[Row]:
    """The whole run folder in an S3 that fails a tenth of the requests."""
    same = starts = failed = faults = requests = 0
    with moto_server() as server:
        for seed in range(seeds):
            with proxied(server, RATE, seed) as proxy:
                run = f"s3://bucket-{seed}/run"
                store_at(server).mkdir(f"bucket-{seed}")
                events = folder / f"seed-{seed}"
                is_over, count = _run_in_store(launcher, corpus, run, events, proxy.url)
                print(f"s3 {seed + 1}/{seeds} {count} starts, {told(proxy)}", file=sys.stderr)
            faults, requests = faults + proxy.faults.total(), requests + proxy.requests
            failed += sum(log.read_text().count(_FAILED) for log in events.glob("*/rank-0.log"))
            starts += count
            with _as_user_of(server):
                same += is_over and result_of(run) == undisturbed
        store_at(server).mkdir("bucket-outage")
        with proxied(server, 1.0, kinds=("503",), about="step_00000006") as proxy:
            settings = client_environment(proxy.url, attempts=2)
            run = "s3://bucket-outage/run"
            codes = launcher.run(flags(corpus, run), folder / "outage", **settings)
            lost = (folder / "outage/rank-0.log").read_text().count(_FAILED)
        with _as_user_of(server):
            goes_on = codes == [0, 0] and lost == 1 and result_of(run) == undisturbed
        store_at(server).mkdir("bucket-control")
        with proxied(server, 1.0, kinds=("503",), about="step_00000006") as proxy:
            settings = client_environment(proxy.url, attempts=2)
            words, events = flags(corpus, "s3://bucket-control/run"), folder / "control"
            codes = launcher.run(words, events, faults={"raising": {}}, **settings)
            bad = codes != [0, 0]
    yield Row("S3 failing 10 %: weights and log lines of the run on a disk", same, f"of {seeds}",
              bar=seeds)  # fmt: skip
    yield Row("S3: requests that met a fault", 100 * faults / requests, "%")
    yield Row("S3: starts of the command", starts, f"for {seeds}")
    yield Row("S3: saves that failed, after which training went on", failed, "saves")
    yield Row("S3 refusing one save: told, training goes on, all as undisturbed", int(goes_on),
              "of 1", bar=1)  # fmt: skip
    yield Row("control: where a failed save is an error the run ends", int(bad), "of 1", bar=1)


def _run_in_store(
    launcher: Launcher, corpus: str, run: str, events: Path, url: str
) -> tuple[bool, int]:
    """Give the command until it ends well; whether it did, and how often it was given."""
    for start in range(1, _STARTS + 1):
        settings = client_environment(url)
        codes = launcher.run(flags(corpus, run), events / str(start), **settings)
        if codes == [0, 0]:
            return True, start
    return False, _STARTS


class _as_user_of:
    """This process's own client, past every proxy."""

    def __init__(self, url: str) -> None:
        self._settings = client_environment(url)

    def __enter__(self) -> None:
        import fsspec.config

        self._before = {name: os.environ.get(name) for name in self._settings}
        os.environ.update(self._settings)
        fsspec.config.conf["s3"] = {"use_listings_cache": False}

    def __exit__(self, *rest: object) -> None:
        import fsspec.config
        import s3fs

        fsspec.config.conf.pop("s3")
        s3fs.S3FileSystem.clear_instance_cache()
        for name, value in self._before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
