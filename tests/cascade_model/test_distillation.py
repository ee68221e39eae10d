"""The teacher's row i-1 teaches token i; a teacher like the student has nothing to teach."""

import dataclasses

import pytest
import torch

from cascade_model.batch import TrainBatch
from cascade_model.config import ModelConfig
from cascade_model.distillation import (
    TRUST,
    Online,
    banned_with,
    distillation_loss,
    divergence,
    require_teacher,
    teacher_rows,
)
from cascade_model.errors import CheckpointMismatch
from cascade_model.loss import diffusion_loss, row_losses
from cascade_model.model import Transformer, vocabulary_logits
from cascade_model.training_input import read_places

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


def online(teacher):
    return Online(teacher, [17, 18])


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
    parts = distillation_loss(model, batch, reference=online(fresh(TEACHER, 1)), alpha=0.0)
    plain = diffusion_loss(model, batch)
    assert torch.allclose(parts.sum, plain.sum)
    assert parts.count == plain.count
    assert torch.allclose(parts.band_sums, plain.band_sums)


@pytest.mark.parametrize("normaliser", ["maskable", "masked", "document"])
@pytest.mark.parametrize("weight", ["elbo", "unit", "cart"])
def test_alpha_zero_is_the_diffusion_loss_on_every_axis(weight, normaliser):
    student = dataclasses.replace(STUDENT, attention="bidirectional")
    model, batch, axes = fresh(student), batch_of(), {"weight": weight, "normaliser": normaliser}
    parts = distillation_loss(model, batch, reference=online(fresh(TEACHER, 1)), alpha=0.0, **axes)
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


@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_what_one_of_the_two_cannot_emit_is_no_outcome(who):
    infilling = {"infill": "psm", "infill_ids": (13, 14, 15)}
    teacher = dataclasses.replace(TEACHER, **infilling if who != "student" else {})
    student = dataclasses.replace(STUDENT, **infilling if who != "teacher" else {})
    batch = batch_of()
    batch = dataclasses.replace(batch, clean_tokens=batch.clean_tokens % 13)
    banned = banned_with(teacher, student)
    assert banned == [13, 14, 15, 17, 18]
    model, reference = fresh(student), Online(fresh(teacher, 1), banned)
    parts = distillation_loss(model, batch, reference=reference, alpha=1.0)
    parts.sum.backward()
    assert parts.sum.isfinite()
    assert parts.sum > 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def train_towards(teacher, batch, alpha=1.0, steps=120):
    model = fresh(STUDENT, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        parts = distillation_loss(model, batch, reference=online(teacher), alpha=alpha)
        parts.sum.backward()
        optimizer.step()
    return model


def mean_divergence(model, teacher, batch, shift=0):
    """Of the masked tokens that have a teacher; `shift` takes another token's teacher row."""
    sequences, places = (batch.is_masked & (batch.positions > 1)).nonzero(as_tuple=True)
    taught, _ = teacher_rows(teacher, batch, sequences, places - shift)
    reference = vocabulary_logits(taught, teacher.head, [17, 18])
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
    distillation_loss(model, batch_of(), reference=online(teacher), alpha=0.5).sum.backward()
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


def trust_by_definition(batch, row, place, block_size):
    """(1 + masked) / (1 + all) over the text to the right in the block and the document."""
    end = (place // block_size + 1) * block_size
    right = [
        i
        for i in range(place + 1, min(end, batch.clean_tokens.shape[1]))
        if batch.segments[row, i] == batch.segments[row, place]
        and (batch.is_maskable[row, i] or batch.clean_tokens[row, i] != 17)
    ]
    return (1 + sum(bool(batch.is_masked[row, i]) for i in right)) / (1 + len(right))


@pytest.mark.parametrize("changes", [{}, {"block_size": 8}, {"attention": "bidirectional"}])
def test_trust_is_its_formula_and_falls_as_what_is_right_becomes_visible(changes):
    config = dataclasses.replace(STUDENT, **changes)
    batch = batch_of(block_size=config.block_size)
    clean, is_maskable = batch.clean_tokens.clone(), batch.is_maskable.clone()
    clean[1, 13:], is_maskable[1, 13:], is_maskable[0, :3] = 17, False, False
    is_masked = batch.is_masked & is_maskable
    batch = dataclasses.replace(
        batch, clean_tokens=clean, is_maskable=is_maskable, is_masked=is_masked
    )
    rows = row_losses(fresh(config), batch)
    found = TRUST["right_context"](config, batch, rows)
    size = 16 if config.attention == "bidirectional" else config.block_size
    pairs = zip(rows.sequences.tolist(), rows.places.tolist(), strict=True)
    expected = [trust_by_definition(batch, row, place, size) for row, place in pairs]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert (TRUST["rate"](config, batch, rows) == 1).all()


def test_padding_that_ends_texts_too_is_trusted_as_any_other_visible_token():
    plain = batch_of()
    is_maskable = plain.is_maskable.clone()
    is_maskable[:, [3, 7]] = False
    plain = dataclasses.replace(
        plain, is_maskable=is_maskable, is_masked=plain.is_masked & is_maskable
    )
    padded = dataclasses.replace(
        plain, clean_tokens=plain.clean_tokens.where(is_maskable, STUDENT.pad_id)
    )
    rows = row_losses(fresh(STUDENT), plain)
    ends = dataclasses.replace(STUDENT, stop_ids=(STUDENT.pad_id,))
    expected = TRUST["right_context"](ends, plain, rows)
    assert torch.equal(TRUST["right_context"](ends, padded, rows), expected)
    assert not torch.equal(TRUST["right_context"](STUDENT, padded, rows), expected)


AS_TEACHER = dataclasses.replace(TEACHER, block_size=4)


def loss_of(model, batch, teacher, **changes):
    return distillation_loss(model, batch, reference=online(teacher), **({"alpha": 1.0} | changes))


def test_a_student_that_is_its_teacher_has_nothing_to_learn_at_block_size_one():
    """Every token that has a teacher; targets shifted by one are another matter."""
    teacher, batch = fresh(TEACHER), batch_of(block_size=1)
    parts = loss_of(fresh(AS_TEACHER), batch, teacher)
    assert parts.others["kl_count"] == batch.clean_tokens.numel() - 6
    assert parts.others["kl"].abs() < 1e-5 * parts.others["kl_count"]

    def shifted(batch, sequences, places):
        taught = online(teacher)(batch, sequences, (places - 1).clamp(min=1))
        return dataclasses.replace(taught, has_teacher=batch.positions[sequences, places] > 1)

    moved = distillation_loss(fresh(AS_TEACHER), batch, reference=shifted, alpha=1.0)
    assert moved.others["kl"] > 0.1 * moved.others["kl_count"]


def test_blocks_first_places_read_from_a_token_causal_clean_half_are_the_teachers():
    """Whatever the block size: there the student sees what the teacher sees."""
    batch = batch_of(block_size=4)
    firsts = (torch.arange(16) % 4 == 0).expand(3, -1)
    batch = dataclasses.replace(batch, is_masked=firsts)
    parts = loss_of(fresh(AS_TEACHER), batch, fresh(TEACHER))
    assert parts.others["kl_count"] == 3 * 2  # of four, two begin a document
    assert parts.others["kl"].abs() < 1e-4


def test_gradient_of_the_divergence_is_the_difference_of_the_distributions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 19, generator=generator, dtype=torch.float64)
    reference, student = logits[0], logits[1].requires_grad_()
    divergence(reference, student, []).sum().backward()
    expected = student.softmax(-1) - reference.softmax(-1)
    torch.testing.assert_close(student.grad, expected.detach(), rtol=1e-12, atol=1e-14)


def test_a_temperature_divides_both_and_keeps_the_scale_of_the_gradient():
    model, batch, teacher = fresh(STUDENT), batch_of(), fresh(TEACHER, 1)
    warm = distillation_loss(model, batch, reference=Online(teacher, [17, 18], 50.0), alpha=1.0)
    sequences, places = (batch.is_masked & (batch.positions > 0)).nonzero(as_tuple=True)
    hidden, _ = teacher_rows(teacher, batch, sequences, places)
    reference = vocabulary_logits(hidden, teacher.head, [17, 18])[:, :17]
    student = read_places(
        model, batch, sequences, places, lambda h, head: vocabulary_logits(h, head, [17, 18])
    )[:, :17]
    # At a high temperature T^2 x KL is half the mean square of the centred logits' difference.
    difference = reference - student
    expected = difference.var(dim=1, unbiased=False).sum() / 2
    torch.testing.assert_close(warm.others["kl"].float(), expected.detach(), rtol=0.1, atol=0)


def test_losses_are_told_apart_and_alpha_mixes_them():
    model, batch, teacher = fresh(STUDENT), batch_of(), fresh(TEACHER, 1)
    plain = diffusion_loss(model, batch)
    whole = loss_of(model, batch, teacher, alpha=1.0, teacher_weight="rate")
    half = loss_of(model, batch, teacher, alpha=0.5, teacher_weight="rate")
    torch.testing.assert_close(half.others["ce"], plain.others["ce"])
    untaught = whole.sum.double() - whole.others["kl"]  # cross entropy of first tokens
    torch.testing.assert_close(
        half.sum.double(),
        (plain.others["ce"] + untaught + whole.others["kl"]) / 2,
        rtol=1e-5,
        atol=0,
    )
    assert untaught > 0
