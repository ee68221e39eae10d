"""SDAR's sampler (JetAstra/SDAR `generate.py`; arXiv 2510.06303), and what LLaDA2 shares with it.

A canvas of whole blocks from the prompt's first token on, each finished before the next. The
published code encodes a finished block in a pass of its own; here that pass is the next block's
first. Where it fails (a mask predicted and no step left) the mask stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, get_args

import torch
from torch import Tensor

from cascade_model.canvas import Change, Window
from cascade_model.drawing import by_inverse, keep_most_probable, uniforms
from cascade_model.model import Transformer
from cascade_model.noise import TOKEN
from cascade_model.passes import Prediction
from cascade_model.presets.published import (
    Published,
    above_or_best,
    best,
    block_causal,
    cut,
    even_quota,
    masked,
    run,
    whole_blocks,
)
from cascade_model.settings import check

Remasking = Literal["sequential", "low_confidence_static", "low_confidence_dynamic"]
Draw = Literal["multinomial", "argmax"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SDARSettings:
    """The arguments of the published function, and how tokens are drawn."""

    gen_length: int = 128
    block_length: int = 8
    denoising_steps: int = 8
    """Passes per block, at most."""
    remasking_strategy: Remasking = "low_confidence_dynamic"
    confidence_threshold: float | None = 0.85
    """low_confidence_dynamic: commit what is above it, where that is no less than the quota."""
    eb_threshold: float | None = None
    """Of `entropy_bounded`, which the published code cannot run: no effect."""
    temperature: float = 1.0
    top_k: int = 0
    """Draw from the this many most probable tokens; 0: all."""
    top_p: float = 1.0
    draw: Draw = "multinomial"
    """argmax: the most probable token, its confidence as if it had been drawn."""
    stopping_criteria_idx: Sequence[int] | None = None
    """Tokens that end decoding with the block they occur in."""
    mask_id: int = 151669
    seed: int = 0
    """Of the multinomial draw."""

    def __post_init__(self) -> None:
        for name in ("gen_length", "block_length", "denoising_steps"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        known = get_args(Remasking)
        check(
            self.remasking_strategy in known,
            f"remasking_strategy={self.remasking_strategy} is unknown, or fails in the published "
            f"code; use {', '.join(known)}",
        )
        check(
            self.confidence_threshold is not None
            or self.remasking_strategy != "low_confidence_dynamic",
            "confidence_threshold=None leaves low_confidence_dynamic without one; use 0.85",
        )
        check(self.draw in get_args(Draw), f"draw={self.draw} is unknown; use argmax, multinomial")
        check(
            self.temperature > 0,
            f"temperature={self.temperature} must be above 0; for the most probable token use "
            "draw=argmax",
        )
        check(self.top_k >= 0, f"top_k={self.top_k} must not be negative; use 0 for all")
        check(0.0 < self.top_p <= 1.0, f"top_p={self.top_p} must be above 0 and at most 1")


def sdar(model: Transformer, prompt: list[int], settings: SDARSettings) -> list[int]:
    """The whole canvas of whole blocks, with masks behind the block in which it stopped."""
    size = settings.block_length
    canvas = whole_blocks(model, prompt, settings.gen_length, size, settings.mask_id)
    windows = cut(len(prompt) // size * size, len(canvas), size, settings.denoising_steps)
    stops = canvas.new_tensor(settings.stopping_criteria_idx or [])
    going = takewhile(lambda _: not torch.isin(canvas[len(prompt) :], stops).any(), windows)
    return run(model, canvas, block_causal(model, size), going, SDAR(settings))


class SDAR(Published):
    """Each step commits its quota of the block, or with `dynamic` all that is certain."""

    def __init__(self, settings: SDARSettings) -> None:
        super().__init__(settings.mask_id)
        self.settings = settings
        self.quota = even_quota(settings.block_length, settings.denoising_steps)

    def places(self, canvas: Tensor, window: Window) -> Tensor:
        """The masks; in sequence, the quota's places from the first mask on, whatever they hold."""
        places = masked(canvas, window, self.mask_id)
        if self.settings.remasking_strategy != "sequential" or len(places) == 0:
            return places
        first = int(places[0])
        end = min(first + self.quota[window.step], window.end)
        return torch.arange(first, end, device=canvas.device)

    def step(self, canvas: Tensor, window: Window, prediction: Prediction) -> Change:
        """Filter the distribution, draw from it, choose by the drawn token's share."""
        settings, places = self.settings, prediction.places
        scaled = prediction.logits / settings.temperature
        shares = keep_most_probable(scaled, settings.top_k, settings.top_p).softmax(dim=-1)
        if settings.draw == "argmax":
            tokens = shares.argmax(dim=-1)
        else:
            inside = (places - window.start).tolist()
            drawn = uniforms(TOKEN, settings.seed, 0, window.number, window.step, inside)
            tokens = by_inverse(shares.double(), torch.from_numpy(drawn).to(shares.device))
        taken = self.choose(shares.gather(-1, tokens[:, None])[:, 0], window)
        return Change(places[taken], tokens[taken])

    def choose(self, confidence: Tensor, window: Window) -> Tensor:
        """By quota, the threshold first where the strategy is dynamic."""
        quota, threshold = self.quota[window.step], self.settings.confidence_threshold
        if self.settings.remasking_strategy == "sequential":
            return torch.arange(len(confidence), device=confidence.device)
        if self.settings.remasking_strategy == "low_confidence_static" or threshold is None:
            return best(confidence, quota)
        return above_or_best(confidence, threshold, quota)
