"""What a checkpoint is on disk or in a store.

    step_00000100/COMMIT                       which attempt counts, and its manifest's SHA-256
    step_00000100/<attempt>/manifest.json      facts, index of tensors, bytes and SHA-256 of files
    step_00000100/<attempt>/rank_00000.safetensors ...

Nothing here is a pickle, and nothing that is read can run code. The index alone decides what a data
file must look like to its last byte: the safetensors header is computed from it and compared. Who
can write to the folder can still give wrong *numbers* under hashes that agree, as there is no key.

Attempts have names of their own: what a process writes that lost the run lies where nobody looks.
"""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from cascade_model.commit import Folder

FORMAT = 2
COMMIT, MANIFEST = "COMMIT", "manifest.json"
ATTEMPT = re.compile(r"\d{8}-[0-9a-f]{16}-\d{4}")
"""Number of the lease, a random part for each start of the ranks, number of the save."""
STEP = re.compile(r"step_(\d{8,})")
FILE = re.compile(r"rank_\d{5}\.safetensors")
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types of tensors and their bytes, as safetensors spells them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A part of a tensor that lies in one file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A tensor of the checkpoint."""

    dtype: str
    """As safetensors spells it."""
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    """Consecutive rows, in order, which together are the tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """A data file as it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A verified checkpoint."""

    path: str
    """Its folder, a local path or a URL."""
    attempt: str
    score: float | None
    """Held-out loss, if it was measured."""
    facts: dict[str, Any]
    index: dict[str, Entry]
    files: dict[str, File]

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return self.facts["step"]

    @property
    def samples(self) -> int:
        """Samples consumed: the whole data position."""
        return self.facts["samples"]

    @property
    def data(self) -> Folder:
        """Where the data files lie."""
        return Folder(self.path) / self.attempt


@dataclass(frozen=True, slots=True)
class Layout:
    """A data file as the index wants it."""

    header: bytes
    parts: list[tuple[str, Chunk, int]]
    """Tensor's name, which part of it, and its bytes, in the order of the file."""

    @property
    def bytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + sum(size for _, _, size in self.parts)


def layout(index: dict[str, Entry], file: str) -> Layout:
    """What a data file must hold: its parts by name, then by place."""
    parts = [
        (name, chunk, math.prod(chunk.sizes) * SIZES[entry.dtype])
        for name, entry in sorted(index.items())
        for chunk in entry.chunks
        if chunk.file == file
    ]
    table, end = {}, 0
    for name, chunk, size in parts:
        key = f"{name}@{','.join(map(str, chunk.offsets))}" if any(chunk.offsets) else name
        table[key] = {
            "dtype": index[name].dtype,
            "shape": list(chunk.sizes),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of 8
    return Layout(len(text).to_bytes(8, "little") + text, parts)


def is_whole(entry: Entry) -> bool:
    """Whether a tensor's chunks are consecutive rows, in order, that together are the tensor."""
    if not entry.shape:
        return [(c.offsets, c.sizes) for c in entry.chunks] == [((), ())]
    row, (rows, *rest) = 0, entry.shape
    for chunk in entry.chunks:
        if chunk.offsets != (row, *[0] * len(rest)) or chunk.sizes[1:] != tuple(rest):
            return False
        if 0 in chunk.sizes:
            return False
        row += chunk.sizes[0]
    return row == rows


def step_name(step: int) -> str:
    """Name of a step's folder."""
    return f"step_{step:08d}"


def steps_in(folder: Folder) -> list[int]:
    """Steps that have a folder, oldest first, complete or not."""
    return sorted(int(m[1]) for name in folder.list() if (m := STEP.fullmatch(name)))


def has_committed(folder: Folder) -> bool:
    """Whether a run's folder of checkpoints has any that was committed, whole or not."""
    return any((folder / step_name(step)).exists(COMMIT) for step in steps_in(folder))


def commit_bytes(step: int, attempt: str, manifest: File, score: float | None) -> bytes:
    """The content of COMMIT."""
    return _json_bytes(
        {
            "format": FORMAT,
            "step": step,
            "attempt": attempt,
            "score": score,
            "bytes": manifest.bytes,
            "sha256": manifest.sha256,
        }
    )


def manifest_bytes(facts: dict[str, Any], index: dict[str, Entry], files: dict[str, File]) -> bytes:
    """The content of manifest.json."""
    return _json_bytes(
        {
            "facts": facts,
            "index": {
                name: {
                    "dtype": entry.dtype,
                    "shape": entry.shape,
                    "chunks": [
                        {"offsets": c.offsets, "sizes": c.sizes, "file": c.file}
                        for c in entry.chunks
                    ],
                }
                for name, entry in index.items()
            },
            "files": {n: {"bytes": f.bytes, "sha256": f.sha256} for n, f in files.items()},
        }
    )


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
