"""A loaded model for people: prompts in, text out, for threads or an event loop.

All of it is decoded together by one engine; here tokens become text and requests become answers.
"""

import asyncio
import contextlib
import operator
import queue
import weakref
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

import torch

from cascade_model.config import ModelConfig
from cascade_model.engine import Engine, Event, Ticket
from cascade_model.engine_config import EngineConfig
from cascade_model.errors import InputError
from cascade_model.networks import Network
from cascade_model.requests import Infilling, between
from cascade_model.sampler import DecodedBlock
from cascade_model.sampling import SamplingParams
from cascade_model.scheduler import Counters
from cascade_model.settings import check
from cascade_model.text_stream import Chunk, Completion, TextStream
from cascade_model.together import Answer, Request, block_of, chunk_of, in_order, together
from cascade_model.tokenizer import Tokenizer
from cascade_model.watching import DenoisedStep
from cascade_model.weights import load_model, require_text

Prompt = str | Sequence[int]


class LLM:
    """A model, its tokenizer and an engine; it ends with `close`, a `with` block or Python.

    The model is the engine's from then on: its weights are packed, so that it can be decoded with
    and no longer trained or saved.
    """

    def __init__(
        self, model: Network, tokenizer: Tokenizer, config: EngineConfig | None = None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.config: ModelConfig = model.config
        self.engine = Engine(model, config)

    @classmethod
    def load(cls, folder: str | Path, config: EngineConfig | None = None) -> Self:
        """Load a model folder, of ours or published; `CheckpointMismatch` if it is damaged.

        On one thread, as loading waits for memory anyway: OpenMP keeps the threads that helped a
        thread, and with more of them than cores those of the engine sleep between two products
        instead of being there for the next. Small models then decode at a third of their speed.
        """
        config = config or EngineConfig()
        check(
            config.device == "cpu" or torch.cuda.is_available(),
            f"device={config.device} is not there; use cpu, or a machine with a GPU",
        )
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            model, tokenizer = load_model(folder, getattr(torch, config.precision), config.device)
            return cls(model.eval(), require_text(tokenizer, folder), config)
        finally:
            torch.set_num_threads(threads)

    def prompt_tokens(
        self, prompt: Prompt, suffix: Prompt | None = None, length: int = 0
    ) -> list[int]:
        """What is decoded: the prompt's tokens, and with a suffix those of both, so that what is
        written stands between them, in a hole of `length` tokens where the model wants one. An
        empty suffix is none.

        Raises `InputError` for a suffix that the model would not see (`requests.between`).
        """
        return self._request(prompt, suffix, length)[0]

    @property
    def counters(self) -> Counters:
        """What the engine did so far."""
        return replace(self.engine.scheduler.counters)

    def blocks(
        self,
        prompt_tokens: Sequence[int],
        params: SamplingParams,
        choice: int = 0,
        *,
        committed: Sequence[int] = (),
        steps_made: int = 0,
        has_holes: bool = False,
    ) -> Generator[DecodedBlock, None, None]:
        """Decode block by block; leaving early, or dropping the iterator, ends the decoding.

        A completion that another engine began goes on behind its `committed` tokens, whole blocks
        that took `steps_made` steps (`sampler.plan_completion`): the rest is the same. With
        `has_holes` the prompt is a text whose mask tokens are to be filled.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        ticket = self.engine.submit(
            prompt_tokens,
            params,
            choice,
            events.put,
            committed=committed,
            steps_made=steps_made,
            has_holes=has_holes,
        )
        blocks = _until_finished(ticket, events)
        weakref.finalize(blocks, ticket.cancel)
        return blocks

    def stream_blocks(
        self,
        prompt_tokens: Sequence[int],
        params: SamplingParams,
        choice: int = 0,
        *,
        committed: Sequence[int] = (),
        steps_made: int = 0,
        has_holes: bool = False,
    ) -> AsyncGenerator[DecodedBlock, None]:
        """The same for the running event loop; a cancelled task ends the decoding."""
        source = self.stream_steps(
            prompt_tokens,
            params,
            choice,
            committed=committed,
            steps_made=steps_made,
            has_holes=has_holes,
            watch=False,
        )
        return cast(AsyncGenerator[DecodedBlock, None], source)

    def stream_steps(
        self,
        prompt_tokens: Sequence[int],
        params: SamplingParams,
        choice: int = 0,
        *,
        committed: Sequence[int] = (),
        steps_made: int = 0,
        has_holes: bool = False,
        watch: bool = True,
    ) -> AsyncGenerator[DecodedBlock | DenoisedStep, None]:
        """`stream_blocks`, each block behind the denoising steps that made it, as they are made;
        without `watch` no steps."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def deliver(event: Event | DenoisedStep) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        ticket = self.engine.submit(
            prompt_tokens,
            params,
            choice,
            deliver,
            committed=committed,
            steps_made=steps_made,
            has_holes=has_holes,
            watcher=deliver if watch else None,
        )
        told = _awaited_until_finished(ticket, events)
        weakref.finalize(told, ticket.cancel)
        return told

    def chunks(
        self,
        prompt: Prompt,
        params: SamplingParams,
        stop: Sequence[str] = (),
        choice: int = 0,
        *,
        suffix: Prompt | None = None,
    ) -> Iterator[Chunk]:
        """Chunks of text, one a block; decoding ends as soon as a stop string is complete."""
        text = TextStream(self.tokenizer.decode, stop)
        tokens, has_holes = self._request(prompt, suffix, params.max_tokens)
        source = self.blocks(tokens, params, choice, has_holes=has_holes)
        with contextlib.closing(source) as blocks:
            for block in blocks:
                chunk = chunk_of(text, block)
                yield chunk
                if chunk.finish_reason is not None:
                    return

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams,
        stop: Sequence[str] = (),
        choice: int = 0,
        *,
        suffix: Prompt | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """The same for an event loop: `async for chunk in llm.stream(...)`; a cancelled task ends
        the decoding."""
        text = TextStream(self.tokenizer.decode, stop)
        tokens, has_holes = self._request(prompt, suffix, params.max_tokens)
        source = self.stream_blocks(tokens, params, choice, has_holes=has_holes)
        async with contextlib.aclosing(source) as blocks:
            async for block in blocks:
                chunk = chunk_of(text, block)
                yield chunk
                if chunk.finish_reason is not None:
                    return

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        stop: Sequence[str] = (),
        n: int = 1,
        *,
        suffix: str | Sequence[Prompt | None] | None = None,
    ) -> list[Completion]:
        """`n` completions a prompt, prompt by prompt; `params` is shared or one a prompt.

        With a `suffix`, a text for all or a list with one (or none) a prompt, a completion is what
        stands between prompt and suffix: with `infill=psm` as long as the model makes it, else
        `max_tokens` tokens, where the model sees the suffix (`requests.between`). Choice i of a
        prompt is the same for every n. Raises `InputError` when a prompt cannot be decoded.
        """
        return in_order(self.answers(prompts, params, stop, n, suffix=suffix))

    def answers(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        stop: Sequence[str] | Sequence[Sequence[str]] = (),
        n: int = 1,
        *,
        suffix: str | Sequence[Prompt | None] | None = None,
    ) -> Generator[Answer, None, None]:
        """Completions as they become whole, all of them decoding together; `stop` holds texts for
        all, or a list of them for each prompt."""
        requests = list(zip(prompts, _one_each(suffix, prompts), strict=True))

        def tokens_of(request: tuple[Prompt, Prompt | None], own: SamplingParams) -> Request:
            return self._request(*request, own.max_tokens)

        return together(self.engine, self.tokenizer.decode, tokens_of, requests, params, stop, n)

    def infill(
        self,
        texts: Sequence[Infilling | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        n: int = 1,
    ) -> list[Completion]:
        """Fill the holes of texts: a prefix, a length and a suffix each, or tokens with mask ids.

        An answer's tokens and text are those of the holes alone, from left to right; what stands
        around them stays. No token and no text ends a hole early. Order, `params` and `n` as in
        `generate`. Raises `InputError` where a hole cannot see what follows it, or has more than
        `max_tokens` (`requests.check_infilling`).
        """
        _require_list(texts)
        return in_order(
            together(self.engine, self.tokenizer.decode, self._masked, texts, params, (), n)
        )

    def close(self) -> None:
        """End the engine's thread; requests that still run get an error."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _tokens(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else _ids(prompt)

    def _request(self, prompt: Prompt, suffix: Prompt | None, length: int) -> Request:
        before, after = self._tokens(prompt), [] if suffix is None else self._tokens(suffix)
        if not after:
            return before, False
        return between(self.config, before, after, length), self.config.infill != "psm"

    def _masked(self, text: Infilling | Sequence[int], _: SamplingParams) -> Request:
        if not isinstance(text, Infilling):
            return _ids(text), True
        hole, encode = [self.config.mask_id] * text.length, self.tokenizer.encode
        return [*encode(text.prefix), *hole, *encode(text.suffix)], True


def _require_list(requests: Any) -> None:
    check(
        isinstance(requests, Sequence) and not isinstance(requests, str | bytes | Infilling),
        f"the prompts are {repr(requests)[:60]}; give a list of them",
    )


def _one_each(
    suffix: str | Sequence[Prompt | None] | None, prompts: Sequence[Prompt]
) -> Sequence[Prompt | None]:
    """The suffix of each prompt."""
    _require_list(prompts)
    if suffix is None or isinstance(suffix, str):
        return [suffix] * len(prompts)
    check(
        len(suffix) == len(prompts),
        f"suffix has {len(suffix)} texts for {len(prompts)} prompts; give one for all, or one a "
        "prompt",
    )
    return suffix


def _ids(tokens: Sequence[int]) -> list[int]:
    """Token ids as plain integers."""
    try:
        if isinstance(tokens, bytes):
            raise TypeError
        return [operator.index(token) for token in tokens]
    except TypeError:
        raise InputError(
            f"the prompt {repr(tokens)[:60]} is neither text nor a list of token ids; give one of "
            "them, in a list of prompts"
        ) from None


def _until_finished(
    ticket: Ticket, events: "queue.SimpleQueue[Event]"
) -> Generator[DecodedBlock, None, None]:
    try:
        while True:
            block = block_of(events.get())
            yield block
            if block.finish_reason is not None:
                return
    finally:
        ticket.cancel()


async def _awaited_until_finished(
    ticket: Ticket, events: "asyncio.Queue[Event | DenoisedStep]"
) -> AsyncGenerator[DecodedBlock | DenoisedStep, None]:
    try:
        while True:
            event = await events.get()
            if isinstance(event, DenoisedStep):
                yield event
                continue
            block = block_of(event)
            yield block
            if block.finish_reason is not None:
                return
    finally:
        ticket.cancel()
