"""LLaDA2.1's samplers: its model's own, and dllm's; arXiv 2602.08676. LLaDA2.0 with editing.

Tokens of the current block are rewritten when another is likelier than a threshold, and a full
block is read again until nothing changes. The published code has no bound while masks are left (a
mask may be predicted, and a token edited into one): where a state of the block comes back it would
run forever, and here the block ends as it is.
"""

from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

import torch
from torch import Tensor

from cascade_model.canvas import Change, Window
from cascade_model.model import Transformer
from cascade_model.passes import Prediction
from cascade_model.presets.llada2 import check_common, has_token, until_end
from cascade_model.presets.published import (
    Published,
    above_or_best,
    block_causal,
    cut,
    run,
    whole_blocks,
)
from cascade_model.settings import check


@dataclass(frozen=True, kw_only=True, slots=True)
class LLaDA21Settings:
    """The arguments of the published functions."""

    variant: Literal["official", "dllm"] = "official"
    """official returns the completion up to its end, dllm the whole canvas."""
    gen_length: int = 2048
    block_length: int = 32
    threshold: float = 0.95
    """Commit what is above it, where that is no less than `num_to_transfer`."""
    num_to_transfer: int = 1
    editing_threshold: float = 0.9
    """Rewrite a token where another one's probability is above it."""
    max_post_steps: int = 16
    """Passes over a full block, at most."""
    eos_early_stop: bool = False
    """Stop with the block that holds an end of text."""
    steps: int | None = None
    """Read and not used by the published code, as `minimal_topk`."""
    minimal_topk: int = 1
    temperature: float = 0.0
    mask_id: int = 156895
    eos_id: int = 156892

    def __post_init__(self) -> None:
        check_common(self.variant, self.temperature)
        for name in ("gen_length", "block_length", "num_to_transfer"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        check(
            self.max_post_steps >= 0,
            f"max_post_steps={self.max_post_steps} must not be negative; use 0 for none",
        )


def llada21(model: Transformer, prompt: list[int], settings: LLaDA21Settings) -> list[int]:
    """The completion up to its end (official), or the whole canvas (dllm)."""
    size, start = settings.block_length, len(prompt)
    canvas = whole_blocks(model, prompt, settings.gen_length, size, settings.mask_id)
    windows = cut(start // size * size, len(canvas), size, size)

    def is_open(window: Window) -> bool:
        done = canvas[start : max(start, window.start)]
        is_full = not has_token(done, settings.mask_id)
        return not (settings.eos_early_stop and is_full and has_token(done, settings.eos_id))

    going, strategy = takewhile(is_open, windows), Editing(settings, start)
    tokens = run(model, canvas, block_causal(model, size), going, strategy)
    if settings.variant == "dllm":
        return tokens
    return until_end(tokens[start:][: settings.gen_length], settings.eos_id)


class Editing(Published):
    """Each step fills masks, and rewrites whatever it wrote before in the block."""

    def __init__(self, settings: LLaDA21Settings, start: int) -> None:
        super().__init__(settings.mask_id)
        self.settings, self.start = settings, start
        self._seen: set[tuple[int, ...]] = set()

    def is_done(self, canvas: Tensor, window: Window) -> bool:
        """Whether a full block settled or was read often enough, or goes round in circles."""
        is_full = not has_token(canvas[window.start : window.end], self.mask_id)
        is_read = is_full and window.post_steps >= self.settings.max_post_steps
        return window.is_settled or is_read

    def places(self, canvas: Tensor, window: Window) -> Tensor:
        """The masks and all that is not the prompt's, int64 [m]."""
        place = torch.arange(window.start, window.end, device=canvas.device)
        return place[(place >= self.start) | (canvas[place] == self.mask_id)]

    def step(self, canvas: Tensor, window: Window, prediction: Prediction) -> Change:
        """Fill and rewrite, from the same predictions."""
        settings, places = self.settings, prediction.places
        tokens, confidence = self.predict(prediction.logits)
        is_masked = canvas[places] == self.mask_id
        is_full = not bool(is_masked.any())
        is_edited = ~is_masked & (tokens != canvas[places])
        is_edited &= confidence > settings.editing_threshold
        window.post_steps += int(is_full)
        is_stable = is_full and not bool(is_edited.any())
        window.is_settled = is_stable or self._is_back(canvas, window)
        open_places = is_masked.nonzero()[:, 0]
        filled = open_places[self.choose(confidence[open_places], window)]
        taken = torch.cat([filled, is_edited.nonzero()[:, 0]])
        return Change(places[taken], tokens[taken])

    def choose(self, confidence: Tensor, window: Window) -> Tensor:
        """Of the masks: all above the threshold, or the least number of best ones."""
        return above_or_best(confidence, self.settings.threshold, self.settings.num_to_transfer)

    def _is_back(self, canvas: Tensor, window: Window) -> bool:
        """Whether the block was in this state before."""
        block = canvas[window.start : window.end].tolist()
        state = (window.number, window.post_steps, *block)
        is_back = state in self._seen
        self._seen.add(state)
        return is_back
