"""LLaDA2.0's samplers: its model's own, and dllm's (ZHZisZZ/dllm `llada2`); arXiv 2512.15745.

Blocks as SDAR's, but a block's steps may run out with masks left. Neither published sampler has a
cache; attention is block-causal, so the exact one gives the same.
"""

from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from torch import Tensor

from cascade_model.canvas import Change, Window
from cascade_model.model import Transformer
from cascade_model.passes import Prediction
from cascade_model.presets.published import (
    Published,
    above_or_best,
    block_causal,
    cut,
    even_quota,
    masked,
    run,
    whole_blocks,
)
from cascade_model.settings import check


@dataclass(frozen=True, kw_only=True, slots=True)
class LLaDA2Settings:
    """The arguments of the published functions."""

    variant: Literal["official", "dllm"] = "official"
    """official returns the completion up to its end; dllm the whole canvas, and never stops."""
    gen_length: int = 2048
    block_length: int = 32
    steps: int = 32
    """Passes per block, at most; no more than gen_length // minimal_topk."""
    minimal_topk: int = 1
    threshold: float = 0.95
    """Commit what is above it, where that is no less than the quota."""
    eos_early_stop: bool = False
    """official: stop inside a block, once everything before the end of text is known."""
    temperature: float = 0.0
    mask_id: int = 156895
    eos_id: int = 156892

    def __post_init__(self) -> None:
        check_common(self.variant, self.temperature)
        for name in ("gen_length", "block_length", "steps", "minimal_topk"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        check(
            self.minimal_topk <= self.gen_length,
            f"minimal_topk={self.minimal_topk} is above gen_length={self.gen_length} and leaves no "
            "step; use 1",
        )

    @property
    def steps_per_block(self) -> int:
        """Passes per block, at most."""
        return min(self.steps, self.gen_length // self.minimal_topk)


def check_common(variant: str, temperature: float) -> None:
    """Refuse (`InputError`) what neither LLaDA2.0 nor 2.1 is reproduced with."""
    check(variant in ("official", "dllm"), f"variant={variant} is unknown; use official or dllm")
    check(
        temperature == 0.0,
        f"temperature={temperature} draws numbers that cannot be reproduced; use 0",
    )


def llada2(model: Transformer, prompt: list[int], settings: LLaDA2Settings) -> list[int]:
    """The completion up to its end (official), or the whole canvas (dllm)."""
    size, start, eos_id = settings.block_length, len(prompt), settings.eos_id
    canvas = whole_blocks(model, prompt, settings.gen_length, size, settings.mask_id)
    windows = cut(start // size * size, len(canvas), size, settings.steps_per_block)
    strategy = LLaDA2(settings, start)
    if settings.variant == "dllm":
        return run(model, canvas, block_causal(model, size), windows, strategy)
    going = takewhile(lambda _: not has_token(canvas[start:], eos_id), windows)
    tokens = run(model, canvas, block_causal(model, size), going, strategy)
    if strategy.is_stopped:
        return tokens[start : tokens.index(eos_id) + 1]
    return until_end(tokens[start:][: settings.gen_length], eos_id)


def has_token(tokens: Tensor, token: int) -> bool:
    """Whether a token occurs."""
    return bool((tokens == token).any())


def until_end(tokens: list[int], eos_id: int) -> list[int]:
    """Cut behind the first end of text."""
    return tokens[: tokens.index(eos_id) + 1] if eos_id in tokens else tokens


class LLaDA2(Published):
    """Each step commits all that is certain, but at least its quota."""

    def __init__(self, settings: LLaDA2Settings, start: int) -> None:
        super().__init__(settings.mask_id)
        self.settings, self.start = settings, start
        self.quota = even_quota(settings.block_length, settings.steps_per_block)
        self.is_stopped = False
        """Whether the text ended inside a block."""

    def is_done(self, canvas: Tensor, window: Window) -> bool:
        """Whether the block is full, its steps used up, or the text has ended."""
        return self.is_stopped or super().is_done(canvas, window)

    def places(self, canvas: Tensor, window: Window) -> Tensor:
        """The masks of the block."""
        return masked(canvas, window, self.mask_id)

    def step(self, canvas: Tensor, window: Window, prediction: Prediction) -> Change:
        """Commit; an early stop follows an end of text where nothing is masked between the prompt
        and the first one of the canvas, even one inside the prompt."""
        change, settings = super().step(canvas, window, prediction), self.settings
        is_looking = settings.variant == "official" and settings.eos_early_stop
        if is_looking and has_token(change.tokens, settings.eos_id):
            after = canvas.index_put((change.places,), change.tokens)
            first = int((after == settings.eos_id).nonzero()[0])
            self.is_stopped = not has_token(after[self.start : first], self.mask_id)
        return change

    def choose(self, confidence: Tensor, window: Window) -> Tensor:
        """Above the threshold, or the quota."""
        return above_or_best(confidence, self.settings.threshold, self.quota[window.step])
