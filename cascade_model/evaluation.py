"""How good a model is: the held-out bound with fixed noise, and the two values beside it.

For a diffusion model the bound is the NELBO of the masked process (Sahoo et al., MDLM,
arXiv 2406.07524; per block, Arriola et al., BD3-LM, arXiv 2503.09573): the expectation over the
mask rate t of the sum over masked tokens of (1/t) x cross entropy. t is stratified over
[1e-3, 1], a rate per block, or in a bidirectional model per sequence. For an autoregressive model
it is the exact negative log likelihood. `sequential` measures the likelihood of decoding each block
from left to right instead, without noise.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cascade_model import parallel
from cascade_model.batch import TrainBatch
from cascade_model.config import ModelConfig, NoiseConfig, Outcomes
from cascade_model.corpus import Corpus
from cascade_model.errors import CheckpointMismatch
from cascade_model.likelihood import sequential_nats
from cascade_model.loss import row_losses
from cascade_model.networks import Network, build_network
from cascade_model.noise import sequence_at
from cascade_model.training_input import source_rows
from cascade_model.window import HeldOut

# Another key than any training recipe is likely to have; fixed, so that curves can be compared.
EVALUATION_SEED = 0x5EED_0E7A


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """A held-out bound in nats, with the standard error over sequences."""

    nats_per_token: float
    standard_error: float
    nats_per_byte: float
    num_sequences: int
    num_tokens: int
    """Tokens that counted, each draw's anew."""
    draws: int
    is_exact: bool
    """True for an autoregressive model and for `sequential`: a likelihood, not a bound."""


def evaluation_noise(
    block_size: int, strata: int = 32, per: Literal["block", "sequence"] = "block"
) -> NoiseConfig:
    """The fixed noise of every evaluation: t uniform on [1e-3, 1], stratified."""
    return NoiseConfig(
        seed=EVALUATION_SEED,
        block_size=block_size,
        per=per,
        min_rate=1e-3,
        max_rate=1.0,
        strata=strata,
    )


@torch.no_grad()
def bound(
    model: Network,
    corpus: Corpus,
    *,
    draws: int = 4,
    max_sequences: int | None = None,
    sequences_per_forward: int = 16,
    strata: int = 32,
    outcomes: Outcomes = "text",
    across_ranks: bool = False,
) -> Bound:
    """The model's bound on a split of a corpus, over every maskable token that it can predict.

    With shifted logits a document's first token has no row that predicts it and is left out. All
    draws take the same `chosen_sequences`, each with mask rates and bits of its own. The value is
    nats over tokens; its standard error is the ratio estimator's, over sequences with their draws
    summed. `across_ranks` shares the sequences over all ranks, which must call it together; the
    forward passes are those of one rank. Raises `CheckpointMismatch` when model and corpus have
    different tokenizers.
    """
    exact = model.config.is_autoregressive

    def sums(batch: TrainBatch) -> tuple[Tensor, Tensor]:
        rows = row_losses(model, batch, outcomes=outcomes)
        nats = torch.zeros(len(batch.clean_tokens), dtype=torch.float64, device=rows.losses.device)
        nats.index_add_(0, rows.sequences, rows.weights.double() * rows.losses.double())
        return nats, rows.num_maskable

    return _measure(
        model,
        corpus,
        sums,
        noise=_noise(model.config, corpus, strata),
        draws=1 if exact else draws,
        max_sequences=max_sequences,
        sequences_per_forward=sequences_per_forward,
        exact=exact,
        across_ranks=across_ranks,
    )


def held_out(
    model: Network,
    corpus: Corpus,
    *,
    draws: int = 1,
    max_sequences: int | None = None,
    sequences_per_forward: int = 16,
    outcomes: Outcomes = "text",
) -> HeldOut:
    """`bound` for a run while it trains, by all its ranks together.

    The noise and the sequences are the same each time, so the curve moves with the weights alone.
    """
    found = bound(
        model,
        corpus,
        draws=draws,
        max_sequences=max_sequences,
        sequences_per_forward=sequences_per_forward,
        outcomes=outcomes,
        across_ranks=True,
    )
    return HeldOut(found.nats_per_token, found.standard_error)


@torch.no_grad()
def sequential(
    model: Network,
    corpus: Corpus,
    *,
    max_sequences: int | None = None,
    sequences_per_forward: int = 16,
    outcomes: Outcomes = "text",
) -> Bound:
    """The likelihood of a split under the sequential factorisation of `likelihood`.

    Without noise; its standard error is over sequences alone. Padding behind a text is masked, as
    it is in decoding, so nothing tells the model where the text ends. A block-causal model makes as
    many passes as a block has places, a bidirectional one as many as the longest document has
    tokens. Raises `CheckpointMismatch` when model and corpus have different tokenizers.
    """
    config = model.config

    def sums(batch: TrainBatch) -> tuple[Tensor, Tensor]:
        is_target = batch.is_maskable & (source_rows(config, batch) >= 0)
        nats = sequential_nats(
            model,
            batch,
            batch.is_maskable | batch.is_padding(config),
            is_target,
            outcomes=outcomes,
            rows_per_forward=sequences_per_forward,
        )
        return nats.sum(dim=1), is_target.sum(dim=1)

    return _measure(
        model,
        corpus,
        sums,
        noise=_noise(config, corpus, strata=32),
        draws=1,
        max_sequences=max_sequences,
        sequences_per_forward=sequences_per_forward,
        exact=True,
    )


def chosen_sequences(corpus: Corpus, max_sequences: int | None) -> np.ndarray:
    """The sequences that every evaluation of a split takes, uint64 [m]: a fixed order's first."""
    size = corpus.num_sequences
    ranks = np.arange(min(size, max_sequences or size), dtype=np.uint64)
    return sequence_at(ranks, size, evaluation_noise(1), 0)


def unigram_baseline(train: Corpus, held_out: Corpus, max_sequences: int | None = None) -> float:
    """Nats per held-out token of add-one smoothed token frequencies of the training split.

    Mask, padding and infilling tokens are no outcomes of the unigram model, as of ours.
    """
    manifest = train.manifest
    every = np.arange(train.num_sequences, dtype=np.uint64)
    counts = np.bincount(_tokens(train, every), minlength=manifest.vocab_size).astype(np.float64)
    outcomes = np.ones(manifest.vocab_size, dtype=bool)
    infill = manifest.infill.ids if manifest.infill else ()
    outcomes[[manifest.mask_id, manifest.pad_id, *infill]] = False
    counts = np.where(outcomes, counts + 1.0, 0.0)
    with np.errstate(divide="ignore"):
        nats = -np.log(counts / counts.sum())
    return float(nats[_tokens(held_out, chosen_sequences(held_out, max_sequences))].mean())


def untrained(model: Network, seed: int = 0) -> Network:
    """A model of the same shape with fresh weights: what training started from."""
    fresh = build_network(model.config)
    fresh.init_weights(seed)
    return fresh.to(next(model.parameters()).device)


def require_same_tokenizer(model: Network, corpus: Corpus) -> None:
    """Raise `CheckpointMismatch`, both digests shown, unless model and corpus share one."""
    have, want = model.config.tokenizer_sha256, corpus.manifest.tokenizer_sha256
    if have != want:
        raise CheckpointMismatch(
            f"the model was trained with the tokenizer {have} and the corpus was prepared with "
            f"{want}; use a corpus prepared with the model's tokenizer"
        )


def _noise(config: ModelConfig, corpus: Corpus, strata: int) -> NoiseConfig:
    if config.attention == "bidirectional":
        return evaluation_noise(corpus.block_size, strata, per="sequence")
    return evaluation_noise(config.block_size, strata)


def _measure(
    model: Network,
    corpus: Corpus,
    sums: Callable[[TrainBatch], tuple[Tensor, Tensor]],
    *,
    noise: NoiseConfig,
    draws: int,
    max_sequences: int | None,
    sequences_per_forward: int,
    exact: bool,
    across_ranks: bool = False,
) -> Bound:
    """Add up what `sums` gives of each batch: nats and the tokens that count, by sequence [n]."""
    require_same_tokenizer(model, corpus)
    ids = chosen_sequences(corpus, max_sequences)
    places = np.arange(len(ids), dtype=np.uint64)
    totals = np.zeros((2, len(ids)))
    rank, ranks = (parallel.rank(), parallel.world_size()) if across_ranks else (0, 1)
    batches = -(-len(ids) // sequences_per_forward)
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    for draw in range(draws):
        for turn in range(0, batches, ranks):
            # All ranks gather sharded weights, so one that has no batch left makes a pass for them.
            is_mine = turn + rank < batches
            first = (turn + rank if is_mine else 0) * sequences_per_forward
            part = slice(first, first + sequences_per_forward)
            rows = corpus.masked(ids[part], places[part], noise, draw)
            found = torch.stack(sums(TrainBatch.from_numpy(rows, device))).double()
            if is_mine:
                totals[:, part] += found.cpu().numpy()
    model.train(was_training)
    if across_ranks:
        totals = parallel.sum_over_ranks(torch.from_numpy(totals).to(device)).cpu().numpy()
    nats, tokens = totals
    seen = tokens > 0
    return _estimate(nats[seen], tokens[seen], corpus, draws, exact)


def _tokens(corpus: Corpus, ids: np.ndarray) -> np.ndarray:
    """All maskable tokens of the given sequences, int64 [m]."""
    found = []
    for first in range(0, len(ids), 4096):
        rows = corpus.rows(ids[first : first + 4096])
        found.append(rows.tokens[rows.is_maskable])
    return np.concatenate(found)


def _estimate(
    nats: np.ndarray, tokens: np.ndarray, corpus: Corpus, draws: int, exact: bool
) -> Bound:
    total = tokens.sum()
    mean = nats.sum() / total
    n = len(nats)
    deviation = np.sum((nats - mean * tokens) ** 2) * n / max(n - 1, 1)
    return Bound(
        nats_per_token=float(mean),
        standard_error=float(math.sqrt(deviation) / total),
        nats_per_byte=float(mean * corpus.num_tokens / corpus.num_bytes),
        num_sequences=n,
        num_tokens=int(total),
        draws=draws,
        is_exact=exact,
    )


def as_dict(value: Bound) -> dict:
    """The bound as JSON-able values."""
    return dataclasses.asdict(value)
