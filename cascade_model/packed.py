"""A network laid out for decoding: fewer and faster matrix products, once, when it is loaded.

Products of the same rows become one (queries, keys and values; gate and up). On a CPU oneDNN keeps
their weights in the order in which it reads them: torch's own products of few rows bring them into
that order anew each time, which costs more than the product (`tests/benchmarks`, rows `engine.*`).
The operators are those that torch.compile puts in for frozen weights. A packed network can neither
be trained nor saved.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade_model.attention import Keep
from cascade_model.feed_forward import FeedForward, MixtureOfExperts
from cascade_model.model import Layer, RMSNorm, Rotation, Transformer, rotate
from cascade_model.networks import Network
from cascade_model.rows import ROW_MULTIPLE, filled, in_whole_rows


@torch.no_grad()
def pack(network: Network) -> None:
    """Lay the weights out in place; what was packed before stays as it is."""
    if isinstance(network, Transformer):
        for index, layer in enumerate(network.layers):
            if not isinstance(layer, PackedLayer):
                network.layers[index] = PackedLayer(cast(Layer, layer)).train(layer.training)
    else:
        for layer in network.layers:
            for name in ("qkv", "o_proj", "up_proj", "down_proj"):
                _pack_child(layer, name)
    _pack_child(network, "head")


def _pack_child(module: nn.Module, name: str) -> None:
    child = getattr(module, name)
    if isinstance(child, nn.Linear):
        setattr(module, name, Product([child.weight], [child.bias]))


class Product(nn.Module):
    """x -> x W^T + b for some weights [n, k] of the same k, one behind the other."""

    def __init__(self, weights: list[Tensor], biases: list[Tensor | None] | None = None) -> None:
        super().__init__()
        weight = torch.cat(weights) if len(weights) > 1 else weights[0].detach()
        self.outputs, self.inputs = weight.shape
        found = [bias for bias in biases or [] if bias is not None]
        self.bias = torch.cat(found) if found else None
        self.is_packed = _has_packed_products(weight)
        self.weight = _reordered(weight) if self.is_packed else weight

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_packed:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def _has_packed_products(weight: Tensor) -> bool:
    is_known = weight.dtype in (torch.float32, torch.bfloat16)
    return weight.device.type == "cpu" and is_known and torch.backends.mkldnn.is_available()


def _reordered(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROW_MULTIPLE)


class PackedLayer(Layer):
    """A transformer's layer with one product for queries, keys and values."""

    def __init__(self, layer: Layer) -> None:
        nn.Module.__init__(self)
        self.index, self.head_dim = layer.index, layer.head_dim
        self.attention_norm, self.mlp_norm = layer.attention_norm, layer.mlp_norm
        self.q_norm, self.k_norm = layer.q_norm, layer.k_norm
        parts = [layer.q_proj, layer.k_proj, layer.v_proj]
        self.sizes = [part.out_features // layer.head_dim for part in parts]
        self.qkv = Product([part.weight for part in parts], [part.bias for part in parts])
        self.o_proj = Product([layer.o_proj.weight])
        is_mixture = isinstance(layer.mlp, MixtureOfExperts)
        self.mlp = (
            PackedMixture(cast(MixtureOfExperts, layer.mlp))
            if is_mixture
            else PackedFeedForward.of(cast(FeedForward, layer.mlp))
        )

    def project(
        self, x: Tensor, rotation: Rotation, keep: Keep | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Layer`."""
        heads, kv_heads, _ = self.sizes
        made = self._heads(self.qkv(x))
        turning, v = made.split([heads + kv_heads, kv_heads], dim=1)
        if isinstance(self.q_norm, RMSNorm):
            q, k = turning.split([heads, kv_heads], dim=1)
            turning = torch.cat([self.q_norm(q), self.k_norm(k)], dim=1)
        q, k = rotate(turning, rotation).split([heads, kv_heads], dim=1)
        return (q if keep is None else q[:, :, keep.rows]), k, v


class PackedFeedForward(nn.Module):
    """SwiGLU with one product for gate and up."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate_and_up = Product([gate, up])
        self.down_proj = Product([down])

    @classmethod
    def of(cls, plain: FeedForward) -> "PackedFeedForward":
        """The same function as `plain`."""
        return cls(plain.gate_proj.weight, plain.up_proj.weight, plain.down_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_and_up(x).chunk(2, dim=-1)
        return self.down_proj(in_whole_rows(F.silu, gate) * up)


class PackedMixture(MixtureOfExperts):
    """A mixture whose experts are packed one by one."""

    def __init__(self, plain: MixtureOfExperts) -> None:
        nn.Module.__init__(self)
        self.config = plain.config
        weight = plain.router.weight
        self.router = Product([weight.to(torch.promote_types(weight.dtype, torch.float32))])
        if plain.config.router_bias:
            self.router_bias = plain.router_bias
        stacks = (plain.gate_proj, plain.up_proj, plain.down_proj)
        self.experts = nn.ModuleList(
            PackedFeedForward(*tables) for tables in zip(*stacks, strict=True)
        )
        self.shared = PackedFeedForward.of(plain.shared) if plain.shared is not None else None

    def scores(self, rows: Tensor) -> Tensor:
        """See `MixtureOfExperts`."""
        return self.router(rows.to(torch.promote_types(rows.dtype, torch.float32)))

    def expert(self, number: int, rows: Tensor) -> Tensor:
        """See `MixtureOfExperts`; a row in a few has the same bits as in many."""
        return self.experts[number](filled(rows))[: len(rows)]
