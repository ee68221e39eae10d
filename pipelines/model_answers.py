"""Answers of a model in the worker's own process, many rows at once in one engine."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cascade_model.chat_template import ChatTemplate, as_templates_say
from cascade_model.engine_config import EngineConfig
from cascade_model.errors import DoesNotFit, InputError, Unfinished
from cascade_model.settings import shown
from pipelines.answers import REFUSED, Answered, Result, longest_first
from pipelines.prompt_rows import DeadRow, Prompt
from pipelines.row_settings import Decoding

if TYPE_CHECKING:
    from cascade_model.llm import LLM
    from cascade_model.text_stream import Completion


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """A model folder and how it is run."""

    model: str
    weights_sha256: str | None = None
    """The job's weights (`weights_digest`); none: whatever the folder holds."""
    chat_template: str = "plain"
    """`plain`, `chatml`, or a Jinja template's text."""
    threads: int = 1
    """Torch threads of a worker."""
    engine: EngineConfig = field(default_factory=EngineConfig)

    @property
    def num_cpus(self) -> float:
        """A core a thread."""
        return self.threads

    @property
    def num_gpus(self) -> int:
        """As the engine asks."""
        return self.engine.num_gpus

    @property
    def rows_at_once(self) -> int:
        """The engine's places."""
        return self.engine.max_sequences

    def open(self) -> "ModelAnswers":
        """Load the model; `InputError` where it or its template cannot be used, `Unfinished` where
        its weights are not the job's."""
        import torch

        from cascade_model.llm import LLM

        torch.set_num_threads(self.threads)
        self._require_same_weights()
        llm = LLM.load(self.model, self.engine)
        self._require_same_weights()  # they may have been replaced meanwhile
        return ModelAnswers(llm, self.chat_template)

    def _require_same_weights(self) -> None:
        from cascade_model.weights import weights_digest

        if self.weights_sha256 is None:
            return
        found = weights_digest(self.model)
        if found != self.weights_sha256:
            raise Unfinished(
                f"model={self.model} has the weights {shown(found)} and this job began with "
                f"{shown(self.weights_sha256)}; put those back and run the same command again, or "
                "give another output"
            )


@dataclass(frozen=True, slots=True)
class _Request:
    """A row as the engine takes it."""

    text: str
    tokens: str | list[int]
    decoding: Decoding


class ModelAnswers:
    """A loaded model that answers rows."""

    def __init__(self, llm: "LLM", chat_template: str = "plain") -> None:
        self._llm = llm
        self._chat = ChatTemplate.of(chat_template, llm.tokenizer)

    def answer(self, prompts: Sequence[Prompt]) -> list[Result]:
        """See `Answerer`. `Unfinished` for a row that the engine's cache cannot hold: that is no
        fault of the row, whose answer depends on no setting of the cache."""
        results: dict[int, Result] = {}
        places: list[int] = []
        requests: list[_Request] = []
        for place in longest_first(prompts):
            try:
                requests.append(self._request(prompts[place]))
                places.append(place)
            except InputError as error:
                results[place] = _dead(prompts[place], "chat_template_fails", error)
        answers = self._llm.answers(
            [request.tokens for request in requests],
            [request.decoding.params for request in requests],
            [request.decoding.stop for request in requests],
            suffix=[prompts[place].suffix for place in places],
        )
        with contextlib.closing(answers):  # whatever is still decoded then ends
            for answer in answers:
                place = places[answer.index]
                results[place] = _result(prompts[place], requests[answer.index], answer.result)
        return [results[place] for place in range(len(prompts))]

    def close(self) -> None:
        """End the engine."""
        self._llm.close()

    def _request(self, prompt: Prompt) -> _Request:
        """A chat in the words of the template, its contents as ordinary text; the token that ends
        the template's turns ends the answer, as it does at the endpoint."""
        if prompt.messages is None:
            return _Request(prompt.text, prompt.text, prompt.decoding)
        turns = [{**turn, "role": as_templates_say(turn["role"])} for turn in prompt.messages]
        chat, params = self._chat, prompt.decoding.params
        tokens = chat.encode([turns], self._llm.tokenizer, open_turn=True).encoded.tokens
        end = chat.turn_end_id
        if params.stop_at_eos and end is not None:
            params = replace(params, stop_ids=(*params.stop_ids, end))
        return _Request(
            chat.prompt(turns), tokens.tolist(), replace(prompt.decoding, params=params)
        )


def _result(prompt: Prompt, request: _Request, result: "Completion | InputError") -> Result:
    if isinstance(result, DoesNotFit):
        raise Unfinished(
            f"engine.cache_bytes is too small for row {prompt.row}: {result} and run the same "
            "command again, which goes on from here"
        )
    if isinstance(result, InputError):
        return _dead(prompt, REFUSED, result)
    return Answered(
        prompt=request.text,
        completion=result.text,
        num_tokens=len(result.token_ids),
        passes=result.passes,
        finish_reason=result.finish_reason,
    )


def _dead(prompt: Prompt, reason: str, error: InputError) -> DeadRow:
    text = prompt.text if prompt.messages is None else repr(list(prompt.messages))
    return DeadRow(row=prompt.row, reason=reason, input=text[:200], detail=str(error))
