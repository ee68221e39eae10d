"""What a place is predicted from: which rows are fed, which are cached, who sees whom.

A context turns "predict these places" into passes. `BlockCausal` has the exact cache: a finished
block's keys and values are written once and never again. The pass that writes them is fused with
the next block's first step, or made alone (`is_fused=False`); both give the same logits.
`Bidirectional` feeds the whole canvas, or with the approximate caches of Fast-dLLM
(arXiv 2505.22618) only what lies behind the block's start or the block itself. `Guided` mixes two
contexts into classifier-free guidance.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor

from cascade_model.canvas import Window
from cascade_model.config import ModelConfig
from cascade_model.passes import Pass, Predicting, Prediction


class Context(Protocol):
    """What the denoising loop asks of a model."""

    @property
    def passes(self) -> int:
        """Forward passes so far."""
        ...

    def predict(self, canvas: Tensor, window: Window, places: Tensor) -> Predicting:
        """Logits of the masked `places` int64 [m] (rising) of the window, or of the first of
        them only, where the others are better predicted with that one known."""
        ...


class ServableContext(Context, Protocol):
    """What a scheduler asks besides: which entries are final, and how to write lost ones again."""

    @property
    def committed(self) -> int:
        """Leading tokens of the canvas whose keys and values in stream 0 are final."""
        ...

    @property
    def can_rewrite(self) -> bool:
        """Whether lost keys and values can be computed again, equal to the bit."""
        ...

    def rewrite(self, canvas: Tensor, stream: int, end: int) -> Pass:
        """The pass that writes entries 0..end-1 of a stream once more."""
        ...


class BlockCausal:
    """Exact cache. Blocks end at origin + k x block_size; finished ones are committed lazily.

    With shifted logits the row on the left predicts, and a block's first place is predicted by the
    last committed row: the commit pass itself yields it and counts as the block's first step
    (Fast-dLLM v2), unless that is the last step and all places are predicted together. A checkpoint
    trained with first_place "noisy" counts too: once its block is filled, the last noisy row sees
    what the clean row sees. For block size 1 this is autoregressive decoding, one pass a token.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        origin: int = 0,
        is_fused: bool = True,
        is_first_alone: bool = True,
        stream: int = 0,
    ) -> None:
        self.config, self.origin, self.stream = config, origin, stream
        self.is_fused, self.is_first_alone = is_fused, is_first_alone
        self.committed = 0
        self.passes = 0
        self.can_rewrite = True
        self._boundary: Tensor | None = None

    def rewrite(self, canvas: Tensor, stream: int, end: int) -> Pass:
        """See `Context`."""
        return Pass(
            tokens=canvas[:end].tolist(),
            start=0,
            limits=self._clean_limits(0, end),
            visible=end,
            reads=[],
            stream=self.stream,
        )

    def predict(self, canvas: Tensor, window: Window, places: Tensor) -> Predicting:
        """See `Context`."""
        wanted = places.tolist()
        if not (self.config.needs_boundary and wanted[0] == window.start):
            logits = yield from self._run(canvas, window, self._rows(wanted))
            return Prediction(places, logits)
        is_open = int(canvas[window.start]) == self.config.mask_id
        is_free = self.is_first_alone and is_open
        is_alone = is_free and (not window.is_last_step or len(wanted) == 1)
        if self.committed < window.start and (is_alone or not self.is_fused):
            last = yield from self._commit(canvas, window.start, read_last=True)
            self._boundary = last.clone()  # else it would hold the logits of its whole round
        if is_alone:
            assert self._boundary is not None
            return Prediction(places[:1], self._boundary)
        inside = self._rows(wanted[1:])
        if self.committed == window.start:
            assert self._boundary is not None
            logits = yield from self._run(canvas, window, inside)
            return Prediction(places, torch.cat([self._boundary, logits]))
        logits = yield from self._run(canvas, window, [window.start - 1, *inside])
        self._boundary = logits[:1].clone()
        return Prediction(places, logits)

    def _rows(self, places: list[int]) -> list[int]:
        """The place whose row predicts each place."""
        if self.config.logits == "aligned":
            return places
        return [max(place - 1, 0) for place in places]

    def _run(self, canvas: Tensor, window: Window, sources: list[int]):
        """One pass over the window, with the finished blocks before it where they are pending."""
        if self.committed < window.start and not self.is_fused:
            yield from self._commit(canvas, window.start, read_last=False)
        first = self.committed
        own_row = self.config.first_place == "own" and self.config.logits == "shifted"
        lowest = window.start if own_row else first
        limits = self._clean_limits(first, window.start)
        limits += [window.end] * (window.end - window.start)
        reads = [max(place, lowest) - first for place in sources]
        self.committed = window.start
        return (yield from self._pass(canvas[first : window.end], first, limits, reads))

    def _commit(self, canvas: Tensor, end: int, *, read_last: bool):
        """One pass that writes the pending finished blocks; their last row's logits [1, v]."""
        first = self.committed
        reads = [end - first - 1] if read_last else []
        self.committed = end
        limits = self._clean_limits(first, end)
        return (yield from self._pass(canvas[first:end], first, limits, reads))

    def _pass(self, tokens: Tensor, start: int, limits: list[int], reads: list[int]):
        self.passes += 1
        return (
            yield Pass(
                tokens=tokens.tolist(),
                start=start,
                limits=limits,
                visible=start + len(tokens),
                reads=reads,
                stream=self.stream,
            )
        )

    def _clean_limits(self, start: int, end: int) -> list[int]:
        """What finished tokens see: their whole block and all before, or themselves and before."""
        if self.config.clean_half == "token_causal":
            return list(range(start + 1, end + 1))
        size, origin = self.config.block_size, self.origin
        ends = (((place - origin) // size + 1) * size + origin for place in range(start, end))
        return [min(block_end, end) for block_end in ends]


class Bidirectional:
    """Every row sees the whole canvas.

    cache "exact" feeds the canvas in every pass. "prefix" and "dual" do so in the first pass of a
    window and keep what it wrote: later ones feed only what lies behind the window's start, or the
    window itself, against keys and values that have grown stale (Fast-dLLM). With shifted logits
    such a piece begins `lead` rows earlier: the row on the left of its first place is in it.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        cache: Literal["exact", "prefix", "dual"] = "exact",
        lead: int | None = None,
        stream: int = 0,
    ) -> None:
        self.config, self.cache, self.stream = config, cache, stream
        self.lead = int(config.logits == "shifted") if lead is None else lead
        self.passes = self.committed = 0
        self.can_rewrite = cache == "exact"

    def rewrite(self, canvas: Tensor, stream: int, end: int) -> Pass:
        """Nothing of an exact pass is used by a later one; see `Context`."""
        raise RuntimeError("a bidirectional model keeps no entries that could be written again")

    def predict(self, canvas: Tensor, window: Window, places: Tensor) -> Predicting:
        """See `Context`."""
        start, end = 0, len(canvas)
        if self.cache != "exact" and window.step > 0:
            start = max(window.start - self.lead, 0)
            end = window.end if self.cache == "dual" else end
        back = int(self.config.logits == "shifted")
        self.passes += 1
        logits = yield Pass(
            tokens=canvas[start:end].tolist(),
            start=start,
            limits=[len(canvas)] * (end - start),
            visible=len(canvas),
            reads=[max(place - back - start, 0) for place in places.tolist()],
            stream=self.stream,
        )
        return Prediction(places, logits)


class Guided:
    """Classifier-free guidance: u + (scale + 1)(c - u), u being blind to what was given.

    As in LLaDA (arXiv 2502.09992): the second pass sees a mask in place of every given token.
    """

    def __init__(
        self, seeing: Context, blind: Context, *, scale: float, is_given: Tensor, mask_id: int
    ) -> None:
        self.seeing, self.blind, self.scale = seeing, blind, scale
        self.is_given, self.mask_id = is_given, mask_id

    @property
    def passes(self) -> int:
        """Forward passes of both."""
        return self.seeing.passes + self.blind.passes

    def hidden(self, canvas: Tensor) -> Tensor:
        """What the blind one sees."""
        return torch.where(self.is_given, self.mask_id, canvas)

    def predict(self, canvas: Tensor, window: Window, places: Tensor) -> Predicting:
        """See `Context`."""
        c = yield from self.seeing.predict(canvas, window, places)
        u = yield from self.blind.predict(self.hidden(canvas), window, places)
        return Prediction(c.places, u.logits + (self.scale + 1) * (c.logits - u.logits))


class ServableGuided(Guided):
    """Guidance over two contexts that can be served, streams 0 and 1."""

    seeing: ServableContext
    blind: ServableContext

    @property
    def committed(self) -> int:
        """See `ServableContext`."""
        return self.seeing.committed

    @property
    def can_rewrite(self) -> bool:
        """See `ServableContext`."""
        return self.seeing.can_rewrite and self.blind.can_rewrite

    def rewrite(self, canvas: Tensor, stream: int, end: int) -> Pass:
        """See `ServableContext`."""
        if stream == 0:
            return self.seeing.rewrite(canvas, stream, end)
        return self.blind.rewrite(self.hidden(canvas), stream, end)
