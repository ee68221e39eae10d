"""The decode engine: a loaded model that many threads, or one event loop, ask for completions.

One thread of its own runs rounds of the scheduler; everybody else only leaves requests and takes
blocks. The same request gives the same tokens, whatever else is running.
"""

import asyncio
import contextlib
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from cascade_model.config import ModelConfig, SamplingParams
from cascade_model.errors import InputError
from cascade_model.networks import Network
from cascade_model.sampler import DecodedBlock, plan_completion
from cascade_model.scheduler import Counters, Running, Scheduler, SchedulerConfig
from cascade_model.text_stream import Chunk, Completion, TextStream, complete
from cascade_model.tokenizer import Tokenizer
from cascade_model.weights import load_model, require_text

Event = DecodedBlock | BaseException
Prompt = str | Sequence[int]


class Ticket:
    """A request in the engine; `cancel` frees its pages before the next round."""

    def __init__(self, engine: "Engine", deliver: Callable[[Event], None]) -> None:
        self._engine, self.deliver = engine, deliver
        self.sequence: Running | None = None
        self.is_over = False

    def cancel(self) -> None:
        """From any thread, any number of times; nothing more is delivered soon after."""
        with contextlib.suppress(RuntimeError):  # a closed engine has forgotten it
            self._engine.order(lambda: self._engine.forget(self))


class Engine:
    """A scheduler and the thread that runs it."""

    def __init__(self, model: Network, config: SchedulerConfig | None = None) -> None:
        self.scheduler = Scheduler(model, config)
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}
        self._thread = threading.Thread(target=self._run, name="decode-engine", daemon=True)
        self._start = threading.Lock()
        self._is_closed = False

    def submit(
        self,
        prompt_tokens: Sequence[int],
        params: SamplingParams,
        choice: int,
        deliver: Callable[[Event], None],
    ) -> Ticket:
        """Leave a request; `deliver` gets its blocks, or the error that ends it, in the engine's
        thread. Raises `InputError` here for what cannot be decoded."""
        model = self.scheduler.model
        device = next(model.parameters()).device
        plan = plan_completion(model.config, list(prompt_tokens), params, choice, device)
        self.scheduler.check(plan)
        ticket = Ticket(self, deliver)

        def begin() -> None:
            self._tickets[id(ticket)] = ticket
            ticket.sequence = self.scheduler.submit(
                plan,
                lambda block: self._hand(ticket, block),
                lambda error: self._end(ticket, error),
            )

        self.order(begin)
        return ticket

    def order(self, action: Callable[[], None]) -> None:
        """Have the engine's thread do something between two rounds."""
        with self._start:
            if self._is_closed:
                raise RuntimeError("the engine is closed")
            if self._thread.ident is None:
                self._thread.start()
            self._orders.put(action)

    def forget(self, ticket: Ticket) -> None:
        """In the engine's thread: end a request."""
        self._tickets.pop(id(ticket), None)
        if ticket.sequence is not None and not ticket.is_over:
            self.scheduler.cancel(ticket.sequence)
        ticket.is_over = True

    def close(self) -> None:
        """End the thread; requests that still run get an error, and none is taken any more."""
        with self._start:
            self._is_closed = True
            self._orders.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    def _hand(self, ticket: Ticket, block: DecodedBlock) -> None:
        if block.finish_reason is not None:
            ticket.is_over = True
            self._tickets.pop(id(ticket), None)
        ticket.deliver(block)

    def _run(self) -> None:
        is_busy = False
        while self._obey(is_busy):
            try:
                is_busy = self.scheduler.step()
            except Exception as error:
                self._fail(error)
                is_busy = False
        self._fail(RuntimeError("the engine was closed"))

    def _obey(self, is_busy: bool) -> bool:
        """Carry out what was left; wait for it where there is nothing else to do."""
        try:
            while True:
                action = self._orders.get(block=not is_busy)
                if action is None:
                    return False
                action()
                is_busy = True
        except queue.Empty:
            return True

    def _fail(self, error: Exception) -> None:
        """A round that failed ends every request with its error; the engine lives on."""
        for ticket in list(self._tickets.values()):
            self.forget(ticket)
            self._end(ticket, error)

    def _end(self, ticket: Ticket, error: Exception) -> None:
        """Tell a request of its error, if anybody still listens."""
        ticket.is_over = True
        self._tickets.pop(id(ticket), None)
        with contextlib.suppress(Exception):
            ticket.deliver(error)


@dataclass(frozen=True, slots=True)
class Answer:
    """One of many completions, as soon as it is whole."""

    index: int
    """Which prompt."""
    result: Completion | InputError
    """The error is the request's own: it could not be decoded."""


class LLM:
    """A model, its tokenizer and an engine."""

    def __init__(
        self, model: Network, tokenizer: Tokenizer, config: SchedulerConfig | None = None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.config: ModelConfig = model.config
        self.engine = Engine(model, config)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        config: SchedulerConfig | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> Self:
        """Load a model folder, of ours or published; `CheckpointMismatch` if it is damaged."""
        model, tokenizer = load_model(folder, dtype, device)
        return cls(model.eval(), require_text(tokenizer, folder), config)

    @property
    def counters(self) -> Counters:
        """What the engine did so far."""
        return replace(self.engine.scheduler.counters)

    def blocks(
        self, prompt_tokens: Sequence[int], params: SamplingParams, choice: int = 0
    ) -> Iterator[DecodedBlock]:
        """Decode block by block; leaving early, or dropping the iterator, ends the decoding."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        ticket = self.engine.submit(prompt_tokens, params, choice, events.put)
        blocks = _until_finished(ticket, events)
        weakref.finalize(blocks, ticket.cancel)
        return blocks

    async def stream_blocks(
        self, prompt_tokens: Sequence[int], params: SamplingParams, choice: int = 0
    ) -> AsyncIterator[DecodedBlock]:
        """The same for an event loop; a cancelled task ends the decoding."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def deliver(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        ticket = self.engine.submit(prompt_tokens, params, choice, deliver)
        try:
            while True:
                block = _checked(await events.get())
                yield block
                if block.finish_reason is not None:
                    return
        finally:
            ticket.cancel()

    def stream(
        self, prompt: Prompt, params: SamplingParams, stop: Sequence[str] = (), choice: int = 0
    ) -> Iterator[Chunk]:
        """Chunks of text, one a block; decoding ends as soon as a stop string is complete."""
        text = TextStream(self.tokenizer.decode, stop)
        blocks = self.blocks(self._tokens(prompt), params, choice)
        try:
            for block in blocks:
                chunk = _chunk(text, block)
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            blocks.close()  # type: ignore[attr-defined]

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        stop: Sequence[str] = (),
    ) -> list[Completion]:
        """One completion a prompt, in order; `params` is shared or one a prompt.

        Raises `InputError` when a prompt cannot be decoded.
        """
        found: dict[int, Completion] = {}
        for answer in self.answers(prompts, params, stop):
            if isinstance(answer.result, InputError):
                raise answer.result
            found[answer.index] = answer.result
        return [found[index] for index in range(len(prompts))]

    def answers(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        stop: Sequence[str] = (),
    ) -> Iterator[Answer]:
        """Completions as they become whole, all prompts decoding together."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        tickets: dict[int, Ticket] = {}
        texts: dict[int, TextStream] = {}
        chunks: dict[int, list[Chunk]] = {}
        try:
            for index, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
                try:
                    tickets[index] = self.engine.submit(
                        self._tokens(prompt), own, 0, lambda event, i=index: events.put((i, event))
                    )
                except InputError as error:
                    yield Answer(index, error)
                    continue
                texts[index], chunks[index] = TextStream(self.tokenizer.decode, stop), []
            while texts:
                index, event = events.get()
                block = _checked(event)
                if index not in texts:  # decoded on before its end was heard of
                    continue
                chunk = _chunk(texts[index], block)
                chunks[index].append(chunk)
                if chunk.finish_reason is not None:
                    tickets.pop(index).cancel()
                    del texts[index]
                    yield Answer(index, complete(iter(chunks.pop(index))))
        finally:
            for ticket in tickets.values():
                ticket.cancel()

    def close(self) -> None:
        """End the engine's thread."""
        self.engine.close()

    def _tokens(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)


def _until_finished(ticket: Ticket, events: "queue.SimpleQueue[Event]") -> Iterator[DecodedBlock]:
    try:
        while True:
            block = _checked(events.get())
            yield block
            if block.finish_reason is not None:
                return
    finally:
        ticket.cancel()


def _checked(event: Event) -> DecodedBlock:
    """A block, or its error raised."""
    if isinstance(event, BaseException):
        raise event
    return event


def _chunk(text: TextStream, block: DecodedBlock) -> Chunk:
    return text.push(
        block.tokens,
        passes=block.passes,
        steps=block.steps,
        finish_reason=block.finish_reason,
        logprobs=block.logprobs,
        margin=block.margin,
    )
