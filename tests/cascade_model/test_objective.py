"""Weights, normalisers and outcomes against their formulas on small batches."""

import dataclasses
import itertools

import pytest
import torch

from cascade_model.loss import diffusion_loss, row_losses
from cascade_model.objective import NORMALISERS, WEIGHTS, banned_ids, loss_parts, weights_of
from tests.tiny_models import EOS, MASK, PAD, batch_of, lively_model, tiny_config

BIDIRECTIONAL = {"attention": "bidirectional"}


def masked_batch(length=24, n=3, seed=0, segments=None):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 12, (n, length), generator=generator)
    is_masked = torch.rand(n, length, generator=generator) < 0.4
    rates = torch.full((n, length // 4), 0.4)
    return batch_of(tokens, block_size=4, is_masked=is_masked, rates=rates, segments=segments)


def with_prompts(batch, lengths):
    """The first tokens of each row are given: never masked, never counted."""
    place = torch.arange(batch.clean_tokens.shape[1])
    is_maskable = place >= torch.tensor(lengths)[:, None]
    return dataclasses.replace(
        batch, is_maskable=is_maskable, is_masked=batch.is_masked & is_maskable
    )


def cart_by_definition(batch, row, place):
    total = 0.0
    for i in range(batch.clean_tokens.shape[1]):
        together = batch.segments[row, i] == batch.segments[row, place]
        is_padding = not batch.is_maskable[row, i] and batch.clean_tokens[row, i] == PAD
        if together and not batch.is_masked[row, i] and not is_padding:
            total += 0.3 * 0.7 ** max(abs(place - i) - 1, 0)
    return total / 2


def test_cart_is_its_formula_within_the_document_and_padding_is_no_context():
    segments = torch.tensor([[0] * 24, [0] * 8 + [1] * 16, [0] * 4 + [1] * 8 + [2] * 12])
    batch = masked_batch(segments=segments.int())
    clean, is_maskable = batch.clean_tokens.clone(), batch.is_maskable.clone()
    clean[0, 20:], is_maskable[0, 20:] = PAD, False
    is_maskable[1, :3] = False  # a prompt is context
    is_masked = batch.is_masked & is_maskable
    batch = dataclasses.replace(
        batch, clean_tokens=clean, is_maskable=is_maskable, is_masked=is_masked
    )
    model = lively_model(**BIDIRECTIONAL)
    rows = row_losses(model, batch)
    found = weights_of(model.config, batch, rows, "cart")
    pairs = zip(rows.sequences.tolist(), rows.places.tolist(), strict=True)
    expected = [cart_by_definition(batch, row, place) for row, place in pairs]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype))


def test_padding_that_ends_texts_too_is_context_as_any_other_token():
    plain = with_prompts(masked_batch(), [3, 3, 3])
    clean = plain.clean_tokens.clone()
    clean[:, 1] = PAD
    padded = dataclasses.replace(plain, clean_tokens=clean)
    model = lively_model(**BIDIRECTIONAL)
    rows = row_losses(model, plain)
    ends = dataclasses.replace(model.config, stop_ids=(PAD,))
    expected = weights_of(ends, plain, rows, "cart")
    assert torch.equal(weights_of(ends, padded, rows, "cart"), expected)
    assert not torch.equal(weights_of(model.config, padded, rows, "cart"), expected)


def test_cart_reaches_far_enough_for_float64():
    batch = masked_batch(length=200, n=1)
    model = lively_model(max_sequence_length=256, **BIDIRECTIONAL)
    rows = row_losses(model, batch)
    found = weights_of(model.config, batch, rows, "cart")
    expected = [cart_by_definition(batch, 0, place) for place in rows.places.tolist()]
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=found.dtype), rtol=1e-12, atol=1e-14
    )


def test_weights_of_one_and_of_the_rate():
    batch, model = masked_batch(), lively_model()
    rows = row_losses(model, batch)
    assert (weights_of(model.config, batch, rows, "unit") == 1).all()
    torch.testing.assert_close(
        weights_of(model.config, batch, rows, "elbo"), torch.full_like(rows.losses, 2.5)
    )


def test_an_autoregressive_model_has_weight_one_whatever_is_set():
    model = lively_model(block_size=1, logits="shifted")
    batch = dataclasses.replace(masked_batch(), mask_rates=torch.full((3, 24), 0.4))
    sums = [diffusion_loss(model, batch, weight=weight).sum.item() for weight in WEIGHTS]
    assert len(set(sums)) == 1


def test_normalisers_give_the_sums_and_counts_of_the_published_systems():
    batch = with_prompts(masked_batch(), [3, 10, 0])
    rows = row_losses(lively_model(), batch)
    per_row = torch.zeros(3, dtype=torch.float64).index_add_(0, rows.sequences, rows.losses)
    found = {name: normaliser(batch, rows, rows.losses) for name, normaliser in NORMALISERS.items()}
    assert found["maskable"][1].tolist() == [21, 14, 24]
    assert found["masked"][1].tolist() == batch.is_masked.sum(dim=1).tolist()
    assert found["document"][1].tolist() == [1, 1, 1]
    for name in ("maskable", "masked"):
        assert torch.equal(found[name][0], rows.losses)
    answers = torch.tensor([21, 14, 24])
    torch.testing.assert_close(found["document"][0].sum(), (per_row / answers).sum())


def test_documents_of_one_sequence_are_normalised_one_by_one():
    """Packing two answers into a row changes nothing; a document without one is not counted."""
    tokens = torch.randint(0, 12, (2, 8), generator=torch.Generator().manual_seed(4))
    is_masked = torch.tensor([[0, 1, 0, 0, 1, 1, 0, 1], [1, 1, 0, 1, 0, 0, 0, 0]]).bool()
    apart = batch_of(tokens, block_size=4, is_masked=is_masked)
    apart = with_prompts(apart, [2, 0])
    segments = torch.tensor([[0] * 8 + [1] * 8 + [2] * 4], dtype=torch.int32)
    empty = torch.zeros(1, 4)
    together = batch_of(
        torch.cat([tokens.reshape(1, 16), empty.long()], dim=1),
        block_size=4,
        is_masked=torch.cat([apart.is_masked.reshape(1, 16), empty.bool()], dim=1),
        segments=segments,
    )
    is_maskable = torch.cat([apart.is_maskable.reshape(1, 16), empty.bool()], dim=1)
    together = dataclasses.replace(together, is_maskable=is_maskable)
    model = lively_model(**BIDIRECTIONAL)
    one, two = (
        diffusion_loss(model, batch, weight="unit", normaliser="document")
        for batch in (apart, together)
    )
    assert one.count == two.count == 2
    torch.testing.assert_close(one.sum, two.sum, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("weight", "normaliser"), list(itertools.product(WEIGHTS, NORMALISERS)))
def test_micro_batches_add_up_on_every_axis(weight, normaliser):
    """The trainer adds sums and counts; no mean is ever taken over a micro-batch."""
    batch, model = with_prompts(masked_batch(), [3, 10, 0]), lively_model(**BIDIRECTIONAL)
    axes = {"weight": weight, "normaliser": normaliser}
    whole = diffusion_loss(model, batch, **axes)
    parts = [diffusion_loss(model, batch.select(torch.tensor([i])), **axes) for i in range(3)]
    assert whole.count == sum(part.count for part in parts)
    total = sum((part.sum for part in parts), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(whole.sum, total, rtol=1e-12, atol=0)


def test_prompts_are_neither_masked_nor_counted_and_are_seen():
    model, batch = lively_model(**BIDIRECTIONAL), with_prompts(masked_batch(), [6, 6, 6])
    rows = row_losses(model, batch)
    assert (rows.places >= 6).all()
    assert rows.num_maskable.tolist() == [18, 18, 18]
    clean = batch.clean_tokens.clone()
    clean[:, :6] = (clean[:, :6] + 1) % 12
    other = row_losses(model, dataclasses.replace(batch, clean_tokens=clean))
    assert not torch.allclose(rows.losses, other.losses)


def test_outcomes_ban_what_their_systems_ban():
    config = tiny_config()
    assert banned_ids(config, "text") == [PAD, MASK]
    assert banned_ids(config, "all_but_mask") == [MASK]
    assert banned_ids(config, "all") == []
    assert banned_ids(tiny_config(pad_id=EOS), "text") == [MASK]


def test_without_supervised_tokens_every_axis_is_zero():
    batch = dataclasses.replace(masked_batch(), is_masked=torch.zeros(3, 24, dtype=torch.bool))
    rows = row_losses(lively_model(), batch)
    for normaliser in NORMALISERS:
        parts = loss_parts(rows.losses, batch, rows, normaliser)
        assert float(parts.sum.detach()) == 0
