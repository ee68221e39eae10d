"""From blocks of token ids to text: detokenisation and stop strings, without weights or torch.

A server can hold this half of decoding on another machine than the model. Whatever may still change
is held back: an unfinished character, a possible beginning of a stop.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from cascade_model.settings import check

FinishReason = Literal["stop", "length"]
UNFINISHED_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class TokenLogprob(NamedTuple):
    """How probable a token was, in natural logarithms.

    The distribution is the prediction of the step that wrote the token, with guidance, before
    temperature, top-k and top-p; ids that are never drawn (mask, padding, with suppress_eos=token
    the end of text) have no share in it. Where a place was written more than once (editing,
    remasking) the last time counts. In an autoregressive model, and with rule=sequential in any
    other while a step commits one token, they add up to the text's log-likelihood
    (`likelihood.sequential`). Of several tokens of one step each is told without the others.
    A tuple, so that a block still holds it after `dataclasses.asdict`.
    """

    logprob: float
    """At most 0, and never -inf."""
    top: tuple[tuple[int, float], ...]
    """The most probable tokens of the place, best first, with theirs; fewer than were asked for
    where there are no more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """What one block added to a completion."""

    text: str
    """Text that is now certain; an unfinished character or a possible stop stays back."""
    token_ids: tuple[int, ...]
    """The block's tokens, up to and including the one that ends a stop string."""
    passes: int
    """Forward passes that this block took, the pass before it that wrote the cache included."""
    steps: int
    """K_b: its denoising steps."""
    finish_reason: FinishReason | None
    """Set on the last chunk only."""
    stop_reason: int | str | None
    """What ended the completion: the token's id, or the stop string; none where its length did."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One for each token; none where they were not asked for."""
    margin: float | None = None
    """As of a completion, of this block alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A finished answer to one prompt."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: int | str | None
    """The token's id or the stop string that ended it; none where its length did."""
    passes: int
    """Forward passes of the whole answer."""
    steps_per_block: tuple[int, ...]
    """K_b, the denoising steps of each block."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One for each token; none where they were not asked for."""
    margin: float | None = None
    """The smallest distance by which any decision was made (`decisions`), at most 1: how close the
    request came to other tokens on a machine whose floating point differs. All of the decoded
    blocks count, also what lies behind a stop string in the last one. None where it was not asked
    for."""


class TextStream:
    """Turns tokens into text that is never taken back, and cuts it at the first stop string.

    The text depends on the tokens alone, not on how they were cut into blocks. The stop that is
    completed first wins; of two that end together, the longer one. Stop text is not returned.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        check(
            isinstance(stop, list | tuple) and all(isinstance(text, str) for text in stop),
            f"stop={stop!r} must be a list of texts; use [] for none, and [text] for one",
        )
        self._decode = decode
        self._stop = [text for text in stop if text]
        self._context: list[int] = []  # the last whole characters: some decoders look behind
        self._pending: list[int] = []  # tokens since then
        self._taken = ""  # text of `_pending` that `_held` already got
        self._held = ""  # decoded, but perhaps the beginning of a stop

    def push(
        self,
        tokens: Sequence[int],
        *,
        passes: int,
        steps: int,
        finish_reason: FinishReason | None,
        stop_reason: int | str | None = None,
        logprobs: Sequence[TokenLogprob] | None = None,
        margin: float | None = None,
    ) -> Chunk:
        """Add one block; the chunk's `finish_reason` is "stop" once a stop string is complete."""
        text, taken = "", tuple(tokens)
        for count, token in enumerate(tokens, start=1):
            self._held += self._decode_next(token)
            stop = self._first_stop()
            if stop is not None:
                text += self._held[: self._held.find(stop)]
                taken, finish_reason, stop_reason = taken[:count], "stop", stop
                break
            text += self._release()
        else:
            text += self._rest() if finish_reason is not None else ""
        return Chunk(
            text=text,
            token_ids=taken,
            passes=passes,
            steps=steps,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            logprobs=None if logprobs is None else tuple(logprobs[: len(taken)]),
            margin=margin,
        )

    def _decode_next(self, token: int) -> str:
        """Certain new text after one more token: all but a last character that may be cut."""
        self._pending.append(token)
        whole = self._decode_pending()
        certain = whole.rstrip(UNFINISHED_CHARACTER)  # some decoders give one for each byte
        new = certain[len(self._taken) :]
        if certain == whole:
            if whole:  # a special token has no text to look behind at
                self._context = self._pending
            self._pending, self._taken = [], ""
        else:
            self._taken = certain
        return new

    def _decode_pending(self) -> str:
        before = self._decode(self._context) if self._context else ""
        return self._decode(self._context + self._pending)[len(before) :]

    def _first_stop(self) -> str | None:
        """The stop that was completed first in the held text; of two the longer, or None."""
        hits = [
            (start + len(stop), start, stop)
            for stop in self._stop
            if (start := self._held.find(stop)) >= 0
        ]
        return min(hits)[2] if hits else None

    def _release(self) -> str:
        """Take out the held text, less the longest ending that begins a stop."""
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def _rest(self) -> str:
        """At the end nothing can change any more: give out all that was held back."""
        text = self._held + (self._decode_pending()[len(self._taken) :] if self._pending else "")
        self._held, self._pending, self._taken = "", [], ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest ending of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def complete(chunks: Iterator[Chunk]) -> Completion:
    """Join a stream that ran to its end."""
    parts = list(chunks)
    if not parts or parts[-1].finish_reason is None:
        raise RuntimeError("the decoding stream ended without a finish reason")
    return Completion(
        text="".join(part.text for part in parts),
        token_ids=tuple(token for part in parts for token in part.token_ids),
        finish_reason=parts[-1].finish_reason,
        stop_reason=parts[-1].stop_reason,
        passes=sum(part.passes for part in parts),
        steps_per_block=tuple(part.steps for part in parts),
        logprobs=_joined([part.logprobs for part in parts]),
        margin=min((part.margin for part in parts if part.margin is not None), default=None),
    )


def _joined(parts: list[tuple[TokenLogprob, ...] | None]) -> tuple[TokenLogprob, ...] | None:
    told = [part for part in parts if part is not None]
    return tuple(itertools.chain(*told)) if told else None
