"""A teacher's word put on disk and taken from there: its k likeliest tokens and all the others.

The divergence is that of k + 1 outcomes, the tokens named and one bucket for the rest: a proper KL
of two distributions over the same outcomes, so never negative, zero where the student agrees on
each of them, and the full KL where k is the whole vocabulary. What was rounded when it was stored
is made a distribution again. The student's share of the rest is a log-sum-exp over what is not
named, which loses nothing where the named ones take nearly everything.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from cascade_model.batch import TrainBatch
from cascade_model.config import ModelConfig
from cascade_model.corpus import Batch
from cascade_model.distillation import Taught, require_student
from cascade_model.errors import CheckpointMismatch
from cascade_model.loss import rows_per_chunk
from cascade_model.model import never_emitted, vocabulary_logits
from cascade_model.networks import Network
from cascade_model.settings import check, shown
from cascade_model.teacher_targets import NO_TARGET, TargetRows, TargetsManifest, TeacherTargets
from cascade_model.training_input import read_places, source_rows


@torch.no_grad()
def teach(
    teacher: Network,
    batch: TrainBatch,
    k: int,
    temperature: float = 1.0,
    also_banned: Sequence[int] = (),
) -> TargetRows:
    """What an autoregressive teacher says of every maskable token that it predicts.

    `also_banned` are ids that it must not name besides those that it never emits. `InputError` when
    fewer than k tokens are left.
    """
    banned = sorted({*never_emitted(teacher.config), *also_banned})
    outcomes = teacher.config.vocab_size - len(banned)
    check(1 <= k <= outcomes, f"k={k} must be in 1..{outcomes}, the tokens that the teacher names")
    is_told = batch.is_maskable & (source_rows(teacher.config, batch) >= 0)
    sequences, places = is_told.nonzero(as_tuple=True)

    def read(hidden: Tensor, head: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        found = [
            likeliest(vocabulary_logits(rows, head, banned) / temperature, k, outcomes)
            for rows in hidden.split(rows_per_chunk(teacher.config.vocab_size))
        ]
        ids, log_probs, rest = (torch.cat(parts) for parts in zip(*found, strict=True))
        return ids, log_probs, rest

    shape, ends = (*is_told.shape, k), (sequences.cpu().numpy(), places.cpu().numpy())
    rows = TargetRows(
        np.full(shape, NO_TARGET, dtype=np.int32),
        np.zeros(shape, dtype=np.float16),
        np.zeros(shape[:2], dtype=np.float32),
    )
    told = read_places(teacher, batch, sequences, places, read)
    for into, values in zip((rows.ids, rows.log_probs, rows.rest), told, strict=True):
        into[ends] = values.cpu().numpy()
    return rows


def likeliest(logits: Tensor, k: int, outcomes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits [r, v], those that are not -inf `outcomes` in number: the k likeliest ids, int32
    [r, k], their log-probabilities, float16, and the probability of the others, float32 [r]."""
    log_p = logits.log_softmax(dim=-1)
    values, ids = log_p.topk(k, dim=-1)
    if k == outcomes:
        rest = values.new_zeros(len(values))
    else:
        rest = log_p.scatter(1, ids, float("-inf")).logsumexp(dim=-1).exp()
    lowest = torch.finfo(torch.float16).min
    return ids.int(), values.clamp(lowest, 0.0).half(), rest.clamp(max=1.0).float()


@dataclass(frozen=True, slots=True)
class Stored:
    """The `distillation.Reference` that reads what a teacher said of this corpus before.

    What was read ahead of a batch is used once; of any other batch the targets are read in place.
    """

    targets: TeacherTargets
    _ready: dict[bytes, TargetRows] = field(default_factory=dict)

    def read_ahead(self, batch: Batch) -> None:
        """Have a batch's targets at hand when the loss asks for them; any thread may call."""
        self._ready[batch.sequence_ids.tobytes()] = self.targets.rows(batch.sequence_ids)

    def __call__(self, batch: TrainBatch, sequences: Tensor, places: Tensor) -> Taught:
        """See `Reference`; only the given tokens' targets are moved to the batch's device."""
        asked = batch.sequence_ids.cpu().numpy().astype(np.uint64)
        rows = self._ready.pop(asked.tobytes(), None) or self.targets.rows(asked)
        ends = (sequences.cpu().numpy(), places.cpu().numpy())
        ids, log_p, rest = (
            torch.from_numpy(values[ends]).to(batch.clean_tokens.device)
            for values in (rows.ids, rows.log_probs, rows.rest)
        )
        degree = self.targets.manifest.temperature

        def of_logits(student: Tensor, ids: Tensor, log_p: Tensor, rest: Tensor) -> Tensor:
            return bucket_divergence(ids, log_p, rest, student / degree) * degree**2

        has_teacher = ids[:, 0] != NO_TARGET
        return Taught((ids.long().clamp(min=0), log_p, rest), of_logits, has_teacher)


def bucket_divergence(ids: Tensor, log_p: Tensor, rest: Tensor, student: Tensor) -> Tensor:
    """KL of k + 1 outcomes in nats, [r], in the type of the student's logits [r, v].

    ids int64 [r, k]; log_p [r, k] their log-probabilities and rest [r] the others' probability, as
    they were rounded. Where the rest is 0, the named ids must be all that the student can emit.
    """
    log_p, log_rest = log_p.to(student.dtype), rest.to(student.dtype).log()
    total = torch.logaddexp(log_p.logsumexp(dim=-1), log_rest)
    log_p, log_rest = log_p - total[:, None], log_rest - total
    log_q = student.log_softmax(dim=-1)
    named = (log_p.exp() * (log_p - log_q.gather(1, ids))).sum(dim=-1)
    has_rest = rest > 0
    # A row without a rest leaves nothing to sum; any number does, as it is not used.
    others = log_q.scatter(1, ids, float("-inf")).where(has_rest[:, None], 0.0).logsumexp(dim=-1)
    unnamed = log_rest.exp() * (log_rest.where(has_rest, 0.0) - others)
    return named + unnamed.where(has_rest, 0.0)


def require_targets(found: TargetsManifest, student: ModelConfig, temperature: float) -> None:
    """Refuse targets that cannot teach this student, both values shown: `CheckpointMismatch`."""
    tokenizer = "write targets with a teacher of the student's tokenizer"
    for name, theirs, ours, cure in (
        ("tokenizer_sha256", found.tokenizer_sha256, student.tokenizer_sha256, tokenizer),
        ("vocab_size", found.vocab_size, student.vocab_size, tokenizer),
        (
            "tokens that are never emitted",
            list(found.banned),
            never_emitted(student),
            "a teacher or student that can fill holes (infill=psm) has three more: run `cascade "
            "teach` again on a corpus with infill_rate, or let the teacher run beside the student "
            "(teacher=..., no targets), which works for both",
        ),
        (
            "temperature",
            found.temperature,
            temperature,
            f"use temperature={found.temperature}, or run `cascade teach --temperature "
            f"{temperature}` into another folder",
        ),
    ):
        if theirs != ours:
            raise CheckpointMismatch(
                f"the targets have {name}={shown(theirs)} and the student {name}={shown(ours)}; "
                f"{cure}"
            )
    require_student(student)
