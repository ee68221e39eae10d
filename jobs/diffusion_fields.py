"""How a choice is decoded, as fields of a request: the engine's own settings beyond OpenAI's.

Each is a field of `SamplingParams` under the same name, with its bounds; left out or null it takes
the engine's default, which its description tells. What a model cannot do, and what contradicts, is
refused before it is decoded.
"""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cascade_model.sampling import Rule, SamplingParams

Share = Annotated[float, Field(ge=0, le=1)]
Ten = Annotated[float, Field(ge=0, le=10)]
Steps = Annotated[int, Field(ge=1, le=4096)]
_DEFAULTS = {each.name: each.default for each in dataclasses.fields(SamplingParams)}


def _setting(name: str, told: str) -> Any:
    """An optional field, described with the engine's own default where it has one."""
    default = _DEFAULTS[name]
    if default is True:
        told = f"{told} Default: true."
    elif default not in (None, ()):
        told = f"{told} Default: {default}."
    return Field(None, description=told)


class DiffusionFields(BaseModel):
    """The fields of denoising; all optional."""

    model_config = ConfigDict(extra="forbid", strict=True)

    rule: Rule | None = _setting("rule", "Which masked places a denoising step fills.")
    confidence_threshold: Share | None = _setting(
        "confidence_threshold", "Of rule confidence_threshold: fill places at least this probable."
    )
    factor: Annotated[float, Field(ge=0, le=1e6)] | None = _setting(
        "factor",
        "Of rule factor: fill the r-th best place where its probability is at least "
        "1 - factor/(r+1).",
    )
    entropy_bound: Annotated[float, Field(ge=0, le=1e6)] | None = _setting(
        "entropy_bound",
        "Of rule entropy_bound: fill places, lowest entropy first, while the entropies before add "
        "up to this.",
    )
    schedule: Literal["even", "linear", "cosine", "exponential"] | None = _setting(
        "schedule", "How many places must be filled after each step at least."
    )
    steps_per_block: Steps | None = _setting(
        "steps_per_block", "Ceiling of the denoising steps of a block; left out: its masks."
    )
    min_steps_per_block: Steps | None = _setting(
        "min_steps_per_block", "Floor of the denoising steps of a block."
    )
    max_steps: Annotated[int, Field(ge=1, lt=2**31)] | None = _setting(
        "max_steps", "Budget: denoising steps of one whole choice at most."
    )
    deadline_seconds: Annotated[float, Field(gt=0, le=1e6)] | None = _setting(
        "deadline_seconds",
        "Budget: seconds in which a choice should be whole, from when a sampler has it. The clock "
        "decides, so the same seed need not give the same text.",
    )
    block_length: Annotated[int, Field(ge=1, le=2**20)] | None = _setting(
        "block_length", "Bidirectional models: places decoded together; left out: the model's."
    )
    cache: Literal["exact", "prefix", "dual"] | None = _setting(
        "cache", "Bidirectional models: exact, or an approximate cache."
    )
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = _setting(
        "top_k", "Draw from this many most probable tokens; 0: from all."
    )
    token_draw: Literal["inverse", "gumbel"] | None = _setting(
        "token_draw",
        "How a token is drawn: by the inverse of the distribution, or by Gumbel noise.",
    )
    position_temperature: Ten | None = _setting(
        "position_temperature", "Noise on the order in which places are filled."
    )
    guidance_scale: Ten | None = _setting(
        "guidance_scale", "Classifier-free guidance, which doubles the passes; 0: none."
    )
    suppress_eos: Literal["never", "token", "confidence"] | None = _setting(
        "suppress_eos",
        "token: end of text is never drawn; confidence: it is filled in last.",
    )
    remask_threshold: Share | None = _setting(
        "remask_threshold",
        "Mask a filled place of the current block again, once, when its probability falls below "
        "this; left out: never.",
    )
    editing_threshold: Share | None = _setting(
        "editing_threshold",
        "Rewrite a filled place of the current block where another token's probability is above "
        "this; left out: never.",
    )
    max_post_steps: Annotated[int, Field(ge=0, le=256)] | None = _setting(
        "max_post_steps", "Of editing: passes that revise a full block, at most."
    )
    stop_at_eos: bool | None = _setting(
        "stop_at_eos", "Whether the model's own end-of-text tokens end a choice."
    )
    stop_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=64)] | None = _setting(
        "stop_ids", "Tokens that end a choice, besides the model's own."
    )

    def settings(self) -> dict[str, Any]:
        """Those that the request gives, as `SamplingParams` takes them."""
        given = {name: getattr(self, name) for name in DiffusionFields.model_fields}
        told = {name: value for name, value in given.items() if value is not None}
        return told | ({"stop_ids": tuple(self.stop_ids)} if self.stop_ids is not None else {})
