"""What a training job would take, before anything starts: memory, work, time and storage.

    cascade plan pretrain --config run.yaml --corpus shards --output run --plan.device H100

It makes the checks of the job's own start, so a setting that the job would refuse is refused here,
and writes nothing. The estimates stand in `cascade_model.footprint` and `cascade_model.flops`; the
speed is a share of the device's peak that is assumed, or measured by a few passes here (`probe`).
"""

import contextlib
import dataclasses
import importlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade_model.errors import InputError
from cascade_model.settings import check
from jobs.cli import actions, command
from jobs.plan_table import table
from jobs.training_settings import TrainingConfig

if TYPE_CHECKING:
    from cascade_model.config import ModelConfig, NoiseConfig
    from cascade_model.corpus import Corpus

STAGES = {"pretrain": "PretrainConfig", "distil": "DistilConfig", "sft": "SftConfig"}
_ASSUMED_SHARE = 0.35
_LINE_BYTES = 900
"""A line of metrics with its TensorBoard scalars."""
_PASSES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanChoices:
    """What to reckon with, beside the job's own settings."""

    device: str | None = None
    """GPU to plan for: a name such as H100, H200, A100, L40S or L4; none: what this machine has."""
    peak_share: float = _ASSUMED_SHARE
    """Share of the device's peak that a step is assumed to reach."""
    probe: bool = False
    """Measure a few passes of the model on this machine in place of assuming a share."""

    def __post_init__(self) -> None:
        check(0.0 < self.peak_share <= 1.0, f"plan.peak_share={self.peak_share} must be in 0..1")
        check(
            not (self.probe and self.device),
            f"plan.probe measures this machine and plan.device={self.device} names another; "
            "choose one",
        )


def run(stage: str, config: Any) -> dict[str, Any]:
    """Check, reckon, print, and return the numbers: bytes, FLOPs, seconds."""
    from cascade_model.corpus import Corpus
    from cascade_model.metrics import tell
    from jobs.starting import starting_config
    from jobs.training import check_start, noise_of, placement_of

    module = importlib.import_module(f"jobs.{stage}")
    module.check_settings(config)
    _require_device(config)
    earlier = check_start(config, module.objective(config), tell)
    corpus = Corpus.open(config.corpus)
    shape = starting_config(config, corpus)
    noise = noise_of(shape, corpus, config.noise, config.trainer.sequences_per_step)
    report = {
        "stage": stage,
        "is_finished": earlier is not None and earlier.summary is not None,
        "earlier": None if earlier is None else str(earlier),
        "output": config.output,
        "ranks": placement_of(config).sizes[-1],
        "fewest_ranks": placement_of(config).sizes[0],
        "precision": config.trainer.precision,
        **_memory(config, shape, corpus, noise),
        **_work(config, shape, corpus, noise),
        **_storage(config, shape),
        **_place(config.output),
    }
    report |= _speed(config, module, report, corpus, noise)
    print(table(report))
    return report


def _require_device(config: Any) -> None:
    """Raise `InputError` for a plan of a GPU that is neither here nor named."""
    import torch

    check(
        not config.use_gpu or config.plan.device is not None or torch.cuda.is_available(),
        "use_gpu=True and this machine has no CUDA device to plan for; name the GPU with "
        "--plan.device (H100)",
    )


def _memory(
    config: Any, shape: "ModelConfig", corpus: "Corpus", noise: "NoiseConfig"
) -> dict[str, Any]:
    """Bytes per rank, as trained and with the other choice of `recompute`."""
    from cascade_model.footprint import footprint, parameter_count
    from jobs.training import beside_of

    trainer, rate = config.trainer, (noise.min_rate + noise.max_rate) / 2
    other = dataclasses.replace(trainer, recompute=not trainer.recompute)

    def of(settings: Any, ranks: int) -> Any:
        length, beside = corpus.sequence_length, beside_of(config)
        return footprint(
            shape, settings, sequence_length=length, ranks=ranks, mask_rate=rate, beside=beside
        )

    has_gpu = config.use_gpu or config.plan.device is not None
    ranks = config.min_workers or max(config.num_workers, 1)
    found, otherwise = of(trainer, ranks), of(other, ranks)
    return {
        "parameters": parameter_count(shape),
        "has_gpu": has_gpu,
        "memory": dataclasses.asdict(found),
        "memory_at_most": found.on_device if has_gpu else found.on_host,
        "memory_with_other_recompute": otherwise.on_device if has_gpu else otherwise.on_host,
        "recompute": trainer.recompute,
        "memory_there": _memory_there(config),
    }


def _work(
    config: Any, shape: "ModelConfig", corpus: "Corpus", noise: "NoiseConfig"
) -> dict[str, Any]:
    """Steps, tokens and useful operations, over the phases of the block-size schedule."""
    from cascade_model.phases import noise_at, phase_starts
    from cascade_model.progress import model_at, work_of
    from jobs.training import beside_of

    trainer, length = config.trainer, corpus.sequence_length
    starts = [first for first, _ in phase_starts(trainer)] or [0]
    ends = [*starts[1:], trainer.num_steps]
    beside = beside_of(config)
    total = 0.0
    per_step = trainer.sequences_per_step * length
    for first, end in zip(starts, ends, strict=True):
        recipe = noise_at(first, noise, trainer, length)
        _, flops = work_of(model_at(first, shape, trainer), recipe, length, beside)
        total += (end - first) * per_step * flops
    tokens = trainer.num_steps * per_step
    # Of sequences, as of a conversation's tokens only the answers count as the corpus's; a
    # complementary pair is one sequence shown twice.
    shown = trainer.num_steps * trainer.sequences_per_step / (2 if config.noise.complement else 1)
    return {
        "steps": trainer.num_steps,
        "tokens": tokens,
        "epochs": shown / corpus.num_sequences,
        "flops": total,
        "flops_per_step": total / trainer.num_steps,
        "flops_per_token": total / tokens,
    }


def _storage(config: Any, shape: "ModelConfig") -> dict[str, Any]:
    """Bytes on disk or in the store at the end of the run, and at most while it goes."""
    from cascade_model.footprint import FLOAT32, checkpoint_bytes, parameter_count

    trainer = config.trainer
    one = checkpoint_bytes(shape)
    forever = trainer.num_steps // trainer.keep_every if trainer.keep_every else 0
    best = trainer.keep_best if trainer.evaluate_every else 0
    lines = trainer.num_steps // trainer.log_every
    lines += trainer.num_steps // trainer.evaluate_every if trainer.evaluate_every else 0
    metrics = lines * _LINE_BYTES
    model = FLOAT32 * parameter_count(shape)
    saves = -(-trainer.num_steps // trainer.checkpoint_every)
    kept = min(trainer.keep_last + forever + best, saves)
    return {
        "checkpoint_bytes": one,
        "kept_checkpoints": kept,
        "model_bytes": model,
        "metrics_bytes": metrics,
        "storage": kept * one + model + metrics,
        "storage_at_most": (kept + 1) * one + model + metrics,
    }


def _place(output: str) -> dict[str, Any]:
    """Who holds the run folder now; bytes in it, and bytes free beside them, on a local disk."""
    from cascade_model.lease import require_free
    from jobs.run_folder import run_folder

    folder, refusal = run_folder(output), None
    try:
        require_free(folder)
    except InputError as error:
        refusal = str(error)
    if not folder.is_local:
        return {"in_use": refusal, "storage_held": None, "storage_free": None}
    root = Path(folder.url)
    nearest = next(each for each in (root, *root.parents) if each.exists())
    held = 0
    for name in folder.files() if nearest == root else ():
        with contextlib.suppress(OSError):  # a run at work has just taken it away
            held += folder.size(name)
    free = shutil.disk_usage(nearest).free
    return {"in_use": refusal, "storage_held": held, "storage_free": free}


def _speed(
    config: Any, module: Any, report: dict[str, Any], corpus: "Corpus", noise: "NoiseConfig"
) -> dict[str, Any]:
    """Tokens per second of all ranks, the time that all steps take, and what this rests on."""
    choices = config.plan
    if choices.probe:
        rate, basis = _probe(config, module, corpus, noise), "measured here, one process"
        if config.use_gpu:
            rate, basis = rate * report["ranks"], f"{basis}, times {report['ranks']} ranks"
    else:
        peak, name = _peak(config)
        if peak is None:
            return {"tokens_per_second": None, "seconds": None, "basis": f"{name} is not known"}
        count = report["ranks"] if config.use_gpu or choices.device else 1
        rate = count * peak * choices.peak_share / report["flops_per_token"]
        basis = f"assumed: {choices.peak_share:.0%} of {count} x {peak / 1e12:.3g} TFLOP/s ({name})"
    return {"tokens_per_second": rate, "seconds": report["tokens"] / rate, "basis": basis}


def _peak(config: Any) -> tuple[float | None, str]:
    """FLOP/s of the device, and its name; the cores of one machine together are one device."""
    import torch

    from cascade_model.flops import cpu_speed, device_peak

    name, precision = config.plan.device, config.trainer.precision
    if name is not None:
        return getattr(_gpu(name), precision), name
    if not config.use_gpu:
        return cpu_speed(precision), "this machine's cores"
    return device_peak("cuda", precision), torch.cuda.get_device_name()


def _gpu(name: str) -> Any:
    from cascade_model.flops import GPUS, gpu_of

    found = gpu_of(name)
    if found is None:
        raise InputError(f"plan.device={name} is not known; use one of {', '.join(GPUS)}")
    return found


def _memory_there(config: Any) -> int | None:
    """Bytes that a rank may use, where that is known: of its GPU, or its share of this machine."""
    if config.plan.device is not None:
        return round(_gpu(config.plan.device).memory)
    if config.use_gpu:
        import torch

        return torch.cuda.mem_get_info()[1]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory // max(config.num_workers, 1)


def _probe(config: Any, module: Any, corpus: "Corpus", noise: "NoiseConfig") -> float:
    """Tokens per second of forward, backward and one optimiser step, in this process."""
    import torch

    from cascade_model import sharding
    from cascade_model.batch import TrainBatch
    from cascade_model.optim import make_optimizer
    from jobs.starting import starting_model

    trainer, device = config.trainer, "cuda" if config.use_gpu else "cpu"
    model = starting_model(config, corpus)
    sharding.prepare(model, dataclasses.replace(trainer, replicas=1), torch.device(device))
    adam, loss_fn = make_optimizer(model, config.optimizer), module.loss_of(config, device)
    per_rank = max(trainer.sequences_per_step // max(config.num_workers, 1), 1)
    count = min(trainer.sequences_per_forward, per_rank)
    batch = TrainBatch.from_numpy(corpus.batch(0, count, noise), device)
    half = trainer.precision == "bfloat16"
    moved = [p for p in model.parameters() if p.requires_grad]

    def gradients() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
            loss = loss_fn(model, batch).sum
        for parameter, gradient in zip(moved, torch.autograd.grad(loss, moved), strict=True):
            parameter.grad = gradient

    seconds = _fastest(gradients, device) + _fastest(adam.step, device) * count / per_rank
    return count * corpus.sequence_length / seconds


def _fastest(work: Callable[[], Any], device: str) -> float:
    """Seconds of the fastest of a few tries."""
    import torch

    best = float("inf")
    for _ in range(_PASSES):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def plan_stage(stage: str, argv: Sequence[str]) -> int:
    """`cascade plan STAGE`: the stage's settings, and a group `plan`."""

    def run_stage(config: TrainingConfig) -> dict[str, Any]:
        return run(stage, config)

    return command(config_of(stage), run_stage, stage)(argv)


def config_of(stage: str) -> type[Any]:
    """The stage's settings with the plan's own beside them."""
    settings = getattr(importlib.import_module(f"jobs.{stage}"), STAGES[stage])
    choices = ("plan", PlanChoices, field(default_factory=PlanChoices))
    return dataclasses.make_dataclass(
        f"{STAGES[stage]}Plan",
        [choices],
        bases=(settings,),
        frozen=True,
        kw_only=True,
        slots=True,
        namespace={"__doc__": settings.__doc__},
    )


main = actions(
    "plan",
    pretrain=("pretraining on a corpus", partial(plan_stage, "pretrain")),
    distil=("distillation from an autoregressive teacher", partial(plan_stage, "distil")),
    sft=("going on with conversations", partial(plan_stage, "sft")),
)

if __name__ == "__main__":
    raise SystemExit(main())
