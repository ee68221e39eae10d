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

from cascade_model.commit import Folder
from cascade_model.errors import InputError
from cascade_model.stopping import sigterm_held_off

HEARTBEAT = 5.0
"""Seconds between two signs of life."""
SILENCE = 60.0
"""Seconds without one after which a run counts as dead."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Drawn by Linux each time that a machine starts."""
_NAME = re.compile(r"lease-(\d{8,})\.json")


class LeaseLost(RuntimeError):
    """The run folder has a newer holder, so this process must not write to it any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """A command that holds a run folder."""

    id: str
    host: str
    namespace: str
    """The numbering of processes that `pid` belongs to: each start of a machine has its own, and
    each container."""
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

    folder: Folder
    number: int

    def check(self) -> None:
        """Raise `LeaseLost` if a higher number was drawn since; call it before every write."""
        last = _newest(self.folder)
        if last is None or last.number != self.number:
            raise LeaseLost(_taken_over(self.folder, last))


@contextlib.contextmanager
def hold(folder: Folder) -> Iterator[Owner]:
    """Hold a run folder while the body runs; a local one is made if it is not there.

    Raises `InputError`, saying who and since when, if a living run holds it, or if another run has
    taken it over when the body fails. What the body raises is what is seen of a store that failed:
    one that cannot be asked at the end hides neither that nor a run that went well. A lease that
    could not be freed then is as good as free `SILENCE` seconds later.
    """
    owner, ended = Owner.here(), threading.Event()
    beat = threading.Thread(target=_beat, args=(folder, owner, ended), daemon=True)
    with contextlib.ExitStack() as held:
        with sigterm_held_off():  # it would leave a lease that nobody lets go
            _draw(folder, owner, partial(_refuse_the_living, folder))
            beat.start()
            held.callback(_let_go, folder, owner, beat, ended)
        try:
            yield owner
        except Exception as error:
            if told := _told_if_lost(folder, owner):
                raise InputError(told) from error
            raise


def _let_go(folder: Folder, owner: Owner, beat: threading.Thread, ended: threading.Event) -> None:
    with sigterm_held_off():
        ended.set()
        beat.join()
        with contextlib.suppress(Exception):
            _release(folder, owner)


def require_free(folder: Folder) -> None:
    """Raise `InputError`, as `hold` would, if a living run holds the folder; writes nothing."""
    _refuse_the_living(folder, _newest(folder))


def begin(folder: Folder, owner: Owner) -> Attempt:
    """A further number for an owner that holds the folder; `LeaseLost` if it does no longer."""

    def refuse_strangers(last: "_Held | None") -> None:
        if not _is_of(last, owner):
            raise LeaseLost(_taken_over(folder, last))

    return Attempt(folder=folder, number=_draw(folder, owner, refuse_strangers))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Held:
    """The record that counts."""

    number: int
    owner: Owner
    is_released: bool

    @property
    def name(self) -> str:
        """The record's file."""
        return _name(self.number)


def _newest(folder: Folder) -> _Held | None:
    while True:
        numbers = _numbers(folder)
        if not numbers:
            return None
        name = _name(numbers[-1])
        try:
            values = json.loads(folder.read_bytes(name))
            return _Held(
                number=numbers[-1],
                owner=Owner(**values["owner"]),
                is_released=values["is_released"],
            )
        except FileNotFoundError:
            continue  # a higher one has just taken its place
        except (ValueError, TypeError, KeyError):
            raise InputError(
                f"{folder.path(name)} is damaged; delete it if no run uses the folder"
            ) from None


def _draw(folder: Folder, owner: Owner, refuse: Callable[[_Held | None], None]) -> int:
    """Create the record of the next number, unless `refuse(last)` raises."""
    data = _record(owner, is_released=False)
    while True:
        last = _newest(folder)
        number = last.number + 1 if last else 1
        refuse(last)
        if folder.create(_name(number), data) != data:
            continue  # another was faster
        for each in _numbers(folder):
            if each < number:
                folder.remove(_name(each))
        return number


def _refuse_the_living(folder: Folder, last: _Held | None) -> None:
    if last is None or last.is_released:
        return
    with contextlib.suppress(FileNotFoundError):
        silence = folder.now() - folder.modified(last.name)
        if silence <= SILENCE and not _is_dead_here(last.owner):
            raise InputError(
                f"output={folder.url} is in use by {last.owner} (last sign of life "
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


def _beat(folder: Folder, owner: Owner, ended: threading.Event) -> None:
    """Give signs of life until the end, or until the folder is another's.

    A store that does not answer is asked again at the next beat.
    """
    while not ended.wait(HEARTBEAT):
        with contextlib.suppress(Exception):
            last = _newest(folder)
            if last is None or not _is_of(last, owner):
                return
            folder.touch(last.name)


def _release(folder: Folder, owner: Owner) -> None:
    last = _newest(folder)
    if last is not None and _is_of(last, owner):
        folder.replace(last.name, _record(owner, is_released=True))


def _told_if_lost(folder: Folder, owner: Owner) -> str | None:
    """The sentence about another holder; none where there is none, or nobody knows."""
    try:
        last = _newest(folder)
    except Exception:
        return None
    return None if _is_of(last, owner) else _taken_over(folder, last)


def _numbers(folder: Folder) -> list[int]:
    """The numbers that were drawn and not removed, the highest last."""
    return sorted(int(match[1]) for name in folder.list() if (match := _NAME.fullmatch(name)))


def _name(number: int) -> str:
    return f"lease-{number:08d}.json"


def _is_of(last: _Held | None, owner: Owner) -> bool:
    return last is not None and last.owner.id == owner.id and not last.is_released


def _record(owner: Owner, is_released: bool) -> bytes:
    """Bytes of this writing alone, so that no other's record is taken for the own one."""
    values = {"owner": asdict(owner), "is_released": is_released, "written": uuid.uuid4().hex}
    return (json.dumps(values) + "\n").encode()


def _taken_over(folder: Folder, last: _Held | None) -> str:
    holder = last.owner if last else "nobody known: its lease was deleted"
    return (
        f"output={folder.url} was taken over by {holder}; this run stops and writes nothing more "
        "there, choose another output for it"
    )


def _namespace() -> str:
    """A start of a machine and a container on it.

    Outside of containers every Linux has the same number for the latter, and two machines may share
    a host name; no two starts share their `boot_id`.
    """
    try:
        return BOOT_ID.read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
