"""How many of a block's masks may be left after each step.

A schedule maps (masks at the beginning n, steps made k, steps in all T) to the masks left, falling
from n at k = 0 to 0 at k = T. Sources: even is LLaDA's published code (ML-GSAI/LLaDA
`generate.py`: 32 masks in 5 steps go 7, 7, 6, 6, 6), linear the cumulative floor of its paper's
Algorithm 5 (6, 6, 7, 6, 7); cosine is MaskGIT's and exponential follows it (google-research/maskgit
`mask_schedule.py`).
"""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

Schedule = Callable[[int, int, int], int]


def even(masks: int, made: int, steps: int) -> int:
    """Equal shares; the first n mod T steps take one more."""
    share, extra = divmod(masks, steps)
    return masks - made * share - min(made, extra)


def linear(masks: int, made: int, steps: int) -> int:
    """Committed are floor(n k / T)."""
    return masks - math.floor(Fraction(masks * made, steps))


def cosine(masks: int, made: int, steps: int) -> int:
    """Left are floor(n cos(pi/2 k/T)): few commits early, many late."""
    return 0 if made >= steps else math.floor(masks * math.cos(math.pi / 2 * made / steps))


def exponential(masks: int, made: int, steps: int) -> int:
    """Left are floor(n (n - n^(k/T)) / (n - 1)): fewer still early, growing by a constant factor.

    MaskGIT's n (1 - n^(k/T - 1)), stretched so that nothing is committed before the first step.
    """
    if made >= steps:
        return 0
    if masks == 1:
        return 1
    return math.floor(masks * (masks - masks ** (made / steps)) / (masks - 1))


SCHEDULES: dict[str, Schedule] = {
    "even": even,
    "linear": linear,
    "cosine": cosine,
    "exponential": exponential,
}


def masks_left(schedule: str, masks: int, made: int, steps: int) -> int:
    """The schedule's value, with at least one position committed a step."""
    return max(0, min(SCHEDULES[schedule](masks, min(made, steps), steps), masks - made))


def counts(schedule: str, masks: int, steps: int) -> list[int]:
    """Positions committed by each step, `steps` numbers that add up to `masks`."""
    left = [masks_left(schedule, masks, made, steps) for made in range(steps + 1)]
    return [before - after for before, after in itertools.pairwise(left)]
