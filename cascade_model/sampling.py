"""The settings of one request: how a completion is decoded. Standard library only."""

import math
from dataclasses import dataclass, replace
from typing import Literal, Self

from cascade_model.config import ModelConfig
from cascade_model.settings import check, check_types

Rule = Literal[
    "confidence_threshold",
    "low_confidence",
    "margin",
    "entropy",
    "random",
    "sequential",
    "factor",
    "entropy_bound",
    "first_hitting",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """One request's decoding settings."""

    max_tokens: int = 64
    """Tokens to generate at most."""
    rule: Rule = "confidence_threshold"
    """Which masked positions a denoising step commits (`unmasking`)."""
    confidence_threshold: float = 0.9
    """confidence_threshold: commit every position whose probability is at least this."""
    factor: float = 1.0
    """factor: commit the r-th best position where its probability is at least 1 - factor/(r+1)."""
    entropy_bound: float = 0.1
    """entropy_bound: commit, lowest entropy first, while the entropies before add up to this."""
    schedule: Literal["even", "linear", "cosine", "exponential"] = "even"
    """How many positions must be committed after each step at least (`schedules`)."""
    steps_per_block: int | None = None
    """Ceiling of K_b, the denoising steps of a block; none: as many as the block has masks."""
    min_steps_per_block: int = 1
    """Floor of K_b, where the block has as many masks."""
    max_steps: int | None = None
    """Denoising steps of the whole completion at most; none: as many as its blocks take. What
    counts is every pass that predicts and writes: also those that mask again (remask_threshold) and
    those that revise a full block (editing_threshold). Prompt and commit passes are no steps, and
    guidance's second pass belongs to the step of the first. When the steps run short, blocks get
    lower ceilings (`budget`), so that more positions are committed a step than the rule asks."""
    deadline_seconds: float | None = None
    """Seconds from submission in which the completion should be whole; none: no limit. The steps
    that are left are estimated from the speed so far; once the time is over, each block that is
    left takes its least, which is one step or min_steps_per_block. The clock decides, so the same
    request need not give the same tokens: the one exception from that promise."""
    block_length: int | None = None
    """bidirectional models: positions decoded together; none: the model's block size."""
    cache: Literal["exact", "prefix", "dual"] = "exact"
    """bidirectional models: exact, or an approximate cache of Fast-dLLM."""
    temperature: float = 0.0
    """Token temperature; 0 takes the most probable token."""
    top_k: int = 0
    """Draw from the this many most probable tokens; 0: all."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens that reaches this probability."""
    token_draw: Literal["inverse", "gumbel"] = "inverse"
    """How a token is drawn: by the inverse of the distribution, or as the maximum of logits plus
    float64 Gumbel noise (LLaDA). The same distribution, other tokens."""
    position_temperature: float = 0.0
    """Gumbel noise on the order of positions: above 0 not always the most confident come first."""
    guidance_scale: float = 0.0
    """Classifier-free guidance; 0: none. Doubles the passes."""
    suppress_eos: Literal["never", "token", "confidence"] = "never"
    """token: end-of-text is never drawn. confidence: it is committed last."""
    remask_threshold: float | None = None
    """Mask a committed position of the current block again, once, when its probability falls below
    this; none: never. LLaDA's published code never does that."""
    editing_threshold: float | None = None
    """Rewrite a committed position of the current block where another token has a probability
    above this (LLaDA2.1); none: never."""
    max_post_steps: int = 16
    """editing: passes that revise a full block, at most."""
    seed: int = 0
    """Randomness is keyed by (seed, choice, block, step)."""
    stop_at_eos: bool = True
    """Whether the model's own end-of-text tokens end the completion."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the completion besides these; the one that did is its last token."""
    logprobs: int | None = None
    """Tell how probable each token was (`text_stream.TokenLogprob`): 0 the token alone, k also the
    k most probable ones of its place, 20 at most; none: nothing is computed."""
    report_margin: bool = False
    """Tell how narrowly the tokens were decided (`text_stream.Completion`)."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("confidence_threshold", "remask_threshold", "editing_threshold"):
            value = getattr(self, name)
            check(value is None or 0.0 <= value <= 1.0, f"{name}={value} must be in 0..1; use 0.9")
        counts = ("max_tokens", "steps_per_block", "min_steps_per_block", "block_length")
        for name in (*counts, "max_steps"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"{name}={value} must be at least 1")
        seconds = self.deadline_seconds
        check(
            seconds is None or 0.0 < seconds < math.inf,
            f"deadline_seconds={seconds} must be above 0 and finite; leave it out for no deadline",
        )
        for name in ("top_k", "max_post_steps", "factor", "entropy_bound"):
            check(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        for name in ("temperature", "position_temperature", "guidance_scale"):
            value = getattr(self, name)
            check(0.0 <= value <= 10.0, f"{name}={value} must be in 0..10")
        check(0.0 < self.top_p <= 1.0, f"top_p={self.top_p} must be above 0 and at most 1")
        check(
            isinstance(self.stop_ids, tuple) and all(type(i) is int for i in self.stop_ids),
            f"stop_ids={self.stop_ids!r} must be a tuple of token ids; use (2,) for one",
        )
        check(-(2**63) <= self.seed < 2**63, f"seed={self.seed} must fit in 64 bits")
        check(
            self.logprobs is None or 0 <= self.logprobs <= 20,
            f"logprobs={self.logprobs} must be in 0..20; use 0 for the chosen tokens alone",
        )
        self._check_together()

    def _check_together(self) -> None:
        """Refuse settings that contradict each other."""
        ceiling = self.steps_per_block
        check(
            ceiling is None or self.min_steps_per_block <= ceiling,
            f"min_steps_per_block={self.min_steps_per_block} is above steps_per_block={ceiling}; "
            "lower it",
        )
        check(
            self.remask_threshold is None or self.editing_threshold is None,
            f"remask_threshold={self.remask_threshold} and editing_threshold="
            f"{self.editing_threshold} both revise committed tokens; choose one",
        )
        check(
            self.rule != "first_hitting" or ceiling is None,
            f"steps_per_block={ceiling} contradicts rule=first_hitting, which takes one position "
            "a step; leave it out",
        )
        check(
            self.rule not in ("sequential", "random", "first_hitting")
            or self.position_temperature == 0,
            f"position_temperature={self.position_temperature} has no meaning with rule="
            f"{self.rule}; use 0",
        )
        check(
            self.rule != "first_hitting" or self.deadline_seconds is None,
            f"deadline_seconds={self.deadline_seconds} contradicts rule=first_hitting, which takes "
            "one position a step however late it is; use rule=random",
        )

    def least_steps(self, masks: int) -> int:
        """Floor of K_b for a block of this many masks."""
        return masks if self.rule == "first_hitting" else min(self.min_steps_per_block, masks)

    def most_steps(self, masks: int) -> int:
        """Ceiling of K_b for a block of this many masks."""
        return min(self.steps_per_block or masks, masks)

    def end_ids(self, config: ModelConfig) -> tuple[int, ...]:
        """Every token that ends the completion."""
        return (config.end_ids if self.stop_at_eos else ()) + self.stop_ids

    def without_end(self) -> Self:
        """The same, ended by no token."""
        return replace(self, stop_at_eos=False, stop_ids=())
