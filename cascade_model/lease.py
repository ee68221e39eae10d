"""One run per folder: a lease whose number only grows and is checked before anything is written.

    RUN/lease-00000007.json    who holds the run folder; the file's time is the last sign of life

The highest number counts. To take the folder is to create the record of the next number, which only
one taker can; records are never written over but to say that they are free. A process that was
thought dead and comes back finds a higher number than its own, and stops. What is left is the
instant between a check and the write behind it, which no file system can close.

The *owner* is the command: it takes the folder and keeps the lease alive. Each start of its ranks
draws a further number, so that a rank of an earlier start is fenced off as well.
"""

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Self

from cascade_model.commit import draft, link_new, replace_file
from cascade_model.errors import InputError

HEARTBEAT = 5.0
"""Seconds between two signs of life."""
SILENCE = 60.0
"""Seconds without one after which a run counts as dead."""
_NAME = re.compile(r"lease-(\d{8,})\.json")


class LeaseLost(RuntimeError):
    """The run folder has a newer holder, so this process must not write to it any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """A command that holds a run folder."""

    id: str
    host: str
    namespace: str
    """The host's numbering of processes that `pid` belongs to: containers have their own."""
    pid: int
    since: str

    @classmethod
    def here(cls) -> Self:
        """This process, from now on."""
        return cls(
            id=uuid.uuid4().hex,
            host=socket.gethostname(),
            namespace=_namespace(),
            pid=os.getpid(),
            since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, at work since {self.since}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One start of an owner's ranks."""

    folder: Path
    number: int

    def check(self) -> None:
        """Raise `LeaseLost` if a higher number was drawn since; call it before every write."""
        last = _newest(self.folder)
        if last is None or last.number != self.number:
            raise LeaseLost(_taken_over(self.folder, last))


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[Owner]:
    """Hold a run folder while the body runs; the folder is made if it is not there.

    Raises `InputError`, saying who and since when, if a living run holds it, or if another run has
    taken it over when the body fails.
    """
    owner, ended = Owner.here(), threading.Event()
    _draw(folder, owner, partial(_refuse_the_living, folder))
    beat = threading.Thread(target=_beat, args=(folder, owner, ended), daemon=True)
    beat.start()
    try:
        yield owner
    except Exception as error:
        last = _newest(folder)
        if not _is_of(last, owner):
            raise InputError(_taken_over(folder, last)) from error
        raise
    finally:
        ended.set()
        beat.join()
        _release(folder, owner)


def begin(folder: Path, owner: Owner) -> Attempt:
    """A further number for an owner that holds the folder; `LeaseLost` if it does no longer."""

    def refuse_strangers(last: "_Held | None", now: float) -> None:
        if not _is_of(last, owner):
            raise LeaseLost(_taken_over(folder, last))

    return Attempt(folder=folder, number=_draw(folder, owner, refuse_strangers))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Held:
    """The record that counts."""

    number: int
    path: Path
    owner: Owner
    is_released: bool


def _newest(folder: Path) -> _Held | None:
    while True:
        found = [match for p in folder.glob("lease-*") if (match := _NAME.fullmatch(p.name))]
        if not found:
            return None
        path = folder / max(found, key=lambda match: int(match[1]))[0]
        try:
            values = json.loads(path.read_bytes())
            return _Held(
                number=int(path.stem.removeprefix("lease-")),
                path=path,
                owner=Owner(**values["owner"]),
                is_released=values["is_released"],
            )
        except FileNotFoundError:
            continue  # a higher one has just taken its place
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{path} is damaged; delete it if no run uses the folder") from None


def _draw(folder: Path, owner: Owner, refuse: Callable[[_Held | None, float], None]) -> int:
    """Create the record of the next number, unless `refuse(last, now)` raises."""
    data = _record(owner, is_released=False)
    while True:
        last = _newest(folder)
        number = last.number + 1 if last else 1
        target = folder / f"lease-{number:08d}.json"
        try:
            with draft(target, lambda file: file.write(data)) as finished:
                # The time of the disk, as the record's is: clocks of machines differ.
                refuse(last, finished.stat().st_mtime)
                link_new(finished, target)
        except FileExistsError:
            continue
        for path in folder.glob("lease-*.json"):
            match = _NAME.fullmatch(path.name)
            if match and int(match[1]) < number:
                path.unlink(missing_ok=True)
        return number


def _refuse_the_living(folder: Path, last: _Held | None, now: float) -> None:
    if last is None or last.is_released:
        return
    with contextlib.suppress(FileNotFoundError):
        silence = now - last.path.stat().st_mtime
        if silence <= SILENCE and not _is_dead_here(last.owner):
            raise InputError(
                f"output={folder} is in use by {last.owner} (last sign of life "
                f"{max(silence, 0):.0f} s ago); end that run or choose another output; "
                f"{SILENCE:.0f} s after its last sign of life the same command takes its place"
            )


def _is_dead_here(owner: Owner) -> bool:
    """Whether the owner ran on this machine and is gone, so that nobody needs to wait for it."""
    if (owner.host, owner.namespace) != (socket.gethostname(), _namespace()):
        return False
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it lives, under another user
    return False


def _beat(folder: Path, owner: Owner, ended: threading.Event) -> None:
    """Give signs of life until the end, or until the folder is another's."""
    while not ended.wait(HEARTBEAT):
        with contextlib.suppress(OSError):
            last = _newest(folder)
            if last is None or not _is_of(last, owner):
                return
            os.utime(last.path)


def _release(folder: Path, owner: Owner) -> None:
    last = _newest(folder)
    if last is not None and _is_of(last, owner):
        replace_file(last.path, _record(owner, is_released=True))


def _is_of(last: _Held | None, owner: Owner) -> bool:
    return last is not None and last.owner.id == owner.id and not last.is_released


def _record(owner: Owner, is_released: bool) -> bytes:
    return (json.dumps({"owner": asdict(owner), "is_released": is_released}) + "\n").encode()


def _taken_over(folder: Path, last: _Held | None) -> str:
    holder = last.owner if last else "nobody known: its lease was deleted"
    return (
        f"output={folder} was taken over by {holder}; this run stops and writes nothing more "
        "there, choose another output for it"
    )


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
