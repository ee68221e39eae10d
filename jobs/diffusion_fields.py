"""How a choice is decoded, as fields of a request: the engine's own settings beyond OpenAI's.

Each is a field of `SamplingParams` under the same name, with its bounds; left out or null it takes
the engine's default. What a model cannot do, and what contradicts, is refused before it is decoded.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cascade_model.sampling import Rule

Share = Annotated[float, Field(ge=0, le=1)]
Ten = Annotated[float, Field(ge=0, le=10)]
Steps = Annotated[int, Field(ge=1, le=4096)]


class DiffusionFields(BaseModel):
    """The fields of denoising; all optional."""

    model_config = ConfigDict(extra="forbid", strict=True)

    rule: Rule | None = Field(
        None,
        description="Which masked places a denoising step fills. Default: confidence_threshold.",
    )
    confidence_threshold: Share | None = Field(
        None,
        description="Of rule confidence_threshold: fill places at least this probable. "
        "Default: 0.9.",
    )
    factor: Annotated[float, Field(ge=0, le=1e6)] | None = Field(
        None,
        description="Of rule factor: fill the r-th best place where its probability is at least "
        "1 - factor/(r+1). Default: 1.",
    )
    entropy_bound: Annotated[float, Field(ge=0, le=1e6)] | None = Field(
        None,
        description="Of rule entropy_bound: fill places, lowest entropy first, while the entropies "
        "before add up to this. Default: 0.1.",
    )
    schedule: Literal["even", "linear", "cosine", "exponential"] | None = Field(
        None,
        description="How many places must be filled after each step at least. Default: even.",
    )
    steps_per_block: Steps | None = Field(
        None, description="Ceiling of the denoising steps of a block. Default: its masks."
    )
    min_steps_per_block: Steps | None = Field(
        None, description="Floor of the denoising steps of a block. Default: 1."
    )
    max_steps: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        None, description="Budget: denoising steps of one whole choice at most."
    )
    deadline_seconds: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        None,
        description="Budget: seconds in which a choice should be whole, from when a sampler has "
        "it. The clock decides, so the same seed need not give the same text.",
    )
    block_length: Annotated[int, Field(ge=1, le=2**20)] | None = Field(
        None, description="Bidirectional models: places decoded together. Default: the model's."
    )
    cache: Literal["exact", "prefix", "dual"] | None = Field(
        None, description="Bidirectional models: exact, or an approximate cache. Default: exact."
    )
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        None, description="Draw from this many most probable tokens. Default: 0, which is all."
    )
    token_draw: Literal["inverse", "gumbel"] | None = Field(
        None,
        description="How a token is drawn: by the inverse of the distribution, or by Gumbel noise. "
        "Default: inverse.",
    )
    position_temperature: Ten | None = Field(
        None, description="Noise on the order in which places are filled. Default: 0."
    )
    guidance_scale: Ten | None = Field(
        None, description="Classifier-free guidance; doubles the passes. Default: 0, which is none."
    )
    suppress_eos: Literal["never", "token", "confidence"] | None = Field(
        None,
        description="token: end of text is never drawn; confidence: it is filled in last. "
        "Default: never.",
    )
    remask_threshold: Share | None = Field(
        None,
        description="Mask a filled place of the current block again, once, when its probability "
        "falls below this. Default: never.",
    )
    editing_threshold: Share | None = Field(
        None,
        description="Rewrite a filled place of the current block where another token's "
        "probability is above this. Default: never.",
    )
    max_post_steps: Annotated[int, Field(ge=0, le=256)] | None = Field(
        None, description="Of editing: passes that revise a full block, at most. Default: 16."
    )
    stop_at_eos: bool | None = Field(
        None, description="Whether the model's own end-of-text tokens end a choice. Default: true."
    )
    stop_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=64)] | None = Field(
        None, description="Tokens that end a choice, besides the model's own."
    )

    def settings(self) -> dict[str, Any]:
        """Those that the request gives, as `SamplingParams` takes them."""
        given = {name: getattr(self, name) for name in DiffusionFields.model_fields}
        told = {name: value for name, value in given.items() if value is not None}
        return told | ({"stop_ids": tuple(self.stop_ids)} if self.stop_ids else {})
