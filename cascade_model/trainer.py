"""The one training loop: pretraining, conversion and distillation differ by `loss_fn` only.

Plain Python: it runs alone, under `torchrun`, and in the workers of Ray Train alike. The state of
the data is one integer, the samples consumed; order and noise are functions of it, so a resumed
run takes the steps that the uninterrupted one would have taken.
"""

import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cascade_model import checkpoint, lease, parallel
from cascade_model.batch import TrainBatch
from cascade_model.checkpoint import Checkpoint, Checkpoints, Keep
from cascade_model.commit import Folder, replace_file
from cascade_model.config import ModelConfig, NoiseConfig, OptimizerConfig, TrainerConfig
from cascade_model.corpus import Batch, Corpus
from cascade_model.errors import InputError
from cascade_model.flex import flex_training
from cascade_model.loss import LossParts
from cascade_model.metrics import MetricsLog, Window, progress_line, speed
from cascade_model.networks import Network, build_network
from cascade_model.optim import learning_rate, make_optimizer, set_learning_rate
from cascade_model.settings import check, to_dict
from cascade_model.weights import Published, save_model

LossFn = Callable[[Network, TrainBatch], LossParts]
SUMMARY = "summary.json"


def tell(line: str) -> None:
    """One line for the person who watches; stderr, so that stdout stays the job's result."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


@dataclass(kw_only=True)
class Trainer:
    """What to train, on what, with which loss, and where to keep it.

    `model` holds the initial weights, equal on every rank. `objective` describes `loss_fn` and is
    compared on resume. `settings` is the job's resolved configuration, kept in each checkpoint.
    `owner` holds the run folder; without one, this process does while it trains. `published` is
    what the initial weights came from, passed on to `model/` for an export.
    """

    model: Network
    corpus: Corpus
    noise: NoiseConfig
    loss_fn: LossFn
    objective: dict[str, Any]
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    owner: lease.Owner | None = None
    published: Published | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def fit(self) -> dict[str, Any]:
        """Train to the end, from the newest complete checkpoint if there is one.

        Returns the run's summary (on every rank) and leaves `model/` and `summary.json` in the run
        folder; a run that is finished is left as it is. Raises `InputError` when the loss stops
        being finite or another run holds the folder, `LeaseLost` when another took it over,
        `CheckpointMismatch` when the folder's checkpoint belongs to another run.
        """
        parallel.join_group(self.device)
        self._local = sequences_per_rank(self.trainer, parallel.world_size())
        with contextlib.ExitStack() as held:
            self._attempt = parallel.on_first_rank(lambda: self._take_folder(held))
            found = self._found()
            finished = functools.partial(finished_summary, self.folder, found, self.trainer)
            return parallel.on_first_rank(finished) or self._run(found)

    def _take_folder(self, held: contextlib.ExitStack) -> lease.Attempt:
        folder = Folder(self.folder)
        owner = self.owner or held.enter_context(lease.hold(folder))
        return lease.begin(folder, owner)

    def _found(self) -> Checkpoint | None:
        """The checkpoint to go on from, of this very run."""
        self._checkpoints = Checkpoints(
            Folder(self.folder / "checkpoints"),
            Keep(last=self.trainer.keep_last),
            self._attempt.check,
            tell,
            attempt=self._attempt.number,
        )
        found = self._checkpoints.newest()
        if found is not None:
            checkpoint.require_same(found, self._facts())
        return found

    def _run(self, found: Checkpoint | None) -> dict[str, Any]:
        """The steps that are left."""
        self._shard()
        self._adam = make_optimizer(self.model, self.optimizer)
        step, samples, window = self._resume(found)
        log = MetricsLog(self.folder, step) if parallel.rank() == 0 else None
        total = self.trainer.num_steps * self.trainer.sequences_per_step
        with contextlib.closing(self._read_ahead(samples, total)) as self._batches:
            while samples < total:
                rate = self._step(step + 1, samples, total, window)
                step, samples = step + 1, samples + self.trainer.sequences_per_step
                if step % self.trainer.log_every == 0 or samples >= total:
                    self._log(log, window, rate, step, samples)
                    window = Window()
                if step % self.trainer.checkpoint_every == 0 or samples >= total:
                    self._save(step, samples, window)
        return self._finish(log, step, samples)

    def _read_ahead(self, samples: int, total: int) -> Generator[Batch, None, None]:
        """This rank's micro-batches from here to the end."""
        return self.corpus.batches(
            (span for first in self._steps(samples, total) for span in self._spans(first)),
            self.noise,
            depth=2 * -(-self._local // self.trainer.sequences_per_forward),
        )

    def _steps(self, samples: int, total: int) -> range:
        """The first sample of each step that is left."""
        return range(samples, total, self.trainer.sequences_per_step)

    def _spans(self, samples: int) -> Iterator[tuple[int, int]]:
        """First sample and size of each of this rank's micro-batches in a step."""
        first = samples + parallel.rank() * self._local
        for offset in range(0, self._local, self.trainer.sequences_per_forward):
            yield first + offset, min(self.trainer.sequences_per_forward, self._local - offset)

    def _shard(self) -> None:
        self.model.to(self.device)
        if self.trainer.attention == "flex":
            check(
                self.device.type == "cuda",
                "trainer.attention=flex needs a GPU; use trainer.attention=grouped",
            )
            self.model.training_attention = flex_training
        parallel.shard(self.model, self.model.layers, self.device)
        self.model.train()

    def _facts(self) -> dict[str, Any]:
        return facts_of(self.model.config, self.corpus, self.noise, self.objective, self.trainer)

    def _resume(self, found: Checkpoint | None) -> tuple[int, int, Window]:
        if found is None:
            return 0, 0, Window()
        checkpoint.load(found, self.model, self._adam)
        if parallel.rank() == 0:
            tell(f"resuming from {found.path} (step {found.step}, {found.samples} samples)")
        return found.step, found.samples, Window(**found.facts["window"])

    def _save(self, step: int, samples: int, window: Window) -> None:
        facts = self._facts() | {
            "step": step,
            "samples": samples,
            "world_size": parallel.world_size(),
            "settings": self.settings,
            "window": to_dict(window),
        }
        self._checkpoints.save(self.model, self._adam, facts)

    def _step(self, step: int, samples: int, total: int, window: Window) -> float:
        """One optimiser step over `sequences_per_step` samples of all ranks.

        The loss is the sum over all ranks' masked rows divided by the global number of maskable
        tokens. That number is known only after the last micro-batch, so the gradients are
        accumulated over a fixed scale and corrected once. FSDP averages over ranks, which the
        factor `world` undoes. Returns the learning rate.
        """
        length, world = self.corpus.sequence_length, parallel.world_size()
        scale = float(self.trainer.sequences_per_step * length)
        self._adam.zero_grad(set_to_none=True)
        started = time.perf_counter()
        sums, waited = self._accumulate(samples, world / scale)
        sums = parallel.sum_over_ranks(sums)
        loss_sum, count = float(sums[0]), float(sums[1])
        correction = scale / max(count, 1.0)
        norm = float(parallel.gradient_norm(self.model)) * correction
        if not (torch.isfinite(sums).all() and torch.isfinite(torch.tensor(norm))):
            self._stop(step, samples, loss_sum, norm)
        clip = min(1.0, self.optimizer.max_grad_norm / (norm + 1e-12))
        parallel.scale_gradients(self.model, correction * clip)
        tokens = samples + self.trainer.sequences_per_step
        rate = learning_rate(tokens * length, total * length, self.optimizer)
        set_learning_rate(self._adam, rate)
        self._adam.step()
        window.add(sums.tolist(), norm, waited, time.perf_counter() - started)
        return rate

    def _accumulate(self, samples: int, factor: float) -> tuple[torch.Tensor, float]:
        """Forward and backward of this rank's share.

        Returns float64 [2 + 2 bands]: loss sum, maskable tokens, then the loss sum and the row
        count of each mask-rate band; and the seconds spent waiting for data.
        """
        totals, waited = None, 0.0
        for _ in self._spans(samples):
            asked = time.perf_counter()
            batch = TrainBatch.from_numpy(next(self._batches), self.device)
            waited += time.perf_counter() - asked
            with self._precision():
                parts = self.loss_fn(self.model, batch)
            (parts.sum * factor).backward()
            sums = _vector(parts)
            totals = sums if totals is None else totals + sums
        assert totals is not None
        return totals, waited

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.trainer.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _stop(self, step: int, samples: int, loss_sum: float, norm: float) -> None:
        """Every rank holds the same sums, so all of them come here in the same step."""
        path = self.folder / f"not_finite_step_{step:08d}.json"
        parallel.on_first_rank(lambda: self._keep_evidence(path, step, samples, loss_sum, norm))
        raise InputError(
            f"the loss or its gradient is not finite at step {step} (sample ids in {path}); "
            f"lower optimizer.peak_lr={self.optimizer.peak_lr} and run again"
        )

    def _keep_evidence(
        self, path: Path, step: int, samples: int, loss_sum: float, norm: float
    ) -> None:
        rows = self.corpus.batch(samples, self.trainer.sequences_per_step, self.noise)
        record = {
            "step": step,
            "first_sample": samples,
            "num_samples": self.trainer.sequences_per_step,
            "sequence_ids": [int(i) for i in rows.sequence_ids],
            "loss_sum": repr(loss_sum),
            "grad_norm": repr(norm),
        }
        self._attempt.check()
        replace_file(path, _json(record))

    def _log(
        self, log: MetricsLog | None, window: Window, rate: float, step: int, samples: int
    ) -> None:
        length = self.corpus.sequence_length
        line = {"step": step, "samples": samples, "tokens": samples * length}
        line |= {"lr": rate, **window.means(self.trainer.sequences_per_step * length)}
        parallel.on_first_rank(lambda: self._write_line(log, line))

    def _write_line(self, log: MetricsLog | None, line: dict[str, Any]) -> None:
        assert log is not None
        self._attempt.check()
        log.write(line)
        tell(progress_line(line))

    def _finish(self, log: MetricsLog | None, step: int, samples: int) -> dict[str, Any]:
        """Export the whole weights as a model folder and write the summary."""
        self._checkpoints.finish()
        state = parallel.full_state(self.model)
        export = functools.partial(self._export, log, state, step, samples)
        return parallel.on_first_rank(export)

    def _export(
        self, log: MetricsLog | None, state: dict[str, torch.Tensor], step: int, samples: int
    ) -> dict[str, Any]:
        assert log is not None
        self._attempt.check()
        lines = log.close()
        seconds, tokens_per_second = speed(lines)
        summary = {
            "run": str(self.folder),
            "model": str(self.folder / "model"),
            "steps": step,
            "samples": samples,
            "tokens": samples * self.corpus.sequence_length,
            "seconds": seconds,
            "tokens_per_second": tokens_per_second,
            "world_size": parallel.world_size(),
            "first_loss": lines[0]["loss"] if lines else None,
            "last_loss": lines[-1]["loss"] if lines else None,
        }
        whole = build_network(self.model.config)
        whole.load_state_dict(state)
        save_model(self.folder / "model", whole, self.corpus.tokenizer(), self.published)
        replace_file(self.folder / SUMMARY, _json(summary))
        return summary


def facts_of(
    model: ModelConfig,
    corpus: Corpus,
    noise: NoiseConfig,
    objective: dict[str, Any],
    trainer: TrainerConfig,
) -> dict[str, Any]:
    """What a checkpoint must share with the run that goes on from it."""
    return {
        "model": to_dict(model),
        "corpus_digest": corpus.digest,
        "noise": to_dict(noise),
        "objective": objective,
        "sequences_per_step": trainer.sequences_per_step,
    }


def finished_summary(
    folder: Path, found: Checkpoint | None, trainer: TrainerConfig
) -> dict[str, Any] | None:
    """The summary of a run that has taken all its steps and said so; none if something is left."""
    total = trainer.num_steps * trainer.sequences_per_step
    if found is None or found.samples < total or not (folder / "model").is_dir():
        return None
    try:
        summary = json.loads((folder / SUMMARY).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return summary if summary.get("steps") == found.step else None


def sequences_per_rank(config: TrainerConfig, world_size: int) -> int:
    """Each rank's share of a step; the global batch does not depend on the number of ranks."""
    if config.sequences_per_step % world_size:
        raise InputError(
            f"trainer.sequences_per_step={config.sequences_per_step} cannot be shared by "
            f"num_workers={world_size}; use a multiple of {world_size}"
        )
    return config.sequences_per_step // world_size


def _vector(parts: LossParts) -> torch.Tensor:
    """The detached sums of one forward pass, float64 [2 + 2 bands]."""
    head = torch.stack(
        [parts.sum.detach().double(), parts.sum.new_tensor(float(parts.count)).double()]
    )
    return torch.cat([head, parts.band_sums.double(), parts.band_counts.double()])


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
