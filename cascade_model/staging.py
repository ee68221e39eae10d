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
    DTensor, whose CPU copy it would move back to the mesh's device.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @property
    def should_synchronize_after_execute(self) -> bool:
        """The copy is made when `stage` returns."""
        return False

    @torch.no_grad()
    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The same dicts of names, with a `Part` for each tensor."""
        staged, devices = {}, set()
        for key, tensors in state_dict.items():
            staged[key] = {}
            for name, tensor in tensors.items():
                offsets, local = local_part(tensor)
                buffer = self._buffer(f"{key}/{name}", local)
                buffer.copy_(local, non_blocking=True)
                devices.add(local.device)
                staged[key][name] = Part(tensor.shape, offsets, buffer)
        for device in devices:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
        return staged

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (like.shape, like.dtype):
            pinned = like.device.type != "cpu"
            buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned)
            self._buffers[name] = buffer
        return buffer


def local_part(tensor: Tensor) -> tuple[torch.Size, Tensor]:
    """Where this rank's part of a tensor begins, and the part."""
    if not isinstance(tensor, DTensor):
        return torch.Size([0] * tensor.ndim), tensor
    [chunk] = tensor.__create_chunk_list__()
    return torch.Size(chunk.offsets), tensor.to_local()
