"""The networks behind one name: which one a config asks for, and its tensors by name."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cascade_model.config import ModelConfig
from cascade_model.dit import DiT
from cascade_model.errors import CheckpointMismatch
from cascade_model.gpt2 import GPT2
from cascade_model.model import Transformer

Network = Transformer | DiT | GPT2
_CLASSES: dict[str, Callable[[ModelConfig], Network]] = {
    "transformer": Transformer,
    "dit": DiT,
    "gpt2": GPT2,
}


def build_network(config: ModelConfig) -> Network:
    """The network that `config.network` names, its weights not yet drawn or read."""
    return _CLASSES[config.network](config)


def network_with(config: ModelConfig, tensors: Mapping[str, Tensor], where: str) -> Network:
    """The network made of these very tensors, which keep their type and device.

    Nothing is copied, so memory never holds the weights twice. Raises as `require_same_tensors`.
    """
    with torch.device("meta"):
        network = build_network(config)
    require_same_tensors(shapes_of(network), _shapes(tensors), f"model {where}")
    network.load_state_dict(tensors, strict=False, assign=True)
    if config.tied_head:
        network.head.weight = network.embed.weight
    return network


def own_state(network: Network) -> dict[str, Tensor]:
    """The network's tensors by name, on the CPU, a tied head left out; not of a packed network,
    whose weights lie in another order (`packed`)."""
    return {name: value.cpu().contiguous() for name, value in _untied(network).items()}


def shapes_of(network: Network) -> dict[str, tuple[int, ...]]:
    """The shapes that `own_state` would have; also for a network on the meta device."""
    return _shapes(_untied(network))


def fill(network: Network, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors into a network. Raises as `require_same_tensors`."""
    require_same_tensors(shapes_of(network), _shapes(tensors), f"model {where}")
    network.load_state_dict(tensors, strict=False)


def require_same_tensors(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], called: str
) -> None:
    """Raise `CheckpointMismatch` that names the missing, surplus and mis-shaped tensors.

    `called` is their place in the words of the caller's setting ("source=...").
    """
    missing = sorted(set(expected) - set(found))
    surplus = sorted(set(found) - set(expected))
    other = [n for n in sorted(set(expected) & set(found)) if expected[n] != found[n]]
    shapes = [
        f"{name} of shape {list(found[name])} where its config makes it {list(expected[name])}"
        for name in other
    ]
    complaints = [
        f"lacks the tensors {_first(missing)}" if missing else "",
        f"has the unknown {_first(surplus)}" if surplus else "",
        f"has {_first(shapes, '; ')}" if shapes else "",
    ]
    if any(complaints):
        raise CheckpointMismatch(
            f"{called} {' and '.join(filter(None, complaints))}; "
            "use weights and a config that belong together"
        )


def _untied(network: Network) -> dict[str, Tensor]:
    state = {name: value.detach() for name, value in network.state_dict().items()}
    if network.config.tied_head:
        del state["head.weight"]
    return state


def _shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def _first(names: list[str], separator: str = ", ", limit: int = 5) -> str:
    """The first few, and how many more there are."""
    more = f"{separator}and {len(names) - limit} more" if len(names) > limit else ""
    return separator.join(names[:limit]) + more
