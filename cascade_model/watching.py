"""What each denoising step wrote, for those who watch a block become text.

A completion is told block by block; a step is told of besides, and what is decoded does not depend
on whether anybody listens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from cascade_model.canvas import Change, Window


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoisedStep:
    """What one denoising step wrote in a block; the block itself follows its last step.

    Step 0 tells that the block was opened: all of it is masks. A block that another engine begins
    again, behind the same finished blocks, has the same steps.
    """

    offset: int
    """Tokens of the completion before the block."""
    length: int
    """Tokens that the block can add."""
    step: int
    """Steps made in this block."""
    places: list[int]
    """Where it wrote, counted from the block's first new token, rising."""
    tokens: list[int | None]
    """What it wrote there; none: the place was masked again."""
    confidences: list[float | None]
    """Probability of each token in the prediction that it was written from, before temperature,
    top-k and top-p."""


Watcher = Callable[[DenoisedStep], None]


def step_of(
    window: Window, change: Change | None, is_given: list[bool], mask_id: int
) -> DenoisedStep:
    """The step that a window has just made, or its opening (no change).

    `is_given` tells which places of the canvas the request gave: they are no part of the
    completion. The window holds the log-probabilities of what it was written with.
    """
    new = [place for place in range(window.start, window.keep) if not is_given[place]]
    written: dict[int, int] = {}
    if change is not None:
        written = dict(zip(change.places.tolist(), change.tokens.tolist(), strict=True))
    kept = [(index, place) for index, place in enumerate(new) if place in written]
    tokens = {place: written[place] for _, place in kept if written[place] != mask_id}
    sure = {place: math.exp(window.logprobs[place].logprob) for place in tokens}
    return DenoisedStep(
        offset=is_given[: window.start].count(False),
        length=len(new),
        step=window.step,
        places=[index for index, _ in kept],
        tokens=[tokens.get(place) for _, place in kept],
        confidences=[sure.get(place) for _, place in kept],
    )
