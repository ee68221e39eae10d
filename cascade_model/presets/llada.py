"""LLaDA's sampler (ML-GSAI/LLaDA `generate.py`; arXiv 2502.09992, Algorithms 4 and 5).

Despite the name "low-confidence remasking" nothing committed is ever masked again: what is
"remasked" are predictions that were not committed.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cascade_model.canvas import Window
from cascade_model.contexts import Bidirectional, Context, Guided
from cascade_model.networks import Network
from cascade_model.presets.published import Published, best, cut, even_quota, run, with_masks
from cascade_model.settings import check


@dataclass(frozen=True, kw_only=True, slots=True)
class LLaDASettings:
    """The arguments of the published function."""

    steps: int = 128
    """In all; divided evenly over the blocks."""
    gen_length: int = 128
    block_length: int = 128
    cfg_scale: float = 0.0
    remasking: Literal["low_confidence"] = "low_confidence"
    logits_eos_inf: bool = False
    """EOS is never predicted."""
    confidence_eos_eot_inf: bool = False
    """EOS and end-of-turn are predicted, but with confidence 0: committed last."""
    mask_id: int = 126336
    eos_id: int = 126081
    eot_id: int = 126348

    def __post_init__(self) -> None:
        check(
            self.gen_length % self.block_length == 0,
            f"block_length={self.block_length} does not divide gen_length={self.gen_length}; "
            "use a divisor",
        )
        blocks = self.gen_length // self.block_length
        check(
            self.steps % blocks == 0,
            f"steps={self.steps} is no multiple of the {blocks} blocks; use one",
        )


def llada(model: Network, prompt: list[int], settings: LLaDASettings) -> list[int]:
    """The whole canvas after decoding: prompt and completion."""
    canvas = with_masks(prompt, settings.gen_length, settings.mask_id, model)
    blocks = settings.gen_length // settings.block_length
    windows = cut(len(prompt), len(canvas), settings.block_length, settings.steps // blocks)
    context = bidirectional(model, canvas, settings.cfg_scale, settings.mask_id)
    return run(model, canvas, context, windows, LowConfidence(settings))


def bidirectional(model: Network, canvas: Tensor, cfg_scale: float, mask_id: int) -> Context:
    """The whole canvas in every pass, guided where a scale is given."""
    if cfg_scale == 0:
        return Bidirectional(model.config)
    return Guided(
        Bidirectional(model.config),
        Bidirectional(model.config, stream=1),
        scale=cfg_scale,
        is_given=canvas != mask_id,
        mask_id=mask_id,
    )


class LowConfidence(Published):
    """Each step commits its quota of the most confident places before the block's end."""

    def __init__(self, settings: LLaDASettings) -> None:
        super().__init__(settings.mask_id)
        self.settings = settings

    def predict(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Arg-max tokens; confidences in float64, with the published ways to hold EOS back."""
        settings = self.settings
        if settings.logits_eos_inf:
            logits = _without(logits, settings.eos_id)
        tokens = logits.argmax(dim=-1)
        if settings.confidence_eos_eot_inf:
            logits = _without(logits, settings.eos_id, settings.eot_id)
        shares = logits.double().softmax(dim=-1)
        return tokens, shares.gather(-1, tokens[:, None])[:, 0]

    def choose(self, confidence: Tensor, window: Window) -> Tensor:
        """The quota of this step, fixed from the block's length."""
        size = window.end - window.start
        return best(confidence, even_quota(size, window.max_steps)[window.step])


def _without(logits: Tensor, *tokens: int) -> Tensor:
    index = torch.tensor(tokens, device=logits.device)
    return logits.index_fill(-1, index, float("-inf"))
