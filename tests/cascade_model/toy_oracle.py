"""Every estimator of the loss against the exact value of its own target, on a toy.

Vocabulary 8, sequences of length 4. A target is computed by enumerating all masks and integrating
over the mask rate by Gauss-Legendre quadrature, which is exact here: for a given mask the integrand
is a polynomial in t. The estimate comes from the production code alone: corpus, noise, loss.

    python -m tests.cascade_model.toy_oracle        prints the table
"""

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from cascade_model.batch import TrainBatch
from cascade_model.commit import Folder
from cascade_model.config import NoiseConfig, Normaliser, TrainingNoise, Weight
from cascade_model.corpus import Corpus
from cascade_model.likelihood import Estimate, monte_carlo
from cascade_model.loss import diffusion_loss, row_losses
from cascade_model.manifest import Manifest, SourceEntry, SplitEntry
from cascade_model.mixing import UNITS
from cascade_model.objective import loss_parts, weights_of
from cascade_model.sequences import SequenceRows
from tests.tiny_models import lively_model

VOCABULARY, MASK, PAD, EOS, LENGTH = 8, 7, 6, 5, 4
TOKENS = (1, 4, 2, 0)
EVERYWHERE = (True,) * LENGTH
PROMPTED = (False, True, True, True)
SAMPLES = 2**13
BLOCKS = {"block_size": 2}
WHOLE = {"attention": "bidirectional"}


def toy_model(**kind):
    return lively_model(vocab_size=VOCABULARY, mask_id=MASK, pad_id=PAD, eos_id=EOS, **kind)


class ToyCorpus(Corpus):
    """The production reader over one sequence, repeated; nothing is stored."""

    def __init__(self, tokens=TOKENS, maskable=EVERYWHERE, count: int = SAMPLES) -> None:
        self._tokens, self._maskable = tokens, maskable
        source = SourceEntry(
            name="toy", first_sequence=0, num_sequences=count, num_tokens=1, share=UNITS
        )
        split = SplitEntry(
            num_sequences=count, num_tokens=1, num_bytes=1, num_documents=1, shards=(),
            sources=(source,),
        )  # fmt: skip
        manifest = Manifest(
            sequence_length=LENGTH, block_size=2, vocab_size=VOCABULARY, mask_id=MASK, pad_id=PAD,
            eos_id=EOS, tokenizer_sha256="", noise=NoiseConfig(seed=99), prepare={}, sources=(),
            counts={}, splits={"train": split},
        )  # fmt: skip
        super().__init__(Folder("memory://toy"), manifest, "train")

    def rows(self, sequence_ids: np.ndarray) -> SequenceRows:
        count = len(sequence_ids)
        starts = np.zeros((count, LENGTH), dtype=bool)
        starts[:, 0] = True
        return SequenceRows(
            sequence_ids=sequence_ids,
            tokens=np.tile(np.array(self._tokens, dtype=np.int64), (count, 1)),
            is_maskable=np.tile(np.array(self._maskable), (count, 1)),
            thresholds=np.zeros((count, 2), dtype=np.uint32),
            is_masked=np.zeros((count, LENGTH), dtype=bool),
            is_start=starts,
        )


# Targets ------------------------------------------------------------------------------------------

Weigh = Callable[[tuple[bool, ...], int, float], float]


def by_rate(mask: tuple[bool, ...], place: int, rate: float) -> float:
    return 1 / rate


def by_one(mask: tuple[bool, ...], place: int, rate: float) -> float:
    return 1.0


def by_context(mask: tuple[bool, ...], place: int, rate: float) -> float:
    visible = (i for i, is_masked in enumerate(mask) if not is_masked)
    return 0.5 * sum(0.3 * 0.7 ** max(abs(place - i) - 1, 0) for i in visible)


@cache
def nats_table(kind: tuple, tokens: tuple[int, ...]) -> dict[tuple[bool, ...], list[float]]:
    """Cross entropy of each place under each mask, 0 where it is not masked."""
    length = len(tokens)
    masks = list(itertools.product([False, True], repeat=length))
    model = toy_model(**dict(kind))
    block = model.config.block_size if model.config.attention == "block_causal" else None
    clean = torch.tensor(tokens).expand(len(masks), -1)
    batch = TrainBatch.of(clean, torch.tensor(masks), block_size=block)
    with torch.no_grad():
        rows = row_losses(model, batch)
    table = torch.zeros(len(masks), length, dtype=torch.float64)
    table[rows.sequences, rows.places] = rows.losses
    return dict(zip(masks, table.tolist(), strict=True))


def rates_in(low: float, high: float) -> list[tuple[float, float]]:
    """Nodes of the mean over rates uniform on [low, high], with their weights."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    return [
        (float(low + (high - low) * (x + 1) / 2), float(w) / 2)
        for x, w in zip(nodes, weights, strict=True)
    ]


def expected(
    kind: dict,
    weigh: Weigh,
    window: tuple[float, float] = (1e-3, 1.0),
    *,
    per: str = "sequence",
    maskable: tuple[bool, ...] = EVERYWHERE,
    tokens: tuple[int, ...] = TOKENS,
) -> float:
    """The mean over rates and masks of the sum over masked tokens of weight x cross entropy."""
    total, size = 0.0, 2 if per == "block" else len(tokens)
    table = nats_table(tuple(kind.items()), tokens)
    for cells in itertools.product(rates_in(*window), repeat=len(tokens) // size):
        share = math.prod(weight for _, weight in cells)
        rates = [rate for rate, _ in cells for _ in range(size)]
        for mask, nats in table.items():
            chance = math.prod(
                (r if m else 1 - r) if can else float(not m)
                for m, r, can in zip(mask, rates, maskable, strict=True)
            )
            if chance:  # a mask that cannot be may have infinite nats: padding is never predicted
                total += (
                    share
                    * chance
                    * sum(
                        weigh(mask, place, rates[place]) * nats[place]
                        for place, is_masked in enumerate(mask)
                        if is_masked
                    )
                )
    return total


def exact_count_bound(kind: dict, places: tuple[int, ...]) -> float:
    """LLaDA's Eq. 6 for the unit of these unknown places, all counts and subsets enumerated."""
    table, size, total = nats_table(tuple(kind.items()), TOKENS), len(places), 0.0
    for count in range(1, size + 1):
        for chosen in itertools.combinations(places, count):
            mask = tuple(i in chosen for i in range(LENGTH))
            total += sum(table[mask]) * size / count / math.comb(size, count) / size
    return total


# Estimates ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    estimator: str
    target: str
    exact: float
    estimate: float
    standard_error: float

    @property
    def z(self) -> float:
        return (self.estimate - self.exact) / self.standard_error


def estimated(
    kind: dict,
    noise: NoiseConfig,
    *,
    corpus: Corpus | None = None,
    group: int = 1,
    weight: Weight = "elbo",
    normaliser: Normaliser = "maskable",
) -> tuple[float, float]:
    """The loss over SAMPLES samples as the trainer makes it, and its standard error.

    `group` samples in a row may depend on each other. The error is that of a ratio of means, since
    the trainer divides sums over the batch.
    """
    model, corpus = toy_model(**kind), corpus or ToyCorpus()
    batch = TrainBatch.from_numpy(corpus.batch(0, SAMPLES, noise))
    with torch.no_grad():
        rows = row_losses(model, batch)
        values = weights_of(model.config, batch, rows, weight) * rows.losses
        parts = loss_parts(values, batch, rows, normaliser)
    sums = torch.zeros(SAMPLES, dtype=torch.float64).index_add_(0, rows.sequences, values)
    if normaliser == "document":
        sums, counts = sums / rows.num_maskable, torch.ones(SAMPLES)
    elif normaliser == "masked":
        counts = rows.sequences.bincount(minlength=SAMPLES)
    else:
        counts = rows.num_maskable
    mean = float(parts.sum) / parts.count
    residuals = (sums - mean * counts).reshape(-1, group).mean(dim=1)
    error = float(residuals.std()) / math.sqrt(len(residuals)) / float(counts.double().mean())
    return mean, error


def noise_of(seed: int, **settings) -> NoiseConfig:
    """A recipe with independent rates and blocks of 2; every line of the table has its seed."""
    return NoiseConfig(seed=seed, **{"block_size": 2, "strata": 1} | settings)


def paired(seed: int, **settings) -> TrainingNoise:
    return TrainingNoise.over(noise_of(seed, **settings), complement=True, sequences_per_batch=2)


def rate_rows() -> list[Row]:
    """How the mask rates are drawn; per token, weight 1/t."""
    bound, block_bound = expected(WHOLE, by_rate) / 4, expected(BLOCKS, by_rate, per="block") / 4
    window, mirrored = (0.3, 0.8), (0.2, 0.7)
    clipped = expected(BLOCKS, by_rate, window, per="block") / 4
    nearly = expected(WHOLE, by_rate, (1e-3, 0.999)) / 4
    halves = (
        expected(BLOCKS, by_one, window, per="block"),
        expected(BLOCKS, by_one, mirrored, per="block"),
    )
    cases = [
        ("1/t, t per sequence", "bound", bound, WHOLE, noise_of(1, per="sequence"), {}),
        ("... stratified over 32", "bound", bound, WHOLE, noise_of(2, per="sequence", strata=32),
         {"group": 32}),
        ("1/t, t per block", "block bound", block_bound, BLOCKS, noise_of(3), {}),
        ("... stratified over 32", "block bound", block_bound, BLOCKS, noise_of(4, strata=32),
         {"group": 32}),
        ("... window 0.3-0.8", "1/t sum of that window", clipped, BLOCKS,
         noise_of(5, min_rate=0.3, max_rate=0.8), {}),
        ("1/t, complementary, 0.001-0.999", "bound on that window", nearly, WHOLE,
         paired(6, per="sequence", max_rate=0.999), {"group": 2}),
        ("1, complementary, 0.3-0.8", "mean of the sums of 0.3-0.8 and 0.2-0.7",
         sum(halves) / 8, BLOCKS, paired(7, min_rate=0.3, max_rate=0.8),
         {"group": 2, "weight": "unit"}),
    ]  # fmt: skip
    return [
        row_of(name, target, exact, *estimated(kind, noise, **axes))
        for name, target, exact, kind, noise, axes in cases
    ]


def axis_rows() -> list[Row]:
    """Weights and normalisers; t per sequence."""
    counted = LENGTH * (1e-3 + 1.0) / 2  # masked tokens of a sequence, in the mean
    noises = [noise_of(seed, per="sequence") for seed in range(8, 14)]
    padded_tokens, eos = (1, 4, EOS, PAD), (1, 4, EOS, EOS)
    padded = ToyCorpus(padded_tokens, (False, True, True, False))
    noises[-1] = TrainingNoise.over(noises[-1], padding="eos")
    unit = expected(WHOLE, by_one)
    only_eos = expected(WHOLE, by_rate, maskable=(False, True, True, False), tokens=padded_tokens)
    document: dict = {"normaliser": "document"}
    cases = [
        ("1", "sum of masked nats", unit / 4, {"weight": "unit"}),
        ("CART", "CART-weighted sum", expected(WHOLE, by_context) / 4, {"weight": "cart"}),
        ("1, over masked tokens", "ratio of the two means", unit / counted,
         {"weight": "unit", "normaliser": "masked"}),
        ("1/t, answers (SFT)", "bound of the answer given the prompt",
         expected(WHOLE, by_rate, maskable=PROMPTED) / 3,
         document | {"corpus": ToyCorpus(maskable=PROMPTED)}),
        ("1/t, SFT, padding never", "bound of answer and EOS", only_eos / 2,
         document | {"corpus": padded}),
        ("1/t, SFT, padding eos", "bound of answer, EOS and padding",
         expected(WHOLE, by_rate, maskable=PROMPTED, tokens=eos) / 3,
         document | {"corpus": padded}),
    ]  # fmt: skip
    return [
        row_of(name, target, exact, *estimated(WHOLE, noise, **axes))
        for (name, target, exact, axes), noise in zip(cases, noises, strict=True)
    ]


def short_row(batches: int = 512, size: int = 32) -> Row:
    """Random-length truncation at a rate of one half; each step divides by its own tokens."""
    model, corpus = toy_model(**WHOLE), ToyCorpus()
    noise = TrainingNoise.over(
        noise_of(14, per="sequence"), short_rate=0.5, sequences_per_batch=size
    )
    values = []
    for number in range(batches):
        batch = TrainBatch.from_numpy(corpus.batch(number * size, size, noise))
        with torch.no_grad():
            parts = diffusion_loss(model, batch)
        values.append(float(parts.sum) / parts.count)
    per_length = [
        expected(WHOLE, by_rate, tokens=TOKENS[:length], maskable=EVERYWHERE[:length]) / length
        for length in range(1, LENGTH + 1)
    ]
    exact = 0.5 * per_length[-1] + 0.5 * float(np.mean(per_length))
    error = float(np.std(values, ddof=1)) / math.sqrt(batches)
    name, target = "1/t, cut to U{1..L} half of the time", "mean of the bounds of the lengths"
    return row_of(name, target, exact, float(np.mean(values)), error)


def likelihood_rows() -> list[Row]:
    """The Monte-Carlo likelihoods, as log-probabilities of the answer."""
    prompt, answer = list(TOKENS[:1]), list(TOKENS[1:])
    whole = monte_carlo(toy_model(**WHOLE), prompt, answer, num_groups=256, samples_per_group=16)
    blocks = monte_carlo(
        toy_model(**BLOCKS), [], list(TOKENS), num_groups=256, samples_per_group=16
    )
    exact = exact_count_bound(BLOCKS, (0, 1)) + exact_count_bound(BLOCKS, (2, 3))
    return [
        likelihood_row("L/l, exact counts, answer", -exact_count_bound(WHOLE, (1, 2, 3)), whole),
        likelihood_row("S/l, exact counts, blocks", -exact, blocks),
    ]


def likelihood_row(name: str, exact: float, found: Estimate) -> Row:
    return row_of(name, "bound on log p(answer)", exact, found.mean, found.standard_error)


def row_of(estimator: str, target: str, exact: float, estimate: float, error: float) -> Row:
    return Row(
        estimator=estimator, target=target, exact=exact, estimate=estimate, standard_error=error
    )


def table() -> list[Row]:
    """Every estimator, its target, its estimate."""
    return [*rate_rows(), *axis_rows(), short_row(), *likelihood_rows()]


def render(rows: list[Row]) -> str:
    """The table in Markdown."""
    lines = [
        "| estimator | target | exact | estimate | standard error | z |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        values = f"{row.exact:.5f} | {row.estimate:.5f} | {row.standard_error:.5f} | {row.z:+.2f}"
        lines.append(f"| {row.estimator} | {row.target} | {values} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(render(table()) + "\n")
