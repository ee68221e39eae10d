"""How probable a model finds a given answer to a prompt: log p(answer | prompt) in nats.

Two ways. `monte_carlo` estimates a lower bound, as LLaDA does (arXiv 2502.09992, Eq. 6): exactly l
of S unknown tokens are masked, l uniform on 1..S and systematic over a group of samples, and the
masked tokens' log-probabilities weigh S / l. In a bidirectional model the S tokens are the whole
answer; in a block-causal one each block's part of it, given the clean text before (the bound of
BD3-LM, arXiv 2503.09573), all blocks in one pass. `sequential` factorises instead: each token given
the earlier blocks, the tokens on its left and masks on its right. That is deterministic, additive
over tokens, a likelihood and not a bound, and what decoding with the sequential rule gives each
token. In an autoregressive model it is the chain rule itself.

Blocks are counted from the prompt's first token. What follows the answer in its last block is
masked, as when it is decoded.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from cascade_model.batch import TrainBatch
from cascade_model.config import ModelConfig, Outcomes
from cascade_model.errors import InputError
from cascade_model.loss import cross_entropy
from cascade_model.networks import Network
from cascade_model.noise import COUNT, SUBSET, key_of, random_words
from cascade_model.objective import banned_ids
from cascade_model.training_input import read_places, source_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A Monte-Carlo value in nats."""

    mean: float
    standard_error: float
    """From the spread of the groups; 0 where nothing is random, NaN for a single group."""
    groups: tuple[float, ...]
    """The mean of each group of samples."""


def monte_carlo(
    model: Network,
    prompt: list[int],
    answer: list[int],
    *,
    num_groups: int = 8,
    samples_per_group: int = 16,
    seed: int = 0,
    outcomes: Outcomes = "text",
    rows_per_forward: int = 16,
) -> Estimate:
    """An unbiased estimate of the bound on log p(answer | prompt).

    LLaDA's 128 samples are 8 groups of 16. The masks depend on the seed and the places behind the
    prompt alone, so answers that are compared (`difference`) share their random numbers.
    """
    canvas = _canvas(model, prompt, answer)
    unit_of = _units(model.config, canvas, len(prompt), len(answer))
    sizes = np.bincount(unit_of)
    if sizes.max() == 1:  # one mask is all there is: no randomness is left
        num_groups = samples_per_group = 1
    groups = []
    for group in range(num_groups):
        masks, weights = _masks(unit_of, sizes, seed, group, samples_per_group)
        values = _weighted(model, canvas, len(prompt), masks, weights, outcomes, rows_per_forward)
        groups.append(float(values.mean()))
    spread = float(np.std(groups, ddof=1)) if num_groups > 1 else math.nan
    return Estimate(
        mean=float(np.mean(groups)),
        standard_error=0.0 if sizes.max() == 1 else spread / math.sqrt(num_groups),
        groups=tuple(groups),
    )


def difference(left: Estimate, right: Estimate) -> Estimate:
    """left - right of two answers with common random numbers: their noise cancels in part."""
    if len(left.groups) == len(right.groups) > 1:
        groups = tuple(a - b for a, b in zip(left.groups, right.groups, strict=True))
        error = float(np.std(groups, ddof=1)) / math.sqrt(len(groups))
    else:  # one of them is exact
        groups, error = (), math.hypot(left.standard_error, right.standard_error)
    return Estimate(mean=left.mean - right.mean, standard_error=error, groups=groups)


@torch.no_grad()
def sequential(
    model: Network,
    prompt: list[int],
    answer: list[int],
    *,
    outcomes: Outcomes = "text",
    rows_per_forward: int = 16,
) -> Tensor:
    """Log-probability of each token of the answer, float64 [len(answer)]; their sum is exact.

    A block-causal model takes as many sequences as a block has places, a bidirectional one as many
    as the answer has tokens, an autoregressive one a single one. Raises `InputError` where no row
    predicts the first token: shifted logits and an empty prompt.
    """
    batch, is_open, is_target = sequential_input(model, prompt, answer)
    nats = sequential_nats(
        model, batch, is_open, is_target, outcomes=outcomes, rows_per_forward=rows_per_forward
    )
    return -nats[is_target]


def sequential_input(
    model: Network, prompt: list[int], answer: list[int]
) -> tuple[TrainBatch, Tensor, Tensor]:
    """One sequence, which of its places are unknown and which of these are the answer's, [1, L]."""
    canvas = _canvas(model, prompt, answer)
    place = torch.arange(len(canvas), device=canvas.device)
    is_open = (place >= len(prompt))[None]
    is_target = is_open & (place < len(prompt) + len(answer))
    return _batch(model.config, canvas[None], is_open), is_open, is_target


@torch.no_grad()
def sequential_nats(
    model: Network,
    batch: TrainBatch,
    is_open: Tensor,
    is_target: Tensor,
    *,
    outcomes: Outcomes = "text",
    rows_per_forward: int = 16,
) -> Tensor:
    """Negative log-probability of each target in the sequential factorisation, float64 [n, L].

    is_open bool [n, L] tells the places that are unknown until they are decoded (others are given),
    is_target those among them whose values are wanted; elsewhere the result is 0. The batch's own
    masks do not matter.
    """
    banned = banned_ids(model.config, outcomes)
    result = torch.zeros(is_target.shape, dtype=torch.float64, device=is_target.device)
    for each in sequential_passes(model.config, batch, is_open, is_target, rows_per_forward):
        nats = _nats(model, each.config, each.batch, each.rows, each.places, banned)
        result[each.sequences[each.rows], each.places] = nats.double()
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class SequentialPass:
    """One forward pass of the sequential factorisation."""

    config: ModelConfig
    """How the model reads this pass: as when it decodes."""
    batch: TrainBatch
    sequences: Tensor
    """int64 [n]: which sequence of the whole batch each of this one is."""
    rows: Tensor
    """int64 [r]: the sequence of this batch that each predicted token stands in."""
    places: Tensor
    """int64 [r]: its place there."""


def sequential_passes(
    config: ModelConfig,
    batch: TrainBatch,
    is_open: Tensor,
    is_target: Tensor,
    rows_per_forward: int,
) -> Iterator[SequentialPass]:
    """The passes that predict every target once; arguments as of `sequential_nats`."""
    config = _as_decoded(config)
    steps = _steps(config, batch)
    sequence, _ = is_target.nonzero(as_tuple=True)
    wanted = torch.stack([sequence, steps[is_target]], dim=1).unique(dim=0)
    for chosen, step in (part.unbind(dim=1) for part in wanted.split(rows_per_forward)):
        now, step = steps[chosen], step[:, None]
        part = replace(batch.select(chosen), is_masked=is_open[chosen] & (now >= step))
        rows, places = (is_target[chosen] & (now == step)).nonzero(as_tuple=True)
        _require_source(config, part, rows, places)
        yield SequentialPass(config=config, batch=part, sequences=chosen, rows=rows, places=places)


def _as_decoded(config: ModelConfig) -> ModelConfig:
    """In decoding a block's left neighbour is finished, so its noisy row is its clean row."""
    if config.first_place == "noisy" and config.attention == "block_causal":
        return replace(config, first_place="clean")
    return config


def _steps(config: ModelConfig, batch: TrainBatch) -> Tensor:
    """When each place is decoded, int64 [n, L]; places of one step do not see each other."""
    if config.attention == "bidirectional":
        return batch.positions
    place = torch.arange(batch.clean_tokens.shape[1], device=batch.clean_tokens.device)
    return (place % config.block_size).expand(batch.clean_tokens.shape)


def _canvas(model: Network, prompt: list[int], answer: list[int]) -> Tensor:
    """Prompt, answer, and padding to whole blocks for a block-causal model, int64 [L]."""
    config = model.config
    if not answer:
        raise InputError("the answer has no tokens; give at least one")
    wrong = [token for token in prompt + answer if not 0 <= token < config.vocab_size]
    if wrong:
        raise InputError(
            f"token id {wrong[0]} is outside the vocabulary of {config.vocab_size}; use the "
            "tokenizer of this model"
        )
    tokens = prompt + answer
    if config.attention == "block_causal":
        tokens = tokens + [config.pad_id] * (-len(tokens) % config.block_size)
    return torch.tensor(tokens, dtype=torch.int64, device=next(model.parameters()).device)


def _batch(config: ModelConfig, canvases: Tensor, is_masked: Tensor) -> TrainBatch:
    block = config.block_size if config.attention == "block_causal" else None
    return TrainBatch.of(canvases, is_masked, block_size=block)


def _units(config: ModelConfig, canvas: Tensor, start: int, count: int) -> np.ndarray:
    """Which unit each token of the answer belongs to, int64 [count]: its block, or all one."""
    if config.attention == "bidirectional":
        return np.zeros(count, dtype=np.int64)
    return (start + np.arange(count)) // config.block_size - start // config.block_size


def _masks(
    unit_of: np.ndarray, sizes: np.ndarray, seed: int, group: int, samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """A group's masks bool [samples, count], and the weight S / l of each token [samples, count].

    The counts of a unit of S tokens are 1 + floor(S (i + u) / samples) for sample i, with one
    uniform u for the group: each l as often as the next, and on average exactly as often.
    """
    key, count = key_of(seed), len(unit_of)
    offsets = random_words(key, COUNT, group, np.arange(len(sizes)), 1)[:, 0] / 2**32
    turns = (np.arange(samples)[:, None] + offsets) / samples
    lengths = np.minimum(1 + np.floor(turns * sizes).astype(np.int64), sizes)
    words = random_words(key, SUBSET, group, np.arange(samples), count)
    order = np.lexsort((words, np.broadcast_to(unit_of, words.shape)))
    first = np.cumsum(sizes) - sizes
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(count)[None] - first[unit_of][None], axis=1)
    return rank < lengths[:, unit_of], (sizes / lengths)[:, unit_of]


@torch.no_grad()
def _weighted(
    model: Network,
    canvas: Tensor,
    start: int,
    masks: np.ndarray,
    weights: np.ndarray,
    outcomes: Outcomes,
    rows_per_forward: int,
) -> np.ndarray:
    """Each sample's weighted sum of log-probabilities, float64 [samples]."""
    config, end = _as_decoded(model.config), start + masks.shape[1]
    banned, totals = banned_ids(config, outcomes), []
    for first in range(0, len(masks), rows_per_forward):
        part = slice(first, first + rows_per_forward)
        chosen = torch.from_numpy(masks[part]).to(canvas.device)
        is_masked = torch.ones(len(chosen), len(canvas), dtype=torch.bool, device=canvas.device)
        is_masked[:, :start], is_masked[:, start:end] = False, chosen
        batch = _batch(config, canvas.expand(len(chosen), -1), is_masked)
        rows, places = chosen.nonzero(as_tuple=True)
        _require_source(config, batch, rows, places + start)
        nats = _nats(model, config, batch, rows, places + start, banned).double()
        weight = torch.from_numpy(weights[part]).to(canvas.device)[rows, places]
        total = torch.zeros(len(chosen), dtype=torch.float64, device=canvas.device)
        totals.append(-total.index_add(0, rows, weight * nats))
    return torch.cat(totals).cpu().numpy()


def _nats(
    model: Network,
    config: ModelConfig,
    batch: TrainBatch,
    rows: Tensor,
    places: Tensor,
    banned: list[int],
) -> Tensor:
    """Cross entropy of the given tokens in one pass, [r]."""
    targets = batch.clean_tokens[rows, places]

    def read(hidden: Tensor, head: nn.Module) -> Tensor:
        return cross_entropy(hidden, head, targets, banned)

    return read_places(model, batch, rows, places, read, config)


def _require_source(config: ModelConfig, batch: TrainBatch, rows: Tensor, places: Tensor) -> None:
    if bool((source_rows(config, batch)[rows, places] < 0).any()):
        raise InputError(
            "the first token of a text has no row on its left that predicts it "
            f"(logits={config.logits}, first_place={config.first_place}); give a prompt, such as "
            "the token that begins texts"
        )
