"""What the published samplers share: they run through the one loop, with laws of their own.

Unlike the general strategy they may predict the mask token, run out of steps with masks left, or
commit nothing in a step. They exist to reproduce published results and are never a default.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from cascade_model.canvas import Change, Window
from cascade_model.contexts import BlockCausal, Context
from cascade_model.networks import Network
from cascade_model.passes import Prediction, Runner
from cascade_model.sampler import Strategy, denoise, drive


class Published(ABC):
    """Commits arg-max tokens at the places that `choose` takes, until a window's steps are over.

    A place is masked as long as it holds the mask token, whoever wrote that.
    """

    def __init__(self, mask_id: int) -> None:
        self.mask_id = mask_id

    def is_done(self, canvas: Tensor, window: Window) -> bool:
        """Whether the steps are used up; a full window stops where that changes nothing."""
        return window.step >= window.max_steps or len(self.places(canvas, window)) == 0

    def places(self, canvas: Tensor, window: Window) -> Tensor:
        """Every masked place before the window's end, int64 [m]."""
        return (canvas[: window.end] == self.mask_id).nonzero()[:, 0]

    def step(self, canvas: Tensor, window: Window, prediction: Prediction) -> Change:
        """Predict by arg-max, choose by confidence."""
        tokens, confidence = self.predict(prediction.logits)
        taken = self.choose(confidence, window)
        return Change(prediction.places[taken], tokens[taken])

    def predict(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int64 [m] and their confidences float [m]."""
        tokens = logits.argmax(dim=-1)
        return tokens, logits.softmax(dim=-1).gather(-1, tokens[:, None])[:, 0]

    @abstractmethod
    def choose(self, confidence: Tensor, window: Window) -> Tensor:
        """Indices of the places to commit, int64 [c]."""


def best(confidence: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest confidences, ties to the left."""
    return confidence.argsort(descending=True, stable=True)[:count]


def even_quota(count: int, steps: int) -> list[int]:
    """Every step floor(n/s), the first n mod s one more."""
    return [count // steps + (step < count % steps) for step in range(steps)]


def cut(start: int, end: int, size: int, steps: int) -> list[Window]:
    """Consecutive windows of `size` places, the last perhaps shorter."""
    edges = [*range(start, end, size), end]
    return [
        Window(number=number, start=first, end=last, keep=last, max_steps=steps)
        for number, (first, last) in enumerate(itertools.pairwise(edges))
    ]


def with_masks(prompt: list[int], masks: int, mask_id: int, model: Network) -> Tensor:
    """A canvas: prompt, then masks; int64 [L] on the model's device."""
    device = next(model.parameters()).device
    return torch.tensor([*prompt, *[mask_id] * masks], dtype=torch.int64, device=device)


def run(
    model: Network,
    canvas: Tensor,
    context: Context,
    windows: Iterable[Window],
    strategy: Strategy,
) -> list[int]:
    """Fill the canvas and return it."""
    for _ in drive(denoise(context, canvas, windows, strategy), Runner(model, len(canvas))):
        pass
    return canvas.tolist()


def whole_blocks(
    model: Network, prompt: list[int], gen_length: int, size: int, mask_id: int
) -> Tensor:
    """A canvas of ceil((prompt + gen_length) / size) blocks: the prompt, then masks."""
    length = -(-(len(prompt) + gen_length) // size) * size
    return with_masks(prompt, length - len(prompt), mask_id, model)


def block_causal(model: Network, size: int) -> BlockCausal:
    """The exact cache for blocks of this size, whatever the checkpoint's own."""
    config = replace(
        model.config,
        attention="block_causal",
        block_size=size,
        logits="aligned",
        clean_half="block_causal",
    )
    return BlockCausal(config)


def masked(canvas: Tensor, window: Window, mask_id: int) -> Tensor:
    """The masked places of the window, int64 [m]."""
    return window.start + (canvas[window.start : window.end] == mask_id).nonzero()[:, 0]


def above_or_best(confidence: Tensor, threshold: float, quota: int) -> Tensor:
    """Indices of all confidences strictly above the threshold, if they fill the quota; otherwise
    of the quota's number of highest ones."""
    above = (confidence > threshold).nonzero()[:, 0]
    return above if len(above) >= quota else best(confidence, quota)
