"""The control of the fault tables: checkpoints as one writes them without a commit protocol.

Every rank writes a file for each step under its final name, and reads back the newest there is.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch.distributed.tensor import DTensor

from cascade_model import parallel, trainer
from cascade_model.checkpoint import Checkpoint, Keep, Saving
from cascade_model.checkpoint_state import state_of
from cascade_model.commit import Folder


class Naive:
    """`Checkpoints` without its promises."""

    point: Callable[[str], None]

    def __init__(self, folder: Folder, keep: Keep, *rest: Any, **named: Any) -> None:
        self.failures = 0
        self._folder = Path(folder.url).parent / "naive"

    def newest(self) -> Checkpoint | None:
        """What the first rank's newest file says."""

        def facts() -> dict[str, Any] | None:
            files = sorted(self._folder.glob("*-0"))
            return _read(files[-1])[0] if files else None

        found = parallel.on_first_rank(facts)
        empty: dict[str, Any] = {"score": None, "index": {}, "files": {}}
        if found is None:
            return None
        return Checkpoint(path=str(self._folder), attempt="", facts=found, **empty)

    @torch.no_grad()
    def load(self, found: Checkpoint, model: Any, optimizer: Any) -> None:
        """Believe what is there."""
        saved = load_tensors(_read(_file(Path(found.path), found.step))[1])
        state = state_of(model, optimizer)
        for name, tensor in state.items():
            _local(tensor).copy_(saved[name])
        for number, (name, parameter) in enumerate(model.named_parameters()):
            moments = {key: state[f"{key}/{name}"] for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": state["steps"][number].clone(), **moments}

    def save(self, model: Any, optimizer: Any, facts: dict[str, Any], score: Any = None) -> Saving:
        """Write half by half; whatever goes wrong ends the run."""
        state = {name: _local(t) for name, t in state_of(model, optimizer).items()}
        head, body = json.dumps(facts).encode(), dump_tensors(state)
        data = struct.pack("<Q", len(head)) + head + body
        self._folder.mkdir(exist_ok=True)
        file = _file(self._folder, facts["step"])
        with file.open("wb", buffering=0) as opened:
            opened.write(data[: len(data) // 2])
            Naive.point("data half written")
            opened.write(data[len(data) // 2 :])
        saving = Saving(str(file), facts["step"])
        saving.end(None)
        return saving

    def finish(self) -> None:
        """Nothing is under way."""


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _file(folder: Path, step: int) -> Path:
    return folder / f"{step:08d}-{parallel.rank()}"


def _read(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def install(point: Callable[[str], None]) -> None:
    """Let the trainer of this process save so."""
    Naive.point = staticmethod(point)  # type: ignore[assignment]
    trainer.Checkpoints = Naive  # type: ignore[misc, assignment]
