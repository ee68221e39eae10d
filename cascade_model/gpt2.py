"""The network of GPT-2 (Radford et al., 2019): learned positions, LayerNorm, tanh-GELU, biases.

What a query sees is the caller's, as in `model`: with a token-causal `Attend` this is GPT-2.

    embed.weight  position_embed.weight
    layers.N.{attention_norm, qkv, o_proj, mlp_norm, up_proj, down_proj}.{weight, bias}
    final_norm.{weight, bias}
    head.weight                                   (tied: embed.weight)

Matrices are [out, in]; the published ones are stored [in, out]. The rows of qkv are all queries,
all keys, all values.
"""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from cascade_model.attention import Attend, DoubledAttention, Keep, grouped_training
from cascade_model.config import ModelConfig
from cascade_model.feed_forward import gelu
from cascade_model.kv_cache import CacheSlot
from cascade_model.model import draw_weights
from cascade_model.rows import in_whole_rows
from cascade_model.settings import check

T = TypeVar("T")


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_heads * config.head_dim
        self.index, self.head_dim = index, config.head_dim
        self.attention_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.qkv = nn.Linear(width, 3 * heads)
        self.o_proj = nn.Linear(heads, width)
        self.mlp_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.up_proj = nn.Linear(width, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, width)

    def forward(
        self,
        x: Tensor,
        attend: Attend,
        cache: CacheSlot | None = None,
        keep: Keep | None = None,
    ) -> Tensor:
        """x [n, r, hidden] -> [n, r, hidden], or with `keep` its rows only."""
        mixed = self._attention(self.attention_norm(x), attend, cache, keep)
        x = (x if keep is None else x[:, keep.rows]) + mixed
        return x + self.down_proj(in_whole_rows(gelu, self.up_proj(self.mlp_norm(x))))

    def _attention(
        self, x: Tensor, attend: Attend, cache: CacheSlot | None, keep: Keep | None
    ) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, -1, self.head_dim))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind()
        if cache is not None:
            k, v = cache.join(self.index, k, v)
        if keep is not None:
            q, attend = q[:, :, keep.rows], keep.attend
        return self.o_proj(attend(q, k, v).transpose(1, 2).flatten(2))


class GPT2(nn.Module):
    """Token ids to whatever `read` makes of the last hidden states."""

    training_attention: DoubledAttention = staticmethod(grouped_training)
    """Who sees whom in the doubled input; `flex.flex_training` is the other way."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        check(
            config.num_kv_heads == config.num_heads,
            f"model.num_kv_heads={config.num_kv_heads} does not fit model.network=gpt2; use "
            f"{config.num_heads}, the number of heads",
        )
        self.config = config
        width = config.hidden_size
        self.embed = nn.Embedding(config.vocab_size, width)
        self.position_embed = nn.Embedding(config.max_sequence_length, width)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.final_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.head = nn.Linear(width, config.vocab_size, bias=False)
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
        """One pass, as that of `Transformer`; a place without a learned position is refused."""
        last_place, limit = int(positions.max()), self.config.max_sequence_length
        check(
            last_place < limit,
            f"the sequence has {last_place + 1} tokens and model.max_sequence_length={limit} "
            "learned positions; shorten the prompt or lower max_tokens",
        )
        x = self.embed(tokens) + self.position_embed(positions)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            x = layer(x, attend, cache, keep if index == last else None)
        return read(self.final_norm(x), self.head)

    def init_weights(self, seed: int) -> None:
        """Draw fresh weights as all networks do, the positions like the embedding."""
        draw_weights(self, self.config, seed)
