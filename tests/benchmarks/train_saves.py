"""How long a save holds training up, beside a bare copy of the same state.

The state is that of AdamW after a step: weights and both moments, of the 135M shape. Both copies go
into buffers that were there before, so neither pays for fresh memory; the first save, which does,
is a row of its own. Saves are waited for in between, so that none waits for the one before it.
"""

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from cascade_model.checkpoint import Checkpoints, Keep
from cascade_model.checkpoint_state import state_of
from cascade_model.commit import Folder
from cascade_model.config import OptimizerConfig
from cascade_model.optim import make_optimizer
from tests.benchmarks.report import Row
from tests.benchmarks.train_arms import SMALL, SMOLLM2, corpus_of, model_of

BAR = 1.5


def save_rows(folder: Path, rounds: int) -> Iterator[Row]:
    """The 135M shape with the bar, the small one beside it."""
    yield from _rows(folder / "large", SMOLLM2, "135M", rounds, BAR)
    yield from _rows(folder / "small", SMALL, "d 256", rounds, None)


def _rows(folder: Path, shape: dict, name: str, rounds: int, bar: float | None) -> Iterator[Row]:
    model = model_of(corpus_of(folder / "corpus", 64, sequences=8), shape)
    optimizer = make_optimizer(model, OptimizerConfig())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    state = state_of(model, optimizer)
    copies = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    folder_of_run = Folder(folder / "checkpoints")
    checkpoints = Checkpoints(folder_of_run, Keep(last=1), lambda: None, lambda line: None)
    first, _ = _blocked(checkpoints, model, optimizer, 1)
    blocked, whole, copied = [], [], []
    for step in range(2, 2 + 2 * rounds):
        copied.append(_copy(state, copies))
        held, total = _blocked(checkpoints, model, optimizer, step)
        blocked.append(held)
        whole.append(total)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    ratio = statistics.median(a / b for a, b in zip(blocked, copied, strict=True))
    yield Row(f"save, {name}, {size / 2**20:,.0f} MiB: blocked / memcpy", ratio, "x", bar, True)
    yield Row(f"save, {name}: training blocked", 1e3 * statistics.median(blocked), "ms")
    yield Row(f"save, {name}: memcpy of the state", 1e3 * statistics.median(copied), "ms")
    yield Row(f"save, {name}: the first, into fresh memory", 1e3 * first, "ms")
    yield Row(f"save, {name}: until COMMIT", 1e3 * statistics.median(whole), "ms")


def _blocked(
    checkpoints: Checkpoints, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> tuple[float, float]:
    """Seconds until a save gave training back, and until it was committed."""
    began = time.perf_counter()
    saving = checkpoints.save(model, optimizer, {"step": step, "samples": step})
    held = time.perf_counter() - began
    if not saving.wait():
        raise RuntimeError(f"the save failed: {saving.reason}")
    return held, time.perf_counter() - began


def _copy(state: dict[str, torch.Tensor], copies: dict[str, torch.Tensor]) -> float:
    """Seconds of a bare copy, with as many threads as the save has."""
    began = time.perf_counter()
    with torch.no_grad():
        for name, tensor in state.items():
            copies[name].copy_(tensor)
    return time.perf_counter() - began
