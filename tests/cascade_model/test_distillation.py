"""The teacher's row i-1 teaches token i; a teacher like the student has nothing to teach."""

import dataclasses

import pytest
import torch

from cascade_model.batch import TrainBatch
from cascade_model.config import ModelConfig
from cascade_model.distillation import (
    distillation_loss,
    divergence,
    require_teacher,
    teacher_rows,
)
from cascade_model.errors import CheckpointMismatch
from cascade_model.loss import diffusion_loss
from cascade_model.model import Transformer, vocabulary_logits

TEACHER = ModelConfig(
    vocab_size=19,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=24,
    block_size=1,
    logits="shifted",
    clean_half="token_causal",
    mask_id=18,
    pad_id=17,
    eos_id=16,
    tokenizer_sha256="abc",
)
STUDENT = dataclasses.replace(TEACHER, block_size=4, logits="aligned")


def fresh(config, seed=0):
    model = Transformer(config)
    model.init_weights(seed)
    with torch.no_grad():
        model.embed.weight.mul_(30)
    return model


def batch_of(rate=0.5, n=3, length=16, seed=0, block_size=4):
    generator = torch.Generator().manual_seed(seed)
    segments = (torch.arange(length) >= 8).int().expand(n, -1)
    return TrainBatch(
        sequence_ids=torch.arange(n),
        clean_tokens=torch.randint(0, 16, (n, length), generator=generator),
        is_masked=torch.rand(n, length, generator=generator) < rate,
        is_maskable=torch.ones(n, length, dtype=torch.bool),
        mask_rates=torch.full((n, length // block_size), rate),
        positions=(torch.arange(length) % 8).expand(n, -1),
        segments=segments,
    )


def test_equal_logits_have_no_divergence():
    logits = torch.randn(5, 19).index_fill(1, torch.tensor([17, 18]), float("-inf"))
    assert divergence(logits, logits, [17, 18]).abs().max() < 1e-6


def test_divergence_equals_its_definition_and_is_positive():
    reference, student = torch.randn(2, 7, 19)
    p, q = reference.softmax(-1), student.softmax(-1)
    expected = (p * (p / q).log()).sum(-1)
    assert torch.allclose(divergence(reference, student, []), expected, atol=1e-5)
    assert (divergence(reference, student, []) > 0).all()


def test_alpha_zero_is_the_diffusion_loss():
    model, batch = fresh(STUDENT), batch_of()
    parts = distillation_loss(model, batch, teacher=fresh(TEACHER, 1), alpha=0.0)
    plain = diffusion_loss(model, batch)
    assert torch.allclose(parts.sum, plain.sum)
    assert parts.count == plain.count
    assert torch.allclose(parts.band_sums, plain.band_sums)


@pytest.mark.parametrize("normaliser", ["maskable", "masked", "document"])
@pytest.mark.parametrize("weight", ["elbo", "unit", "cart"])
def test_alpha_zero_is_the_diffusion_loss_on_every_axis(weight, normaliser):
    student = dataclasses.replace(STUDENT, attention="bidirectional")
    model, batch, axes = fresh(student), batch_of(), {"weight": weight, "normaliser": normaliser}
    parts = distillation_loss(model, batch, teacher=fresh(TEACHER, 1), alpha=0.0, **axes)
    plain = diffusion_loss(model, batch, **axes)
    torch.testing.assert_close(parts.sum, plain.sum)
    assert parts.count == plain.count


def test_teacher_row_is_the_one_before_the_token_and_starts_again_with_a_document():
    teacher, batch = fresh(TEACHER), batch_of()
    sequences, places = torch.tensor([0, 0, 0, 0]), torch.tensor([0, 3, 8, 11])
    rows, has_teacher = teacher_rows(teacher, batch, sequences, places)
    assert has_teacher.tolist() == [False, True, False, True]
    changed = batch.clean_tokens.clone()
    changed[0, 3:8] = (changed[0, 3:8] + 1) % 16
    changed[0, 11:] = (changed[0, 11:] + 1) % 16
    other = dataclasses.replace(batch, clean_tokens=changed)
    again, _ = teacher_rows(teacher, other, sequences, places)
    assert torch.equal(rows[1], again[1])
    assert torch.equal(rows[3], again[3])
    changed[0, 2] = (changed[0, 2] + 1) % 16
    moved, _ = teacher_rows(teacher, other, sequences, places)
    assert not torch.equal(rows[1], moved[1])


def train_towards(teacher, batch, alpha=1.0, steps=120):
    model = fresh(STUDENT, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        parts = distillation_loss(model, batch, teacher=teacher, alpha=alpha)
        parts.sum.backward()
        optimizer.step()
    return model


def mean_divergence(model, teacher, batch, shift=0):
    """Of the masked tokens that have a teacher; `shift` takes another token's teacher row."""
    sequences, places = (batch.is_masked & (batch.positions > 1)).nonzero(as_tuple=True)
    taught, _ = teacher_rows(teacher, batch, sequences, places - shift)
    reference = vocabulary_logits(taught, teacher.head, [17, 18])
    from cascade_model.loss import read_places

    student = read_places(
        model, batch, sequences, places, lambda h, head: vocabulary_logits(h, head, [17, 18])
    )
    return float(divergence(reference, student, [17, 18]).mean())


@pytest.mark.filterwarnings("ignore")
def test_student_comes_near_the_teacher_and_not_near_its_neighbouring_rows():
    teacher, batch = fresh(TEACHER, 1), batch_of()
    before = mean_divergence(fresh(STUDENT, 2), teacher, batch)
    model = train_towards(teacher, batch)
    after = mean_divergence(model, teacher, batch)
    assert after < 0.2 * before
    assert mean_divergence(model, teacher, batch, shift=1) > 3 * after


def test_teacher_gets_no_gradient():
    teacher, model = fresh(TEACHER, 1), fresh(STUDENT)
    distillation_loss(model, batch_of(), teacher=teacher, alpha=0.5).sum.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_other_tokenizer_is_refused_with_both_values():
    other = dataclasses.replace(STUDENT, tokenizer_sha256="xyz")
    with pytest.raises(CheckpointMismatch, match=r"tokenizer_sha256=abc .* tokenizer_sha256=xyz"):
        require_teacher(TEACHER, other)


def test_teacher_must_be_autoregressive_and_the_student_not():
    with pytest.raises(CheckpointMismatch, match="block_size=4 and logits=aligned"):
        require_teacher(STUDENT, STUDENT)
    with pytest.raises(CheckpointMismatch, match="student is autoregressive"):
        require_teacher(TEACHER, TEACHER)
