"""The settings of the science: model, noise, optimiser, training.

Standard library only, so that every process can read them. Each dataclass checks itself and raises
`InputError` with the setting, its value and the cure. Every choice that decoding depends on stands
in `ModelConfig`, which is stored in the checkpoint.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Self

from cascade_model.settings import check, check_types, to_dict

Weight = Literal["elbo", "unit", "cart"]
Normaliser = Literal["maskable", "masked", "document"]
Outcomes = Literal["text", "all_but_mask", "all"]
TeacherWeight = Literal["rate", "right_context"]


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
class TrainingNoise(NoiseConfig):
    """The recipe, and what a training run makes of its samples; shards store none of the latter.

    Every setting is recorded in the run's checkpoints. A stored bitmap belongs to `recipe`; of a
    complementary pair it gives both members.
    """

    complement: bool = False
    """Samples 2k and 2k + 1 are one sequence and its complement: the second masks exactly the
    maskable tokens that the first shows, at rate 1 - t (Fast-dLLM v2, LLaDA2)."""
    padding: Literal["never", "eos"] = "never"
    """never: padding carries no loss. eos: it holds EOS, is masked and counted as text is (LLaDA's
    fine-tuning)."""
    short_rate: float = 0.0
    """Share of the global batches that are cut to a length drawn from 1..L (LLaDA: 0.01)."""
    short_multiple: int = 1
    """Cut lengths are multiples of this."""
    sequences_per_batch: int = 1
    """Samples of a global batch, which are cut together."""

    def __post_init__(self) -> None:
        NoiseConfig.__post_init__(self)
        check(
            not self.complement or self.sequences_per_batch % 2 == 0,
            "noise.complement=True needs both of a pair in one batch and trainer.sequences_per_step"
            f"={self.sequences_per_batch} is odd; use {self.sequences_per_batch + 1}",
        )
        check(
            0.0 <= self.short_rate <= 1.0,
            f"noise.short_rate={self.short_rate} must be in 0..1; use 0.01",
        )
        check(
            self.short_multiple >= 1
            and (
                self.short_rate == 0.0
                or self.per == "sequence"
                or self.short_multiple % self.block_size == 0
            ),
            f"noise.short_multiple={self.short_multiple} must be a multiple of noise.block_size="
            f"{self.block_size} where each block has a rate of its own; use {self.block_size}",
        )
        check(
            self.sequences_per_batch >= 1,
            f"noise.sequences_per_batch={self.sequences_per_batch} must be at least 1",
        )

    @classmethod
    def over(cls, recipe: NoiseConfig, **settings: Any) -> Self:
        """A recipe with the settings of a run."""
        return cls(**(to_dict(recipe) | settings))

    @property
    def recipe(self) -> NoiseConfig:
        """The part that a stored bitmap is bound to."""
        names = [f.name for f in dataclasses.fields(NoiseConfig)]
        return NoiseConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsConfig:
    """Mixture of experts in place of the feed-forward of the later layers."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    """Width of one routed expert."""
    first_dense_layers: int = 0
    """Layers before the first mixture; they keep the model's `intermediate_size`."""
    shared_intermediate_size: int = 0
    """Width of the expert that every token passes, added unweighted; 0: none."""
    router: Literal["softmax", "sigmoid_groups"] = "softmax"
    """softmax: the largest probabilities (LLaDA-MoE). sigmoid_groups: sigmoid scores, the best
    groups first, a bias for the selection only (LLaDA2)."""
    num_groups: int = 1
    groups_per_token: int = 1
    renormalise: bool = False
    """Divide the chosen weights by their sum."""
    weight_scale: float = 1.0
    """Factor on the chosen weights, after renormalising."""
    router_bias: bool = False
    """One number per expert: with sigmoid_groups it moves the selection only, with softmax the
    weights too."""

    def __post_init__(self) -> None:
        check(
            1 <= self.experts_per_token <= self.num_experts,
            f"experts.experts_per_token={self.experts_per_token} must be in "
            f"1..{self.num_experts}, the number of experts",
        )
        check(
            self.num_experts % self.num_groups == 0
            and 1 <= self.groups_per_token <= self.num_groups,
            f"experts.num_groups={self.num_groups} must divide experts.num_experts="
            f"{self.num_experts} and not be below experts.groups_per_token="
            f"{self.groups_per_token}; use 1 and 1",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape of the network and every choice that decoding depends on."""

    network: Literal["transformer", "dit", "gpt2"] = "transformer"
    """transformer: the Llama type of this project; dit: that of MDLM and BD3-LM; gpt2: GPT-2's."""
    family: str = ""
    """The published family the weights came from; empty for a model of our own."""
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
    rotary_dim: int | None = None
    """Leading dimensions of each head that rotary positions turn; none: all."""
    qk_norm: bool = False
    qkv_bias: bool = False
    tied_head: bool = True
    experts: ExpertsConfig | None = None
    conditioning_size: int = 128
    """dit: width of the noise level's embedding."""
    attention: Literal["block_causal", "bidirectional"] = "block_causal"
    """block_causal: a token sees its own block and those before it. bidirectional: everything, as
    in LLaDA and Dream; blocks are then only an order of decoding."""
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
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a completion besides eos_id."""
    tokenizer_sha256: str = ""
    """Digest of the tokenizer the weights were trained with."""
    infill: Literal["none", "psm"] = "none"
    """psm: trained on documents of which some were rearranged as prefix, suffix, middle, so that a
    text between two others can be asked for (Bavarian et al. 2022, arXiv 2207.14255)."""
    infill_ids: tuple[int, ...] = ()
    """psm: the tokens before prefix, suffix and middle; given, never predicted."""

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
        ids, wanted = self.infill_ids, 3 if self.infill == "psm" else 0
        check(
            len(set(ids)) == len(ids) == wanted and all(0 <= i < self.vocab_size for i in ids),
            f"model.infill={self.infill} needs {wanted} tokens of the vocabulary and "
            f"model.infill_ids={list(ids)}; give those before prefix, suffix and middle",
        )
        rotary = self.rotary_dim
        check(
            rotary is None or (0 < rotary <= self.head_dim and rotary % 2 == 0),
            f"model.rotary_dim={rotary} must be even and at most model.head_dim={self.head_dim}",
        )

    @property
    def is_autoregressive(self) -> bool:
        """Whether the clean rows alone give every logit (B = 1, shifted, clean source)."""
        shifted = self.logits == "shifted" and self.first_place == "clean"
        return shifted and self.block_size == 1 and self.attention == "block_causal"

    @property
    def needs_boundary(self) -> bool:
        """Whether a block's first token is predicted by the last committed row."""
        is_causal = self.attention == "block_causal"
        return is_causal and self.logits == "shifted" and self.first_place != "own"

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Every token that ends a completion: `eos_id` first, then `stop_ids`."""
        return (self.eos_id, *(i for i in self.stop_ids if i != self.eos_id))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from JSON values; an unknown key is refused by name."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        check(
            not unknown, f"model config has unknown settings {unknown}; known are {sorted(known)}"
        )
        experts = values.get("experts")
        nested = {
            "experts": ExpertsConfig(**experts) if isinstance(experts, dict) else experts,
            "stop_ids": tuple(values.get("stop_ids", ())),
            "infill_ids": tuple(values.get("infill_ids", ())),
        }
        return cls(**(values | nested))


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


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How one decode engine runs: its numbers and its limits."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Type in which weights are loaded, and of keys and values. bfloat16 takes half the memory and
    is faster where the CPU has it; what it rounds may give other tokens. A model that was loaded
    already keeps its own."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model is loaded; cuda asks Ray for a GPU of its own for each engine. One that was
    loaded already stays where it is."""
    max_sequences: int = 32
    """Sequences that run at once."""
    rows_per_round: int = 512
    """Rows of one forward pass; beside a single pass that cannot be cut and takes more than half of
    them, half as many for the others."""
    cache_bytes: int = 1 << 30
    """Keys and values of all sequences and known prefixes, in bytes; taken as they are written. One
    token takes 2 x layers x key-value heads x head size numbers."""
    prefix_share: float = 0.25
    """Of the pages, how many known prefixes may hold; 0: nothing is taken over from others."""
    page_tokens: int = 32
    """Tokens that keys and values are handed out for at a time, and the shortest beginning that a
    request can take over from another; rounded up to whole blocks."""

    def __post_init__(self) -> None:
        check_types(self, "engine.")
        for name in ("max_sequences", "rows_per_round", "cache_bytes", "page_tokens"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        check(
            0.0 <= self.prefix_share < 1.0,
            f"prefix_share={self.prefix_share} must be at least 0 and below 1; use 0.25",
        )

    @property
    def num_gpus(self) -> int:
        """GPUs of one engine."""
        return int(self.device == "cuda")
