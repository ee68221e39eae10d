"""Learning from an autoregressive teacher at the masked tokens.

The teacher reads the clean tokens of a document; its row i-1 is its distribution of token i. The
student predicts the masked token i from the clean blocks before and from what is visible in its
own block, on both sides. With right context visible the true posterior is sharper than any
left-to-right distribution, so the teacher is trusted in proportion to the mask rate t: the loss of
a masked token is

    (1 - alpha) x (1/t) x cross entropy  +  alpha x w(t) x (1/t) x KL(teacher || student), w(t) = t

so a masked row's KL has weight one, whatever its rate: a token counts with probability t in the KL,
and once, in expectation, in the cross entropy. A document's first token has no teacher row; its
cross entropy then has its full weight. The KL is the full one over the shared vocabulary (mask and
padding are outcomes of neither), made in chunks of rows, so never negative and zero only when
teacher and student agree.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade_model.batch import TrainBatch
from cascade_model.config import ModelConfig, Normaliser, Weight
from cascade_model.errors import CheckpointMismatch
from cascade_model.loss import in_chunks, read_places, rows_of, source_rows, supervised
from cascade_model.model import never_emitted, vocabulary_logits
from cascade_model.networks import Network
from cascade_model.objective import LossParts, loss_parts, weights_of


def distillation_loss(
    model: Network,
    batch: TrainBatch,
    *,
    teacher: Network,
    alpha: float,
    weight: Weight = "elbo",
    normaliser: Normaliser = "maskable",
) -> LossParts:
    """The distillation loss of one batch; at alpha = 0 it is `loss.diffusion_loss`.

    `weight` is the cross entropy's, as in `objective`; the KL's is always one per row.
    The bands hold the plain cross entropy. Raises `CheckpointMismatch` as `require_teacher`.
    """
    require_teacher(teacher.config, model.config)
    config = model.config
    sequences, places = supervised(config, batch).nonzero(as_tuple=True)
    targets = batch.clean_tokens[sequences, places]
    taught, has_teacher = teacher_rows(teacher, batch, sequences, places)
    banned = never_emitted(config)

    def read(hidden: Tensor, head: nn.Module) -> Tensor:
        def both(rows: Tensor, wanted: Tensor, taught: Tensor) -> Tensor:
            student = vocabulary_logits(rows, head, banned)
            nats = F.cross_entropy(student, wanted, reduction="none")
            with torch.no_grad():
                reference = vocabulary_logits(taught, teacher.head, banned)
            return torch.stack([nats, divergence(reference, student, banned)], dim=1)

        return in_chunks(both, hidden, targets, taught, vocabulary=config.vocab_size)

    losses, divergences = read_places(model, batch, sequences, places, read).unbind(dim=1)
    rows = rows_of(config, batch, sequences, places, losses)
    weights = weights_of(config, batch, rows, weight)
    share = alpha * has_teacher.to(losses.dtype)
    values = (1 - share) * weights * losses + share * divergences
    return loss_parts(values, batch, rows, normaliser)


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


def require_teacher(teacher: ModelConfig, student: ModelConfig) -> None:
    """Raise `CheckpointMismatch`, both values shown, when this teacher cannot teach."""
    if not teacher.is_autoregressive:
        raise CheckpointMismatch(
            f"the teacher has block_size={teacher.block_size} and logits={teacher.logits}; it must "
            "be autoregressive: block_size=1, logits=shifted, first_place=clean"
        )
    if student.is_autoregressive:
        raise CheckpointMismatch(
            "the student is autoregressive like the teacher; give it model.block_size above 1"
        )
    for name in ("tokenizer_sha256", "vocab_size"):
        theirs, ours = getattr(teacher, name), getattr(student, name)
        if theirs != ours:
            raise CheckpointMismatch(
                f"the teacher has {name}={theirs} and the student {name}={ours}; teacher and "
                "student must share one tokenizer"
            )
