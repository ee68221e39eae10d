"""The divergence of k + 1 outcomes by brute force, and what a teacher says place by place."""

import dataclasses

import numpy as np
import pytest
import torch

from cascade_model.distillation import divergence, require_student
from cascade_model.errors import CheckpointMismatch, InputError
from cascade_model.model import vocabulary_logits
from cascade_model.stored_teaching import bucket_divergence, likeliest, require_targets, teach
from cascade_model.teacher_targets import TargetsManifest
from cascade_model.training_input import read_places
from tests.cascade_model.test_training_input import noisy_batch
from tests.tiny_models import MASK, PAD, lively_model

BANNED = [PAD, MASK]
AUTOREGRESSIVE = {"block_size": 1, "logits": "shifted", "first_place": "clean"}


def random_logits(seed, scale=2.0, rows=6):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, 16, generator=generator, dtype=torch.float64)
    return logits.index_fill(1, torch.tensor(BANNED), float("-inf"))


def exact(logits, k):
    """The k likeliest without rounding, and the probability of the rest."""
    log_p = logits.log_softmax(-1)
    values, ids = log_p.topk(k)
    rest = 1 - values.exp().sum(-1)
    return ids, values, rest if k < 14 else torch.zeros_like(rest)


def by_hand(logits, student, k):
    """The KL of the two (k + 1)-outcome distributions, made as lists of probabilities."""
    result = []
    for p_row, q_row in zip(logits.softmax(-1), student.softmax(-1), strict=True):
        named = p_row.argsort(descending=True)[:k].tolist()
        p = [float(p_row[i]) for i in named]
        q = [float(q_row[i]) for i in named]
        p, q = [*p, 1 - sum(p)], [*q, 1 - sum(q)]
        result.append(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 1e-14))
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 3, 13, 14])
def test_the_bucket_divergence_is_the_divergence_of_k_and_one_outcomes(k):
    teacher, student = random_logits(0), random_logits(1)
    found = bucket_divergence(*exact(teacher, k), student)
    torch.testing.assert_close(found, by_hand(teacher, student, k), rtol=1e-9, atol=1e-12)


def test_all_outcomes_named_give_the_full_divergence_and_fewer_give_less():
    """Joining outcomes can only lose information."""
    teacher, student = random_logits(0), random_logits(1)
    full = divergence(teacher, student, BANNED)
    ids, log_p, _ = exact(teacher, 14)
    found = bucket_divergence(ids, log_p, torch.zeros(6).double(), student)
    torch.testing.assert_close(found, full, rtol=1e-12, atol=0)
    coarse = [bucket_divergence(*exact(teacher, k), student) for k in (1, 4, 8)]
    for less, more in zip(coarse, [*coarse[1:], full], strict=True):
        assert (less < more).all()


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("k", [1, 4, 14])
def test_what_was_rounded_never_gives_less_than_nothing(k, scale):
    """float16 log-probabilities do not sum to 1; they are made a distribution again."""
    teacher = random_logits(3, scale, rows=500)
    ids, log_p, rest = likeliest(teacher, k, 14)
    for student in (teacher, random_logits(4, scale, rows=500)):
        found = bucket_divergence(ids.long(), log_p, rest, student)
        assert found.isfinite().all()
        assert (found > -1e-12).all()
    same = bucket_divergence(ids.long(), log_p, rest, teacher)
    assert (same < 1e-4).all()


def test_the_gradient_is_the_difference_on_named_outcomes_and_shares_out_the_rest():
    teacher, student = random_logits(0), random_logits(1).requires_grad_()
    ids, log_p, rest = exact(teacher, 4)
    bucket_divergence(ids, log_p, rest, student).sum().backward()
    p, q = teacher.softmax(-1), student.detach().softmax(-1)
    is_named = torch.zeros_like(p).scatter(1, ids, 1.0).bool()
    unnamed = q.masked_fill(is_named, 0.0)
    wanted = torch.where(is_named, p, rest[:, None] * unnamed / unnamed.sum(-1, keepdim=True))
    torch.testing.assert_close(student.grad, q - wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k", [4, 14])
def test_certain_students_and_teachers_keep_a_finite_value_and_gradient(k):
    """A rest of 1e-30 in float32: 1 minus the named would be 0 and its logarithm nothing."""
    logits = torch.zeros(1, 16).index_fill(1, torch.tensor(BANNED), float("-inf"))
    certain = logits + 70 * torch.eye(16)[:1]
    student = certain.clone().requires_grad_()
    for teacher in (logits, certain):
        found = bucket_divergence(*_long(likeliest(teacher, k, 14)), student)
        assert found.isfinite().all()
        found.sum().backward()
    assert student.grad.isfinite().all()


def _long(told):
    ids, log_p, rest = told
    return ids.long(), log_p, rest


def test_what_a_teacher_says_is_its_distribution_of_the_predicted_token():
    teacher, batch = lively_model(**AUTOREGRESSIVE), noisy_batch(1)
    is_maskable = batch.is_maskable.clone()
    is_maskable[0, :3] = False  # a prompt
    batch = dataclasses.replace(batch, is_maskable=is_maskable)
    rows = teach(teacher, batch, 5, temperature=2.0)
    assert rows.ids.shape == (2, 16, 5)
    is_told = rows.ids[:, :, 0] >= 0
    assert not is_told[0, :3].any()
    assert not is_told[1, [0, 8]].any()  # a document's first token
    assert is_told.sum() == 32 - 3 - 2
    sequences, places = torch.from_numpy(is_told).nonzero(as_tuple=True)
    logits = read_places(
        teacher, batch, sequences, places, lambda h, head: vocabulary_logits(h, head, BANNED)
    )
    log_p = (logits / 2).log_softmax(-1).detach()
    ids = torch.from_numpy(rows.ids[is_told]).long()
    assert torch.equal(ids[:, 0], logits.argmax(-1))
    assert not (ids == PAD).any()
    assert not (ids == MASK).any()
    found = torch.from_numpy(rows.log_probs[is_told]).double()
    torch.testing.assert_close(found, log_p.gather(1, ids), rtol=1e-3, atol=1e-4)
    rest = 1 - log_p.gather(1, ids).exp().sum(-1)
    torch.testing.assert_close(
        torch.from_numpy(rows.rest[is_told]).double(), rest, atol=1e-6, rtol=0
    )
    assert (rows.log_probs[~is_told] == 0).all()


def test_later_tokens_and_other_documents_change_nothing_that_was_said():
    teacher, batch = lively_model(**AUTOREGRESSIVE), noisy_batch(1)
    tokens = batch.clean_tokens.clone()
    tokens[1, 4:8] = (tokens[1, 4:8] + 1) % 12
    before = teach(teacher, batch, 3)
    after = teach(teacher, dataclasses.replace(batch, clean_tokens=tokens), 3)
    for name in ("ids", "log_probs", "rest"):
        old, new = getattr(before, name)[1], getattr(after, name)[1]
        assert np.array_equal(old[:5], new[:5])
        assert np.array_equal(old[8:], new[8:])
        assert not np.array_equal(old[5:8], new[5:8])


def test_more_tokens_than_there_are_cannot_be_named():
    with pytest.raises(InputError, match=r"k=15 must be in 1\.\.14"):
        teach(lively_model(**AUTOREGRESSIVE), noisy_batch(1), 15)


def manifest(**changes):
    values = {
        "corpus": "c", "split": "train", "teacher": "t", "tokenizer_sha256": "abc",
        "sequence_length": 16, "vocab_size": 16, "banned": tuple(BANNED), "k": 4,
        "temperature": 1.0, "precision": "float32", "shards": (),
    }  # fmt: skip
    return TargetsManifest(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"tokenizer_sha256": "xyz"}, "tokenizer_sha256=xyz and the student tokenizer_sha256=abc"),
        ({"banned": (15,)}, "let the teacher run beside the student"),
        ({"temperature": 2.0}, "use temperature=2.0, or run `cascade teach --temperature 1.0`"),
        ({"vocab_size": 17}, "vocab_size=17 and the student vocab_size=16"),
        ({"banned": (15,)}, r"never emitted=\[15\] and the student .*=\[14, 15\]"),
        ({"temperature": 2.0}, "temperature=2.0 and the student temperature=1.0"),
    ],
)
def test_targets_for_another_student_are_refused_with_both_values(changes, shown):
    student = dataclasses.replace(lively_model().config, tokenizer_sha256="abc")
    require_targets(manifest(), student, 1.0)
    with pytest.raises(CheckpointMismatch, match=shown):
        require_targets(manifest(**changes), student, 1.0)


def test_an_autoregressive_student_has_no_masked_tokens_to_teach():
    with pytest.raises(CheckpointMismatch, match="student is autoregressive"):
        require_student(lively_model(**AUTOREGRESSIVE).config)
