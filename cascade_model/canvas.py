"""The text being written: known tokens and masks, filled window by window from the left."""

from dataclasses import dataclass, field

from torch import Tensor

from cascade_model.text_stream import TokenLogprob


@dataclass(slots=True, kw_only=True)
class Window:
    """The places start..end-1 that are denoised together: a block."""

    number: int
    """Counted from the canvas's first block: a key of the randomness."""
    start: int
    end: int
    keep: int
    """End of the places that will be kept; a last block is filled whole where that is the law."""
    max_steps: int
    """K_b at most: by then everything is filled."""
    budget: int | None = None
    """Steps after which a full window is revised no more; none: as many as the strategy likes."""
    step: int = 0
    """Steps made."""
    num_masked: int = 0
    """Masks when the window was opened."""
    post_steps: int = 0
    """Passes made after the window was full, to revise it."""
    is_settled: bool = False
    """Whether the last such pass changed nothing."""
    revised: set[int] = field(default_factory=set)
    """Places that were masked again."""
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)
    """By place, of what was last written there; filled where it is asked for."""
    margin: float = 1.0
    """The narrowest decision so far (`decisions`), at most 1; kept where it is asked for."""

    @property
    def is_last_step(self) -> bool:
        """Whether everything must be filled by the step to come."""
        return self.step + 1 >= self.max_steps

    @property
    def is_spent(self) -> bool:
        """Whether its budget is used up."""
        return self.budget is not None and self.step >= self.budget


@dataclass(frozen=True, slots=True)
class Change:
    """What a step writes: tokens int64 [c] (the mask token to mask again) at places int64 [c]."""

    places: Tensor
    tokens: Tensor
