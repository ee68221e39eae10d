"""What a masked token's cross entropy counts in the loss, and what the sum is divided by.

Published systems differ on each of three axes, so each is a recorded setting of its own:

- weight: 1/t ("elbo": LLaDA, MDLM, BD3-LM), 1 ("unit": Fast-dLLM v2, LLaDA2), or by how near the
  visible tokens are ("cart": Dream, arXiv 2508.15487).
- normaliser: the tokens that could have been masked ("maskable": LLaDA, MDLM, BD3-LM), those that
  were ("masked": DiffuLLaMA, LLaDA2), or each document by its own maskable tokens and then the mean
  over documents ("document": LLaDA's fine-tuning, where a document is an answer).
- outcomes: whether the mask token can be predicted. "text": neither it nor padding takes
  probability; "all_but_mask": the substitution parameterisation of MDLM and BD3-LM; "all": LLaDA.

Weights and normalisers are small functions of a batch and its supervised tokens. A normaliser gives
what each token adds and what each sequence counts: the trainer adds both over micro-batches and
ranks before it divides. A loss on other tokens (`Term`) is averaged over its own tokens of each
sequence and weighs as much as the sequence counts, so that neither its scale nor its value depends
on the normaliser's tokens or on how sequences are shared out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cascade_model.batch import TrainBatch
from cascade_model.config import ModelConfig, Normaliser, Outcomes, Weight
from cascade_model.model import never_emitted

NUM_BANDS = 8
CART_RATE = 0.3
_CART_REACH = 100  # 0.7^100 = 3e-16: beyond it a visible token adds nothing in float64


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLosses:
    """The supervised tokens of a batch, r in all."""

    sequences: Tensor
    """int64 [r]: row of the batch."""
    places: Tensor
    """int64 [r]: place in the sequence."""
    losses: Tensor
    """float32 [r]: cross entropy in nats."""
    rates: Tensor
    """float32 [r]: mask rate of the token's block; 1 for an autoregressive model."""
    is_counted: Tensor
    """bool [n, L]: tokens that could have been masked and predicted."""

    @property
    def num_maskable(self) -> Tensor:
        """int64 [n]: maskable and predictable tokens of each sequence."""
        return self.is_counted.sum(dim=1)

    @property
    def weights(self) -> Tensor:
        """float32 [r]: 1/t, under which the sum is the bound's estimate."""
        return self.rates.reciprocal()


@dataclass(frozen=True, kw_only=True, slots=True)
class LossParts:
    """Sums of one forward pass; the trainer divides by the count of the whole global batch."""

    sum: Tensor
    """float32 scalar, differentiable: weighted losses of the supervised tokens and all terms."""
    count: int
    """What the normaliser counts: maskable tokens, masked tokens or documents."""
    band_sums: Tensor
    """float32 [8]: unweighted cross entropy by mask rate, band j being [j/8, (j+1)/8)."""
    band_counts: Tensor
    """float32 [8]: supervised tokens of each band."""
    others: dict[str, Tensor] = field(default_factory=dict)
    """float64 scalars, for the metrics: each loss's own sum, and `<name>_count` to divide it by."""


@dataclass(frozen=True, slots=True)
class Term:
    """A loss beside that of the supervised tokens, on m tokens of its own."""

    name: str
    weight: float
    sequences: Tensor
    """int64 [m]: row of the batch."""
    values: Tensor
    """float32 [m], differentiable: nats."""


def banned_ids(config: ModelConfig, outcomes: Outcomes) -> list[int]:
    """Ids that take no probability."""
    if outcomes == "text":
        return never_emitted(config)
    return [config.mask_id] if outcomes == "all_but_mask" else []


def by_rate(config: ModelConfig, batch: TrainBatch, rows: RowLosses) -> Tensor:
    """1/t."""
    return rows.weights


def by_one(config: ModelConfig, batch: TrainBatch, rows: RowLosses) -> Tensor:
    """1."""
    return torch.ones_like(rows.losses)


def by_context(config: ModelConfig, batch: TrainBatch, rows: RowLosses) -> Tensor:
    """CART: 1/2 x the sum over unmasked i of p (1 - p)^max(|n - i| - 1, 0), within the document.

    Padding is no context. A token amid visible ones has weight 1, one far from all weight 0.
    """
    is_visible = ~batch.is_masked & ~batch.is_padding(config)
    total = torch.zeros(is_visible.shape, dtype=rows.losses.dtype, device=is_visible.device)
    for distance in range(1, min(_CART_REACH, is_visible.shape[1] - 1) + 1):
        together = batch.segments[:, distance:] == batch.segments[:, :-distance]
        share = 0.5 * CART_RATE * (1 - CART_RATE) ** (distance - 1)
        total[:, distance:] += share * (together & is_visible[:, :-distance]).to(total.dtype)
        total[:, :-distance] += share * (together & is_visible[:, distance:]).to(total.dtype)
    return total[rows.sequences, rows.places]


WEIGHTS: dict[Weight, Callable[[ModelConfig, TrainBatch, RowLosses], Tensor]] = {
    "elbo": by_rate,
    "unit": by_one,
    "cart": by_context,
}


def weights_of(config: ModelConfig, batch: TrainBatch, rows: RowLosses, weight: Weight) -> Tensor:
    """The weight of each supervised token, [r]; 1 for an autoregressive model."""
    chosen = by_one if config.is_autoregressive else WEIGHTS[weight]
    return chosen(config, batch, rows)


def over_maskable(batch: TrainBatch, rows: RowLosses, values: Tensor) -> tuple[Tensor, Tensor]:
    """Every token as it is; a sequence counts its tokens that could have been masked."""
    return values, rows.num_maskable


def over_masked(batch: TrainBatch, rows: RowLosses, values: Tensor) -> tuple[Tensor, Tensor]:
    """Every token as it is; a sequence counts its supervised tokens: not the bound's scale."""
    return values, rows.sequences.bincount(minlength=len(batch.segments))


def over_documents(batch: TrainBatch, rows: RowLosses, values: Tensor) -> tuple[Tensor, Tensor]:
    """A token over its document's maskable ones; a sequence counts the documents that have any."""
    segments = batch.segments.long()
    lengths = values.new_zeros(len(segments), int(segments.max()) + 1)
    lengths.scatter_add_(1, segments, rows.is_counted.to(values.dtype))
    own = lengths[rows.sequences, segments[rows.sequences, rows.places]]
    return values / own, (lengths > 0).sum(dim=1)


NORMALISERS: dict[Normaliser, Callable[[TrainBatch, RowLosses, Tensor], tuple[Tensor, Tensor]]] = {
    "maskable": over_maskable,
    "masked": over_masked,
    "document": over_documents,
}


def loss_parts(
    values: Tensor,
    batch: TrainBatch,
    rows: RowLosses,
    normaliser: Normaliser = "maskable",
    terms: Sequence[Term] = (),
    weighted: Tensor | None = None,
) -> LossParts:
    """What each supervised token adds, [r], and the terms, as sum and count, beside the sums by
    mask rate and those of each loss alone.

    `weighted` is the tokens' weighted cross entropy, [r], where `values` hold something else too:
    it is told as "ce", which other runs' losses can be compared with.
    """
    normalise = NORMALISERS[normaliser]
    shares, counts = normalise(batch, rows, values)
    plain = shares if weighted is None else normalise(batch, rows, weighted)[0]
    total, count = shares.sum(), int(counts.sum())
    others = _told("ce", plain, count)
    for term in terms:
        total = total + term.weight * (means_by_sequence(term, len(counts)) * counts).sum()
        others |= _told(term.name, term.values, len(term.values))
    losses = rows.losses.detach().float()
    band = (rows.rates * NUM_BANDS).long().clamp(max=NUM_BANDS - 1)
    zeros = losses.new_zeros(NUM_BANDS)
    return LossParts(
        sum=total,
        count=count,
        band_sums=zeros.index_add(0, band, losses),
        band_counts=zeros.index_add(0, band, torch.ones_like(losses)),
        others=others,
    )


def _told(name: str, values: Tensor, count: int) -> dict[str, Tensor]:
    """A loss's own sum and count, as `LossParts.others` holds them."""
    total = values.detach().double().sum()
    return {name: total, f"{name}_count": torch.full_like(total, count)}


def means_by_sequence(term: Term, num_sequences: int) -> Tensor:
    """The mean of a term's values in each sequence, [n]; 0 in one that has none."""
    zeros = term.values.new_zeros(num_sequences)
    tokens = term.sequences.bincount(minlength=num_sequences).clamp(min=1)
    return zeros.index_add(0, term.sequences, term.values) / tokens
