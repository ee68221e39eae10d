"""dllm's rounded schedule (ZHZisZZ/dllm `get_num_transfer_tokens` with its alpha schedulers).

Step j commits its expected share of what is left, rounded; so the counts follow the curve only
roughly, and steps that would commit nothing are left out. LLaDA's schedule is `even_quota`.
"""

import functools
import itertools
import math

import torch
from torch import Tensor

from cascade_model.settings import check

SCHEDULERS = ("linear", "cosine")


def transfer_counts(masks: int, steps: int, scheduler: str) -> list[int]:
    """How many of `masks` places each step commits; zeros removed, so perhaps fewer than `steps`.

    Raises `InputError` for an unknown scheduler and for less than one step.
    """
    check(
        scheduler in SCHEDULERS,
        f"scheduler={scheduler} is unknown; use {' or '.join(SCHEDULERS)}",
    )
    check(steps >= 1, f"steps={steps} must be at least 1")
    return list(_counts(masks, steps, scheduler))


@functools.lru_cache(maxsize=1024)
def _counts(masks: int, steps: int, scheduler: str) -> tuple[int, ...]:
    shares = [_masked(j / steps, scheduler) for j in range(steps, -1, -1)]
    counts, left = [], masks
    for now, then in itertools.pairwise(shares):
        stays = (then / now).item()
        counts.append(min(left, round(left * (1 - stays))))
        left -= counts[-1]
    return tuple(count for count in counts if count)


def _masked(time: float, scheduler: str) -> Tensor:
    """The share 1 - a(t) of masked places at a time in 0..1, in float32 as published."""
    t = torch.tensor(time, dtype=torch.float32)
    alpha = 1 - t if scheduler == "linear" else 1 - torch.cos(math.pi / 2 * (1 - t))
    return 1 - alpha
