"""A system's folder as cases: named inputs, settings and results, arrays resolved."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


class CaseError(Exception):
    """A case that cannot be run as it is written; the message names what is in the way."""


class Record:
    """Values by name. It remembers which were asked for, so that none is passed over."""

    def __init__(self, values: Mapping[str, Any], what: str) -> None:
        self._values, self._what = dict(values), what
        self._asked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def __getitem__(self, name: str) -> Any:
        """A value that must be there; null counts as missing."""
        value = self.get(name)
        if value is None:
            raise CaseError(f"the case has no {self._what} {name}")
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """A value, or the default where it is missing or null."""
        self._asked.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def only(self, name: str, *known: Any) -> None:
        """Refuse a value that is not among the known ones; a missing one is fine."""
        value = self.get(name)
        if value is not None and value not in known:
            shown = ", ".join(map(repr, known)) or "none"
            raise CaseError(f"{self._what} {name}={value!r} is not reproduced; only {shown} is")

    def tensor(self, name: str, dtype: torch.dtype = torch.int64) -> Tensor:
        """A nested list, or an array, as a tensor."""
        value = self[name]
        try:
            return torch.as_tensor(value, dtype=dtype)
        except (TypeError, ValueError) as error:
            raise CaseError(f"{self._what} {name} is no array ({error})") from None

    def inform(self, *names: str) -> None:
        """Names whose values decide nothing."""
        self._asked.update(names)

    def unknown(self) -> str:
        """What nobody asked for, as a sentence; empty where there is nothing. Null is nothing."""
        left = {n: v for n, v in self._values.items() if n not in self._asked and v is not None}
        return ", ".join(f"{self._what} {n}={str(v)[:40]} is not known" for n, v in left.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One golden case."""

    system: str
    name: str
    kind: str
    weights: str
    settings: Record
    inputs: Record
    """input_ids, attention_mask and whatever else stands beside them."""
    expected: Record

    def unknown(self) -> str:
        """Settings, inputs and results that the run did not look at."""
        parts = (self.settings, self.inputs, self.expected)
        return ", ".join(filter(None, (part.unknown() for part in parts)))


def system_folders(root: Path) -> list[Path]:
    """Every folder below the root; each should be a system."""
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def read_cases(folder: Path) -> list[Case]:
    """The cases of one system; none where the folder has no cases.json."""
    file = folder / "cases.json"
    return list(_cases(folder, json.loads(file.read_bytes()))) if file.is_file() else []


def _cases(folder: Path, entries: list[dict[str, Any]]) -> Iterator[Case]:
    arrays_file = folder / "arrays.safetensors"
    arrays = load_file(arrays_file) if arrays_file.is_file() else {}
    for entry in entries:
        inputs = _resolved(entry, arrays)
        yield Case(
            system=folder.name,
            name=inputs.pop("name"),
            kind=inputs.pop("kind"),
            weights=inputs.pop("weights", "main"),
            settings=Record(_resolved(inputs.pop("settings", None) or {}, arrays), "setting"),
            expected=Record(_resolved(inputs.pop("expected"), arrays), "result"),
            inputs=Record(inputs, "input"),
        )


def _resolved(values: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> dict[str, Any]:
    """Values of the form {"array": KEY} are tensors of the arrays' file."""

    def one(value: Any) -> Any:
        is_key = isinstance(value, dict) and set(value) == {"array"}
        return arrays[value["array"]] if is_key else value

    return {name: one(value) for name, value in values.items()}
