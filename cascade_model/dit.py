"""The network of MDLM (arXiv 2406.07524) and BD3-LM (arXiv 2503.09573): a diffusion transformer.

It differs from the transformer of `model` in its norms (LayerNorm without bias), its MLP
(tanh-GELU) and its conditioning: every norm is shifted and scaled, and every branch gated, by a
vector made from the noise level (adaLN). The published models feed noise level 0 always; then the
conditioning is the same for all sequences and computed once for all, as a batch of one.

    embed.weight
    time_in.{weight, bias}  time_out.{weight, bias}
    layers.N.{attention_norm, qkv, o_proj, mlp_norm}.weight
    layers.N.{up_proj, down_proj, modulation}.{weight, bias}
    final_norm.weight  final_modulation.{weight, bias}
    head.{weight, bias}

The rows of qkv are all queries, all keys, all values. Those of `modulation` are shift, scale and
gate of the attention, then of the MLP; those of `final_modulation` shift and scale.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade_model.attention import Attend, DoubledAttention, Keep, grouped_training
from cascade_model.config import ModelConfig
from cascade_model.feed_forward import gelu
from cascade_model.kv_cache import CacheSlot
from cascade_model.model import Rotation, draw_weights, rotary, rotate
from cascade_model.rows import in_whole_rows
from cascade_model.settings import check

T = TypeVar("T")
SINUSOIDS = 256


class Layer(nn.Module):
    """Attention and MLP, each behind a modulated norm, gated and added to the stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_heads * config.head_dim
        self.index, self.head_dim = index, config.head_dim
        self.attention_norm = nn.LayerNorm(width, eps=config.norm_eps, bias=False)
        self.qkv = nn.Linear(width, 3 * heads, bias=False)
        self.o_proj = nn.Linear(heads, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, eps=config.norm_eps, bias=False)
        self.up_proj = nn.Linear(width, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, width)
        self.modulation = nn.Linear(config.conditioning_size, 6 * width)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        rotation: Rotation,
        attend: Attend,
        cache: CacheSlot | None = None,
        keep: Keep | None = None,
    ) -> Tensor:
        """x [n, r, hidden] -> [n, r, hidden], or with `keep` its rows only.

        `condition` is [n, 1, conditioning], or [1, 1, conditioning] for all sequences.
        """
        parts = self.modulation(condition).chunk(6, dim=-1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        inner = modulate(self.attention_norm(x), shift, scale)
        mixed = self._attention(inner, rotation, attend, cache, keep)
        x = (x if keep is None else x[:, keep.rows]) + gate * mixed
        inner = modulate(self.mlp_norm(x), mlp_shift, mlp_scale)
        return x + mlp_gate * self.down_proj(in_whole_rows(gelu, self.up_proj(inner)))

    def _attention(
        self,
        x: Tensor,
        rotation: Rotation,
        attend: Attend,
        cache: CacheSlot | None,
        keep: Keep | None,
    ) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, -1, self.head_dim))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind()
        q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.join(self.index, k, v)
        if keep is not None:
            q, attend = q[:, :, keep.rows], keep.attend
        return self.o_proj(attend(q, k, v).transpose(1, 2).flatten(2))


class DiT(nn.Module):
    """Token ids, and a noise level where one is given, to what `read` makes of the last rows."""

    training_attention: DoubledAttention = staticmethod(grouped_training)
    """Who sees whom in the doubled input; `flex.flex_training` is the other way."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        check(
            config.num_kv_heads == config.num_heads and not config.tied_head,
            f"model.num_kv_heads={config.num_kv_heads} and model.tied_head={config.tied_head} do "
            f"not fit model.network=dit; use {config.num_heads} and false",
        )
        self.config = config
        width, conditioning = config.hidden_size, config.conditioning_size
        self.embed = nn.Embedding(config.vocab_size, width)
        self.time_in = nn.Linear(SINUSOIDS, conditioning)
        self.time_out = nn.Linear(conditioning, conditioning)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.final_norm = nn.LayerNorm(width, eps=config.norm_eps, bias=False)
        self.final_modulation = nn.Linear(conditioning, 2 * width)
        self.head = nn.Linear(width, config.vocab_size)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: Attend,
        read: Callable[[Tensor, nn.Module], T],
        cache: CacheSlot | None = None,
        keep: Keep | None = None,
        noise_level: Tensor | None = None,
    ) -> T:
        """One pass, as that of `Transformer`; `noise_level` is one number a sequence, [n]."""
        x, config = self.embed(tokens), self.config
        rotation = rotary(positions, config.head_dim, config.rope_theta, x.dtype)
        condition = self._condition(positions.new_zeros(1) if noise_level is None else noise_level)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            x = layer(x, condition, rotation, attend, cache, keep if index == last else None)
        shift, scale = self.final_modulation(condition).chunk(2, dim=-1)
        return read(modulate(self.final_norm(x), shift, scale), self.head)

    def _condition(self, noise_level: Tensor) -> Tensor:
        """Noise levels [n] -> [n, 1, conditioning]."""
        weight = self.time_in.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        features = sinusoids(noise_level.to(wide)).to(weight.dtype)
        return F.silu(self.time_out(F.silu(self.time_in(features))))[:, None]

    def init_weights(self, seed: int) -> None:
        """Draw fresh weights as all networks do; modulations and head start at zero (adaLN-zero:
        every layer begins as the identity and every prediction uniform)."""
        draw_weights(self, self.config, seed, zero=("modulation", "head.weight"))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return x * (1 + scale) + shift


def sinusoids(levels: Tensor) -> Tensor:
    """Noise levels [n] -> [n, 256]: cosines, then sines, of level x 10000^(-i / 128)."""
    half = SINUSOIDS // 2
    steps = torch.arange(half, dtype=levels.dtype, device=levels.device)
    angles = levels[:, None] * torch.exp(steps * (-math.log(10000.0) / half))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
