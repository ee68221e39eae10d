"""The one denoising loop: windows from left to right, each filled in a few parallel steps.

A window starts as mask tokens (the first one perhaps behind the prompt's ragged tail). In every
step a context (`contexts`) predicts places by forward passes and a strategy says what is written.
The loop itself never runs a model: it yields the passes it needs, so one sequence alone and many
together are driven by the same code. Predictions are pure functions of (weights, canvas), choices
of (request, seed): the same request gives the same tokens.
"""

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from cascade_model.budget import Budget
from cascade_model.canvas import Change, Window
from cascade_model.config import ModelConfig
from cascade_model.contexts import (
    Bidirectional,
    BlockCausal,
    Context,
    ServableContext,
    ServableGuided,
)
from cascade_model.networks import Network
from cascade_model.passes import Pass, Prediction, Runner
from cascade_model.requests import (
    block_edges,
    check_infilling,
    check_request,
    masks_per_block,
    with_committed,
)
from cascade_model.sampling import SamplingParams
from cascade_model.strategy import General
from cascade_model.text_stream import TokenLogprob
from cascade_model.watching import Watcher, step_of


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
    """New tokens, up to and including one that ends the completion, at most `max_tokens` in all;
    of a text with holes, what they were filled with."""
    passes: int
    """Forward passes since the block before it: prompt or commit pass, then denoising."""
    steps: int
    """K_b: denoising steps of this block."""
    finish_reason: Literal["stop", "length"] | None
    """Set on the last block only."""
    stop_reason: int | None
    """The token that ended the completion; none where it has its full length, or goes on."""
    logprobs: tuple[TokenLogprob, ...] | None
    """One for each token; none where they were not asked for."""
    margin: float | None
    """The smallest distance by which any decision of the block was made (`decisions`), at most 1;
    none where it was not asked for."""


def denoise(
    context: Context,
    canvas: Tensor,
    windows: Iterable[Window],
    strategy: Strategy,
    budget: Budget | None = None,
    on_step: Callable[[Window, Change | None], None] | None = None,
) -> Generator[Pass | Window, Tensor, None]:
    """Fill the canvas int64 [L] in place: yields passes, to be answered with their logits, and
    each window when it is done. A budget sets the windows' ceilings; none: as they are. `on_step`
    hears of each window when it is opened, and then of what each step wrote."""
    for window in windows:
        if budget is not None:
            budget.open(window)
        if on_step is not None:
            on_step(window, None)
        while not strategy.is_done(canvas, window):
            places = strategy.places(canvas, window)
            prediction = yield from context.predict(canvas, window, places)
            change = strategy.step(canvas, window, prediction)
            canvas[change.places] = change.tokens
            window.step += 1
            if budget is not None:
                budget.note_step(window)
            if on_step is not None:
                on_step(window, change)
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
    is_given: Tensor
    """bool [L]: what the request gave; committed tokens of an earlier run are not given."""
    end_ids: tuple[int, ...]
    """Tokens that end the completion."""
    windows: list[Window]
    """The blocks to decode."""
    context: ServableContext
    strategy: General
    budget: Budget
    counted: int = 0
    """Passes that finished blocks have told of."""
    watcher: Watcher | None = None
    """Who hears of every step; none: nothing is made of them."""

    @property
    def num_streams(self) -> int:
        """Caches that the request needs: two with guidance."""
        return 2 if isinstance(self.context, ServableGuided) else 1

    def loop(self) -> Generator[Pass | Window, Tensor, None]:
        """The denoising loop of this request."""
        on_step = None if self.watcher is None else self._tell
        return denoise(self.context, self.canvas, self.windows, self.strategy, self.budget, on_step)

    def watch(self, watcher: Watcher) -> None:
        """Tell of every step from now on; what is decoded stays the same."""
        self.watcher, self.strategy.is_told = watcher, True

    def _tell(self, window: Window, change: Change | None) -> None:
        assert self.watcher is not None
        mask_id = self.strategy.config.mask_id
        self.watcher(step_of(window, change, self.is_given.tolist(), mask_id))

    def block(self, window: Window) -> DecodedBlock:
        """What a finished window adds to the completion; asked for once, as soon as it is done."""
        block = slice(window.start, window.keep)
        written = zip(self.canvas[block].tolist(), self.is_given[block].tolist(), strict=True)
        new = {
            place: token
            for place, (token, is_given) in enumerate(written, start=window.start)
            if not is_given
        }
        end = next((place for place, token in new.items() if token in self.end_ids), None)
        places = [place for place in new if end is None or place <= end]
        is_last = window is self.windows[-1]
        passes, self.counted = self.context.passes - self.counted, self.context.passes
        params = self.strategy.params
        is_told = params.logprobs is not None
        return DecodedBlock(
            tokens=[new[place] for place in places],
            passes=passes,
            steps=window.step,
            finish_reason="stop" if end is not None else "length" if is_last else None,
            stop_reason=None if end is None else new[end],
            logprobs=tuple(window.logprobs[place] for place in places) if is_told else None,
            margin=window.margin if params.report_margin else None,
        )


def plan_completion(
    config: ModelConfig,
    prompt_tokens: Sequence[int],
    params: SamplingParams,
    choice: int = 0,
    device: torch.device | str = "cpu",
    *,
    committed: Sequence[int] = (),
    steps_made: int = 0,
) -> Plan:
    """A completion of a prompt, from its beginning or from where another run of it came to.

    `committed` are the tokens of the blocks that were decoded already, `steps_made` the sum of
    their steps, which a budget (`max_steps`) counts. The rest is the same as without the cut; of
    the passes only those of the rest are told. A deadline runs anew. Raises `InputError` as
    `check_request`.
    """
    check_request(config, prompt_tokens, params, committed, steps_made)
    prompt, known = len(prompt_tokens), len(prompt_tokens) + len(committed)
    edges, end = block_edges(config, prompt, params), prompt + params.max_tokens
    canvas = torch.full((edges[-1],), config.mask_id, dtype=torch.int64, device=device)
    canvas[:known] = torch.tensor([*prompt_tokens, *committed], dtype=torch.int64, device=device)
    is_given = torch.arange(edges[-1], device=device) < prompt
    first = edges[0] // config.block_size if config.attention == "block_causal" else 0
    windows = [
        _window(number, start, stop, end, stop - max(start, known), params)
        for number, (start, stop) in enumerate(itertools.pairwise(edges), start=first)
        if stop > known
    ]
    return _plan(config, canvas, is_given, windows, params, choice, steps_made)


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


def infill(
    model: Network, tokens: Sequence[int], params: SamplingParams, choice: int = 0
) -> list[int]:
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
    tokens: Sequence[int],
    params: SamplingParams,
    choice: int = 0,
    device: torch.device | str = "cpu",
    *,
    committed: Sequence[int] = (),
    steps_made: int = 0,
) -> Plan:
    """The holes (mask tokens) of a text; no token ends it early.

    `committed` are what another run filled the first blocks' holes with, in `steps_made` steps; the
    rest is the same as without the cut. Raises `InputError` as `check_infilling`.
    """
    check_infilling(config, tokens, params, committed, steps_made)
    is_causal, size = config.attention == "block_causal", config.block_size
    length = -(-len(tokens) // size) * size if is_causal else len(tokens)
    filled = with_committed(config, tokens, committed)
    canvas = torch.full((length,), config.mask_id, dtype=torch.int64, device=device)
    canvas[: len(tokens)] = torch.tensor(tokens, dtype=torch.int64, device=device)
    is_given = canvas != config.mask_id
    canvas[: len(tokens)] = torch.tensor(filled, dtype=torch.int64, device=device)
    step = size if is_causal else params.block_length or size
    windows = [
        _window(number, number * step, min((number + 1) * step, length), len(tokens), count, params)
        for number, count in masks_per_block(config, filled, params).items()
    ]
    return _plan(config, canvas, is_given, windows, params.without_end(), choice, steps_made)


def _plan(
    config: ModelConfig,
    canvas: Tensor,
    is_given: Tensor,
    windows: list[Window],
    params: SamplingParams,
    choice: int,
    steps_made: int = 0,
) -> Plan:
    return Plan(
        canvas=canvas,
        is_given=is_given,
        end_ids=params.end_ids(config),
        windows=windows,
        context=_context(config, params, is_given),
        strategy=General(config, params, is_given, choice),
        budget=Budget(windows, params, steps_made=steps_made),
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
    return Window(
        number=number,
        start=start,
        end=stop,
        keep=min(stop, end),
        num_masked=masks,
        max_steps=params.most_steps(masks),
    )
