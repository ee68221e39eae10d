"""What is done to a network before it trains: recomputed, compiled, cut into shards over the ranks.

The names of the weights never change, so checkpoints fit whatever was chosen.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from cascade_model.config import TrainerConfig
from cascade_model.flex import flex_training
from cascade_model.networks import Network
from cascade_model.parallel import world_size
from cascade_model.settings import check


def prepare(model: Network, config: TrainerConfig, device: torch.device) -> None:
    """Put a network on its device as the settings say, in place.

    Every rank must hold equal weights beforehand. Raises `InputError` for settings that this
    device or number of ranks cannot have.
    """
    model.to(device)
    if config.attention == "flex":
        check(
            device.type == "cuda",
            "trainer.attention=flex needs a GPU; use trainer.attention=grouped",
        )
        model.training_attention = flex_training
    for layer in model.layers:
        layer.forward = wrapped(layer.forward, config)
    shard(model, config, device)
    model.train()


def shard(model: Network, config: TrainerConfig, device: torch.device) -> None:
    """FSDP2: each layer is a unit, the rest (embedding, last norm, head) is the root's.

    With one rank the model stays as it is. In bfloat16 the ranks gather weights of that type while
    each keeps its shard, gradients and their sums over ranks in float32.
    """
    require_replicas(config, world_size())
    if world_size() == 1:
        return
    is_half = config.precision == "bfloat16"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if is_half else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the angles of rotary positions stay float32
    )
    grid = mesh(config.replicas, device)
    for layer in model.layers:
        fully_shard(layer, mesh=grid, mp_policy=policy)
    fully_shard(model, mesh=grid, mp_policy=policy)


def mesh(replicas: int, device: torch.device) -> DeviceMesh:
    """All ranks in one row, or in a row for each replica of the model (HSDP)."""
    size = world_size()
    if replicas == 1:
        return init_device_mesh(device.type, (size,))
    names = ("replica", "shard")
    return init_device_mesh(device.type, (replicas, size // replicas), mesh_dim_names=names)


def require_replicas(config: TrainerConfig, ranks: int) -> None:
    """Raise `InputError` unless the replicas share the ranks evenly."""
    check(
        ranks % config.replicas == 0,
        f"trainer.replicas={config.replicas} cannot share num_workers={ranks}; use a divisor",
    )


def reshard(model: nn.Module) -> None:
    """Put whole weights away again: a pass without a backward one leaves those of the root."""
    if isinstance(model, FSDPModule):
        model.reshard()


def full_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights, whole and on the CPU, on every rank; each rank must call it."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
        for name, value in model.state_dict().items()
    }


def gradient_norm(model: nn.Module) -> torch.Tensor:
    """The 2-norm of all gradients of all ranks, float32 scalar; the same bits on each rank."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, norm_type=2.0)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def scale_gradients(model: nn.Module, factor: float) -> None:
    """Multiply every gradient in place."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def wrapped(
    forward: Callable[..., Any], config: TrainerConfig, backend: str = "inductor"
) -> Callable[..., Any]:
    """A layer's forward, compiled and recomputed as the settings say.

    The compiler is inside, as it leaves alone what is recomputed. All layers share its graphs, two
    at most: the last layer may compute fewer rows. Nothing in a layer is random, so no random state
    is kept for the second time.
    """
    if config.compile:
        forward = torch.compile(forward, backend=backend)
    if config.recompute:
        forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    return forward
