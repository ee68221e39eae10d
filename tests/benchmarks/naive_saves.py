"""The control of the fault tables: checkpoints as one writes them without a commit protocol.

Every rank writes its state over the one before it, in place, and reads back whatever is there.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors

from cascade_model import parallel, trainer
from cascade_model.checkpoint import Checkpoint, Keep, Saving
from cascade_model.checkpoint_state import state_of
from cascade_model.commit import Folder
from cascade_model.staging import local_part


class InPlace:
    """`Checkpoints` without its promises."""

    point: Callable[[str], None]

    def __init__(self, folder: Folder, keep: Keep, *rest: Any, **named: Any) -> None:
        self.failures = 0
        self._file = Path(folder.url).parent / f"naive-{parallel.rank()}"

    def newest(self) -> Checkpoint | None:
        """What the first rank's file says."""

        def facts() -> dict[str, Any] | None:
            return _read(self._file)[0] if self._file.exists() else None

        found = parallel.on_first_rank(facts)
        empty: dict[str, Any] = {"score": None, "index": {}, "files": {}}
        return found and Checkpoint(path=str(self._file.parent), attempt="", facts=found, **empty)

    def save(self, model: Any, optimizer: Any, facts: dict[str, Any], score: Any = None) -> Saving:
        """Write over what was there, half by half."""
        state = {n: local_part(t)[1] for n, t in state_of(model, optimizer).items()}
        head, body = json.dumps(facts).encode(), dump_tensors(state)
        data = struct.pack("<Q", len(head)) + head + body
        with self._file.open("wb", buffering=0) as file:
            file.write(data[: len(data) // 2])
            InPlace.point("data half written")
            file.write(data[len(data) // 2 :])
        saving = Saving(str(self._file), facts["step"])
        saving.end(None)
        return saving

    def finish(self) -> None:
        """Nothing is under way."""


def _read(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _load(found: Checkpoint, model: Any, optimizer: Any) -> None:
    """Believe what is there."""
    saved = load_tensors(_read(Path(found.path) / f"naive-{parallel.rank()}")[1])
    state = state_of(model, optimizer)
    for name, tensor in state.items():
        local_part(tensor)[1].copy_(saved[name])
    for number, (name, parameter) in enumerate(model.named_parameters()):
        moments = {key: state[f"{key}/{name}"] for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": state["steps"][number].clone(), **moments}


def install(point: Callable[[str], None]) -> None:
    """Let the trainer of this process save so."""
    InPlace.point = staticmethod(point)  # type: ignore[assignment]
    trainer.Checkpoints = InPlace  # type: ignore[misc, assignment]
    trainer.load = torch.no_grad()(_load)
