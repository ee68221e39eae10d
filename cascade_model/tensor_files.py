"""The tensors of a checkpoint where they lie: safetensors files, mapped and read a few at a time.

Only safetensors are opened. A file is mapped while one group of tensors is copied out of it and
unmapped again, so that reading needs no more memory than the tensors that are kept.
"""

import contextlib
import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cascade_model.errors import CheckpointMismatch, InputError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class Header:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it: "F32", "BF16" and so on."""


class TensorSource(Protocol):
    """Tensors by the names they have in a file."""

    @property
    def headers(self) -> Mapping[str, Header]:
        """Every tensor there is."""
        ...

    @property
    def is_mapped(self) -> bool:
        """Whether what is kept of a tensor must be copied."""
        ...

    def read(self, names: Iterable[str]) -> contextlib.AbstractContextManager[list[Tensor]]:
        """These tensors on the CPU, valid inside the `with` block only."""
        ...


class TensorFiles:
    """A folder with one model.safetensors, or with shards that an index names."""

    is_mapped = True

    def __init__(self, folder: Path, called: str) -> None:
        """Read every header; `CheckpointMismatch` for what is missing or damaged, `InputError`
        for other formats and for an index that points outside the folder.

        `called` is the folder in the words of the caller's setting ("source=...").
        """
        self._called = called
        self._file_of: dict[str, Path] = {}
        self.headers: dict[str, Header] = {}
        index = _index(folder, called)
        for file in _files(folder, index, called):
            for name, header in self._headers(file).items():
                if name in self.headers:
                    raise CheckpointMismatch(
                        f"{called} has the tensor {name} in {self._file_of[name].name} and "
                        f"in {file.name}; copy it again"
                    )
                self._file_of[name], self.headers[name] = file, header
        for name, file in (index or {}).items():
            if self._file_of.get(name) != folder / file:
                raise CheckpointMismatch(
                    f"{called} has no tensor {name} in {file}, where {INDEX} puts it; copy it again"
                )

    @contextlib.contextmanager
    def read(self, names: Iterable[str]) -> Iterator[list[Tensor]]:
        """These tensors, mapped from their files while the `with` block lasts."""
        with contextlib.ExitStack() as stack:
            opened: dict[Path, Any] = {}
            tensors = []
            for name in names:
                file = self._file_of[name]
                if file not in opened:
                    opened[file] = stack.enter_context(self._open(file))
                tensors.append(opened[file].get_tensor(name))
            yield tensors

    def _headers(self, file: Path) -> dict[str, Header]:
        with self._open(file) as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            return {n: Header(tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}

    @contextlib.contextmanager
    def _open(self, file: Path) -> Iterator[Any]:
        try:
            with safe_open(file, framework="pt") as handle:
                yield handle
        except (OSError, SafetensorError) as error:
            raise CheckpointMismatch(
                f"{self._called} has a damaged {file.name} ({error}); copy it again"
            ) from None


def kept(
    source: TensorSource, tensor: Tensor, dtype: torch.dtype | None, device: torch.device
) -> Tensor:
    """A tensor that outlives its source, contiguous, of a type (none: its own) on a device."""
    return tensor.to(
        device=device,
        dtype=dtype or tensor.dtype,
        copy=source.is_mapped,
        memory_format=torch.contiguous_format,
    )


class LoadedTensors:
    """Tensors that another library has already read into memory."""

    is_mapped = False

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        spelled = {dtype: name for name, dtype in DTYPES.items()}
        self._tensors = tensors
        self.headers = {
            name: Header(tuple(value.shape), spelled.get(value.dtype, str(value.dtype)))
            for name, value in tensors.items()
        }

    @contextlib.contextmanager
    def read(self, names: Iterable[str]) -> Iterator[list[Tensor]]:
        """These tensors."""
        yield [self._tensors[name] for name in names]


def _index(folder: Path, called: str) -> dict[str, str] | None:
    """Tensor name to file name, where the folder has an index."""
    file = folder / INDEX
    if not file.is_file():
        return None
    try:
        names = dict(json.loads(file.read_bytes())["weight_map"])
        outside = next((n for n in names.values() if not _stays_inside(n)), None)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointMismatch(f"{called} has a damaged {INDEX}; copy it again") from None
    if outside is not None:
        raise InputError(
            f"{called} has an index that names the file {outside!r}; only .safetensors "
            "files inside the folder are read, mend the index"
        )
    return names


def _stays_inside(name: str) -> bool:
    path = posixpath.normpath(name.replace("\\", "/"))
    is_above = path.startswith(("/", "..")) or ":" in path
    return name.endswith(".safetensors") and not is_above


def _files(folder: Path, index: dict[str, str] | None, called: str) -> list[Path]:
    names = [WEIGHTS] if index is None else sorted(set(index.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return [folder / name for name in names]
    pickles = [*sorted(folder.glob("*.bin")), *sorted(folder.glob("*.pt*"))]
    if index is None and pickles:
        raise InputError(
            f"{called} has {pickles[0].name} and no {WEIGHTS}; a pickle can run code and is "
            "never read, convert it to safetensors with the library that wrote it"
        )
    if index is None:
        raise CheckpointMismatch(f"{called} has no {WEIGHTS} and no {INDEX}; copy it again")
    raise CheckpointMismatch(
        f"{called} lacks {missing[0]}, one of {len(missing)} missing of the {len(names)} "
        f"files that {INDEX} names; copy it too"
    )
