"""dllm's samplers for its converted Llama and Qwen networks (ZHZisZZ/dllm `bd3lm`, `mdlm`).

Block diffusion (`a2d_bd3lm`) and full attention (`a2d_mdlm`, `a2d_infill`), all on the rounded
schedule of `transfer`. They take batches. Rows are decoded each on its own; what couples them is
the width they are padded to, and that block diffusion goes on until every row has ended.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade_model.canvas import Window
from cascade_model.contexts import Bidirectional, Context, Guided
from cascade_model.errors import InputError
from cascade_model.model import Transformer
from cascade_model.passes import Pass, Predicting, Prediction, Runner
from cascade_model.presets.published import (
    Published,
    best,
    cut,
    masked,
    run,
    with_masks,
)
from cascade_model.presets.transfer import SCHEDULERS, transfer_counts
from cascade_model.sampler import denoise, drive
from cascade_model.settings import check


@dataclass(frozen=True, kw_only=True, slots=True)
class A2DSettings:
    """The arguments that both samplers have."""

    steps: int = 128
    """In all; divided over the blocks and rounded up."""
    max_new_tokens: int = 128
    scheduler: str = "linear"
    remasking: Literal["low_confidence"] = "low_confidence"
    right_shift_logits: bool = False
    """Row i predicts token i + 1."""
    cfg_scale: float = 0.0
    cfg_keep_tokens: Sequence[int] | None = None
    """Given tokens that guidance does not mask."""
    temperature: float = 0.0
    mask_id: int
    eos_id: int
    bos_id: int | None = None
    """Stands for an empty prompt where the logits are shifted."""

    def __post_init__(self) -> None:
        for name in ("steps", "max_new_tokens"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        check(
            self.scheduler in SCHEDULERS,
            f"scheduler={self.scheduler} is unknown; use {' or '.join(SCHEDULERS)}",
        )
        check(
            self.remasking == "low_confidence",
            f"remasking={self.remasking} is not reproduced; use low_confidence",
        )
        check(
            self.temperature == 0.0,
            f"temperature={self.temperature} draws numbers that cannot be reproduced; use 0",
        )
        check(self.cfg_scale >= 0, f"cfg_scale={self.cfg_scale} must not be negative; use 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class BD3LMSettings(A2DSettings):
    """The arguments of block diffusion."""

    sampler: Literal["bd3lm"] = "bd3lm"
    block_size: int = 32
    steps_per_block: int | None = None
    """Instead of `steps`."""
    pad_id: int

    def __post_init__(self) -> None:
        A2DSettings.__post_init__(self)
        _check_sampler(self.sampler, "bd3lm")
        _check_block_size(self.block_size)
        check(
            self.steps_per_block is None or self.steps_per_block >= 1,
            f"steps_per_block={self.steps_per_block} must be at least 1; leave it out to use steps",
        )
        check(
            self.pad_id != self.mask_id,
            f"pad_id={self.pad_id} is mask_id too, and padding takes no part; use another",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MDLMSettings(A2DSettings):
    """The arguments of full attention."""

    sampler: Literal["mdlm"] = "mdlm"
    block_size: int | None = 128
    """None, infilling: the whole width is one block."""
    suppress_tokens: Sequence[int] | None = None
    """Never predicted."""
    begin_suppress_tokens: Sequence[int] | None = None
    """Predicted with confidence 0, and without a share in the others' confidences."""

    def __post_init__(self) -> None:
        A2DSettings.__post_init__(self)
        _check_sampler(self.sampler, "mdlm")
        _check_block_size(1 if self.block_size is None else self.block_size)


def _check_sampler(sampler: str, own: str) -> None:
    check(sampler == own, f"sampler={sampler} has other settings; leave it out, these are {own}'s")


def _check_block_size(block_size: int) -> None:
    check(block_size >= 1, f"block_size={block_size} must be at least 1; use 32")


def a2d_bd3lm(
    model: Transformer, prompts: Sequence[list[int]], settings: BD3LMSettings
) -> list[list[int]]:
    """The canvases: padding up to a multiple of the block, prompt, and the blocks decoded."""
    prompts, size = _begun(prompts, settings), settings.block_size
    width = -(-max(map(len, prompts)) // size) * size
    rows = [[settings.pad_id] * (width - len(prompt)) + prompt for prompt in prompts]
    canvases = [with_masks(row, settings.max_new_tokens, settings.mask_id, model) for row in rows]
    loops = [_block_diffusion(model, canvas, width, settings) for canvas in canvases]
    end, ended = width, [False] * len(rows)
    for finished in zip(*loops, strict=True):
        end = finished[0].end
        blocks = [canvas[finished[0].start : end] for canvas in canvases]
        ended = [e or settings.eos_id in b.tolist() for e, b in zip(ended, blocks, strict=True)]
        if all(ended):
            break
    return [canvas[:end].tolist() for canvas in canvases]


def a2d_mdlm(
    model: Transformer, prompts: Sequence[list[int]], settings: MDLMSettings
) -> list[list[int]]:
    """The canvases: prompt, completion, and `eos_id` up to the width of the longest."""
    size, count = settings.block_size, settings.max_new_tokens
    if size is None:
        raise InputError("block_size=None is for infilling alone; use the length of a block")
    steps = -(-settings.steps // -(-count // size))
    canvases = []
    for prompt in _begun(prompts, settings):
        canvas = with_masks(prompt, count, settings.mask_id, model)
        windows = cut(len(prompt), len(canvas), size, steps)
        canvases.append(_full_attention(model, canvas, windows, settings, is_block_alone=False))
    return _padded(canvases, settings.eos_id)


def a2d_infill(
    model: Transformer, rows: Sequence[list[int]], settings: MDLMSettings
) -> list[list[int]]:
    """The rows with their masks filled in place, and `eos_id` up to the width of the longest."""
    rows = _begun(rows, settings)
    width = max(1, *map(len, rows))
    size = settings.block_size or width
    steps = -(-settings.steps // -(-width // size))
    canvases = []
    for row in rows:
        canvas = with_masks(row, 0, settings.mask_id, model)
        windows = cut(0, len(canvas), size, steps)
        canvases.append(_full_attention(model, canvas, windows, settings, is_block_alone=True))
    return _padded(canvases, settings.eos_id)


def _begun(rows: Sequence[list[int]], settings: A2DSettings) -> list[list[int]]:
    """The rows; an empty one begins a text where the first place needs one before it."""
    check(len(rows) > 0, "the batch has no row; give at least one")
    if not settings.right_shift_logits:
        return list(rows)
    check(
        all(rows) or settings.bos_id is not None,
        "bos_id=None with right_shift_logits=True leaves an empty prompt nothing to predict its "
        "first token from; give the id that begins texts",
    )
    begin = [] if settings.bos_id is None else [settings.bos_id]
    return [row or begin for row in rows]


def _padded(rows: list[list[int]], eos_id: int) -> list[list[int]]:
    width = max(map(len, rows))
    return [row + [eos_id] * (width - len(row)) for row in rows]


def _block_diffusion(
    model: Transformer, canvas: Tensor, start: int, settings: BD3LMSettings
) -> Iterator[Window]:
    """One row, block by block."""
    blocks = -(-settings.max_new_tokens // settings.block_size)
    steps = settings.steps_per_block or -(-settings.steps // blocks)
    windows = cut(start, len(canvas), settings.block_size, steps)
    is_given = (canvas != settings.mask_id) & (canvas != settings.pad_id)
    context = _guided(lambda stream: Unpadded(settings, stream=stream), canvas, is_given, settings)
    strategy = Rounded(canvas, windows, settings, is_block_alone=True)
    return drive(denoise(context, canvas, windows, strategy), Runner(model, len(canvas)))


def _full_attention(
    model: Transformer,
    canvas: Tensor,
    windows: list[Window],
    settings: MDLMSettings,
    *,
    is_block_alone: bool,
) -> list[int]:
    """One row, every pass over all of it."""
    config = replace(
        model.config,
        attention="bidirectional",
        logits="shifted" if settings.right_shift_logits else "aligned",
    )
    is_given = canvas != settings.mask_id
    context = _guided(
        lambda stream: Bidirectional(config, stream=stream), canvas, is_given, settings
    )
    strategy = Suppressing(canvas, windows, settings, is_block_alone=is_block_alone)
    return run(model, canvas, context, windows, strategy)


def _guided(
    context: Callable[[int], Context], canvas: Tensor, is_given: Tensor, settings: A2DSettings
) -> Context:
    """The context of stream 0, guided where a scale is given."""
    if settings.cfg_scale == 0:
        return context(0)
    kept = torch.isin(canvas, canvas.new_tensor(settings.cfg_keep_tokens or []))
    return Guided(
        context(0),
        context(1),
        scale=settings.cfg_scale,
        is_given=is_given & ~kept,
        mask_id=settings.mask_id,
    )


class Unpadded:
    """Block-causal with the exact cache, over the tokens that are not padding.

    Padding is neither seen nor counted in positions, so leaving it out is the same. What counts as
    padding is decided where a block begins: a padding token generated in it takes part as any
    other until the block is finished. Blocks are counted in places of the canvas.
    """

    def __init__(self, settings: BD3LMSettings, *, stream: int = 0) -> None:
        self.settings, self.stream = settings, stream
        self.passes = 0
        self._encoded = self._texts = 0
        """Places of the canvas that were encoded, and how many of their tokens are no padding."""
        self._boundary: Tensor | None = None
        """Logits [1, v] of the last place that was encoded."""

    def predict(self, canvas: Tensor, window: Window, places: Tensor) -> Predicting:
        """See `contexts.Context`; with shifted logits the row on the left predicts."""
        if self._encoded < window.start:
            yield from self._encode(canvas, window.start)
        tokens, first = canvas[window.start : window.end], self._texts
        reads = places - window.start - int(self.settings.right_shift_logits)
        limits = torch.full_like(tokens, first + len(tokens))
        logits = yield from self._pass(tokens, first, limits, reads[reads >= 0])
        if reads[0] < 0 and self._boundary is not None:
            logits = torch.cat([self._boundary, logits])
        return Prediction(places, logits)

    def _encode(self, canvas: Tensor, end: int):
        """Write the finished blocks, and keep what their last place predicts.

        Should that be padding it is fed none the less, behind the others: it sees nothing, nothing
        sees it, and the next block is written over it.
        """
        size, begin = self.settings.block_size, self._encoded
        is_text = canvas[:end] != self.settings.pad_id
        texts = F.pad(is_text.cumsum(dim=0), (1, 0))
        is_fed = is_text.clone()
        is_fed[-1] = True
        places = begin + is_fed[begin:].nonzero()[:, 0]
        limits = texts[(places // size + 1) * size] * is_text[places]
        last = torch.tensor([len(places) - 1], device=canvas.device)
        self._boundary = yield from self._pass(canvas[places], self._texts, limits, last)
        self._encoded, self._texts = end, int(texts[end])

    def _pass(self, tokens: Tensor, start: int, limits: Tensor, reads: Tensor):
        self.passes += 1
        return (
            yield Pass(
                tokens=tokens.tolist(),
                start=start,
                limits=limits.tolist(),
                visible=start + len(tokens),
                reads=reads.tolist(),
                stream=self.stream,
            )
        )


class Rounded(Published):
    """Each step commits its share of the rounded schedule, the most confident places first.

    Candidates are the masks of the block alone, or all before its end.
    """

    def __init__(
        self, canvas: Tensor, windows: list[Window], settings: A2DSettings, *, is_block_alone: bool
    ) -> None:
        super().__init__(settings.mask_id)
        self.is_block_alone = is_block_alone
        self.counts = [
            transfer_counts(
                len(masked(canvas, window, self.mask_id)), window.max_steps, settings.scheduler
            )
            for window in windows
        ]

    def is_done(self, canvas: Tensor, window: Window) -> bool:
        """Whether the schedule is used up."""
        is_over = window.step >= len(self.counts[window.number])
        return is_over or super().is_done(canvas, window)

    def places(self, canvas: Tensor, window: Window) -> Tensor:
        """See the class."""
        if self.is_block_alone:
            return masked(canvas, window, self.mask_id)
        return super().places(canvas, window)

    def choose(self, confidence: Tensor, window: Window) -> Tensor:
        """The share of this step."""
        return best(confidence, self.counts[window.number][window.step])


class Suppressing(Rounded):
    """With tokens that are never predicted, or only with confidence 0."""

    def __init__(
        self, canvas: Tensor, windows: list[Window], settings: MDLMSettings, *, is_block_alone: bool
    ) -> None:
        super().__init__(canvas, windows, settings, is_block_alone=is_block_alone)
        self.never = canvas.new_tensor(settings.suppress_tokens or [])
        self.late = canvas.new_tensor(settings.begin_suppress_tokens or [])

    def predict(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Arg-max tokens; confidences without the tokens to hold back, as published."""
        logits = logits.index_fill(-1, self.never, float("-inf"))
        tokens = logits.argmax(dim=-1)
        shares = logits.index_fill(-1, self.late, float("-inf")).softmax(dim=-1)
        return tokens, shares.gather(-1, tokens[:, None])[:, 0]
