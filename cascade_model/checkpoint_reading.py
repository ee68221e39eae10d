"""The proof that a checkpoint is whole, and its numbers front to back.

Every hash is compared before anything is used, and what is used is hashed once more on the way.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cascade_model.checkpoint_files import (
    ATTEMPT,
    COMMIT,
    FILE,
    FORMAT,
    MANIFEST,
    SIZES,
    STEP,
    Checkpoint,
    Chunk,
    Entry,
    File,
    is_whole,
    layout,
    step_name,
)
from cascade_model.commit import Folder, reason_of
from cascade_model.errors import CheckpointMismatch, InputError, Unfinished, of_store
from cascade_model.hashing import HashingReader
from cascade_model.local_files import TEMPORARY

_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)


class OtherFormat(CheckpointMismatch):
    """A checkpoint that is none of ours, or of another version of this program."""


def verify(folder: Folder | str | Path) -> Checkpoint:
    """The checkpoint in a step's folder, once every byte of it is known to be what was written.

    Raises `CheckpointMismatch` naming the file, what was recorded and what was found; `OtherFormat`
    for a folder of another program or version. A store that does not answer is `Unfinished`: that
    says nothing about the checkpoint.
    """
    folder = folder if isinstance(folder, Folder) else Folder(folder)
    with _told(folder, folder.url):
        names = set(folder.files())
    _refuse_foreign(folder, names)
    attempt, recorded, score = committed(folder)
    with _told(folder, folder.url):
        names = set(folder.files())  # those before may lack what came just before the COMMIT
    data = folder / attempt
    text = _bytes(data, MANIFEST)
    where = data.path(MANIFEST)
    _compare(where, recorded, File(bytes=len(text), sha256=hashlib.sha256(text).hexdigest()))
    try:
        facts, index, files = _manifest(json.loads(text))
    except _MALFORMED:
        raise CheckpointMismatch(
            f"checkpoint file {where} is no manifest of a checkpoint; choose another step"
        ) from None
    found = Checkpoint(
        path=folder.url, attempt=attempt, score=score, facts=facts, index=index, files=files
    )
    if STEP.fullmatch(_name(folder)) and _name(folder) != step_name(found.step):
        raise CheckpointMismatch(f"checkpoint {folder.url} holds step {found.step}; restore it")
    inside = {name.removeprefix(f"{attempt}/") for name in names if name.startswith(f"{attempt}/")}
    if odd := sorted(inside ^ {MANIFEST, *files}):
        state = "is missing" if odd[0] in files else "is not in its manifest"
        raise CheckpointMismatch(
            f"checkpoint file {data.path(odd[0])} {state}; restore it or choose another step"
        )
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(partial(_verify_file, found), files))
    return found


def read_parts(
    found: Checkpoint, file: str, is_wanted: Callable[[str, Chunk], bool]
) -> Iterator[tuple[str, Chunk, bytearray]]:
    """The wanted parts of a data file, which is read once, front to back, and hashed on the way.

    Raises `CheckpointMismatch` at the end when the file is not what was written: whatever was made
    of its numbers must not be used then.
    """
    expected, where = layout(found.index, file), found.data.path(file)
    with _told(found.data, where), found.data.open(file) as opened:
        hashed = HashingReader(opened)
        if hashed.read(len(expected.header)) != expected.header:
            raise CheckpointMismatch(
                f"checkpoint file {where} does not begin as the manifest's index wants it; restore "
                "it or choose another step"
            )
        for name, chunk, size in expected.parts:
            if not is_wanted(name, chunk):
                hashed.skip(size)
            elif len(data := hashed.read(size)) == size:
                yield name, chunk, data
        hashed.skip(None)
    _compare(where, found.files[file], File(bytes=hashed.bytes, sha256=hashed.sha256))


def _verify_file(found: Checkpoint, file: str) -> None:
    size, recorded = layout(found.index, file).bytes, found.files[file].bytes
    if size != recorded:
        raise CheckpointMismatch(
            f"checkpoint file {found.data.path(file)} has {recorded} bytes in the manifest and its "
            f"index fills {size}; restore it or choose another step"
        )
    for _ in read_parts(found, file, lambda name, chunk: False):
        pass


def _refuse_foreign(folder: Folder, names: set[str]) -> None:
    """Files that this program never writes into a step's folder; those of other attempts may lie
    there, and are not looked at."""
    for name in sorted(names):
        top, _, rest = name.partition("/")
        is_ours = ATTEMPT.fullmatch(top) if rest else top == COMMIT or TEMPORARY.fullmatch(top)
        if not is_ours:
            raise OtherFormat(
                f"checkpoint {folder.url} has {name}, which this program never writes and does not "
                "open (a foreign index can run code); use the program that wrote it, export its "
                "weights as safetensors and start from those"
            )


def committed(folder: Folder) -> tuple[str, File, float | None]:
    """What COMMIT says: the attempt that counts, its manifest as recorded, and the score.

    `CheckpointMismatch` when it is not there, damaged, or of another step.
    """
    where = folder.path(COMMIT)
    try:
        text = folder.read_bytes(COMMIT)
    except FileNotFoundError:
        raise CheckpointMismatch(
            f"checkpoint {folder.url} has no {COMMIT}, so its writing never finished; choose "
            "another step"
        ) from None
    except OSError as error:
        raise _unreadable(folder, where, error) from None
    try:
        values = json.loads(text)
        version, attempt = values["format"], values["attempt"]
        score, manifest = values["score"], _file(values)
        is_ours = STEP.fullmatch(_name(folder)) is None or values["step"] == _step_of(folder)
    except _MALFORMED:
        raise CheckpointMismatch(f"{where} is damaged; choose another step") from None
    if version != FORMAT:
        raise OtherFormat(
            f"checkpoint {folder.url} has format {version} and this program reads {FORMAT}; use "
            "the version that wrote it"
        )
    if not is_ours or not isinstance(attempt, str) or not ATTEMPT.fullmatch(attempt):
        raise CheckpointMismatch(
            f"{where} belongs to step {values['step']}, attempt {attempt}; choose another step"
        )
    return attempt, manifest, _score(score)


def _manifest(
    values: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Entry], dict[str, File]]:
    """Facts, index and files; raises one of `_MALFORMED` where they cannot be of a checkpoint."""
    facts = values["facts"]
    for name in ("step", "samples"):
        _whole(facts[name])
    files = {_require(name, FILE): _file(file) for name, file in values["files"].items()}
    index = {name: _entry(entry, files) for name, entry in values["index"].items()}
    return facts, index, files


def _entry(values: dict[str, Any], files: dict[str, File]) -> Entry:
    shape = _places(values["shape"])
    chunks = tuple(
        Chunk(offsets=_places(c["offsets"]), sizes=_places(c["sizes"]), file=c["file"])
        for c in values["chunks"]
    )
    entry = Entry(dtype=values["dtype"], shape=shape, chunks=chunks)
    if entry.dtype not in SIZES or not all(c.file in files for c in chunks):
        raise ValueError(entry.dtype)
    return entry if is_whole(entry) else _fail()


def is_ours(folder: Folder) -> bool:
    """Whether a step's folder holds nothing but what this program writes there."""
    return all(name == COMMIT or ATTEMPT.fullmatch(name) for name in folder.list())


def attempt_of(folder: Folder) -> str:
    """The attempt that COMMIT names; `CheckpointMismatch` when it is damaged."""
    return committed(folder)[0]


def score_of(folder: Folder) -> tuple[bool, float | None]:
    """Whether a step's folder has a COMMIT that can be read, and the held-out loss in it.

    Raises `OtherFormat` for a folder that is none of ours.
    """
    try:
        return True, committed(folder)[2]
    except OtherFormat:
        raise
    except CheckpointMismatch:
        return False, None


def _fail() -> Any:
    raise ValueError("chunks do not lie end to end")


def _places(values: Any) -> tuple[int, ...]:
    return tuple(_whole(value) for value in values)


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value


def _require(text: str, pattern: re.Pattern[str]) -> str:
    return text if pattern.fullmatch(text) else _fail()


def _file(values: dict[str, Any]) -> File:
    sha256 = _require(values["sha256"], re.compile("[0-9a-f]{64}"))
    return File(bytes=_whole(values["bytes"]), sha256=sha256)


def _score(value: Any) -> float | None:
    return None if value is None else float(value)


def _compare(where: str, recorded: File, found: File) -> None:
    if recorded != found:
        raise CheckpointMismatch(
            f"checkpoint file {where} is damaged: {recorded.bytes} bytes with sha256 "
            f"{recorded.sha256} recorded, {found.bytes} with {found.sha256} found; restore it or "
            "choose another step"
        )


def _bytes(folder: Folder, name: str) -> bytes:
    with _told(folder, folder.path(name)):
        return folder.read_bytes(name)


@contextmanager
def _told(folder: Folder, where: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise _unreadable(folder, where, error) from None


def _unreadable(folder: Folder, where: str, error: Exception) -> Exception:
    """A missing file, or a local one that cannot be read, is damage; a store's silence is not."""
    if isinstance(error, FileNotFoundError) or (folder.is_local and isinstance(error, OSError)):
        return CheckpointMismatch(
            f"checkpoint file {where} cannot be read ({reason_of(error)}); choose another step"
        )
    if isinstance(error, OSError):
        return Unfinished(
            f"{where} cannot be read ({reason_of(error)}); run the same command again when the "
            "store answers"
        )
    return of_store(error) or error


def _name(folder: Folder) -> str:
    return folder.url.rpartition("/")[2]


def _step_of(folder: Folder) -> int:
    return int(_name(folder).removeprefix("step_"))
