"""The settings that every training job shares: on what to train, what, for how long and where."""

from dataclasses import dataclass, field
from typing import Literal

from cascade_model.config import Normaliser, Weight
from cascade_model.settings import check
from cascade_model.shard_cache import CacheConfig
from cascade_model.training_config import OptimizerConfig, TrainerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The model's own choices; vocabulary and special tokens come from the corpus."""

    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 64
    intermediate_size: int = 768
    rope_theta: float = 10000.0
    max_sequence_length: int = 1024
    """Longest prompt plus completion, in tokens."""
    qk_norm: bool = False
    tied_head: bool = True
    attention: Literal["block_causal", "bidirectional"] = "block_causal"
    """block_causal: a token sees its own block and those before it. bidirectional: its whole
    document, as in LLaDA."""
    block_size: int | None = None
    """Tokens per diffusion block; none: the corpus's. It must divide the corpus's."""
    logits: Literal["aligned", "shifted"] = "aligned"
    """aligned: row i predicts token i. shifted: row i-1 predicts token i."""
    first_place: Literal["clean", "noisy", "own"] = "clean"
    """With shifted logits, the row that predicts a block's first token."""
    clean_half: Literal["block_causal", "token_causal"] = "block_causal"
    """What a committed token sees: its whole block and all before, or only the tokens before it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseChoices:
    """What differs from the corpus's own mask recipe. Its stored masks are used as long as the
    first five settings and the padding are left alone."""

    seed: int | None = None
    per: Literal["block", "sequence"] | None = None
    """Whether each block draws a mask rate of its own or the whole sequence shares one; none: the
    corpus's, and one per sequence for a bidirectional model."""
    min_rate: float | None = None
    """Lowest mask rate."""
    max_rate: float | None = None
    """Highest mask rate."""
    strata: int | None = None
    """Sequences over which the mask rates are stratified."""
    complement: bool = False
    """Show each sequence twice running, the second time with exactly the other tokens masked."""
    padding: Literal["never", "eos"] = "never"
    """never: padding carries no loss. eos: it holds EOS, is masked and counts as text does (LLaDA's
    fine-tuning)."""
    short_rate: float = 0.0
    """Share of the steps whose sequences are cut to a random length (LLaDA: 0.01)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutChoices:
    """What `trainer.evaluate_every` measures: the bound on the corpus's held-out split."""

    sequences: int = 64
    """Sequences, the same ones each time."""
    draws: int = 1
    """Noise draws of each."""

    def __post_init__(self) -> None:
        for name in ("sequences", "draws"):
            value = getattr(self, name)
            check(value >= 1, f"held_out.{name}={value} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """What to train on, what, for how long and where."""

    corpus: str
    """Folder or URL that `cascade prepare` wrote."""
    output: str
    """Run folder: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, model/, summary.json.
    A run that is there goes on from its newest complete checkpoint; one in use is refused."""
    model: ModelShape = field(default_factory=ModelShape)
    initial_model: str | None = None
    """Model folder to start from, whose shape is kept: `model` is then left out."""
    noise: NoiseChoices = field(default_factory=NoiseChoices)
    weight: Weight = "elbo"
    """Weight of a masked token: elbo is 1 / mask rate, unit is 1, cart grows with the visible
    tokens nearby (Dream)."""
    normaliser: Normaliser = "maskable"
    """What the weighted sum is divided by: the tokens that could have been masked, those that were,
    or each document by its own tokens and then the mean over documents."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    held_out: HeldOutChoices = field(default_factory=HeldOutChoices)
    num_workers: int = 2
    """Ranks on Ray Train; 0 trains in this process, without Ray, or in those of `torchrun`."""
    min_workers: int | None = None
    """Ranks to make do with; then Ray trains on as many as the cluster has, up to num_workers, and
    starts anew when that changes. Any number in between must share a step. None: always all."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    use_gpu: bool = False
    """One GPU per rank."""
    label_selector: dict[str, str] | None = None
    """Labels of the machines that ranks may run on, as Ray has them (`ray.io/accelerator-type`)."""
    max_failures: int = 2
    """Restarts after a rank died, each from the newest complete checkpoint; -1: no limit."""
    max_preemptions: int = -1
    """Restarts after a machine was taken away, which are counted apart; -1: no limit."""
    collective_timeout_s: float = 180.0
    """Seconds that ranks wait for one that stands still before they count it as lost."""
    resize_after_s: float = 60.0
    """With min_workers, seconds between two looks at what the cluster has."""
