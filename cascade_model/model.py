"""The transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU (Llama type).

What a query sees is not decided here: the caller passes an `Attend`. With a token-causal one this
is a Llama, with the masks of `attention` a block-diffusion model. Options: a norm on each query and
key head (Qwen3), biases on q, k and v (Qwen2), rotary positions on a part of each head, a mixture
of experts.
"""

from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade_model.attention import Attend, DoubledAttention, Keep, grouped_training
from cascade_model.config import ModelConfig
from cascade_model.feed_forward import FeedForward, MixtureOfExperts
from cascade_model.kv_cache import CacheSlot

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
        width, head, bias = config.hidden_size, config.head_dim, config.qkv_bias
        self.index, self.head_dim = index, head
        self.attention_norm = RMSNorm(width, config.norm_eps)
        self.q_proj = nn.Linear(width, config.num_heads * head, bias=bias)
        self.k_proj = nn.Linear(width, config.num_kv_heads * head, bias=bias)
        self.v_proj = nn.Linear(width, config.num_kv_heads * head, bias=bias)
        self.o_proj = nn.Linear(config.num_heads * head, width, bias=False)
        self.q_norm = RMSNorm(head, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head, config.norm_eps) if config.qk_norm else nn.Identity()
        self.mlp_norm = RMSNorm(width, config.norm_eps)
        experts = config.experts
        if experts is not None and index >= experts.first_dense_layers:
            self.mlp = MixtureOfExperts(width, experts)
        else:
            self.mlp = FeedForward(width, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        attend: Attend,
        cache: CacheSlot | None = None,
        keep: Keep | None = None,
    ) -> Tensor:
        """x [n, r, hidden] -> [n, r, hidden], or with `keep` its rows only."""
        mixed = self._attention(self.attention_norm(x), rotation, attend, cache, keep)
        x = (x if keep is None else x[:, keep.rows]) + mixed
        return x + self.mlp(self.mlp_norm(x))

    def _attention(
        self,
        x: Tensor,
        rotation: Rotation,
        attend: Attend,
        cache: CacheSlot | None,
        keep: Keep | None,
    ) -> Tensor:
        q, k, v = self.project(x, rotation, keep)
        if cache is not None:
            k, v = cache.join(self.index, k, v)
        if keep is not None:
            attend = keep.attend
        return self.o_proj(attend(q, k, v).transpose(1, 2).flatten(2))

    def project(
        self, x: Tensor, rotation: Rotation, keep: Keep | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [n, r, hidden] to turned queries (of the kept rows) and keys, and values:
        [n, heads, r, head_dim]."""
        k = rotate(self.k_norm(self._heads(self.k_proj(x))), rotation)
        v = self._heads(self.v_proj(x))
        if keep is not None:
            cos, sin = rotation
            x, rotation = x[:, keep.rows], (cos[:, :, keep.rows], sin[:, :, keep.rows])
        return rotate(self.q_norm(self._heads(self.q_proj(x))), rotation), k, v

    def _heads(self, projected: Tensor) -> Tensor:
        """[n, r, heads x head_dim] -> [n, heads, r, head_dim]."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Transformer(nn.Module):
    """Token ids to whatever `read` makes of the last hidden states."""

    training_attention: DoubledAttention = staticmethod(grouped_training)
    """Who sees whom in the doubled input; `flex.flex_training` is the other way."""

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
        cache: CacheSlot | None = None,
        keep: Keep | None = None,
    ) -> T:
        """One pass: tokens and positions int64 [n, r] -> `read(hidden [n, r, d], head)`.

        `read` runs inside, because under FSDP2 the head's weight is whole only here; it must
        return a tensor or a tuple of tensors. With a `cache` the r rows stand where the slot says,
        and see what else it shows. With `keep`, `read` gets those rows only, and of the others the
        last layer computes no more than keys and values.
        """
        x, config = self.embed(tokens), self.config
        turned = config.rotary_dim or config.head_dim
        rotation = rotary(positions, turned, config.rope_theta, x.dtype)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            x = layer(x, rotation, attend, cache, keep if index == last else None)
        return read(self.final_norm(x), self.head)

    def init_weights(self, seed: int) -> None:
        """Draw fresh weights, see `draw_weights`."""
        draw_weights(self, self.config, seed)


@torch.no_grad()
def draw_weights(
    model: nn.Module, config: ModelConfig, seed: int, zero: tuple[str, ...] = ()
) -> None:
    """Draw a network's weights: normal of 1/sqrt(fan in), the two output projections
    1/sqrt(2 layers) smaller (GPT-2), embeddings and head 0.02, norms 1, biases and what has a name
    of `zero` in its own 0. The same seed gives the same weights."""
    generator = torch.Generator().manual_seed(seed)
    depth_factor = (2 * config.num_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif name.endswith("bias") or any(part in name for part in zero):
            parameter.zero_()
        else:
            is_table = "embed" in name or name == "head.weight"
            scale = 0.02 if is_table else parameter.shape[-1] ** -0.5
            scale *= depth_factor if "o_proj" in name or "down_proj" in name else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def rotary(positions: Tensor, size: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Cosines and sines [n, 1, r, size] of the angles position x theta^(-2i / size), i being
    counted in each half, and the first half's sines negative: as `rotate` wants them."""
    wide = torch.promote_types(dtype, torch.float32)
    even = torch.arange(0, size, 2, dtype=wide, device=positions.device)
    frequencies = 1.0 / theta ** (even / size)
    angles = positions[:, None, :, None].to(wide) * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the pairs (i, i + s/2) of the leading s dimensions of x [n, h, r, head_dim], s being
    the size of the rotation: the half-split layout."""
    cos, sin = rotation
    size = cos.shape[-1]
    leading = x if size == x.shape[-1] else x[..., :size]
    turned = (leading * cos + leading.roll(size // 2, -1) * sin).to(x.dtype)
    return turned if leading is x else torch.cat([turned, x[..., size:]], dim=-1)


def never_emitted(config: ModelConfig) -> list[int]:
    """Ids that no prediction may give: the mask token, padding unless it ends texts too, and what
    stands before the parts of a rearranged text."""
    padding = {config.pad_id} - {config.eos_id}
    return sorted({config.mask_id, *config.infill_ids} | padding)


def vocabulary_logits(hidden: Tensor, head: nn.Module, banned: list[int]) -> Tensor:
    """Rows [r, d] -> logits [r, vocabulary] in float32 or wider, the banned ids at -inf."""
    logits = cast(Tensor, head(hidden))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.index_fill_(
        -1, torch.tensor(banned, dtype=torch.int64, device=logits.device), float("-inf")
    )
