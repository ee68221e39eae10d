"""What is asked for a row and what comes back, whoever answers: a model here, or an endpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pipelines.prompt_rows import DeadRow, Prompt

REFUSED = "refused"
"""The reason of a row that its answerer did not take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """One completion."""

    prompt: str
    """What was continued, as text."""
    completion: str
    num_tokens: int
    passes: int | None
    """Forward passes; None where the answerer does not tell."""
    finish_reason: str


Result = Answered | DeadRow


class Answerer(Protocol):
    """Answers rows, many at once and from several threads."""

    def answer(self, prompts: Sequence[Prompt]) -> list[Result]:
        """One result a prompt, in their order; a pure function of each prompt alone. `InputError`
        ends the job."""
        ...

    def close(self) -> None:
        """End what runs for it: no more is asked."""
        ...


class Source(Protocol):
    """Where answers come from, in a form that travels to a worker."""

    @property
    def num_cpus(self) -> float:
        """What Ray is to set aside for one worker."""
        ...

    @property
    def num_gpus(self) -> int:
        """The same of GPUs."""
        ...

    @property
    def rows_at_once(self) -> int:
        """Rows that are worked on at the same time."""
        ...

    def open(self) -> Answerer:
        """Load or connect, in the worker; `InputError` where that cannot be done."""
        ...


def longest_first(prompts: Sequence[Prompt]) -> list[int]:
    """The order in which rows are handed over: those with most to write first, of equal ones the
    longest prompt, so that short ones are left to fill up the end. It changes no answer."""

    def length(place: int) -> tuple[int, int, int]:
        prompt = prompts[place]
        chat = sum(len(message["content"]) for message in prompt.messages or ())
        given = len(prompt.text) + len(prompt.suffix or "") + chat
        return -prompt.decoding.params.max_tokens, -given, place

    return sorted(range(len(prompts)), key=length)
