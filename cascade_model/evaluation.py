"""How good a model is: the held-out bound with fixed noise, and the two values beside it.

For a diffusion model the bound is the NELBO of the masked process (Sahoo et al., MDLM,
arXiv 2406.07524; per block, Arriola et al., BD3-LM, arXiv 2503.09573): the expectation over the
mask rate t of the sum over masked tokens of (1/t) x cross entropy. t is stratified over
[1e-3, 1]. For an autoregressive model it is the exact negative log likelihood.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch

from cascade_model.batch import TrainBatch
from cascade_model.config import NoiseConfig
from cascade_model.corpus import Corpus
from cascade_model.errors import CheckpointMismatch
from cascade_model.loss import row_losses
from cascade_model.model import Transformer

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
    """True for an autoregressive model: a likelihood, not a bound."""


def evaluation_noise(block_size: int, strata: int = 32) -> NoiseConfig:
    """The fixed noise of every evaluation: t per block, uniform on [1e-3, 1], stratified."""
    return NoiseConfig(
        seed=EVALUATION_SEED,
        block_size=block_size,
        per="block",
        min_rate=1e-3,
        max_rate=1.0,
        strata=strata,
    )


@torch.no_grad()
def bound(
    model: Transformer,
    corpus: Corpus,
    *,
    draws: int = 4,
    max_sequences: int | None = None,
    sequences_per_forward: int = 16,
    strata: int = 32,
) -> Bound:
    """The model's bound on a split of a corpus, all maskable tokens counted.

    Each draw takes the first `max_sequences` sequences of its own order, with its own mask rates
    and bits. The value is nats over tokens; its standard error is the ratio estimator's, over
    sequences with their draws summed.
    Raises `CheckpointMismatch` when model and corpus have different tokenizers.
    """
    require_same_tokenizer(model, corpus)
    exact = model.config.is_autoregressive
    draws = 1 if exact else draws
    noise = evaluation_noise(model.config.block_size, strata)
    size = corpus.num_sequences
    count = min(size, max_sequences or size)
    nats, tokens = np.zeros(size), np.zeros(size)
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    for draw in range(draws):
        for first in range(0, count, sequences_per_forward):
            step = min(sequences_per_forward, count - first)
            rows = corpus.batch(draw * size + first, step, noise)
            sums, counted = _sums(model, TrainBatch.from_numpy(rows, device))
            nats[rows.sequence_ids] += sums
            tokens[rows.sequence_ids] += counted
    model.train(was_training)
    seen = tokens > 0
    return _estimate(nats[seen], tokens[seen], corpus, draws, exact)


def unigram_baseline(train: Corpus, held_out: Corpus) -> float:
    """Nats per held-out token of add-one smoothed token frequencies of the training split.

    Mask and padding are no outcomes of the unigram model, as of ours.
    """
    manifest = train.manifest
    counts = np.bincount(_tokens(train), minlength=manifest.vocab_size).astype(np.float64)
    outcomes = np.ones(manifest.vocab_size, dtype=bool)
    outcomes[[manifest.mask_id, manifest.pad_id]] = False
    counts = np.where(outcomes, counts + 1.0, 0.0)
    with np.errstate(divide="ignore"):
        nats = -np.log(counts / counts.sum())
    return float(nats[_tokens(held_out)].mean())


def untrained(model: Transformer, seed: int = 0) -> Transformer:
    """A model of the same shape with fresh weights: what training started from."""
    fresh = Transformer(model.config)
    fresh.init_weights(seed)
    return fresh.to(next(model.parameters()).device)


def require_same_tokenizer(model: Transformer, corpus: Corpus) -> None:
    """Raise `CheckpointMismatch`, both digests shown, unless model and corpus share one."""
    have, want = model.config.tokenizer_sha256, corpus.manifest.tokenizer_sha256
    if have != want:
        raise CheckpointMismatch(
            f"the model was trained with the tokenizer {have} and the corpus was prepared with "
            f"{want}; use a corpus prepared with the model's tokenizer"
        )


def _sums(model: Transformer, batch: TrainBatch) -> tuple[np.ndarray, np.ndarray]:
    """Per sequence: the weighted nats and the number of tokens that count, float64 [n]."""
    rows = row_losses(model, batch)
    size = len(batch.clean_tokens)
    nats = torch.zeros(size, dtype=torch.float64, device=rows.sequences.device)
    nats.index_add_(0, rows.sequences, rows.weights.double() * rows.losses.double())
    return nats.cpu().numpy(), rows.num_maskable.double().cpu().numpy()


def _tokens(corpus: Corpus) -> np.ndarray:
    """All maskable tokens of a split, int64 [m]."""
    found = []
    for first in range(0, corpus.num_sequences, 4096):
        last = min(first + 4096, corpus.num_sequences)
        rows = corpus.rows(np.arange(first, last, dtype=np.uint64))
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
