"""Comparing with the published results, in the tolerances that their README gives."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LOGITS = 1e-3
LOSSES = 1e-4


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a case came to."""

    problem: str = ""
    """Empty: passed."""
    logit_error: float | None = None


def compare_logits(
    found: Tensor, expected: Tensor, is_real: Tensor | None = None, tolerance: float = LOGITS
) -> Verdict:
    """Logits [n, L, vocabulary] where `is_real` bool [n, L]; surplus columns of ours are the mask
    token that an autoregressive checkpoint has not."""
    found = found[..., : expected.shape[-1]]
    if found.shape != expected.shape:
        return Verdict(f"logits are {list(found.shape)}, expected {list(expected.shape)}")
    difference = (found - expected).abs()
    error = float((difference if is_real is None else difference[is_real]).max())
    is_close = error <= tolerance  # false for NaN too
    return Verdict("" if is_close else f"logits are off by {error:.2e}", error)


def compare_losses(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Verdict:
    """Losses by name."""
    problems = [_loss_problem(name, found[name], value) for name, value in expected.items()]
    return Verdict("; ".join(filter(None, problems)))


def compare_tokens(found: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> Verdict:
    """Rows of token ids, complete."""
    if len(found) != len(expected):
        return Verdict(f"{len(found)} rows, expected {len(expected)}")
    problems = (_row_problem(*rows) for rows in zip(found, expected, strict=True))
    named = [f"row {number} {problem}" for number, problem in enumerate(problems) if problem]
    return Verdict("; ".join(named))


def _loss_problem(name: str, found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape:
        return f"{name} is {list(found.shape)}, expected {list(expected.shape)}"
    # A single token may cost next to nothing, where a relative tolerance means nothing.
    if torch.allclose(found, expected, rtol=LOSSES, atol=LOSSES if expected.dim() else 0.0):
        return ""
    return f"{name} is off by {float((found - expected).abs().max()):.2e}"


def _row_problem(found: Sequence[int], expected: Sequence[int]) -> str:
    if list(found) == list(expected):
        return ""
    pairs = enumerate(zip(found, expected, strict=False))
    place = next((i for i, (ours, theirs) in pairs if ours != theirs), None)
    if place is None:
        return f"has {len(found)} tokens, expected {len(expected)}"
    return f"has {found[place]} at place {place}, expected {expected[place]}"
