"""The run folder, where a command and its ranks meet: small files say who launched, who stops, why.

    launched       the name of the launch whose ranks may write here
    begun          the same name, once its first rank is at work
    stop.json      what the ranks are asked for: {launch, reason, kind}
    outcome.json   how the ranks ended, if not with a summary: the error, as one sentence

The folder is a path on a disk that all ranks share, or a URL of a store. Files are put whole, over
whatever stood there, and only those of the own launch count.
"""

import json
import os
import socket
from pathlib import Path
from typing import Any, Literal

from cascade_model.commit import Folder
from cascade_model.errors import InputError

Kind = Literal["end", "resize", "done"]
"""Why ranks stop: for good, or to start again in another number; done: they have."""
_MARK, _BEGUN, _STOP, _OUTCOME = "launched", "begun", "stop.json", "outcome.json"


def run_folder(output: str) -> Folder:
    """The run folder, not made yet; all ranks must see the same one.

    Raises `InputError` for a file in the way, a place that cannot be written or an unknown URL.
    """
    folder = Folder(output)
    if not folder.is_local:
        return folder
    path = Path(folder.url)
    nearest = next(p for p in (path, *path.parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(
            f"output={output} cannot be made: {nearest} is no folder that can be written; "
            "choose another path"
        )
    return folder


def mark(folder: Folder, launch: str) -> None:
    """Say whose launch the folder belongs to; what earlier ones left is taken away."""
    for name in (_BEGUN, _STOP, _OUTCOME):
        folder.remove(name)
    folder.replace(_MARK, launch.encode())


def unmark(folder: Folder, launch: str) -> None:
    """Take the own marks away; those of a run that took the folder over stay."""
    if _read(folder, _MARK) == launch:
        for name in (_BEGUN, _STOP, _OUTCOME, _MARK):
            folder.remove(name)


def require_shared(folder: Folder, launch: str) -> None:
    """Raise `InputError` in a rank that does not see the run folder of the command."""
    if _read(folder, _MARK) != launch:
        raise InputError(
            f"output={folder.url} on the machine {socket.gethostname()} is not the run folder that "
            "the command made; give a folder on a disk that all machines share, or an s3:// URL"
        )


def begin(folder: Folder, launch: str) -> None:
    """Say that the first rank is at work."""
    folder.replace(_BEGUN, launch.encode())


def has_begun(folder: Folder, launch: str) -> bool:
    """Whether the first rank of the launch has been at work."""
    return _read(folder, _BEGUN) == launch


def ask_to_stop(folder: Folder, launch: str, reason: str, kind: Kind = "end") -> None:
    """Ask the ranks of a launch to save and stop at the end of their step."""
    wish = {"launch": launch, "reason": reason, "kind": kind}
    folder.replace(_STOP, json.dumps(wish).encode())


def wish_to_stop(folder: Folder, launch: str) -> tuple[str, Kind] | None:
    """The reason and the kind of what the ranks are asked for, if they are."""
    wish = _read_json(folder, _STOP)
    return (wish["reason"], wish["kind"]) if wish and wish["launch"] == launch else None


def forget_stop(folder: Folder) -> None:
    """Take the wish back."""
    folder.remove(_STOP)


def write_outcome(folder: Folder, error: InputError) -> None:
    """Leave an error for the command, and for ranks that would only meet it again."""
    folder.replace(_OUTCOME, json.dumps(error.to_data()).encode())


def has_outcome(folder: Folder) -> bool:
    """Whether an earlier attempt of this launch has ended with an error of its own."""
    return _read_json(folder, _OUTCOME) is not None


def take_outcome(folder: Folder) -> InputError | None:
    """The error that the ranks left, once."""
    data = _read_json(folder, _OUTCOME)
    folder.remove(_OUTCOME)
    return None if data is None else InputError.from_data(data)


def _read(folder: Folder, name: str) -> str:
    try:
        return folder.read_bytes(name).decode()
    except OSError:
        return ""


def _read_json(folder: Folder, name: str) -> dict[str, Any] | None:
    try:
        return json.loads(_read(folder, name))
    except ValueError:
        return None
