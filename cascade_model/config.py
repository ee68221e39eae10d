"""The settings of the science: model, noise, optimiser, training, sampling.

Standard library only, so that every process can read them. Each dataclass checks itself and raises
`InputError` with the setting, its value and the cure. Every choice that decoding depends on stands
in `ModelConfig`, which is stored in the checkpoint.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal, Self

from cascade_model.errors import InputError


def check(condition: bool, sentence: str) -> None:
    """Raise `InputError(sentence)` unless the condition holds."""
    if not condition:
        raise InputError(sentence)


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON-able values."""
    return dataclasses.asdict(config)


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON-able value in its one canonical spelling."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseConfig:
    """The mask recipe: with a draw number and a sequence it determines every mask bit."""

    seed: int = 0
    """Key of the order of the draws, of the mask rates and of the mask bits."""
    block_size: int = 8
    """Tokens per diffusion block; a power of two."""
    per: Literal["block", "sequence"] = "block"
    """Whether each block draws a mask rate of its own or the whole sequence shares one."""
    min_rate: float = 1e-3
    """Lowest mask rate: the uniform draw u becomes min_rate + (max_rate - min_rate) u."""
    max_rate: float = 1.0
    """Highest mask rate."""
    strata: int = 32
    """Sequences (in the draw's order) over which the mask rates are stratified."""

    def __post_init__(self) -> None:
        check(
            0.0 < self.min_rate <= self.max_rate <= 1.0,
            f"noise.min_rate={self.min_rate} and noise.max_rate={self.max_rate} must satisfy "
            "0 < min_rate <= max_rate <= 1; use 0.001 and 1.0",
        )
        check(
            self.block_size >= 1 and self.block_size & (self.block_size - 1) == 0,
            f"noise.block_size={self.block_size} must be a power of two; use 4, 8, 16 or 32",
        )
        check(1 <= self.strata <= 65536, f"noise.strata={self.strata} must be in 1..65536; use 32")
        check(0 <= self.seed < 2**63, f"noise.seed={self.seed} must be in 0..2^63-1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape of the transformer and every choice that decoding depends on."""

    vocab_size: int
    """Rows of the embedding, special tokens and the mask token included."""
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 64
    intermediate_size: int = 768
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    max_sequence_length: int = 1024
    """Longest prompt plus completion, in tokens."""
    qk_norm: bool = False
    qkv_bias: bool = False
    tied_head: bool = True
    block_size: int = 8
    """Tokens per diffusion block B; 1 with shifted logits is an autoregressive model."""
    logits: Literal["aligned", "shifted"] = "aligned"
    """aligned: row i predicts token i. shifted: row i-1 predicts token i."""
    first_place: Literal["clean", "noisy", "own"] = "clean"
    """With shifted logits, the row that predicts a block's first token."""
    clean_half: Literal["block_causal", "token_causal"] = "block_causal"
    """What a committed token sees: its whole block and all before, or only the tokens before it."""
    mask_id: int
    pad_id: int
    eos_id: int
    tokenizer_sha256: str = ""
    """Digest of the tokenizer the weights were trained with."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "max_sequence_length",
            "block_size",
        ):
            check(
                getattr(self, name) >= 1, f"model.{name}={getattr(self, name)} must be at least 1"
            )
        check(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_kv_heads={self.num_kv_heads} does not divide "
            f"model.num_heads={self.num_heads}; use a divisor",
        )
        check(
            self.head_dim % 2 == 0,
            f"model.head_dim={self.head_dim} must be even for rotary positions; use 64",
        )
        for name in ("mask_id", "pad_id", "eos_id"):
            value = getattr(self, name)
            check(
                0 <= value < self.vocab_size,
                f"model.{name}={value} is outside the vocabulary of {self.vocab_size}; "
                "use an id below model.vocab_size",
            )

    @property
    def is_autoregressive(self) -> bool:
        """Whether the clean rows alone give every logit (B = 1, shifted, clean source)."""
        return self.block_size == 1 and self.logits == "shifted" and self.first_place == "clean"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from JSON values; an unknown key is refused by name."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        check(
            not unknown, f"model config has unknown settings {unknown}; known are {sorted(known)}"
        )
        return cls(**values)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW with a warm-up, stable, decay schedule counted in tokens."""

    peak_lr: float = 1e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    warmup_rate: float = 0.05
    """Share of all tokens over which the learning rate rises linearly from 0."""
    decay_rate: float = 0.3
    """Share of all tokens, at the end, over which it falls linearly to final_lr_rate x peak_lr."""
    final_lr_rate: float = 0.1

    def __post_init__(self) -> None:
        check(self.peak_lr > 0, f"optimizer.peak_lr={self.peak_lr} must be above 0; use 0.001")
        check(
            self.warmup_rate >= 0
            and self.decay_rate >= 0
            and self.warmup_rate + self.decay_rate <= 1,
            f"optimizer.warmup_rate={self.warmup_rate} plus optimizer.decay_rate={self.decay_rate} "
            "must not exceed 1; use 0.05 and 0.3",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerConfig:
    """How long to train, in what steps, and what to keep."""

    num_steps: int = 200
    sequences_per_step: int = 32
    """Global batch, the same for any number of ranks; accumulation is derived from it."""
    sequences_per_forward: int = 16
    """Sequences of one rank in one forward pass."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products; weights and optimiser state stay float32."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step always writes one."""
    keep_last: int = 2
    """Newest checkpoints to keep."""
    log_every: int = 10
    """Steps between lines of metrics."""
    seed: int = 0
    """Seed of the weights' initial values."""

    def __post_init__(self) -> None:
        for name in (
            "num_steps",
            "sequences_per_step",
            "sequences_per_forward",
            "checkpoint_every",
            "keep_last",
            "log_every",
        ):
            check(
                getattr(self, name) >= 1, f"trainer.{name}={getattr(self, name)} must be at least 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """One request's decoding settings."""

    max_tokens: int = 64
    """Tokens to generate at most."""
    rule: Literal["confidence_threshold", "top_k", "sequential"] = "confidence_threshold"
    """Which masked positions a denoising step commits."""
    confidence_threshold: float = 0.9
    """confidence_threshold: commit every position whose probability is at least this."""
    steps_per_block: int | None = None
    """Ceiling of K_b, the denoising steps of a block; none: the block size."""
    temperature: float = 0.0
    """Token temperature; 0 takes the most probable token."""
    top_p: float = 1.0
    seed: int = 0
    """Randomness is keyed by (seed, choice, block, step)."""
    stop_at_eos: bool = True

    def __post_init__(self) -> None:
        check(self.max_tokens >= 1, f"max_tokens={self.max_tokens} must be at least 1")
        check(
            0.0 <= self.confidence_threshold <= 1.0,
            f"confidence_threshold={self.confidence_threshold} must be in 0..1; use 0.9",
        )
        check(
            self.steps_per_block is None or self.steps_per_block >= 1,
            f"steps_per_block={self.steps_per_block} must be at least 1, or left out",
        )
        check(0.0 <= self.temperature <= 10.0, f"temperature={self.temperature} must be in 0..10")
        check(0.0 < self.top_p <= 1.0, f"top_p={self.top_p} must be above 0 and at most 1")
        check(-(2**63) <= self.seed < 2**63, f"seed={self.seed} must fit in 64 bits")
