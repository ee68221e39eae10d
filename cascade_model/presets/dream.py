"""Dream's sampler (Dream-org, `diffusion_generate`; arXiv 2508.15487) without randomness.

No blocks: in every step the most confident places of the whole completion are committed. How many
follows from times that fall evenly from 1 to eps, truncated to whole places, so that with as many
steps as masks the first step commits nothing and the last ones catch up.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cascade_model.canvas import Window
from cascade_model.contexts import Bidirectional
from cascade_model.model import Transformer
from cascade_model.presets.published import Published, best, cut, run, with_masks
from cascade_model.settings import check

Confidence = Literal["maskgit_plus", "topk_margin", "entropy", "origin"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DreamSettings:
    """The arguments of the published function; its temperatures are 0."""

    steps: int = 512
    max_new_tokens: int = 128
    eps: float = 1e-3
    """The last time."""
    alg: Confidence = "entropy"
    """The confidence: top probability, its lead over the second, or negative entropy. origin, the
    published default, draws the places at random, which is repeatable with steps=1 alone."""
    top_k: int | None = None
    """Confidences count these many best tokens only; predictions stay."""
    top_p: float | None = None
    """The same for the smallest set of tokens above this probability."""
    mask_token_id: int = 151666

    def __post_init__(self) -> None:
        check_algorithm(self.alg, ("maskgit_plus", "topk_margin", "entropy", "origin"))
        check_times(self.steps, self.eps)
        check_filters(self.top_k, self.top_p)
        check(self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens} must be at least 1")
        check(
            self.alg != "origin" or self.steps == 1,
            f"alg=origin with steps={self.steps} draws places at random; use steps=1 or another "
            "alg",
        )


def check_algorithm(alg: str, known: tuple[str, ...]) -> None:
    """Refuse (`InputError`) an unknown way to order places."""
    check(alg in known, f"alg={alg} is not known; use {', '.join(known)}")


def check_times(steps: int, eps: float) -> None:
    """Refuse (`InputError`) times that do not fall."""
    check(steps >= 1, f"steps={steps} must be at least 1")
    check(0.0 <= eps < 1.0, f"eps={eps} must be at least 0 and below 1; use 0.001")


def check_filters(top_k: int | None, top_p: float | None) -> None:
    """Refuse (`InputError`) sets of tokens that would be empty."""
    check(top_k is None or top_k >= 1, f"top_k={top_k} must be at least 1; leave it out for all")
    check(
        top_p is None or 0.0 <= top_p <= 1.0,
        f"top_p={top_p} must be in 0..1; leave it out for all tokens",
    )


def dream(model: Transformer, prompt: list[int], settings: DreamSettings) -> list[int]:
    """The whole canvas after decoding: prompt and completion."""
    masks = settings.max_new_tokens
    canvas = with_masks(prompt, masks, settings.mask_token_id, model)
    windows = cut(len(prompt), len(canvas), masks, settings.steps)
    return run(model, canvas, Bidirectional(model.config), windows, Dream(settings))


class Dream(Published):
    """The places of greatest confidence, as many as the times say."""

    def __init__(self, settings: DreamSettings) -> None:
        super().__init__(settings.mask_token_id)
        self.settings = settings
        self.times = times(settings.steps, settings.eps)

    def predict(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and what `alg` calls their confidence."""
        settings = self.settings
        return confidences(keep(logits, settings.top_k, settings.top_p), settings.alg)

    def choose(self, confidence: Tensor, window: Window) -> Tensor:
        """See the class."""
        return best(confidence, count(len(confidence), self.times, window.step))


def times(steps: int, eps: float) -> Tensor:
    """t[0..steps] from 1 to eps, float32 as published: truncation shows the last bit."""
    return torch.linspace(1, eps, steps + 1)


def count(masks: int, times: Tensor, step: int) -> int:
    """Places that a step commits: all of them in the last one."""
    if step + 2 >= len(times):
        return masks
    return int(masks * (1 - times[step + 1] / times[step]))


def confidences(logits: Tensor, alg: str) -> tuple[Tensor, Tensor]:
    """Tokens int64 [m] of logits [m, vocabulary], and the confidence of each."""
    shares = logits.softmax(dim=-1)
    top, tokens = shares.max(dim=-1)
    if alg == "topk_margin":
        first, second = shares.topk(2, dim=-1).values.unbind(dim=-1)
        return tokens, first - second
    if alg == "entropy":
        return tokens, (shares * torch.log(shares + 1e-10)).sum(dim=-1)
    return tokens, top


def keep(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits [m, vocabulary] with the tokens outside both sets hugely negative.

    The token that crosses `top_p` is kept, and so are ties of the last of the `top_k`.
    """
    least = torch.finfo(logits.dtype).min
    if top_p is not None and top_p < 1:
        ranked, order = logits.sort(dim=-1, descending=True)
        above = ranked.softmax(dim=-1).cumsum(dim=-1) > top_p
        outside = torch.zeros_like(above)
        outside[:, 1:] = above[:, :-1]
        logits = logits.masked_fill(outside.scatter(-1, order, outside), least)
    if top_k is not None and top_k < logits.shape[-1]:
        last = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < last, least)
    return logits
