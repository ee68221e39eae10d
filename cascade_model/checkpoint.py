"""Checkpoints that are either whole or not there.

    checkpoints/step_00000100/
        state/          weights and AdamW moments, written by all ranks (torch DCP, reshardable)
        config.json     facts: step, samples consumed, model, corpus digest, noise, settings
        manifest.json   size and SHA-256 of every file above
        COMMIT          SHA-256 of the manifest; written last

A checkpoint is written and brought to disk under a temporary name, COMMIT at the end; the rename to
its own name makes it whole at once. DCP's own index is a pickle, so every hash is verified before
DCP opens anything.
"""

import contextlib
import hashlib
import json
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.optim import Optimizer

from cascade_model import parallel
from cascade_model.commit import fsync, sha256_of
from cascade_model.errors import CheckpointMismatch

FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A verified checkpoint: where it lies and the facts in its config.json."""

    path: Path
    facts: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return self.facts["step"]

    @property
    def samples(self) -> int:
        """Samples consumed: the whole data position."""
        return self.facts["samples"]


def save(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    facts: dict[str, Any],
    keep_last: int,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint of all ranks and commit it; every rank must call this.

    `facts` holds at least `step` and `samples` and must be JSON. `check` raises where this process
    may no longer write here: it is asked on the first rank before anything is written, and again
    before the checkpoint gets its name. Returns the checkpoint's folder.
    """
    target = folder / f"step_{facts['step']:08d}"
    work = parallel.on_first_rank(lambda: _make_work(target, check))
    with _quiet():
        dcp_save(
            _state(model, optimizer),
            checkpoint_id=work / "state",
            no_dist=not dist.is_initialized(),
        )
    parallel.barrier()
    parallel.on_first_rank(lambda: _seal(work, target, facts, keep_last, check))
    return target


def newest(folder: Path, tell: Callable[[str], None]) -> Checkpoint | None:
    """The newest complete checkpoint; damaged ones are told and passed over."""
    for path in reversed(_folders(folder)):
        try:
            return verify(path)
        except CheckpointMismatch as error:
            tell(f"{error}; falling back to the checkpoint before it")
    return None


def newest_on_all_ranks(folder: Path, tell: Callable[[str], None]) -> Checkpoint | None:
    """`newest`, decided by the first rank for all; leftovers of dead writers are removed.

    Only for the holder of the run folder: another writer's work would count as a leftover.
    """

    def tidy_and_find() -> Checkpoint | None:
        for leftover in folder.glob("step_*.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        return newest(folder, tell)

    return parallel.on_first_rank(tidy_and_find)


def verify(path: Path) -> Checkpoint:
    """Check COMMIT, the manifest and the hash of every file; nothing is unpickled.

    Raises `CheckpointMismatch` naming the file, what was recorded and what was found.
    """
    if not (path / "COMMIT").is_file():
        raise CheckpointMismatch(
            f"checkpoint {path} has no COMMIT, so its writing never finished; choose another step"
        )
    commit, manifest_bytes = _json(path / "COMMIT"), _bytes(path / "manifest.json")
    _compare(
        path / "manifest.json",
        commit.get("manifest_sha256"),
        hashlib.sha256(manifest_bytes).hexdigest(),
    )
    recorded = _json(path / "manifest.json").get("files", {})
    found = _file_names(path)
    if set(recorded) != found:
        different = sorted(set(recorded) ^ found)
        raise CheckpointMismatch(
            f"checkpoint {path} should hold {len(recorded)} files and holds {len(found)}; "
            f"missing or surplus: {different[:5]}; restore it or choose another step"
        )
    for name, entry in sorted(recorded.items()):
        _compare(path / name, entry["sha256"], _sha256(path / name))
    facts = _json(path / "config.json")
    if facts.get("format") != FORMAT:
        raise CheckpointMismatch(
            f"checkpoint {path} has format {facts.get('format')} and this program reads {FORMAT}; "
            "use the version that wrote it"
        )
    return Checkpoint(path=path, facts=facts)


def load(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer) -> None:
    """Put a verified checkpoint into a model and its optimiser, in place, on any number of ranks.

    Every rank must call this, with the model already sharded.
    """
    state = _state(model, optimizer)
    with _quiet():
        dcp_load(state, checkpoint_id=checkpoint.path / "state", no_dist=not dist.is_initialized())
    adam_step = state["adam_step"]
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            "step": adam_step.clone(),
            "exp_avg": state["exp_avg"][name],
            "exp_avg_sq": state["exp_avg_sq"][name],
        }


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Only the weights, in this process alone, without any process group."""
    state = {"model": _weights(model)}
    with _quiet():
        dcp_load(state, checkpoint_id=checkpoint.path / "state", no_dist=True)


def require_same(checkpoint: Checkpoint, expected: dict[str, Any]) -> None:
    """Refuse to resume when a fact differs; the sentence shows both values.

    Raises `CheckpointMismatch` for the first differing fact, nested settings by their full name.
    """
    for name, want in expected.items():
        have = checkpoint.facts.get(name)
        if have == want:
            continue
        if isinstance(have, dict) and isinstance(want, dict):
            key = next(k for k in sorted({*have, *want}) if have.get(k) != want.get(k))
            name, have, want = f"{name}.{key}", have.get(key), want.get(key)
        raise CheckpointMismatch(
            f"checkpoint {checkpoint.path} was made with {name}={have!r} and this run has "
            f"{name}={want!r}; set it back or choose a new output folder"
        )


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Named parameters, a tied one once; the tensors share memory with the model."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Tensors only, so that nothing but tensor shards is in the files that DCP writes."""
    state: dict[str, Any] = {"model": _weights(model), "exp_avg": {}, "exp_avg_sq": {}}
    state["adam_step"] = torch.zeros((), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        moments = optimizer.state.get(parameter, {})
        for key in ("exp_avg", "exp_avg_sq"):
            state[key][name] = moments[key] if moments else torch.zeros_like(parameter).detach()
        if moments:
            state["adam_step"] = moments["step"].detach().cpu()
    return state


def _make_work(target: Path, check: Callable[[], None]) -> Path:
    """A folder that only this save knows."""
    check()
    work = target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")
    work.mkdir(parents=True)
    return work


def _seal(
    work: Path, target: Path, facts: dict[str, Any], keep_last: int, check: Callable[[], None]
) -> None:
    """Facts, manifest, COMMIT, rename: in this order, each on disk before the next."""
    _write(work / "config.json", {"format": FORMAT, **facts})
    files = {
        name: {"bytes": (work / name).stat().st_size, "sha256": _sha256(work / name)}
        for name in sorted(_file_names(work))
    }
    for name in files:
        fsync(work / name)
    _write(work / "manifest.json", {"files": files})
    digest = _sha256(work / "manifest.json")
    _write(work / "COMMIT", {"step": facts["step"], "manifest_sha256": digest})
    fsync(work / "state")
    fsync(work)
    try:
        check()
    except Exception:
        shutil.rmtree(work, ignore_errors=True)
        raise
    if target.exists():
        _discard(target)
    work.rename(target)
    fsync(target.parent)
    _retain(target, keep_last)


def _retain(target: Path, keep_last: int) -> None:
    """Of the checkpoints before `target`, keep the newest committed ones that have room beside it.

    One after it is damaged, or the run would have gone on from there; its step will replace it.
    """
    before = [path for path in _folders(target.parent) if _step(path) < _step(target)]
    committed = [path for path in before if (path / "COMMIT").is_file()]
    kept = committed[max(0, len(committed) - keep_last + 1) :]
    for path in before:
        if path not in kept:
            _discard(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's warning that one process saves alone, which is what was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _discard(path: Path) -> None:
    """Remove a checkpoint so that a half-removed one is never taken for complete."""
    (path / "COMMIT").unlink(missing_ok=True)
    shutil.rmtree(path)


def _folders(folder: Path) -> list[Path]:
    """Checkpoints under their final names, oldest first, complete or not."""
    return sorted((p for p in folder.glob("step_*") if _NAME.match(p.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _file_names(path: Path) -> set[str]:
    """What the manifest vouches for: every file but the manifest and COMMIT themselves."""
    names = {str(p.relative_to(path)) for p in path.rglob("*") if not p.is_dir()}
    return names - {"manifest.json", "COMMIT"}


def _compare(path: Path, recorded: str | None, found: str) -> None:
    if recorded != found:
        raise CheckpointMismatch(
            f"checkpoint file {path} is damaged: sha256 recorded {recorded}, found {found}; "
            "restore it or choose another step"
        )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return sha256_of(file)
    except OSError as error:
        raise CheckpointMismatch(
            f"checkpoint file {path} cannot be read ({error.strerror}); choose another step"
        ) from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointMismatch(
            f"checkpoint file {path} cannot be read ({error.strerror}); choose another step"
        ) from None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_bytes(path))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise CheckpointMismatch(f"checkpoint file {path} is not JSON; choose another step")
    return value


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    fsync(path)
