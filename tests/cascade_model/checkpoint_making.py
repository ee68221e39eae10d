"""Small checkpoints for tests, and ways to look at them."""

from pathlib import Path

import torch

from cascade_model.checkpoint import Checkpoint, Checkpoints, Keep, Saving, newest
from cascade_model.commit import Folder

X = torch.arange(6.0).reshape(2, 3)


def trained(seed: int = 0, steps: int = 2):
    """A tiny model and its AdamW with two groups, after a few steps."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for _ in range(steps):
        take_step(model, optimizer)
    return model, optimizer


def take_step(model, optimizer) -> None:
    """One step on fixed data."""
    optimizer.zero_grad()
    model(X).square().sum().backward()
    optimizer.step()


def allow() -> None:
    """A lease that is always held."""


def open_run(folder, keep=None, check=allow, tell=print, timeout=600.0) -> Checkpoints:
    """The checkpoints of a run, as a rank opens them."""
    return Checkpoints(Folder(folder), keep or Keep(last=99), check, tell, timeout=timeout)


def save(folder, step, seed=0, score=None, **options) -> Saving:
    """Save a small state as a step, and wait for it."""
    model, optimizer = trained(seed)
    facts = {"step": step, "samples": 8 * step, "model": {"num_layers": 2}}
    saving = open_run(folder, **options).save(model, optimizer, facts, score)
    saving.wait()
    return saving


def told_newest(folder) -> tuple[Checkpoint | None, list[str]]:
    """What a reader finds, and the lines it tells."""
    told: list[str] = []
    return newest(Folder(folder), told.append), told


def attempt(step_folder) -> Path:
    """The one attempt in a step's local folder."""
    [found] = [path for path in Path(step_folder).iterdir() if path.is_dir()]
    return found


def same_state(one, other) -> bool:
    """Whether two (model, optimiser) pairs have the same bits."""
    (a, a_adam), (b, b_adam) = one, other
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        held, other_held = a_adam.state[p], b_adam.state[q]
        if not torch.equal(p, q) or held.keys() != other_held.keys():
            return False
        if not all(torch.equal(held[key], other_held[key]) for key in held):
            return False
    return True
