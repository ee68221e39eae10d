"""Learning from an autoregressive teacher at the masked tokens.

The teacher reads the clean tokens of a document; its row i-1 is its distribution of token i. The
student predicts the masked token i from the clean blocks before and from what is visible in its
own block, on both sides. What it does not see on the left costs the teacher's word no truth: over
those tokens it is right on average. What it sees on the right does: the true posterior is then
sharper than any left-to-right distribution. So the loss of a masked token is

    (1 - alpha) x (1/t) x cross entropy  +  alpha x w(t, i) x (1/t) x KL(teacher || student)

with w(t, i) = t at "rate", and at "right_context" w(t, i) = t x (1 + m) / (1 + r), where r tokens
of the text stand to the right of i in its block and m of them are masked: t where the teacher sees
what the student sees, falling to t / (1 + r) as they become visible. With w = t a masked row's KL
has weight one, whatever its rate: a token counts with probability t in the KL, and once, in
expectation, in the cross entropy. A document's first token has no teacher row; its cross entropy
then has its full weight. So has that of padding that a run learns as end-of-text
(`noise.padding=eos`): a teacher says of it how it would begin another text. Mask and padding are
outcomes of neither. At a temperature T both sides are softmax(logits / T) and the KL is multiplied
by T^2 (arXiv 1503.02531).

Where the teacher's word comes from is a `Reference`: a network that runs beside the student
(`Online`), or what it said of this corpus before (`stored_teaching.Stored`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cascade_model.batch import TrainBatch
from cascade_model.config import ModelConfig, Normaliser, TeacherWeight, Weight
from cascade_model.errors import CheckpointMismatch
from cascade_model.loss import OfLogits, token_losses
from cascade_model.model import never_emitted, vocabulary_logits
from cascade_model.networks import Network
from cascade_model.objective import LossParts, RowLosses, Term, by_one, loss_parts, weights_of
from cascade_model.settings import shown
from cascade_model.training_config import AuxiliaryConfig
from cascade_model.training_input import config_for, read_places, source_rows, supervised


@dataclass(frozen=True, slots=True)
class Taught:
    """What the teacher says of r tokens, in a form that is cut into chunks of rows."""

    given: tuple[Tensor, ...]
    """Tensors [r, ...], the rows of those without a teacher holding values that are not used."""
    divergence: OfLogits
    """The student's logits [r, v] and the rows of `given` -> KL(teacher || student), nats [r]."""
    has_teacher: Tensor
    """bool [r]: False for a document's first token and for padding that is stored as such."""


class Reference(Protocol):
    """Where the teacher's word comes from."""

    def __call__(self, batch: TrainBatch, sequences: Tensor, places: Tensor) -> Taught:
        """What it says of the given tokens of a batch, int64 [r] each."""
        ...


@dataclass(frozen=True, slots=True)
class Online:
    """A frozen teacher that runs beside the student; the KL is the full one over the vocabulary."""

    teacher: Network
    banned: list[int]
    """Ids that one of the two cannot emit, see `banned_with`; the teacher speaks of the others."""
    temperature: float = 1.0

    def __call__(self, batch: TrainBatch, sequences: Tensor, places: Tensor) -> Taught:
        """See `Reference`; only the last hidden states are held, not the logits of all rows."""
        hidden, has_teacher = teacher_rows(self.teacher, batch, sequences, places)

        def of_logits(student: Tensor, taught: Tensor) -> Tensor:
            with torch.no_grad():
                reference = vocabulary_logits(taught, self.teacher.head, self.banned)
            degree = self.temperature
            return divergence(reference / degree, student / degree, self.banned) * degree**2

        return Taught((hidden,), of_logits, has_teacher)


def distillation_loss(
    model: Network,
    batch: TrainBatch,
    *,
    reference: Reference,
    alpha: float,
    teacher_weight: TeacherWeight = "right_context",
    weight: Weight = "elbo",
    normaliser: Normaliser = "maskable",
    auxiliary: AuxiliaryConfig = AuxiliaryConfig(),
) -> LossParts:
    """The distillation loss of one batch; at alpha = 0 it is `loss.diffusion_loss`.

    `weight` is the cross entropy's, as in `objective`, `teacher_weight` the KL's, as above. The
    bands hold the plain cross entropy. Teacher and student must fit, see `require_teacher`.
    """
    config = config_for(model.config, batch)
    sequences, places = supervised(config, batch).nonzero(as_tuple=True)
    taught = reference(batch, sequences, places)
    has_teacher = taught.has_teacher & ~behind_the_end(config, batch, sequences, places)
    found = token_losses(
        model,
        batch,
        config,
        never_emitted(config),
        auxiliary,
        taught.divergence,
        taught.given,
    )
    rows, divergences = found.rows, found.extra
    assert divergences is not None
    weighted = weights_of(config, batch, rows, weight) * rows.losses
    share = alpha * has_teacher.to(weighted.dtype)
    trust = TRUST[teacher_weight](config, batch, rows)
    # What was not taught holds any value, which times zero need not be zero.
    divergences = divergences.where(has_teacher, 0.0)
    values = (1 - share) * weighted + share * trust * divergences
    told = divergences.detach()[has_teacher]
    terms = [*found.terms, Term("kl", 0.0, sequences[has_teacher], told)]
    return loss_parts(values, batch, rows, normaliser, terms, weighted)


def behind_the_end(
    config: ModelConfig, batch: TrainBatch, sequences: Tensor, places: Tensor
) -> Tensor:
    """Which of the given tokens, int64 [r] each, are an end-of-text behind another: padding."""
    is_end = batch.clean_tokens == config.eos_id
    return is_end[sequences, places] & is_end[sequences, (places - 1).clamp(min=0)]


def by_right_context(config: ModelConfig, batch: TrainBatch, rows: RowLosses) -> Tensor:
    """w / t = (1 + m) / (1 + r): r tokens of the text to the right in the block, m of them masked.

    An autoregressive student sees none of them; a bidirectional one has its document for a block.
    """
    if config.is_autoregressive:
        return torch.ones_like(rows.losses)
    is_text = ~batch.is_padding(config)
    place = torch.arange(is_text.shape[1], device=is_text.device)
    block = place // config.block_size if config.attention == "block_causal" else 0 * place
    right = _to_the_right(is_text, block, batch.segments)[rows.sequences, rows.places]
    masked = _to_the_right(batch.is_masked, block, batch.segments)[rows.sequences, rows.places]
    return ((1 + masked) / (1 + right)).to(rows.losses.dtype)


TRUST: dict[TeacherWeight, Callable[[ModelConfig, TrainBatch, RowLosses], Tensor]] = {
    "rate": by_one,
    "right_context": by_right_context,
}
"""w / t of each supervised token, [r]: at "rate" w = t."""


def _to_the_right(chosen: Tensor, block: Tensor, segments: Tensor) -> Tensor:
    """How many chosen places, bool [n, L], stand right of each in its block and document."""
    before = chosen.long().cumsum(dim=1)
    place = torch.arange(chosen.shape[1], device=chosen.device)
    is_last = torch.ones_like(chosen)
    is_last[:, :-1] = (block[1:] != block[:-1]) | (segments[:, 1:] != segments[:, :-1])
    # The last place of each one's block: the nearest `is_last` at or behind it.
    ends = torch.where(is_last, place, chosen.shape[1] - 1)
    last = ends.flip(1).cummin(dim=1).values.flip(1)
    return before.gather(1, last) - before


@torch.no_grad()
def teacher_rows(
    teacher: Network, batch: TrainBatch, sequences: Tensor, places: Tensor
) -> tuple[Tensor, Tensor]:
    """The teacher's last hidden states that predict the given tokens, and where there is one.

    sequences and places int64 [r] -> float [r, teacher's hidden size], bool [r]; the rows without a
    teacher (a document's first token) hold values that must not be used.
    """
    has_teacher = source_rows(teacher.config, batch)[sequences, places] >= 0
    hidden = read_places(teacher, batch, sequences, places, lambda hidden, head: hidden)
    return hidden, has_teacher


def divergence(reference: Tensor, student: Tensor, banned: list[int]) -> Tensor:
    """KL(reference || student) in nats, float32 [r], from logits [r, v]; banned ids are -inf."""
    ids = torch.tensor(banned, device=student.device, dtype=torch.int64)
    log_p, log_q = reference.log_softmax(dim=-1), student.log_softmax(dim=-1)
    # -inf on both sides; as zeros they add nothing, where -inf minus -inf would be NaN.
    difference = log_p.index_fill(1, ids, 0.0) - log_q.index_fill(1, ids, 0.0)
    return (log_p.exp() * difference).sum(dim=-1)


def banned_with(teacher: ModelConfig, student: ModelConfig) -> list[int]:
    """Ids, rising, that a running teacher must not name: those that it or the student cannot emit.

    Where the student alone cannot emit a token, any probability of it makes the KL infinite.
    """
    return sorted({*never_emitted(teacher), *never_emitted(student)})


def require_teacher(teacher: ModelConfig, student: ModelConfig) -> None:
    """Raise `CheckpointMismatch`, both values shown, when this teacher cannot teach."""
    require_autoregressive(teacher)
    require_student(student)
    for name in ("tokenizer_sha256", "vocab_size"):
        theirs, ours = getattr(teacher, name), getattr(student, name)
        if theirs != ours:
            raise CheckpointMismatch(
                f"the teacher has {name}={shown(theirs)} and the student {name}={shown(ours)}; "
                "teacher and student must share one tokenizer"
            )


def require_autoregressive(teacher: ModelConfig) -> None:
    """Raise `CheckpointMismatch` unless row i-1 of the teacher is its distribution of token i."""
    if not teacher.is_autoregressive:
        raise CheckpointMismatch(
            f"the teacher has block_size={teacher.block_size} and logits={teacher.logits}; it must "
            "be autoregressive: block_size=1, logits=shifted, first_place=clean"
        )


def require_student(student: ModelConfig) -> None:
    """Raise `CheckpointMismatch` when there are no masked tokens to teach."""
    if student.is_autoregressive:
        raise CheckpointMismatch(
            "the student is autoregressive like the teacher; give it model.block_size above 1"
        )
