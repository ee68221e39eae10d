"""Fast-dLLM's sampler for Dream (NVlabs/Fast-dLLM, block-wise; arXiv 2505.22618).

A block's first pass sees the whole canvas and commits the block's first place, whatever its
confidence: Dream's logits are shifted, and in the later passes over a piece of the canvas the row
that predicts that place is not fed.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cascade_model.canvas import Window
from cascade_model.contexts import Bidirectional
from cascade_model.model import Transformer
from cascade_model.presets import dream
from cascade_model.presets.fast_dllm import BlockByBlock, best_and_above
from cascade_model.presets.published import best, cut, run, with_masks
from cascade_model.settings import check


@dataclass(frozen=True, kw_only=True, slots=True)
class FastDLLMDreamSettings:
    """The arguments of the published function; its temperatures are 0."""

    cache: Literal["prefix", "dual"] = "prefix"
    steps: int = 512
    """In all; divided evenly over the blocks. Without effect with a threshold."""
    max_new_tokens: int = 128
    block_length: int = 32
    alg: Literal["confidence_threshold", dream.Confidence] = "confidence_threshold"
    """confidence_threshold: the most confident place and all others of at least `threshold`. Every
    other name: Dream's times, always by negative entropy."""
    threshold: float = 0.9
    eps: float = 1e-3
    top_k: int | None = None
    top_p: float | None = None
    mask_token_id: int = 151666

    def __post_init__(self) -> None:
        check(
            self.cache in ("prefix", "dual"),
            f"cache={self.cache} is not known; use prefix or dual, or Dream's own sampler",
        )
        algorithms = ("confidence_threshold", "maskgit_plus", "topk_margin", "entropy", "origin")
        dream.check_algorithm(self.alg, algorithms)
        dream.check_times(self.steps, self.eps)
        dream.check_filters(self.top_k, self.top_p)
        size, total = self.block_length, self.max_new_tokens
        check(size >= 1, f"block_length={size} must be at least 1")
        check(
            total >= size and total % size == 0,
            f"block_length={size} does not divide max_new_tokens={total}; use a divisor",
        )
        check(
            self.steps % self.blocks == 0,
            f"steps={self.steps} is no multiple of the {self.blocks} blocks; use one",
        )

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.max_new_tokens // self.block_length

    @property
    def steps_per_block(self) -> int:
        """Passes of a block, the first one included, where there is no threshold."""
        return self.steps // self.blocks


def fast_dllm_dream(
    model: Transformer, prompt: list[int], settings: FastDLLMDreamSettings
) -> list[int]:
    """The whole canvas after decoding: prompt and completion."""
    canvas = with_masks(prompt, settings.max_new_tokens, settings.mask_token_id, model)
    context = Bidirectional(model.config, cache=settings.cache, lead=0)
    strategy = FastDLLMDream(settings)
    # Every later pass fills a place or is the last; the first may predict the mask token.
    passes = settings.block_length + 1 if strategy.is_free else settings.steps_per_block
    windows = cut(len(prompt), len(canvas), settings.block_length, passes)
    return run(model, canvas, context, windows, strategy)


class FastDLLMDream(BlockByBlock):
    """The first place alone, then the block's other places by threshold or by time."""

    def __init__(self, settings: FastDLLMDreamSettings) -> None:
        is_free = settings.alg == "confidence_threshold"
        super().__init__(settings.mask_token_id, is_free=is_free)
        self.settings = settings
        self.times = dream.times(settings.steps_per_block, settings.eps)

    def places(self, canvas: Tensor, window: Window) -> Tensor:
        """The first place, then every masked one of the block."""
        if window.step == 0:
            return torch.tensor([window.start], device=canvas.device)
        return super().places(canvas, window)

    def predict(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and their probability, or negative entropy."""
        kept = dream.keep(logits, self.settings.top_k, self.settings.top_p)
        return dream.confidences(kept, "maskgit_plus" if self.is_free else "entropy")

    def choose(self, confidence: Tensor, window: Window) -> Tensor:
        """See the class."""
        if self.is_free:
            return best_and_above(confidence, self.settings.threshold)
        if window.step == 0:
            return best(confidence, 1)
        return best(confidence, dream.count(len(confidence), self.times, window.step))
