"""Answers of a model in the worker's own process, many rows at once in one engine."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cascade_model.chat_template import ChatTemplate
from cascade_model.config import EngineConfig
from cascade_model.errors import InputError
from pipelines.answers import REFUSED, Answered, Result, longest_first
from pipelines.prompt_rows import DeadRow, Prompt
from pipelines.row_settings import Decoding

if TYPE_CHECKING:
    from cascade_model.llm import LLM


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """A model folder and how it is run."""

    model: str
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
        """Load the model; `InputError` where it or its template cannot be used."""
        import torch

        from cascade_model.llm import LLM

        torch.set_num_threads(self.threads)
        return ModelAnswers(LLM.load(self.model, self.engine), self.chat_template)


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
        """See `Answerer`."""
        results: dict[int, Result] = {}
        places: list[int] = []
        requests: list[_Request] = []
        for place in longest_first(prompts):
            try:
                requests.append(self._request(prompts[place]))
                places.append(place)
            except InputError as error:
                results[place] = _dead(prompts[place], "chat_template_fails", error)
        for answer in self._llm.answers(
            [request.tokens for request in requests],
            [request.decoding.params for request in requests],
            [request.decoding.stop for request in requests],
            suffix=[prompts[place].suffix for place in places],
        ):
            place, result = places[answer.index], answer.result
            if isinstance(result, InputError):
                results[place] = _dead(prompts[place], REFUSED, result)
                continue
            results[place] = Answered(
                prompt=requests[answer.index].text,
                completion=result.text,
                num_tokens=len(result.token_ids),
                passes=result.passes,
                finish_reason=result.finish_reason,
            )
        return [results[place] for place in range(len(prompts))]

    def close(self) -> None:
        """End the engine."""
        self._llm.close()

    def _request(self, prompt: Prompt) -> _Request:
        """A chat in the words of the template, its contents as ordinary text; the token that ends
        the template's turns ends the answer, as it does at the endpoint."""
        if prompt.messages is None:
            return _Request(prompt.text, prompt.text, prompt.decoding)
        turns = [
            {**turn, "role": "system" if turn["role"] == "developer" else turn["role"]}
            for turn in prompt.messages
        ]
        chat, params = self._chat, prompt.decoding.params
        tokens = chat.encode([turns], self._llm.tokenizer, open_turn=True).encoded.tokens
        end = chat.turn_end_id
        if params.stop_at_eos and end is not None:
            params = replace(params, stop_ids=(*params.stop_ids, end))
        return _Request(
            chat.prompt(turns), tokens.tolist(), replace(prompt.decoding, params=params)
        )


def _dead(prompt: Prompt, reason: str, error: InputError) -> DeadRow:
    shown = prompt.text if prompt.messages is None else repr(list(prompt.messages))
    return DeadRow(row=prompt.row, reason=reason, input=shown[:200], detail=str(error))
