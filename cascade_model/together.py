"""Many requests decoded together, each answered as soon as it is whole."""

import contextlib
import queue
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from cascade_model.engine import Engine, Event, Ticket
from cascade_model.errors import InputError
from cascade_model.sampler import DecodedBlock
from cascade_model.sampling import SamplingParams
from cascade_model.settings import check
from cascade_model.text_stream import Chunk, Completion, TextStream, complete

Key = tuple[int, int]  # request and choice
Request = tuple[list[int], bool]  # tokens to decode, and whether they have holes to fill


@dataclass(frozen=True, slots=True)
class Answer:
    """One of many completions, as soon as it is whole."""

    index: int
    """Which prompt."""
    choice: int
    """Which of its completions, from 0."""
    result: Completion | InputError
    """The error is the request's own: it could not be decoded."""


def together(
    engine: Engine,
    decode: Callable[[Sequence[int]], str],
    tokens_of: Callable[[Any, SamplingParams], Request],
    requests: Sequence[Any],
    params: SamplingParams | Sequence[SamplingParams],
    stop: Sequence[str] | Sequence[Sequence[str]],
    n: int,
) -> Generator[Answer, None, None]:
    """Submit `n` choices of every request, and give each as soon as it is whole.

    `tokens_of` makes of a request and its settings what is decoded; its `InputError` is the
    request's own. `params` is shared or one a request, `stop` texts for all or a list a request.
    Raises `InputError` where these do not fit together.
    """
    check(type(n) is int and n >= 1, f"n={n!r} must be a whole number of at least 1")
    each = [params] * len(requests) if isinstance(params, SamplingParams) else params
    check(
        isinstance(each, Sequence) and all(isinstance(own, SamplingParams) for own in each),
        f"params={repr(params)[:60]} must be SamplingParams, or a list with one a prompt",
    )
    check(
        len(each) == len(requests),
        f"params has {len(each)} settings for {len(requests)} prompts; give one for all, or "
        "one a prompt",
    )
    stops = _stops_each(stop, len(requests))
    events: queue.SimpleQueue[tuple[Key, Event]] = queue.SimpleQueue()
    tickets: dict[Key, Ticket] = {}
    texts: dict[Key, TextStream] = {}
    chunks: dict[Key, list[Chunk]] = {}
    try:
        for index, (request, own) in enumerate(zip(requests, each, strict=True)):
            known: Request | None = None
            for choice in range(n):
                key = (index, choice)
                try:
                    known = known or tokens_of(request, own)
                    tickets[key] = engine.submit(
                        known[0],
                        own,
                        choice,
                        lambda event, key=key: events.put((key, event)),
                        has_holes=known[1],
                    )
                except InputError as error:
                    yield Answer(index, choice, error)
                    continue
                texts[key], chunks[key] = TextStream(decode, stops[index]), []
        while texts:
            key, event = events.get()
            if key not in texts:  # decoded on before its end was heard of
                continue
            if isinstance(event, InputError):
                del texts[key], tickets[key]
                yield Answer(*key, event)
                continue
            block = block_of(event)
            chunk = chunk_of(texts[key], block)
            chunks[key].append(chunk)
            if chunk.finish_reason is not None:
                tickets.pop(key).cancel()
                del texts[key]
                yield Answer(*key, complete(iter(chunks.pop(key))))
    finally:
        for ticket in tickets.values():
            ticket.cancel()


def in_order(answers: Generator[Answer, None, None]) -> list[Completion]:
    """Prompt by prompt, choice by choice; the first refusal is raised and ends the others."""
    found: dict[Key, Completion] = {}
    with contextlib.closing(answers):
        for answer in answers:
            if isinstance(answer.result, InputError):
                raise InputError(f"prompts[{answer.index}]: {answer.result}") from None
            found[answer.index, answer.choice] = answer.result
    return [found[key] for key in sorted(found)]


def _stops_each(
    stop: Sequence[str] | Sequence[Sequence[str]], count: int
) -> Sequence[Sequence[str]]:
    """The stop texts of each prompt."""
    is_each = not isinstance(stop, str) and bool(stop)
    if not is_each or not all(isinstance(own, list | tuple) for own in stop):
        return [stop] * count  # type: ignore[list-item]
    check(
        len(stop) == count,
        f"stop has {len(stop)} lists for {count} prompts; give texts for all, or a list a prompt",
    )
    return stop


def block_of(event: Event) -> DecodedBlock:
    """A block, or its error raised."""
    if isinstance(event, BaseException):
        raise event
    return event


def chunk_of(text: TextStream, block: DecodedBlock) -> Chunk:
    return text.push(
        block.tokens,
        passes=block.passes,
        steps=block.steps,
        finish_reason=block.finish_reason,
        stop_reason=block.stop_reason,
        logprobs=block.logprobs,
        margin=block.margin,
    )
