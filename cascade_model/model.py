"""The transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU (Llama type).

What a query sees is not decided here: the caller passes an `Attend`. With a token-causal one this
is a Llama, with the masks of `attention` a block-diffusion model.
"""

from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade_model.attention import Attend
from cascade_model.config import ModelConfig
from cascade_model.kv_cache import KVCache

T = TypeVar("T")
Rotation = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) x weight over the last axis, computed in float32 or wider."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, self.weight.shape, eps=self.eps).to(x.dtype) * self.weight


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        width, head = config.hidden_size, config.head_dim
        inner, bias = config.intermediate_size, config.qkv_bias
        self.index, self.head_dim = index, head
        self.attention_norm = RMSNorm(width, config.norm_eps)
        self.q_proj = nn.Linear(width, config.num_heads * head, bias=bias)
        self.k_proj = nn.Linear(width, config.num_kv_heads * head, bias=bias)
        self.v_proj = nn.Linear(width, config.num_kv_heads * head, bias=bias)
        self.o_proj = nn.Linear(config.num_heads * head, width, bias=False)
        self.q_norm = RMSNorm(head, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head, config.norm_eps) if config.qk_norm else nn.Identity()
        self.mlp_norm = RMSNorm(width, config.norm_eps)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        attend: Attend,
        cache: KVCache | None,
        keep: int | None = None,
    ) -> Tensor:
        """x [n, r, hidden] -> [n, keep or r, hidden]; rows behind `keep` are only attended to."""
        mixed = self._attention(self.attention_norm(x), rotation, attend, cache, keep)
        x = x[:, :keep] + mixed
        inner = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(inner)) * self.up_proj(inner))

    def _attention(
        self,
        x: Tensor,
        rotation: Rotation,
        attend: Attend,
        cache: KVCache | None,
        keep: int | None,
    ) -> Tensor:
        cos, sin = rotation
        q = self.q_norm(self._heads(self.q_proj(x[:, :keep])))
        q = rotate(q, (cos[:, :, :keep], sin[:, :, :keep]))
        k = rotate(self.k_norm(self._heads(self.k_proj(x))), rotation)
        v = self._heads(self.v_proj(x))
        if cache is not None:
            k, v = cache.join(self.index, k, v)
        return self.o_proj(attend(q, k, v).transpose(1, 2).flatten(2))

    def _heads(self, projected: Tensor) -> Tensor:
        """[n, r, heads x head_dim] -> [n, heads, r, head_dim]."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Transformer(nn.Module):
    """Token ids to whatever `read` makes of the last hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied_head:
            self.head.weight = self.embed.weight

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: Attend,
        read: Callable[[Tensor, nn.Module], T],
        cache: KVCache | None = None,
        keep: int | None = None,
    ) -> T:
        """One pass: tokens and positions int64 [n, r] -> `read(hidden [n, r, d], head)`.

        `read` runs inside, because under FSDP2 the head's weight is whole only here; it must
        return a tensor or a tuple of tensors. With a `cache` the r rows follow the committed ones.
        With `keep`, `read` gets the first `keep` rows only, and of the others the last layer
        computes no more than keys and values.
        """
        x = self.embed(tokens)
        rotation = rotary(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            x = layer(x, rotation, attend, cache, keep if index == last else None)
        return read(self.final_norm(x), self.head)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw fresh weights: normal of 1/sqrt(fan in), the two output projections 1/sqrt(2 layers)
        smaller (GPT-2), the embedding 0.02, norms 1. The same seed gives the same weights."""
        generator = torch.Generator().manual_seed(seed)
        depth_factor = (2 * self.config.num_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                scale = 0.02 if name in ("embed.weight", "head.weight") else _spread(parameter)
                scale *= depth_factor if "o_proj" in name or "down_proj" in name else 1.0
                drawn = torch.randn(parameter.shape, generator=generator) * scale
                parameter.copy_(drawn)


def _spread(parameter: Tensor) -> float:
    return parameter.shape[-1] ** -0.5


def rotary(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Cosines and sines [n, 1, r, head_dim / 2] of the angles position x theta^(-2i/head_dim)."""
    wide = torch.promote_types(dtype, torch.float32)
    even = torch.arange(0, head_dim, 2, dtype=wide, device=positions.device)
    frequencies = 1.0 / theta ** (even / head_dim)
    angles = positions[:, None, :, None].to(wide) * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the pairs (i, i + head_dim / 2) of x [n, h, r, head_dim]: the half-split layout."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


def never_emitted(config: ModelConfig) -> list[int]:
    """Ids that no prediction may give: the mask token, and padding unless it ends texts too."""
    return sorted({config.mask_id, config.pad_id} - {config.eos_id} | {config.mask_id})


def vocabulary_logits(hidden: Tensor, head: nn.Module, banned: list[int]) -> Tensor:
    """Rows [r, d] -> logits [r, vocabulary] in float32 or wider, the banned ids at -inf."""
    logits = cast(Tensor, head(hidden))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.index_fill_(-1, torch.tensor(banned, device=logits.device), float("-inf"))
