"""The one denoising loop: blocks from left to right, each filled in a few parallel steps.

A block starts as mask tokens (the first one perhaps behind the prompt's ragged tail). Every step is
one forward pass over the block against the cached keys and values of all blocks before it; a rule
of `unmasking` says which predictions become final. A finished block is passed once more, clean, to
write its keys and values (the commit pass of SDAR); those never change again. With shifted logits
that pass's last row also predicts the next block's first token and counts as its first step: for
block size 1 this is plain autoregressive decoding, one pass a token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from cascade_model.attention import clean_mask, commit_mask, dense
from cascade_model.config import ModelConfig, SamplingParams
from cascade_model.errors import InputError
from cascade_model.kv_cache import KVCache
from cascade_model.model import Transformer, never_emitted, vocabulary_logits
from cascade_model.unmasking import choose, draw_tokens, uniforms


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


class Denoiser(Protocol):
    """A network with a context of committed tokens; what the loop needs to know of a model."""

    config: ModelConfig
    passes: int
    """Forward passes so far."""
    next_logits: Tensor | None
    """float [1, vocabulary]: what the last committed row predicts, of shifted models."""

    def commit(self, tokens: Tensor) -> None:
        """Append whole blocks of clean tokens, int64 [r], to the context."""
        ...

    def logits(self, block: Tensor, rows: Tensor) -> Tensor:
        """Logits [m, vocabulary] of rows int64 [m] of the current block int64 [block_size]."""
        ...


class CachedDenoiser:
    """A transformer with the exact cache of its committed blocks."""

    def __init__(self, model: Transformer, capacity: int) -> None:
        self.model, self.config = model, model.config
        weight = model.embed.weight
        self.cache = KVCache(model.config, capacity, weight.dtype, weight.device)
        self.passes = 0
        self.next_logits: Tensor | None = None
        self._banned = never_emitted(model.config)

    def commit(self, tokens: Tensor) -> None:
        """One pass that writes the keys and values of whole blocks (of the prompt: of many)."""
        cached, count = self.cache.length, len(tokens)
        if cached:
            mask = commit_mask(cached, count, self.config.clean_half, tokens.device)
        else:
            segments = torch.zeros(1, count, dtype=torch.int32, device=tokens.device)
            mask = clean_mask(segments, self.config.block_size, self.config.clean_half)
        rows = torch.tensor([count - 1] if _needs_boundary(self.config) else [], dtype=torch.int64)
        logits = self._run(tokens, mask, rows.to(tokens.device))
        self.next_logits = logits if len(rows) else None
        self.cache.commit(count)

    def logits(self, block: Tensor, rows: Tensor) -> Tensor:
        """One pass over the current block, which sees the whole cache and itself both ways."""
        return self._run(block, None, rows)

    @torch.inference_mode()
    def _run(self, tokens: Tensor, mask: Tensor | None, rows: Tensor) -> Tensor:
        self.passes += 1
        start = self.cache.length
        positions = torch.arange(start, start + len(tokens), device=tokens.device)
        return self.model(
            tokens[None],
            positions[None],
            dense(mask),
            lambda hidden, head: vocabulary_logits(hidden[0, rows], head, self._banned),
            self.cache,
        )


def sample(
    model: Transformer, prompt_tokens: list[int], params: SamplingParams, choice: int = 0
) -> Iterator[DecodedBlock]:
    """Decode one completion of a prompt, block by block.

    The same (weights, prompt, params, choice) gives the same tokens; blocks are counted from the
    prompt's first token, so decoding on from a committed prefix gives the same rest. Raises
    `InputError` for a prompt that is empty under shifted logits, has a token outside the
    vocabulary, or is too long for the model's context together with `max_tokens`.
    """
    config = model.config
    _check(config, prompt_tokens, params)
    whole = -(-(len(prompt_tokens) + params.max_tokens) // config.block_size)
    denoiser = CachedDenoiser(model, whole * config.block_size)
    return decode(denoiser, prompt_tokens, params, choice, model.embed.weight.device)


def decode(
    denoiser: Denoiser,
    prompt_tokens: list[int],
    params: SamplingParams,
    choice: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[DecodedBlock]:
    """The loop over blocks, for any denoiser."""
    size, eos = denoiser.config.block_size, denoiser.config.eos_id
    prompt = torch.tensor(prompt_tokens, dtype=torch.int64, device=device)
    known = len(prompt) // size * size
    tail, left, counted = prompt[known:], params.max_tokens, denoiser.passes
    if known:
        denoiser.commit(prompt[:known])
    for number in range(known // size, known // size + len(prompt) + left):
        block = torch.full((size,), denoiser.config.mask_id, dtype=torch.int64, device=device)
        block[: len(tail)] = tail
        wanted = min(len(tail) + left, size)
        steps = _fill(denoiser, block, len(tail), wanted, params, choice, number)
        tokens, stopped = _new_tokens(block[len(tail) : wanted].tolist(), eos, params)
        left -= len(tokens)
        reason = "stop" if stopped else "length" if left == 0 else None
        passes, counted = denoiser.passes - counted, denoiser.passes
        yield DecodedBlock(tokens=tokens, passes=passes, steps=steps, finish_reason=reason)
        if reason is not None:
            return
        denoiser.commit(block)
        tail = prompt[:0]


def _fill(
    denoiser: Denoiser,
    block: Tensor,
    first: int,
    wanted: int,
    params: SamplingParams,
    choice: int,
    number: int,
) -> int:
    """Denoise one block in place; returns the steps taken.

    `first` is the place of the first new token and `wanted` ends those that will be kept. Filling
    follows the whole block, so that a lower `max_tokens` gives a prefix of the same tokens; it
    ends as soon as all wanted places, or all up to an end-of-text token, are filled.
    """
    config = denoiser.config
    ceiling = params.steps_per_block or config.block_size
    is_masked = torch.arange(len(block), device=block.device) >= first
    step = 0
    while not _is_done(block, is_masked, first, wanted, config.eos_id, params):
        places = is_masked.nonzero()[:, 0]
        boundary = _needs_boundary(config) and bool(is_masked[0])
        alone = boundary and step == 0 and (ceiling > 1 or len(places) == 1)
        logits = _logits(denoiser, block, places[:1] if alone else places, boundary, alone)
        places = places[:1] if alone else places
        uniform = torch.from_numpy(uniforms(params, choice, number, step, places.tolist()))
        tokens, confidence = draw_tokens(logits, params, uniform)
        chosen = choose(confidence, 1 if alone else ceiling - step, params)
        block[places[chosen]] = tokens[chosen]
        is_masked[places[chosen]] = False
        step += 1
    return step


def _logits(
    denoiser: Denoiser, block: Tensor, places: Tensor, boundary: bool, alone: bool
) -> Tensor:
    """Logits [m, vocabulary] that predict the masked places, each from its source row."""
    config = denoiser.config
    if boundary:
        assert denoiser.next_logits is not None
        if alone:
            return denoiser.next_logits
        inside = denoiser.logits(block, places[1:] - 1)
        return torch.cat([denoiser.next_logits, inside])
    if config.logits == "aligned":
        return denoiser.logits(block, places)
    return denoiser.logits(block, (places - 1).clamp(min=0))


def _needs_boundary(config: ModelConfig) -> bool:
    """Whether a block's first token is predicted by the last committed row.

    A checkpoint trained with `noisy` counts: once its block is filled, the last noisy row sees what
    the clean row sees.
    """
    return config.logits == "shifted" and config.first_place != "own"


def _is_done(
    block: Tensor,
    is_masked: Tensor,
    first: int,
    wanted: int,
    eos_id: int,
    params: SamplingParams,
) -> bool:
    """Whether every place that will be kept is filled."""
    open_places = is_masked[first:wanted].nonzero()
    if len(open_places) == 0:
        return True
    filled = block[first : first + int(open_places[0])]
    return params.stop_at_eos and bool((filled == eos_id).any())


def _new_tokens(tokens: list[int], eos_id: int, params: SamplingParams) -> tuple[list[int], bool]:
    """Cut behind the first end-of-text token."""
    if params.stop_at_eos and eos_id in tokens:
        return tokens[: tokens.index(eos_id) + 1], True
    return tokens, False


def _check(config: ModelConfig, prompt_tokens: list[int], params: SamplingParams) -> None:
    wrong = [token for token in prompt_tokens if not 0 <= token < config.vocab_size]
    if wrong:
        raise InputError(
            f"prompt has the token id {wrong[0]}, outside the vocabulary of {config.vocab_size}; "
            "use the tokenizer of this model"
        )
    if config.mask_id in prompt_tokens:
        raise InputError(
            f"prompt has the mask token {config.mask_id}, which is no text; leave it out"
        )
    if not prompt_tokens and _needs_boundary(config):
        raise InputError(
            "prompt is empty, and with shifted logits the first token needs one before it; "
            f"begin with the end-of-text token {config.eos_id}"
        )
    if _needs_boundary(config) and (config.first_place, config.clean_half) == (
        "noisy",
        "token_causal",
    ):
        raise InputError(
            "first_place=noisy with clean_half=token_causal cannot be decoded from committed rows; "
            "train with first_place=clean"
        )
    length, limit = len(prompt_tokens), config.max_sequence_length
    if length + params.max_tokens > limit:
        raise InputError(
            f"prompt of {length} tokens plus max_tokens={params.max_tokens} exceeds the model's "
            f"context of {limit}; shorten the prompt or lower max_tokens"
        )
