"""A folder that is whole or not there: written beside its place, flushed, then renamed.

A store has no rename. There the file that seals the folder, a manifest that names all others, is
taken away first and put last; a reader without it finds no folder, and one that began before finds
hashes that do not agree.
"""

import contextlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from cascade_model.commit import Folder
from cascade_model.errors import InputError
from cascade_model.local_files import fsync


@contextlib.contextmanager
def whole_folder(
    target: str | Path, is_replaceable: Callable[[Folder], bool], kind: str, seal: str | None = None
) -> Iterator[Path]:
    """A work folder, always local, that takes the place of `target` when the block ends without an
    error. A folder without a `seal` must be local.

    A folder that stands there must be empty or `is_replaceable`, and goes whole; anything else is
    refused (`InputError`), before any work.
    """
    place = Folder(target)
    if not place.is_local and seal is None:
        raise InputError(f"output={target} must be a local folder; write there and copy it")
    _refuse_other(place, is_replaceable, kind)
    work = _make_work(place)
    try:
        yield work
        _refuse_other(place, is_replaceable, kind)
        if place.is_local:
            _flush(work)
            _replace(work, Path(place.url))
        else:
            assert seal is not None
            _upload(work, place, seal)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _refuse_other(place: Folder, is_replaceable: Callable[[Folder], bool], kind: str) -> None:
    if place.list() and not is_replaceable(place):
        raise InputError(
            f"output={place.url} exists and is no {kind}; choose another folder or empty it"
        )


def _make_work(place: Folder) -> Path:
    if not place.is_local:
        return Path(tempfile.mkdtemp())
    path = Path(place.url)
    work = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    work.mkdir(parents=True)
    return work


def _upload(work: Path, place: Folder, seal: str) -> None:
    """What was there goes with its seal, which goes first."""
    place.remove(seal)
    names = sorted(path.name for path in work.iterdir())
    for surplus in set(place.list()) - set(names):
        place.remove(surplus)
    for name in sorted(names, key=lambda name: name == seal):
        with (work / name).open("rb") as file:
            place.put(name, lambda out, file=file: shutil.copyfileobj(file, out, 8 << 20))


def _flush(folder: Path) -> None:
    """Bring every file, then the folder itself, to disk."""
    for path in (*sorted(folder.iterdir()), folder):
        fsync(path)


def _replace(work: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.rename(target, old)
    os.rename(work, target)
    fsync(target.parent)
    _remove_old(target)


def _remove_old(target: Path) -> None:
    """Remove what stood in the place before, and what a kill left of that in earlier times; only
    now, as until here it may be all that there is."""
    is_old = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{32}}\.old\.tmp").fullmatch
    for path in target.parent.iterdir():
        if is_old(path.name):
            shutil.rmtree(path, ignore_errors=True)
