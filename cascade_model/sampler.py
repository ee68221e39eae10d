"""The one denoising loop: windows from left to right, each filled in a few parallel steps.

A window starts as mask tokens (the first one perhaps behind the prompt's ragged tail). In every
step a context (`contexts`) predicts places by forward passes and a strategy says what is written.
The loop itself never runs a model: it yields the passes it needs, so one sequence alone and many
together are driven by the same code. Predictions are pure functions of (weights, canvas), choices
of (request, seed): the same request gives the same tokens.
"""

import itertools
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from cascade_model.canvas import Change, Window
from cascade_model.config import ModelConfig, SamplingParams
from cascade_model.contexts import (
    Bidirectional,
    BlockCausal,
    Context,
    ServableContext,
    ServableGuided,
)
from cascade_model.networks import Network
from cascade_model.passes import Pass, Prediction, Runner
from cascade_model.requests import check_infilling, check_request
from cascade_model.strategy import General
from cascade_model.text_stream import TokenLogprob


class Strategy(Protocol):
    """What the loop asks of a way to denoise; presets of published samplers are others."""

    def is_done(self, canvas: Tensor, window: Window) -> bool:
        """Whether the window needs no further step."""
        ...

    def places(self, canvas: Tensor, window: Window) -> Tensor:
        """The places to predict next, int64 [m], rising."""
        ...

    def step(self, canvas: Tensor, window: Window, prediction: Prediction) -> Change:
        """What to write."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedBlock:
    """What one block added to the completion."""

    tokens: list[int]
    """New tokens, up to and including the end-of-text token, at most `max_tokens` in all."""
    passes: int
    """Forward passes since the block before it: prompt or commit pass, then denoising."""
    steps: int
    """K_b: denoising steps of this block."""
    finish_reason: Literal["stop", "length"] | None
    """Set on the last block only."""
    logprobs: tuple[TokenLogprob, ...] | None
    """One for each token; none where they were not asked for."""
    margin: float | None
    """The smallest distance by which any decision of the block was made (`decisions`), at most 1;
    none where it was not asked for."""


def denoise(
    context: Context, canvas: Tensor, windows: Iterable[Window], strategy: Strategy
) -> Generator[Pass | Window, Tensor, None]:
    """Fill the canvas int64 [L] in place: yields passes, to be answered with their logits, and
    each window when it is done."""
    for window in windows:
        while not strategy.is_done(canvas, window):
            places = strategy.places(canvas, window)
            prediction = yield from context.predict(canvas, window, places)
            change = strategy.step(canvas, window, prediction)
            canvas[change.places] = change.tokens
            window.step += 1
        yield window


def drive(loop: Generator[Pass | Window, Tensor, None], runner: Runner) -> Iterator[Window]:
    """Run the passes of one loop; gives each window when it is done."""
    reply = None
    while True:
        try:
            event = loop.send(reply)  # type: ignore[arg-type]
        except StopIteration:
            return
        if isinstance(event, Window):
            reply = None
            yield event
        else:
            reply = runner.run(event)


@dataclass(kw_only=True, slots=True)
class Plan:
    """Everything of one request that decoding needs besides the weights."""

    canvas: Tensor
    """int64 [L]: prompt, masks, and a suffix where there is one."""
    known: int
    """Tokens of the prompt."""
    windows: list[Window]
    context: ServableContext
    strategy: General
    params: SamplingParams
    counted: int = 0
    """Passes that finished blocks have told of."""

    @property
    def num_streams(self) -> int:
        """Caches that the request needs: two with guidance."""
        return 2 if isinstance(self.context, ServableGuided) else 1

    def loop(self) -> Generator[Pass | Window, Tensor, None]:
        """The denoising loop of this request."""
        return denoise(self.context, self.canvas, self.windows, self.strategy)

    def block(self, window: Window) -> DecodedBlock:
        """What a finished window adds to the completion; asked for once, as soon as it is done."""
        end = self.known + self.params.max_tokens
        first = max(self.known, window.start)
        tokens = self.canvas[first : window.keep].tolist()
        tokens, stopped = _new_tokens(tokens, self.strategy.config.end_ids, self.params)
        reason = "stop" if stopped else "length" if window.keep == end else None
        passes, self.counted = self.context.passes - self.counted, self.context.passes
        is_told, places = self.params.logprobs is not None, range(first, first + len(tokens))
        return DecodedBlock(
            tokens=tokens,
            passes=passes,
            steps=window.step,
            finish_reason=reason,
            logprobs=tuple(window.logprobs[place] for place in places) if is_told else None,
            margin=window.margin if self.params.report_margin else None,
        )


def plan_completion(
    config: ModelConfig,
    prompt_tokens: list[int],
    params: SamplingParams,
    choice: int = 0,
    device: torch.device | str = "cpu",
) -> Plan:
    """A completion of a prompt. Raises `InputError` as `check_request`."""
    check_request(config, prompt_tokens, params)
    size, known = config.block_size, len(prompt_tokens)
    end = known + params.max_tokens
    is_causal = config.attention == "block_causal"
    length = -(-end // size) * size if is_causal else end
    canvas = torch.full((length,), config.mask_id, dtype=torch.int64, device=device)
    canvas[:known] = torch.tensor(prompt_tokens, dtype=torch.int64, device=device)
    is_given = torch.arange(length, device=device) < known
    if is_causal:
        edges = list(range(known // size * size, length + 1, size))
    else:
        edges = [*range(known, length, params.block_length or size), length]
    first = edges[0] // size if is_causal else 0
    windows = [
        _window(first + number, start, stop, end, stop - max(start, known), params)
        for number, (start, stop) in enumerate(itertools.pairwise(edges))
    ]
    context = _context(config, params, is_given)
    strategy = General(config, params, is_given, choice)
    return Plan(
        canvas=canvas,
        known=known,
        windows=windows,
        context=context,
        strategy=strategy,
        params=params,
    )


def sample(
    model: Network, prompt_tokens: list[int], params: SamplingParams, choice: int = 0
) -> Iterator[DecodedBlock]:
    """Decode one completion of a prompt, block by block.

    The same (weights, prompt, params, choice) gives the same tokens. In a block-causal model
    blocks are counted from the prompt's first token, so decoding on from a committed prefix gives
    the same rest. Raises `InputError` for what cannot be decoded (`check_request`).
    """
    device = next(model.parameters()).device
    plan = plan_completion(model.config, prompt_tokens, params, choice, device)
    return decoded(plan, Runner(model, len(plan.canvas)))


def decoded(plan: Plan, runner: Runner) -> Iterator[DecodedBlock]:
    """The blocks of a plan, alone on a runner, up to the one that ends it."""
    for window in drive(plan.loop(), runner):
        block = plan.block(window)
        yield block
        if block.finish_reason is not None:
            return


def infill(model: Network, tokens: list[int], params: SamplingParams, choice: int = 0) -> list[int]:
    """Fill the mask tokens of a text; everything else stays.

    Raises `InputError` where a hole cannot see what follows it (`check_infilling`).
    """
    device = next(model.parameters()).device
    plan = plan_infilling(model.config, tokens, params, choice, device)
    for _ in drive(plan.loop(), Runner(model, len(plan.canvas))):
        pass
    return plan.canvas[: len(tokens)].tolist()


def plan_infilling(
    config: ModelConfig,
    tokens: list[int],
    params: SamplingParams,
    choice: int = 0,
    device: torch.device | str = "cpu",
) -> Plan:
    """The holes (mask tokens) of a text."""
    check_infilling(config, tokens, params)
    is_causal, size = config.attention == "block_causal", config.block_size
    length = -(-len(tokens) // size) * size if is_causal else len(tokens)
    canvas = torch.full((length,), config.mask_id, dtype=torch.int64, device=device)
    canvas[: len(tokens)] = torch.tensor(tokens, dtype=torch.int64, device=device)
    is_given = canvas != config.mask_id
    step = params.block_length or size
    masks = {
        start: int((~is_given[start : start + step]).sum()) for start in range(0, length, step)
    }
    windows = [
        _window(start // step, start, min(start + step, length), len(tokens), count, params)
        for start, count in masks.items()
        if count
    ]
    context = _context(config, params, is_given)
    endless = _without_stop(params)
    strategy = General(config, endless, is_given, choice)
    return Plan(
        canvas=canvas,
        known=0,
        windows=windows,
        context=context,
        strategy=strategy,
        params=endless,
    )


def _context(config: ModelConfig, params: SamplingParams, is_given: Tensor) -> ServableContext:
    def plain(stream: int) -> ServableContext:
        if config.attention == "block_causal":
            return BlockCausal(config, stream=stream)
        return Bidirectional(config, cache=params.cache, stream=stream)

    if params.guidance_scale == 0:
        return plain(0)
    return ServableGuided(
        plain(0),
        plain(1),
        scale=params.guidance_scale,
        is_given=is_given,
        mask_id=config.mask_id,
    )


def _window(
    number: int, start: int, stop: int, end: int, masks: int, params: SamplingParams
) -> Window:
    steps = min(params.steps_per_block or masks, masks)
    return Window(
        number=number,
        start=start,
        end=stop,
        keep=min(stop, end),
        num_masked=masks,
        max_steps=steps,
    )


def _without_stop(params: SamplingParams) -> SamplingParams:
    """Infilling ends nowhere early: the text behind the hole stays."""
    return replace(params, stop_at_eos=False)


def _new_tokens(
    tokens: list[int], end_ids: tuple[int, ...], params: SamplingParams
) -> tuple[list[int], bool]:
    """Cut behind the first end-of-text token."""
    ends = [place for place, token in enumerate(tokens) if token in end_ids]
    if params.stop_at_eos and ends:
        return tokens[: ends[0] + 1], True
    return tokens, False
