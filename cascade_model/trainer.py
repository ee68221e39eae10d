"""The one training loop: pretraining, conversion and distillation differ by `loss_fn` only.

Plain Python: it runs alone, under `torchrun`, and in the workers of Ray Train alike. The state of
the data is one integer, the samples consumed; order and noise are functions of it, so a resumed
run takes the steps that the uninterrupted one would have taken.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from cascade_model import lease, not_finite, parallel, sharding
from cascade_model.batch import TrainBatch
from cascade_model.checkpoint import Checkpoint, Checkpoints, Keep, Saving, require_same
from cascade_model.commit import Folder
from cascade_model.config import NoiseConfig
from cascade_model.corpus import Batch, Corpus
from cascade_model.errors import Stopped
from cascade_model.feed import feed, nothing_else, spans
from cascade_model.flops import device_peak
from cascade_model.metrics import MetricsLog
from cascade_model.networks import Network, network_with
from cascade_model.objective import LossParts
from cascade_model.optim import learning_rate, make_optimizer, set_learning_rate
from cascade_model.phases import noise_at, require_phases
from cascade_model.progress import (
    NOTHING_BESIDE,
    Beside,
    Progress,
    line_of,
    model_at,
    sums_of,
    work_of,
)
from cascade_model.run_record import MODEL, facts_of, finished_summary, write_summary
from cascade_model.settings import to_dict
from cascade_model.status_line import tell
from cascade_model.stopping import signals_noted
from cascade_model.training_config import OptimizerConfig, TrainerConfig
from cascade_model.weights import Published, save_model
from cascade_model.window import HeldOut, Window, told_of

LossFn = Callable[[Network, TrainBatch], LossParts]


@dataclass(kw_only=True)
class Trainer:
    """What to train, on what, with which loss, and where to keep it.

    `model` holds the initial weights, equal on every rank. `objective` describes `loss_fn` and is
    compared on resume. `settings` is the job's resolved configuration, kept in each checkpoint.
    `owner` holds the run folder; without one, this process does while it trains. `published` is
    what the initial weights came from, passed on to `model/` for an export, as is `chat_template`,
    the text of the template that its chats are written with. `on_save` is called on
    every rank when a save has begun; `stop_wanted` is asked on every rank once a step for a reason
    to stop, one rank's being enough; `held_out` is run by all ranks together. A rank that stands
    still for longer than `collective_timeout_s` ends the others; what the first rank does alone
    (hashing a checkpoint, writing the model) and the data of a checkpoint may take longer. So only
    the ranks' differences in a step count: a layer that one of them compiles and the others find
    in their cache takes a minute or two, a disk or store that falls over to another server as
    long; 180 s bear either, and a rank that died is seen at once without it. `beside`
    is what `loss_fn` computes besides, for the utilisation in the metrics; `read_ahead` reads what
    it needs besides a batch, in the thread that reads batches ahead. `initial_weights` is the
    digest of the model that `model` was loaded from, which a resumed run must share.
    """

    model: Network
    corpus: Corpus
    noise: NoiseConfig
    loss_fn: LossFn
    objective: dict[str, Any]
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    folder: Folder
    settings: dict[str, Any] = field(default_factory=dict)
    owner: lease.Owner | None = None
    published: Published | None = None
    chat_template: str | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    on_save: Callable[[Saving], None] = lambda saving: None
    stop_wanted: Callable[[], str | None] = lambda: None
    held_out: Callable[[Network], HeldOut] | None = None
    collective_timeout_s: float = 180.0
    beside: Beside = NOTHING_BESIDE
    read_ahead: Callable[[Batch], None] = nothing_else
    initial_weights: str | None = None

    def fit(self) -> dict[str, Any]:
        """Train to the end, from the newest complete checkpoint if there is one.

        Returns the run's summary (on every rank) and leaves `model/` and `summary.json` in the run
        folder; a run that is finished is left as it is. SIGTERM and SIGINT, or a reason from
        `stop_wanted`, save at the end of the step and raise `Stopped`. Raises `InputError` when the
        loss stops being finite or another run holds the folder, `LeaseLost` when another took it
        over, `CheckpointMismatch` when the folder's checkpoint belongs to another run.
        """
        parallel.join_group(self.device, self.collective_timeout_s)
        self._passes = len(spans(0, self.trainer, parallel.rank(), parallel.world_size()))
        self._length = self.corpus.sequence_length
        self._total = self.trainer.num_steps * self.trainer.sequences_per_step
        require_phases(self.trainer, self.model.config, self.corpus.block_size, self._length)
        with contextlib.ExitStack() as held:
            self._attempt = parallel.on_first_rank(lambda: self._take_folder(held))
            self._checkpoints = self._open_checkpoints()
            found = self._checkpoints.newest()
            if found is not None:
                require_same(found, self._facts())
            finished = partial(finished_summary, self.folder, found, self.trainer)
            return parallel.on_first_rank(finished) or self._run(found)

    def _take_folder(self, held: contextlib.ExitStack) -> lease.Attempt:
        owner = self.owner or held.enter_context(lease.hold(self.folder))
        return lease.begin(self.folder, owner)

    def _open_checkpoints(self) -> Checkpoints:
        config = self.trainer
        keep = Keep(last=config.keep_last, every=config.keep_every, best=config.keep_best)
        return Checkpoints(
            self.folder / "checkpoints",
            keep,
            self._attempt.check,
            tell,
            attempt=self._attempt.number,
            timeout=self.collective_timeout_s,
        )

    def _run(self, found: Checkpoint | None) -> dict[str, Any]:
        """The steps that are left."""
        sharding.prepare(self.model, self.trainer, self.device)
        self._adam = make_optimizer(self.model, self.optimizer)
        self._at = at = self._resume(found)
        self._saving: Saving | None = None
        batches = feed(self.corpus, self.noise, self.trainer, at.step, self.read_ahead)
        with contextlib.ExitStack() as opened:
            self._log = parallel.only_first_rank(lambda: self._open_log(opened))
            self._noted = opened.enter_context(signals_noted())
            opened.enter_context(self._save_ended())
            self._batches = opened.enter_context(contextlib.closing(batches))
            if found is not None and not at.is_told:
                self._rate(found, self._tell())
            while at.samples < self._total:
                is_stopping = self._step()
                if is_stopping and at.samples < self._total:
                    self._stop()
                held_out = self._tell()
                if at.step % self.trainer.checkpoint_every == 0 or at.samples >= self._total:
                    self._save(held_out)
            self._checkpoints.finish()
            return self._finish()

    @contextlib.contextmanager
    def _save_ended(self) -> Iterator[None]:
        """If the body fails, the save that is on its way still ends before the folder is let go.

        It waits for no rank that stands still for longer than the bound, and so ends.
        """
        try:
            yield
        except Exception:
            if self._saving is not None:
                with contextlib.suppress(Exception):
                    self._saving.wait()
            raise

    def _resume(self, found: Checkpoint | None) -> Progress:
        if found is None:
            return Progress()
        self._checkpoints.load(found, self.model, self._adam)
        if parallel.rank() == 0:
            tell(f"resuming from {found.path} (step {found.step}, {found.samples} samples)")
        return Progress.from_facts(found.facts["progress"])

    def _open_log(self, opened: contextlib.ExitStack) -> MetricsLog:
        told = self._at.step if self._at.is_told else self._at.step - 1
        log = MetricsLog(self.folder, told, self._attempt.check)
        opened.callback(log.abandon)
        peak = device_peak(self.device, self.trainer.precision)
        self._peak = None if peak is None else peak * parallel.world_size()
        return log

    def _noise_at(self, step: int) -> NoiseConfig:
        return noise_at(step, self.noise, self.trainer, self._length)

    def _step(self) -> bool:
        """One optimiser step over `sequences_per_step` samples of all ranks.

        The loss is the sum over all ranks' masked rows divided by the global count of the
        normaliser. That is known only after the last micro-batch, so the gradients are accumulated
        over a fixed scale and corrected once. FSDP averages over ranks, which the factor of their
        number undoes. Returns whether any rank wants to stop.
        """
        at, started = self._at, time.perf_counter()
        scale = float(self.trainer.sequences_per_step * self._length)
        self._adam.zero_grad(set_to_none=True)
        sums, waited = self._accumulate(parallel.world_size() / scale)
        self._reason = self.stop_wanted() or self._noted()
        sums["stop"] = sums["loss"].new_tensor(float(self._reason is not None))
        totals = parallel.sum_named(sums)
        wanting, tokens = totals.pop("stop"), int(totals.pop("tokens"))
        correction = scale / max(totals["count"], 1.0)
        norm = float(sharding.gradient_norm(self.model)) * correction
        if all(map(math.isfinite, [norm, *totals.values()])):
            self._update(correction, norm)
            at.window.add(totals, norm)
            at.skipped_in_a_row = 0
        else:  # every rank holds the same sums, so all of them come here in the same step
            self._pass_over(totals["loss"], norm)
        shape = model_at(at.step, self.model.config, self.trainer)
        rows, flops = work_of(shape, self._noise_at(at.step), self._length, self.beside)
        at.window.spend(
            seconds=time.perf_counter() - started,
            waited=waited,
            tokens=tokens,
            processed=rows * tokens,
            flops=flops * tokens,
        )
        at.step, at.samples = at.step + 1, at.samples + self.trainer.sequences_per_step
        at.is_told = False
        return wanting > 0

    def _accumulate(self, factor: float) -> tuple[dict[str, torch.Tensor], float]:
        """Forward and backward of this rank's share.

        Returns float64 sums by name (`Window.sums`, and the data `tokens`), and the seconds spent
        waiting for data.
        """
        totals: dict[str, torch.Tensor] = {}
        waited = 0.0
        for _ in range(self._passes):
            asked = time.perf_counter()
            batch = TrainBatch.from_numpy(next(self._batches), self.device)
            waited += time.perf_counter() - asked
            with self._precision():
                parts = self.loss_fn(self.model, batch)
            (parts.sum * factor).backward()
            for name, value in sums_of(parts, batch).items():
                totals[name] = totals[name] + value if name in totals else value
        return totals, waited

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.trainer.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _update(self, correction: float, norm: float) -> None:
        clip = min(1.0, self.optimizer.max_grad_norm / (norm + 1e-12))
        sharding.scale_gradients(self.model, correction * clip)
        tokens = (self._at.samples + self.trainer.sequences_per_step) * self._length
        self._at.rate = learning_rate(tokens, self._total * self._length, self.optimizer)
        set_learning_rate(self._adam, self._at.rate)
        self._adam.step()

    def _pass_over(self, loss: float, norm: float) -> None:
        """Leave the weights as they are, write the samples down, and go on only if that is asked.

        Raises `InputError` with `not_finite=stop`, or after too many such steps running.
        """
        at = self._at
        at.window.skipped += 1
        at.skipped_in_a_row += 1
        told = self._on_first(
            lambda: not_finite.write_down(
                self.folder, self.corpus, self._noise_at(at.step), self.trainer, at, loss, norm
            )
        )
        not_finite.require_patience(at, self.trainer, self.optimizer, told)
        if parallel.rank() == 0:
            tell(f"{told}; no weight was moved")

    def _tell(self) -> HeldOut | None:
        """Evaluate and log, where that is due after this step."""
        at, config = self._at, self.trainer
        held_out = self._evaluate() if self._is_evaluated() else None
        if held_out or at.step % config.log_every == 0 or at.samples >= self._total:
            parallel.on_first_rank(lambda: self._write_line(held_out))
            at.window = Window()
        at.is_told = True
        return held_out

    def _is_evaluated(self) -> bool:
        every, is_last = self.trainer.evaluate_every, self._at.samples >= self._total
        return bool(self.held_out and every and (self._at.step % every == 0 or is_last))

    def _evaluate(self) -> HeldOut:
        assert self.held_out is not None
        with self._precision():
            found = self.held_out(self.model)
        sharding.reshard(self.model)
        return found

    def _rate(self, found: Checkpoint, held_out: HeldOut | None) -> None:
        """Give the checkpoint of a stop the score that it would have been saved with otherwise."""
        if held_out is not None and self._at.step % self.trainer.checkpoint_every == 0:
            self._checkpoints.rate(found, held_out.loss)

    def _write_line(self, held_out: HeldOut | None) -> None:
        line = line_of(self._at, self.model.config, self.trainer, self._length)
        line |= self._at.window.means(self._peak) | told_of(held_out)
        line["failed_checkpoints"] = self._checkpoints.failures
        self._log.write(line, tokens_left=(self._total - self._at.samples) * self._length)

    def _save(self, held_out: HeldOut | None) -> None:
        started = time.perf_counter()
        facts = self._facts() | {
            "step": self._at.step,
            "samples": self._at.samples,
            "world_size": parallel.world_size(),
            "settings": self.settings,
            "progress": to_dict(self._at),
        }
        parallel.on_first_rank(lambda: self._log.save())
        score = None if held_out is None else held_out.loss
        self._saving = self._checkpoints.save(self.model, self._adam, facts, score)
        parallel.on_first_rank(lambda: self._log.draw())
        self._at.window.saving += time.perf_counter() - started
        self.on_save(self._saving)

    def _stop(self) -> None:
        """Save at once and end the run, on all ranks for the same reason.

        An evaluation that is due waits for the next start: launchers commonly kill 30 s after the
        signal.
        """
        reason = parallel.first_of(self._reason)
        self._save(None)
        parallel.only_first_rank(lambda: self._log.close())
        self._checkpoints.finish()
        raise Stopped.at(self._at.step, reason or "asked to")

    def _finish(self) -> dict[str, Any]:
        state = sharding.full_state(self.model)
        return self._on_first(lambda: self._export(state))

    def _export(self, state: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Write the whole weights as a model folder, and the summary."""
        facts = {"steps": self._at.step, "samples": self._at.samples}
        facts |= {"tokens": self._at.samples * self._length, "world_size": parallel.world_size()}
        url = (self.folder / MODEL).url
        save_model(
            url,
            network_with(self.model.config, state, url),
            self.corpus.tokenizer(),
            self.published,
            chat_template=self.chat_template,
        )
        return write_summary(self.folder, facts, self._log.close())

    def _facts(self) -> dict[str, Any]:
        config = self.model.config
        given = self.corpus, self.noise, self.objective, self.trainer
        return facts_of(config, *given, self.initial_weights)

    def _on_first(self, work: Callable[[], Any]) -> Any:
        """Write something on the first rank, if the folder is still this attempt's."""

        def checked() -> Any:
            self._attempt.check()
            return work()

        return parallel.on_first_rank(checked)
