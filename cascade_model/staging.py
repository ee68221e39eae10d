"""The state of a run as it is at one moment: one copy into buffers that are used again.

Training may go on as soon as the copy is made; what is written afterwards is the copy. Buffers are
pinned where the state lies on a GPU, and they are the memory that saving in the background costs:
this rank's share of weights and moments, once.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.tensor import DTensor


@dataclass(frozen=True, slots=True)
class Part:
    """This rank's part of a tensor, on the CPU."""

    shape: torch.Size
    """Of the whole tensor."""
    offsets: torch.Size
    data: Tensor


class HostCopy(AsyncStager):
    """Copies dicts of tensors to the CPU, into the same buffers each time.

    The copy before must be out of use. A sharded tensor gives its local shard, so DCP never sees a
    DTensor, whose CPU copy it would move back to the mesh's device. Where a shard lies in its
    tensor is computed once: that alone would take as long as the copy.
    """

    def __init__(self) -> None:
        self._parts: dict[str, Part] = {}

    @property
    def should_synchronize_after_execute(self) -> bool:
        """The copy is made when `stage` returns."""
        return False

    @torch.no_grad()
    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The same dicts of names, with a `Part` for each tensor."""
        staged: dict[str, dict[str, Part]] = {}
        sources, targets = [], []
        for key, tensors in state_dict.items():
            staged[key] = {}
            for name, tensor in tensors.items():
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                staged[key][name] = part = self._part(f"{key}/{name}", tensor, local)
                sources.append(local)
                targets.append(part.data)
        copy_all: Any = torch._foreach_copy_  # type: ignore[reportPrivateImportUsage]
        copy_all(targets, sources, non_blocking=True)
        for device in {local.device for local in sources}:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
        return staged

    def _part(self, key: str, tensor: Tensor, local: Tensor) -> Part:
        part = self._parts.get(key)
        if part is None or part.data.shape != local.shape or part.data.dtype != local.dtype:
            part = self._parts[key] = Part(tensor.shape, _offsets(tensor), self._buffer(local))
        return part

    def _buffer(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.device.type != "cpu")


def _offsets(tensor: Tensor) -> torch.Size:
    """Where this rank's part of a tensor begins."""
    if not isinstance(tensor, DTensor):
        return torch.Size([0] * tensor.ndim)
    [chunk] = tensor.__create_chunk_list__()
    return torch.Size(chunk.offsets)
