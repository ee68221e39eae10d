"""The settings of `generate`, and which of them make another job of it."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from cascade_model.engine_config import EngineConfig
from cascade_model.sampling import SamplingParams
from cascade_model.settings import check, to_dict
from pipelines.row_settings import NAMES

_SAME_ANSWER = {
    "model",
    "endpoint",
    "model_name",
    "chat_template",
    "input",
    "split",
    "subset",
    "output",
    "num_workers",
    "threads_per_worker",
    "requests_in_flight",
    "patience_seconds",
    "max_dead_rate",
    "engine",
}
"""How the work is shared out, and what `job_identity` has by its content instead."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Complete every prompt of the input, exactly once; run it again to go on after a stop."""

    model: str = ""
    """Model folder (weights, config, tokenizer, manifest)."""
    endpoint: str = ""
    """URL of a running OpenAI-compatible endpoint, asked instead of a model here. Its API key is
    taken from the variable CASCADE_API_KEY."""
    model_name: str = ""
    """With endpoint: the model's name there; none: the only one it serves."""
    input: str
    """JSONL, Parquet or Arrow file of prompts, a folder of them or one written by Hugging Face
    `datasets`, each also as an fsspec URL; or hub:OWNER/NAME, a dataset of the Hugging Face hub."""
    split: str | None = None
    """Split of a Hugging Face dataset; none: the only one of a folder."""
    subset: str | None = None
    """Subset (configuration) of a dataset of the hub, where it has several."""
    output: str
    """Folder or fsspec URL for the completions."""
    prompt_column: str = "prompt"
    """Column with the text to continue."""
    messages_column: str = "messages"
    """Column with a chat, used where the prompt column is missing."""
    suffix_column: str = "suffix"
    """Column with what follows the completion, for a model that was trained to fill holes
    (infill=psm); it may be missing."""
    id_column: str = "id"
    """Column that is carried along; where it is missing, the row's number."""
    params_column: str = "params"
    """Column with a row's own settings, an object such as {"temperature": 0.7, "stop": ["END"]} of
    the names below sampling and of stop; it may be missing."""
    setting_columns: tuple[str, ...] = ()
    """Columns that are such settings themselves, under their own names; null: the job's."""
    chat_template: str | None = None
    """How chats become text: plain, chatml, or a Jinja template or its file; none: the model
    folder's own, else plain. An endpoint has its own."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """Decoding settings of rows that have none of their own; a row's seed is its own, or derived
    from sampling.seed and its number."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion; they are not part of it."""
    format: Literal["jsonl", "parquet"] = "jsonl"
    """Format of the output shards."""
    rows_per_shard: int = 64
    """Prompts per output shard: the unit of retry."""
    max_dead_rate: float = 0.01
    """Share of rows that cannot be answered above which the job stops instead of setting them
    aside; the same job may go on with another share."""
    num_workers: int = 1
    """Actors, each holding the model once, or asking the endpoint."""
    threads_per_worker: int | None = None
    """Torch threads of an actor; none: the cores divided by the actors."""
    requests_in_flight: int = 32
    """With endpoint: requests of an actor at once."""
    patience_seconds: float = 120.0
    """With endpoint: so long may it fail, or refuse as busy without answering anybody, before the
    job stops (code 75), to be run again."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """The decode engine of an actor."""

    def __post_init__(self) -> None:
        for name in ("rows_per_shard", "num_workers", "requests_in_flight"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        check(
            0.0 <= self.max_dead_rate <= 1.0,
            f"max_dead_rate={self.max_dead_rate} must be in 0..1; use 0.01",
        )
        threads = self.threads_per_worker
        check(
            threads is None or threads >= 1,
            f"threads_per_worker={threads} must be at least 1, or left out",
        )
        unknown = [name for name in self.setting_columns if name not in NAMES]
        check(
            not unknown,
            f"setting_columns={unknown[:1]} is no setting of a row; known are {', '.join(NAMES)}",
        )
        self._check_source()
        self._check_sampling()

    def _check_source(self) -> None:
        """One of model and endpoint, and no setting of the other."""
        check(
            bool(self.model) != bool(self.endpoint),
            f"model={self.model or None} and endpoint={self.endpoint or None}: give one of them, a "
            "model folder or the URL of an endpoint",
        )
        check(
            self.patience_seconds > 0,
            f"patience_seconds={self.patience_seconds} must be above 0; use 120",
        )
        check(
            not (self.endpoint and self.chat_template),
            f"chat_template={self.chat_template} and endpoint={self.endpoint}, which has a "
            "template of its own; leave one of them out",
        )
        check(
            not (self.model and self.model_name),
            f"model_name={self.model_name} is a name at an endpoint; leave it out with a model",
        )

    def _check_sampling(self) -> None:
        """Nothing that makes another output each time, or that no column holds."""
        seconds = self.sampling.deadline_seconds
        check(
            seconds is None,
            f"sampling.deadline_seconds={seconds} lets the clock decide, and a shard that is made "
            "again must have the same bytes; use sampling.max_steps",
        )
        for name in ("logprobs", "report_margin"):
            value = getattr(self.sampling, name)
            check(
                value is None or value is False,
                f"sampling.{name}={value} is not written to the output; leave it out",
            )


def job_identity(
    config: GenerateConfig, answerer: dict[str, Any], input_sha256: str
) -> dict[str, Any]:
    """What the completions depend on; an output folder belongs to one such job.

    `answerer` tells the weights that answer, and what else of them counts.
    """
    settings = {key: value for key, value in to_dict(config).items() if key not in _SAME_ANSWER}
    # Through JSON, so that it compares equal to what is read back.
    return json.loads(json.dumps({**settings, **answerer, "input_sha256": input_sha256}))
