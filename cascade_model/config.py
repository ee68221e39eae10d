"""The settings of the science: noise and model.

Standard library only, so that every process can read them. Each dataclass checks itself and raises
`InputError` with the setting, its value and the cure. Every choice that decoding depends on stands
in `ModelConfig`, which is stored in the checkpoint.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Self

from cascade_model.settings import check, to_dict

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
