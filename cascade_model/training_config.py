"""The settings of training. Standard library only; each dataclass checks itself."""

from dataclasses import dataclass
from typing import Literal

from cascade_model.settings import check, check_types


@dataclass(frozen=True, kw_only=True, slots=True)
class AuxiliaryConfig:
    """Losses beside the masked cross entropy, made in the same pass; each is off at 0."""

    ar_weight: float = 0.0
    """Weight of the next-token loss of the clean half (0.3); it needs a token-causal one."""
    entropy_weight: float = 0.0
    """Weight of the entropy of correctly predicted masked tokens, a second stage after training:
    what is certain is written in fewer steps (LLaDA2, dParallel: 2)."""
    entropy_temperature: float = 1.0
    """Temperature at which that entropy is taken (LLaDA2: 1, dParallel: 0.5)."""

    def __post_init__(self) -> None:
        for name in ("ar_weight", "entropy_weight"):
            value = getattr(self, name)
            check(0.0 <= value < float("inf"), f"{name}={value} must be 0 or more; use 0")
        check(
            0.0 < self.entropy_temperature < float("inf"),
            f"entropy_temperature={self.entropy_temperature} must be above 0; use 1",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW with a warm-up, stable, decay schedule counted in tokens."""

    peak_lr: float = 1e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    """Longer gradients are cut to this 2-norm."""
    warmup_rate: float = 0.05
    """Share of all tokens over which the learning rate rises linearly from 0."""
    decay_rate: float = 0.3
    """Share of all tokens, at the end, over which it falls linearly to final_lr_rate x peak_lr."""
    final_lr_rate: float = 0.1

    def __post_init__(self) -> None:
        check_types(self, "optimizer.")
        check(self.peak_lr > 0, f"optimizer.peak_lr={self.peak_lr} must be above 0; use 0.001")
        check(
            self.max_grad_norm > 0,
            f"optimizer.max_grad_norm={self.max_grad_norm} must be above 0; use 1.0",
        )
        check(
            self.warmup_rate >= 0
            and self.decay_rate >= 0
            and self.warmup_rate + self.decay_rate <= 1,
            f"optimizer.warmup_rate={self.warmup_rate} plus optimizer.decay_rate={self.decay_rate} "
            "must not exceed 1; use 0.05 and 0.3",
        )
        check(
            0 <= self.final_lr_rate <= 1,
            f"optimizer.final_lr_rate={self.final_lr_rate} must be in 0..1, a share of peak_lr; "
            "use 0.1",
        )
        check(
            0 <= self.weight_decay < float("inf"),
            f"optimizer.weight_decay={self.weight_decay} must be 0 or more; use 0.1",
        )
        for name, usual in (("beta1", 0.9), ("beta2", 0.95)):
            value = getattr(self, name)
            check(
                0 <= value < 1,
                f"optimizer.{name}={value} must be at least 0 and below 1; use {usual}",
            )
        check(
            0 < self.eps < float("inf"),
            f"optimizer.eps={self.eps} must be above 0, as weights without a gradient are divided "
            "by it; use 1e-8",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A part of a training run with a block size of its own; `TrainerConfig` checks it, and knows
    which one it is."""

    block_size: int
    """Tokens per diffusion block; a divisor of the corpus's, or the sequence length."""
    share: float
    """Share of all tokens of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerConfig:
    """How long to train, in what steps, and what to keep. `trainer.block_sizes`, a list of
    {block_size, share}, is set in a YAML file only; jobs/README.md has an example."""

    num_steps: int = 200
    sequences_per_step: int = 32
    """Global batch, the same for any number of ranks; accumulation is derived from it."""
    sequences_per_forward: int = 16
    """Sequences of one rank in one forward pass. Where the ranks' shares of a step are multiples of
    it, every number of ranks makes the same forward passes and only the order of sums differs."""
    block_sizes: tuple[Phase, ...] = ()
    """Block sizes to train with in turn (1, 4, 8, 16, or up to the sequence length and down again
    as LLaDA2, arXiv 2512.15745), the model's own last; none: the model's throughout. Each has a
    share of all tokens; the shares make 1. A YAML file sets them, no flag does."""
    attention: Literal["grouped", "flex"] = "grouped"
    """Kernel of the doubled input: grouped runs anywhere, flex is compiled, for GPUs."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products; weights and optimiser state stay float32, and gradients are
    summed over ranks in it."""
    recompute: bool = False
    """Keep no activations inside a layer and run it again in the backward pass: less memory for a
    third more work, and the same gradients bit for bit."""
    compile: bool = False
    """Compile each layer; pays on GPUs, hardly on CPUs."""
    replicas: int = 1
    """Groups of ranks that each hold the whole model in shards; 1 shards it over all ranks."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step always writes one."""
    keep_last: int = 2
    """Newest checkpoints to keep."""
    keep_every: int | None = None
    """Checkpoints at multiples of this step are kept for ever."""
    keep_best: int = 1
    """Checkpoints to keep of those with the lowest held-out loss: saved at evaluated steps only."""
    log_every: int = 10
    """Steps between lines of metrics."""
    evaluate_every: int | None = None
    """Steps between values on the held-out split, and once at the end; none: never."""
    not_finite: Literal["stop", "skip"] = "stop"
    """What to do where a loss or gradient is NaN or infinite: in both cases no weight moves and the
    samples are written down."""
    max_skipped_in_a_row: int = 3
    """With not_finite=skip, one more of them running stops the run."""
    seed: int = 0
    """Seed of the weights' initial values."""

    def __post_init__(self) -> None:
        check_types(self, "trainer.")
        for name in (
            "num_steps",
            "sequences_per_step",
            "sequences_per_forward",
            "replicas",
            "checkpoint_every",
            "keep_last",
            "keep_every",
            "log_every",
            "evaluate_every",
            "max_skipped_in_a_row",
        ):
            value = getattr(self, name)
            check(value is None or value >= 1, f"trainer.{name}={value} must be at least 1")
        check(self.keep_best >= 0, f"trainer.keep_best={self.keep_best} must be at least 0")
        for index, phase in enumerate(self.block_sizes):
            where = f"trainer.block_sizes[{index}]."
            check_types(phase, where)
            check(
                phase.block_size >= 1,
                f"{where}block_size={phase.block_size} must be at least 1",
            )
            check(
                phase.share * self.num_steps >= 1,
                f"{where}share={phase.share:g} (block size {phase.block_size}) is less than one of "
                f"trainer.num_steps={self.num_steps}; give it more, or train for longer",
            )
        shares = [phase.share for phase in self.block_sizes]
        check(
            not shares or abs(sum(shares) - 1.0) < 1e-6,
            f"trainer.block_sizes has the shares {', '.join(f'{each:g}' for each in shares)}, "
            f"which add up to {sum(shares):g}; they must make 1",
        )
