"""A model of ours as a processor of `ray.data.llm`.

    from ray.data.llm import build_processor
    from jobs.ray_data_llm import CascadeProcessorConfig

    config = CascadeProcessorConfig(model="model-folder", concurrency=2, batch_size=64)
    processor = build_processor(config, preprocess=..., postprocess=...)
    answers = processor(ray.data.read_json("prompts.jsonl"))

After `preprocess` a row has `prompt` or `messages`, and perhaps `suffix` and `sampling_params`. It
gains `generated_text`, `num_generated_tokens`, `passes`, `finish_reason` and `seed`, which is the
row's own, or made of the job's and of what the row asks: equal rows get equal answers. None of it
needs vllm. It is a step of a dataflow of yours: what makes `cascade generate` exactly-once, the
commit of shards, is not in it.
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from pydantic import Field
from ray.data import ActorPoolStrategy
from ray.data.block import UserDefinedFunction
from ray.data.llm import Processor, ProcessorConfig
from ray.llm._internal.batch.processor import ProcessorBuilder
from ray.llm._internal.batch.stages import StatefulStage
from ray.llm._internal.batch.stages.base import StatefulStageUDF

from cascade_model.engine_config import EngineConfig
from cascade_model.errors import InputError
from cascade_model.own_template import text_of
from cascade_model.sampling import SamplingParams
from cascade_model.weights import weights_digest
from jobs.cli import build
from jobs.launch import absolute
from pipelines.answers import Result
from pipelines.model_answers import ModelSource
from pipelines.prompt_rows import Columns, DeadRow, DeadRowError, Prompt, prompt_of
from pipelines.row_settings import Decoding, decoding_of

ERROR = "__inference_error__"
"""Ray's own name for what went wrong with a row; such a row skips `postprocess`."""
_COLUMNS = Columns(params="sampling_params")
_EMPTY = {
    "generated_text": "",
    "num_generated_tokens": 0,
    "passes": 0,
    "finish_reason": "",
    "seed": 0,
}


class CascadeProcessorConfig(ProcessorConfig):
    """Settings of the processor; `batch_size`, `concurrency` and `accelerator_type` are Ray's."""

    model: str = Field(description="Model folder.")
    chat_template: str | None = Field(
        None, description="plain, chatml or a Jinja template; none: the model's own, else plain."
    )
    sampling_params: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings of rows that have none of their own: the names below `sampling` of "
        "`cascade generate`, and `stop`.",
    )
    engine: dict[str, Any] = Field(
        default_factory=dict, description="Settings of the decode engine, as below `engine` there."
    )
    threads: int = Field(1, ge=1, description="Torch threads and CPUs of an actor.")
    batches_at_once: int = Field(
        2,
        ge=1,
        description="Batches of an actor at once: one fills the places another leaves.",
    )
    should_continue_on_error: bool = Field(
        False,
        description=f"Set rows aside that cannot be answered, the reason in `{ERROR}`; else the "
        "first one ends the dataflow.",
    )


class CascadeUDF(StatefulStageUDF):
    """The actor: holds the model and answers batches."""

    def __init__(
        self,
        data_column: str,
        expected_input_keys: list[str],
        source: ModelSource,
        common: Decoding,
        should_continue_on_error: bool,
    ) -> None:
        super().__init__(data_column, expected_input_keys)
        self._answerer, self._common = source.open(), common
        self._goes_on = should_continue_on_error

    async def udf(  # type: ignore[override] - Ray's own stages are such generators too
        self, rows: list[dict[str, Any]]
    ) -> AsyncIterator[dict[str, Any]]:
        """What each row gains."""
        gained = await asyncio.to_thread(self._answers, rows)
        for row, own in zip(rows, gained, strict=True):
            yield {self.IDX_IN_BATCH_COLUMN: row[self.IDX_IN_BATCH_COLUMN], **own}

    def _answers(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        read = [self._read(row) for row in rows]
        prompts = [each for each in read if isinstance(each, Prompt)]
        answers = iter(zip(prompts, self._answerer.answer(prompts), strict=True))
        return [
            self._told(*next(answers)) if isinstance(each, Prompt) else self._failed(each)
            for each in read
        ]

    def _read(self, row: dict[str, Any]) -> Prompt | DeadRow:
        """The row as a prompt; its number is made of what it asks, as a dataset numbers no rows."""
        asked = {name: _plain(row[name]) for name in sorted(_COLUMNS.all) if name in row}
        try:
            spelt = json.dumps(asked, sort_keys=True, default=repr)
            number = int.from_bytes(hashlib.sha256(spelt.encode()).digest()[:8], "little")
            return prompt_of(number, asked, _COLUMNS, self._common)
        except DeadRowError as error:
            shown = repr(asked)[:200]
            return DeadRow(row=0, reason=error.reason, input=shown, detail=error.detail)

    def _told(self, prompt: Prompt, result: Result) -> dict[str, Any]:
        if isinstance(result, DeadRow):
            return self._failed(result)
        return {
            "generated_text": result.completion,
            "num_generated_tokens": result.num_tokens,
            "passes": result.passes,
            "finish_reason": result.finish_reason,
            "seed": prompt.decoding.params.seed,
            ERROR: "",
        }

    def _failed(self, dead: DeadRow) -> dict[str, Any]:
        sentence = f"{dead.reason}: {dead.detail}".rstrip(": ")
        if not self._goes_on:
            raise InputError(
                f"a row cannot be answered ({sentence}): {dead.input}; mend it or set "
                "should_continue_on_error"
            )
        return {**_EMPTY, ERROR: sentence}


class CascadeStage(StatefulStage):
    """The one stage: text to text, as the tokenizer and the template belong to the model."""

    fn: type[StatefulStageUDF] = CascadeUDF

    def get_optional_input_keys(self) -> dict[str, str]:
        """What a row may have; one of the first two it must."""
        return {
            "prompt": "A text to continue.",
            "messages": "A chat to answer: a list of role and content.",
            "suffix": "What follows the completion.",
            "sampling_params": "Settings of the row's own.",
        }


def build_cascade_processor(
    config: CascadeProcessorConfig,
    preprocess: UserDefinedFunction | None = None,
    postprocess: UserDefinedFunction | None = None,
    preprocess_map_kwargs: dict[str, Any] | None = None,
    postprocess_map_kwargs: dict[str, Any] | None = None,
) -> Processor:
    """What `build_processor` calls for a `CascadeProcessorConfig`.

    `InputError` for settings that cannot work.
    """
    engine = build(EngineConfig, config.engine, "engine")
    common = decoding_of(
        0, {"seed": 0, **config.sampling_params}, Decoding(params=SamplingParams())
    )
    source = ModelSource(
        model=absolute(config.model),
        weights_sha256=weights_digest(config.model),
        chat_template=text_of(config.model, config.chat_template),
        threads=config.threads,
        engine=engine,
    )
    sizes: dict[str, Any] = {**config.get_concurrency(autoscaling_enabled=False)}
    stage = CascadeStage(
        fn_constructor_kwargs={
            "source": source,
            "common": common,
            "should_continue_on_error": config.should_continue_on_error,
        },
        map_batches_kwargs={
            "num_cpus": source.num_cpus,
            "num_gpus": source.num_gpus,
            "accelerator_type": config.accelerator_type,
            "compute": ActorPoolStrategy(
                **sizes,
                max_tasks_in_flight_per_actor=config.batches_at_once,
                max_concurrent_calls_per_actor=config.batches_at_once,
            ),
        },
    )
    return Processor(
        config,
        [stage],
        preprocess=preprocess,
        postprocess=postprocess,
        preprocess_map_kwargs=preprocess_map_kwargs,
        postprocess_map_kwargs=postprocess_map_kwargs,
    )


def _plain(value: Any) -> Any:
    """A cell without numpy's types, in which Ray Data hands nested values over."""
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


ProcessorBuilder.register(CascadeProcessorConfig, build_cascade_processor)
