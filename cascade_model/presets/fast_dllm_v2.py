"""Fast-dLLM v2's sampler (NVlabs; arXiv 2509.26328): blocks of small blocks, logits shifted.

A finished block is encoded for good, and its last row gives the next block's first token, so the
result is one token longer than whole blocks. Inside a block small ones are filled from left to
right; a pass feeds the whole block, or with the block cache mostly the small one. A prompt of
exactly one block is never fed: the published code decodes as if there were none.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor

from cascade_model.canvas import Change, Window
from cascade_model.model import Transformer
from cascade_model.passes import Pass, Predicting, Prediction
from cascade_model.presets.published import (
    Published,
    cut,
    masked,
    run,
    with_masks,
)
from cascade_model.settings import check


@dataclass(frozen=True, kw_only=True, slots=True)
class FastDLLMV2Settings:
    """The arguments of the published function."""

    max_new_tokens: int = 1024
    """Rounded down to whole blocks, the prompt's last one included."""
    block_size: int = 32
    small_block_size: int = 8
    threshold: float = 1.0
    """Commit every place of the small block above it, one at the least."""
    use_block_cache: bool = False
    temperature: float = 0.0
    mask_id: int = 151665
    stop_token: int = 151645

    def __post_init__(self) -> None:
        for name in ("block_size", "small_block_size"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        check(
            self.block_size % self.small_block_size == 0,
            f"small_block_size={self.small_block_size} does not divide block_size="
            f"{self.block_size}; use a divisor",
        )
        check(
            self.max_new_tokens >= 0,
            f"max_new_tokens={self.max_new_tokens} must not be negative; use a multiple of "
            f"block_size={self.block_size}",
        )
        check(
            self.temperature == 0.0,
            f"temperature={self.temperature} draws numbers that cannot be reproduced; use 0",
        )


class FirstToken(Window):
    """The one place behind finished blocks, which their last row predicts."""


def fast_dllm_v2(model: Transformer, prompt: list[int], settings: FastDLLMV2Settings) -> list[int]:
    """Prompt and completion, up to the first stop token."""
    size = settings.block_size
    unseen = prompt if len(prompt) == size else []
    seen = prompt[len(unseen) :]
    whole = (len(seen) // size + settings.max_new_tokens // size) * size
    masks = max(0, whole + 1 - len(seen)) if whole else 0
    canvas = with_masks(seen, masks, settings.mask_id, model)
    strategy = Confident(settings, len(seen))
    going = takewhile(
        lambda _: not strategy.has_ended(canvas), _windows(len(seen), len(canvas), settings)
    )
    tokens = run(model, canvas, NestedBlocks(settings), going, strategy)
    stop = strategy.stop(canvas)
    return unseen + (tokens if stop is None else tokens[: stop + 1])


def _windows(known: int, end: int, settings: FastDLLMV2Settings) -> Iterator[Window]:
    """The small blocks of every block, and behind each block its successor's first token."""
    size = settings.block_size
    if known and known % size == 0:
        yield _first_token(known)
    for start in range(known // size * size, end - size, size):
        yield from cut(start, start + size, settings.small_block_size, size)
        yield _first_token(start + size)


def _first_token(place: int) -> FirstToken:
    end = place + 1
    return FirstToken(number=0, start=place, end=end, keep=end, max_steps=1)


class NestedBlocks:
    """Exact cache of finished blocks; inside a block, that of small blocks where it is wanted.

    The block cache holds what the last pass over the whole block wrote, and what later passes over
    the small block wrote over it. The first pass of a small block, and every pass while its first
    place is masked, is over the whole block. Logits are shifted within what is fed, whose first
    row also predicts itself.
    """

    def __init__(self, settings: FastDLLMV2Settings) -> None:
        self.settings = settings
        self.passes = 0
        self._encoded = 0
        """Places of finished blocks that are in the cache."""

    def predict(self, canvas: Tensor, window: Window, places: Tensor) -> Predicting:
        """See `contexts.Context`."""
        size, first = self.settings.block_size, window.start
        start, end = first // size * size, (first // size + 1) * size
        if isinstance(window, FirstToken):
            logits = yield from self._pass(canvas, self._encoded, first, places - 1)
            self._encoded = first
        elif self._is_cached(canvas, window):
            reads = (places - 1).clamp(min=first)
            logits = yield from self._pass(canvas, first, window.end, reads)
        else:
            reads = (places - 1).clamp(min=start)
            logits = yield from self._pass(canvas, self._encoded, end, reads)
            self._encoded = start
        return Prediction(places, logits)

    def _is_cached(self, canvas: Tensor, window: Window) -> bool:
        """Whether the small block alone is fed."""
        is_open = bool(canvas[window.start] == self.settings.mask_id)
        return self.settings.use_block_cache and window.step > 0 and not is_open

    def _pass(self, canvas: Tensor, start: int, end: int, reads: Tensor):
        """Feed the places start..end-1; each sees its whole block and all before.

        A row is read once, so that the two places it may predict have exactly the same logits and
        the left one comes first.
        """
        self.passes += 1
        size = self.settings.block_size
        limits = [(place // size + 1) * size for place in range(start, end)]
        rows, row_of = reads.unique(return_inverse=True)
        logits = yield Pass(
            tokens=canvas[start:end].tolist(),
            start=start,
            limits=limits,
            visible=limits[-1],
            reads=(rows - start).tolist(),
        )
        return logits[row_of]


class Confident(Published):
    """The most confident place of the small block, and all above the threshold.

    A place may predict the mask token. Where two passes in a row fill nothing the published code
    would go on forever; here decoding ends, with masks left.
    """

    def __init__(self, settings: FastDLLMV2Settings, start: int) -> None:
        super().__init__(settings.mask_id)
        self.settings, self.start = settings, start
        self._idle = 0
        """Passes since a place was filled."""

    def stop(self, canvas: Tensor) -> int | None:
        """The place of the first stop token behind the prompt."""
        found = (canvas[self.start :] == self.settings.stop_token).nonzero()
        return self.start + int(found[0]) if len(found) else None

    def has_ended(self, canvas: Tensor) -> bool:
        """Whether there is a stop token without a mask before it, or nothing moves."""
        stop = self.stop(canvas)
        is_known = stop is not None and bool((canvas[self.start : stop] != self.mask_id).all())
        return is_known or self._idle > 1

    def is_done(self, canvas: Tensor, window: Window) -> bool:
        """Whether the window is full, or decoding has ended."""
        if isinstance(window, FirstToken):
            return window.step > 0
        return self.has_ended(canvas) or len(masked(canvas, window, self.mask_id)) == 0

    def places(self, canvas: Tensor, window: Window) -> Tensor:
        """The masks of the small block, int64 [m]."""
        return masked(canvas, window, self.mask_id)

    def step(self, canvas: Tensor, window: Window, prediction: Prediction) -> Change:
        """As published samplers do; counts the passes that fill nothing."""
        change = super().step(canvas, window, prediction)
        is_idle = bool((change.tokens == self.mask_id).all())
        self._idle = self._idle + 1 if is_idle else 0
        return change

    def choose(self, confidence: Tensor, window: Window) -> Tensor:
        """Never none."""
        is_taken = confidence > self.settings.threshold
        is_taken[confidence.argmax()] = True
        return is_taken.nonzero()[:, 0]
