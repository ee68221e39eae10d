"""A local folder that is whole or not there: written beside its place, flushed, then renamed."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from cascade_model.errors import InputError


@contextlib.contextmanager
def whole_folder(
    target: str | Path, is_replaceable: Callable[[Path], bool], kind: str
) -> Iterator[Path]:
    """A work folder that takes the place of `target` when the block ends without an error.

    A folder that stands there must be empty or `is_replaceable`, and goes whole; anything else is
    refused (`InputError`), before any work.
    """
    if "://" in str(target):
        raise InputError(f"output={target} must be a local folder; write there and copy it")
    place = Path(target)
    _refuse_other(place, is_replaceable, kind)
    work = place.with_name(f".{place.name}.{uuid.uuid4().hex}.tmp")
    work.mkdir(parents=True)
    try:
        yield work
        _flush(work)
        _refuse_other(place, is_replaceable, kind)
        _replace(work, place)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _refuse_other(place: Path, is_replaceable: Callable[[Path], bool], kind: str) -> None:
    if place.exists() and any(place.iterdir()) and not is_replaceable(place):
        raise InputError(
            f"output={place} exists and is no {kind}; choose another folder or empty it"
        )


def _flush(folder: Path) -> None:
    """Bring every file, then the folder itself, to disk."""
    for path in (*sorted(folder.iterdir()), folder):
        _flush_entry(path)


def _flush_entry(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(work: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.rename(target, old)
    os.rename(work, target)
    _flush_entry(target.parent)
    shutil.rmtree(old, ignore_errors=True)
