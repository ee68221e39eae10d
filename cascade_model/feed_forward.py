"""The feed-forward of a layer: one for all tokens, or a few of many that a router chooses.

Two published routers: LLaDA-MoE takes the largest softmax probabilities as they are
(arXiv 2509.24389); LLaDA2 scores by sigmoid, keeps the best groups, and adds a bias that moves the
selection but not the weights (arXiv 2512.15745, after DeepSeek-V3's).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade_model.config import ExpertsConfig
from cascade_model.rows import in_whole_rows


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form (GPT-2), written out: torch's own cuts even small tensors among its
    threads and rounds the last numbers of a cut differently."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)  # sqrt(2 / pi)
    return 0.5 * x * (1.0 + torch.tanh(inner))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MixtureOfExperts(nn.Module):
    """x [..., hidden] -> sum over the chosen experts of weight x expert(x), plus the shared one."""

    def __init__(self, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        inner, count = config.intermediate_size, config.num_experts
        shared = config.shared_intermediate_size
        self.router = nn.Linear(width, count, bias=False)
        self.gate_proj = nn.Parameter(torch.empty(count, inner, width))
        self.up_proj = nn.Parameter(torch.empty(count, inner, width))
        self.down_proj = nn.Parameter(torch.empty(count, width, inner))
        for stack in (self.gate_proj, self.up_proj, self.down_proj):
            nn.init.normal_(stack, std=stack.shape[-1] ** -0.5)
        if config.router_bias:
            self.router_bias = nn.Parameter(torch.zeros(count), requires_grad=False)
        self.shared = FeedForward(width, shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        chosen, weights = self.route(rows)
        result = self._routed(rows, chosen, weights)
        if self.shared is not None:
            result = result + self.shared(rows)
        return result.reshape(x.shape)

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each row and their weights: [r, hidden] -> int64 and float [r, chosen].

        Scores are computed in float32 or wider.
        """
        config, scores = self.config, self.scores(rows)
        if config.router == "softmax":
            scores = scores.softmax(dim=-1)
            ranked = scores = scores + self.router_bias if config.router_bias else scores
        else:
            scores = in_whole_rows(torch.sigmoid, scores)
            biased = scores + self.router_bias if config.router_bias else scores
            ranked = _best_groups(biased, config.num_groups, config.groups_per_token)
        chosen = ranked.topk(config.experts_per_token, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if config.renormalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return chosen, (weights * config.weight_scale).to(rows.dtype)

    def scores(self, rows: Tensor) -> Tensor:
        """The router's outputs, [r, hidden] -> [r, experts].

        Not rounded under autocast: a step of bfloat16 is wider than many a gap between experts.
        """
        wide = torch.promote_types(rows.dtype, torch.float32)
        with torch.autocast(rows.device.type, enabled=False):
            return F.linear(rows.to(wide), self.router.weight.to(wide))

    def _routed(self, rows: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Each expert on its rows: sorted by expert, so that every weight is read once."""
        result = torch.zeros_like(rows)
        order = chosen.flatten().argsort(stable=True)
        row_of = order // chosen.shape[1]
        counts = chosen.flatten().bincount(minlength=self.config.num_experts).tolist()
        start = 0
        for expert, count in enumerate(counts):
            if count:
                part = slice(start, start + count)
                index = row_of[part]
                made = self.expert(expert, rows[index])
                scaled = made * weights.flatten()[order[part]][:, None]
                result = result.index_add(0, index, scaled)
                start += count
        return result

    def expert(self, number: int, rows: Tensor) -> Tensor:
        """One expert on some rows [r, hidden]."""
        gate = F.silu(F.linear(rows, self.gate_proj[number]))
        return F.linear(gate * F.linear(rows, self.up_proj[number]), self.down_proj[number])


def _best_groups(scores: Tensor, num_groups: int, kept: int) -> Tensor:
    """Scores [r, experts] with those outside the best groups at -inf.

    A group's score is the sum of its two best experts.
    """
    grouped = scores.unflatten(-1, (num_groups, -1))
    two = min(2, grouped.shape[-1])
    best = grouped.topk(two, dim=-1).values.sum(dim=-1).topk(kept, dim=-1).indices
    outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, False)
    return grouped.masked_fill(outside[..., None], float("-inf")).flatten(-2)
