"""Fast-dLLM's samplers for LLaDA (arXiv 2505.22618): NVlabs/Fast-dLLM and its port in ZHZisZZ/dllm.

Both go block by block, each until it is full, and may keep keys and values between the passes of a
block (`contexts.Bidirectional`). They differ in small ways: NVlabs compares confidences in float64
and takes masks of the prompt for places to fill; dllm compares in float32, has the factor rule, a
rounded schedule instead of the even quota, and with the dual cache never makes more passes a block
than that schedule has entries, so that masks may stay.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cascade_model.canvas import Change, Window
from cascade_model.contexts import Bidirectional
from cascade_model.model import Transformer
from cascade_model.passes import Prediction
from cascade_model.presets.published import (
    Published,
    best,
    cut,
    even_quota,
    masked,
    run,
    with_masks,
)
from cascade_model.presets.transfer import transfer_counts
from cascade_model.settings import check


@dataclass(frozen=True, kw_only=True, slots=True)
class FastDLLMSettings:
    """The arguments of the published functions; dllm calls some of them otherwise."""

    variant: Literal["nvlabs", "dllm"] = "nvlabs"
    cache: Literal["none", "prefix", "dual"] = "none"
    steps: int = 128
    """In all; divided over the blocks. Without effect where threshold or factor is given, except
    as the ceiling of passes in dllm's dual cache."""
    gen_length: int = 128
    block_length: int = 128
    threshold: float | None = None
    """Commit every place of at least this confidence, one at the least."""
    factor: float | None = None
    """dllm: commit the r-th best place where its confidence is at least 1 - factor/(r + 1)."""
    remasking: Literal["low_confidence"] = "low_confidence"
    mask_id: int = 126336
    eos_id: int = 126081
    """dllm: pads the shorter rows of a batch."""

    def __post_init__(self) -> None:
        known = {
            "variant": ("nvlabs", "dllm"),
            "cache": ("none", "prefix", "dual"),
            "remasking": ("low_confidence",),
        }
        for name, values in known.items():
            value = getattr(self, name)
            check(value in values, f"{name}={value} is not known; use {' or '.join(values)}")
        for name in ("steps", "gen_length", "block_length"):
            value = getattr(self, name)
            check(value >= 1, f"{name}={value} must be at least 1")
        check(
            self.threshold is None or self.factor is None,
            f"threshold={self.threshold} and factor={self.factor} both choose the places; give one",
        )
        check(
            self.factor is None or self.variant == "dllm",
            f"factor={self.factor} is a rule of variant=dllm; use that, or a threshold",
        )
        if self.variant == "nvlabs":
            self._check_divisions()

    def _check_divisions(self) -> None:
        check(
            self.gen_length % self.block_length == 0,
            f"block_length={self.block_length} does not divide gen_length={self.gen_length}; "
            "use a divisor",
        )
        check(
            self.steps % self.blocks == 0,
            f"steps={self.steps} is no multiple of the {self.blocks} blocks; use one",
        )

    @property
    def blocks(self) -> int:
        """Number of blocks, the last perhaps short (dllm)."""
        return -(-self.gen_length // self.block_length)

    def quota(self, places: int) -> list[int]:
        """Places that each step of a block commits where nothing else says how many."""
        steps = -(-self.steps // self.blocks)
        if self.variant == "dllm":
            return transfer_counts(places, steps, "linear")
        return even_quota(places, steps)


def fast_dllm(
    model: Transformer, prompt: list[int], settings: FastDLLMSettings, *, padding: int = 0
) -> list[int]:
    """The whole canvas after decoding: prompt, completion and padding.

    A row that dllm decodes beside longer ones has `padding` places on its right. They hold
    `eos_id` and are seen by all others: the published network ignores the attention mask.
    """
    check(
        padding == 0 or (settings.variant, settings.cache) == ("dllm", "none"),
        f"variant={settings.variant} with cache={settings.cache} needs prompts of one length, and "
        f"one is {padding} shorter; use variant=dllm with cache=none, or decode them one by one",
    )
    end = len(prompt) + settings.gen_length
    canvas = with_masks(prompt, settings.gen_length + padding, settings.mask_id, model)
    canvas[end:] = settings.eos_id
    cache = "exact" if settings.cache == "none" else settings.cache
    context = Bidirectional(model.config, cache=cache)
    windows = cut(len(prompt), end, settings.block_length, 0)
    for window in windows:
        window.max_steps = _most_passes(settings, window.end - window.start)
    return run(model, canvas, context, windows, FastDLLM(settings))


def _most_passes(settings: FastDLLMSettings, places: int) -> int:
    """Every pass over the block alone fills a place or is the last; the first may see others."""
    is_free = settings.threshold is not None or settings.factor is not None
    is_capped = settings.variant == "dllm" and settings.cache == "dual"
    return places + 1 if is_free and not is_capped else len(settings.quota(places))


class BlockByBlock(Published):
    """One block is filled before the next begins, without a count of steps where `is_free`."""

    def __init__(self, mask_id: int, *, is_free: bool) -> None:
        super().__init__(mask_id)
        self.is_free = is_free

    def is_done(self, canvas: Tensor, window: Window) -> bool:
        """Whether the block is full or its passes are used up.

        A free rule may choose places whose prediction is the mask token, and nothing else. Then
        the next pass would be the same again, in which the published code hangs.
        """
        is_full = not bool((canvas[window.start : window.end] == self.mask_id).any())
        return is_full or window.step >= window.max_steps or window.is_settled

    def places(self, canvas: Tensor, window: Window) -> Tensor:
        """The masked places of the block."""
        return masked(canvas, window, self.mask_id)

    def step(self, canvas: Tensor, window: Window, prediction: Prediction) -> Change:
        """See `Published`; notes a pass over the block that changes nothing."""
        change = super().step(canvas, window, prediction)
        is_same = bool((canvas[change.places] == change.tokens).all())
        window.is_settled = self.is_free and is_same and window.step > 0
        return change


class FastDLLM(BlockByBlock):
    """The best place and all above a threshold, by the factor rule, or by quota."""

    def __init__(self, settings: FastDLLMSettings) -> None:
        is_free = settings.threshold is not None or settings.factor is not None
        super().__init__(settings.mask_id, is_free=is_free)
        self.settings = settings

    def places(self, canvas: Tensor, window: Window) -> Tensor:
        """The masked places of the block; NVlabs takes earlier ones too where it sees them."""
        sees_all = self.settings.cache == "none" or window.step == 0
        if self.settings.variant == "nvlabs" and sees_all:
            return (canvas[: window.end] == self.mask_id).nonzero()[:, 0]
        return super().places(canvas, window)

    def predict(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Arg-max tokens and their probabilities in the published precision."""
        dtype = torch.float64 if self.settings.variant == "nvlabs" else torch.float32
        tokens = logits.argmax(dim=-1)
        return tokens, logits.to(dtype).softmax(dim=-1).gather(-1, tokens[:, None])[:, 0]

    def choose(self, confidence: Tensor, window: Window) -> Tensor:
        """See the class."""
        settings = self.settings
        if settings.factor is not None:
            return best(confidence, accepted(confidence, settings.factor))
        if settings.threshold is not None:
            return best_and_above(confidence, settings.threshold)
        return best(confidence, settings.quota(window.end - window.start)[window.step])


def best_and_above(confidence: Tensor, threshold: float) -> Tensor:
    """Indices of the best place and of all with at least this confidence."""
    return best(confidence, max(1, int((confidence >= threshold).sum())))


def accepted(confidence: Tensor, factor: float) -> int:
    """How many of the best places the factor rule takes; the best one always."""
    ranked = confidence.sort(descending=True).values
    rank = torch.arange(1, len(ranked) + 1, device=ranked.device, dtype=ranked.dtype)
    least = 1.0 - torch.tensor(factor, dtype=ranked.dtype, device=ranked.device) / (rank + 1.0)
    return max(1, int((ranked >= least).sum()))
