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

from cascade_model.feed_forward import MixtureOfExperts
from cascade_model.flex import flex_training
from cascade_model.networks import Network
from cascade_model.parallel import rank, world_size
from cascade_model.settings import check
from cascade_model.training_config import TrainerConfig


def prepare(model: Network, config: TrainerConfig, device: torch.device) -> None:
    """Put a network on its device as the settings say, in place.

    Every rank must hold equal weights beforehand. Of several ranks none ever has more of them on
    its device than its shards and one unit. Raises `InputError` for settings that this device or
    number of ranks cannot have.
    """
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
    """FSDP2: the matrices of each layer are a unit, and all else is the root's: embedding, head,
    and what every layer computes with in float32, its vectors (norms and biases) and its router.

    One rank has the whole model on its device. In bfloat16 several ranks compute what it does:
    autocast rounds what enters a matrix product and nothing else. So a layer's matrices are
    gathered as bfloat16: half the bytes, and autocast would keep a rounded copy of every layer
    until the backward pass. What is the root's is gathered in float32, in which norms, routing and
    the stream of hidden states are computed. Shards, and sums of gradients over ranks, are float32.
    """
    require_replicas(config, world_size())
    if world_size() == 1:
        model.to(device)
        return
    products = torch.bfloat16 if config.precision == "bfloat16" else None
    grid = mesh(config.replicas, device)
    wide = [value for value in model.layers.parameters() if value.ndim == 1]
    for part in model.layers.modules():
        if isinstance(part, MixtureOfExperts):
            wide += part.router.parameters()
    for layer in model.layers:
        fully_shard(layer, mesh=grid, mp_policy=_in(products), ignored_params=set(wide))
    model.register_module("wide", nn.ParameterList(wide))  # where the root's call finds them
    fully_shard(model, mesh=grid, mp_policy=_in(None))
    del model.wide


def _in(products: torch.dtype | None) -> MixedPrecisionPolicy:
    """Weights gathered in this type, in their own if it is none."""
    return MixedPrecisionPolicy(
        param_dtype=products,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the stream and the angles of rotary positions stay float32
    )


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
    """All weights, whole and on the first rank's CPU, a tied one once; none on the other ranks.

    Each rank must call it. No rank has more than one whole tensor on its device at a time.
    """
    state = {}
    for name, value in model.named_parameters():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if rank() == 0:
            state[name] = whole.detach().cpu()
    return state


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
