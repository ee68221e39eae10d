"""Local files that are whole or not there: a temporary file, fsync, its name, fsync of the folder.

A crash leaves the old file or the new one, and at worst a temporary file that nobody reads.
"""

import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}(\.old)?\.tmp")
"""Names of our own unfinished files; any other `.tmp` belongs to somebody."""


@contextmanager
def draft(target: Path, write: Callable[[BinaryIO], Any]) -> Iterator[Path]:
    """A finished temporary file, on disk, for the body to give the target's name."""
    make_folder(target.parent)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
    fsync(target.parent)


def create_file(target: Path, data: bytes) -> None:
    """A small local file that appears whole or not at all; `FileExistsError` if one is there."""
    with draft(target, lambda file: file.write(data)) as finished:
        link_new(finished, target)


def replace_file(target: Path, data: bytes) -> None:
    """A small local file that appears whole or stays as it was."""
    with draft(target, lambda file: file.write(data)) as finished:
        os.replace(finished, target)


def link_new(finished: Path, target: Path) -> None:
    """Give a finished file its name unless the name is taken (`FileExistsError`)."""
    try:
        os.link(finished, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links, where the check is not atomic
        if target.exists():
            raise FileExistsError(target) from None
        os.replace(finished, target)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each name on disk; one that is there is fine."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync(folder.parent)


def fsync(path: str | Path) -> None:
    """Bring a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
