"""What of a model and its optimiser goes into a checkpoint, and back."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.optim import Optimizer

from cascade_model.checkpoint_files import Checkpoint
from cascade_model.checkpoint_storage import AtWork, Reader, cause_of, load_planner
from cascade_model.errors import CheckpointMismatch
from cascade_model.tensor_files import DTYPES

_MOMENTS = ("exp_avg", "exp_avg_sq")


def _alone(work: Callable[[], Any]) -> Any:
    return work()


def load(
    checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer, at_work: AtWork = _alone
) -> None:
    """Put a verified checkpoint into a model and its optimiser, in place, on any number of ranks.

    Every rank must call this, with the model already sharded as it will be. `at_work` does each
    rank's reading; without one, ranks wait for each other within their group's timeout. Raises
    `CheckpointMismatch` when tensors differ in name, shape or type, or a file changed since it was
    verified; the model must not be used then.
    """
    state = state_of(model, optimizer)
    _require_same_tensors(checkpoint, state, "")
    _load(checkpoint, state, at_work, no_dist=not dist.is_initialized())
    trained = _trained(model, optimizer)
    for (name, (parameter, group)), step in zip(trained.items(), state["steps"], strict=True):
        is_on_device = group.get("fused") or group.get("capturable")
        optimizer.state[parameter] = {
            "step": step.clone().to(parameter.device if is_on_device else "cpu"),
            **{key: state[f"{key}/{name}"] for key in _MOMENTS},
        }


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Only the weights, in this process alone, without any process group; raises as `load`."""
    state = _weights(model)
    _require_same_tensors(checkpoint, state, "model/")
    _load(checkpoint, dict(state), _alone, no_dist=True)


def _load(checkpoint: Checkpoint, state: dict[str, Any], at_work: AtWork, no_dist: bool) -> None:
    reader = Reader(checkpoint, at_work)
    try:
        dcp_load(state, storage_reader=reader, planner=load_planner(), no_dist=no_dist)
    except CheckpointException as error:
        raise cause_of(error) or error from None


def _require_same_tensors(
    checkpoint: Checkpoint, state: dict[str, torch.Tensor], prefix: str
) -> None:
    """DCP would convert types, and would not miss a tensor that the model lacks."""
    spelled = {dtype: name for name, dtype in DTYPES.items()}
    want = {name: (spelled.get(t.dtype), tuple(t.shape)) for name, t in state.items()}
    have = {
        name: (entry.dtype, entry.shape)
        for name, entry in checkpoint.index.items()
        if name.startswith(prefix)
    }
    if have != want:
        name = next(n for n in sorted({*have, *want}) if have.get(n) != want.get(n))
        raise CheckpointMismatch(
            f"checkpoint {checkpoint.path} has the tensor {name} as {have.get(name)} and this "
            f"model as {want.get(name)}; use the settings that it was made with"
        )


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Named parameters, a tied one once; the tensors share memory with the model."""
    return {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters()}


def _trained(
    model: nn.Module, optimizer: Optimizer
) -> dict[str, tuple[nn.Parameter, dict[str, Any]]]:
    """The parameters that the optimiser moves, by name, each with its group."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return {n: (p, groups[id(p)]) for n, p in model.named_parameters() if id(p) in groups}


def state_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Weights, moments and steps taken by flat names.

    A parameter that no step has moved yet has moments of zero and no step, as AdamW would begin.
    """
    state: dict[str, Any] = dict(_weights(model))
    steps = []
    for name, (parameter, _) in _trained(model, optimizer).items():
        held = optimizer.state.get(parameter, {})
        if surplus := held.keys() - {"step", *_MOMENTS}:
            raise ValueError(f"optimiser state {sorted(surplus)} has no place in a checkpoint")
        for key in _MOMENTS:
            value = held[key] if held else torch.zeros_like(parameter)
            state[f"{key}/{name}"] = value.detach()
        steps.append(float(held["step"]) if held else 0.0)
    state["steps"] = torch.tensor(steps, dtype=torch.float32)
    return state
