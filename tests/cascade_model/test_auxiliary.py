"""The losses beside the masked cross entropy: next tokens of the clean half, and certainty."""

import dataclasses
import math

import pytest
import torch

from cascade_model import loss as loss_module
from cascade_model.errors import InputError
from cascade_model.loss import diffusion_loss, entropy
from cascade_model.model import vocabulary_logits
from cascade_model.objective import NORMALISERS
from cascade_model.training_config import AuxiliaryConfig
from cascade_model.training_input import read_places
from tests.cascade_model.test_training_input import noisy_batch
from tests.tiny_models import MASK, PAD, lively_model

CAUSAL = {"clean_half": "token_causal", "block_size": 4}
AR = AuxiliaryConfig(ar_weight=0.3)
FEW_STEPS = AuxiliaryConfig(entropy_weight=2.0, entropy_temperature=0.5)


def prompted(batch, lengths=(3, 9)):
    """The first tokens of each sequence are given."""
    is_maskable = torch.arange(16) >= torch.tensor(lengths)[:, None]
    return dataclasses.replace(
        batch, is_maskable=is_maskable, is_masked=batch.is_masked & is_maskable
    )


@pytest.mark.parametrize(
    "axes", [{}, *({"logits": "shifted", "first_place": p} for p in ("clean", "noisy", "own"))]
)
def test_the_clean_half_is_an_autoregressive_model_of_the_same_weights(axes):
    batch = prompted(noisy_batch(4))
    found = diffusion_loss(lively_model(**CAUSAL, **axes), batch, auxiliary=AR)
    parent = lively_model(block_size=1, logits="shifted", first_place="clean")
    alone = diffusion_loss(parent, dataclasses.replace(batch, mask_rates=torch.ones(2, 16)))
    torch.testing.assert_close(found.others["ar"], alone.sum.detach(), rtol=1e-12, atol=0)
    assert found.others["ar_count"] == alone.count == 13 + 7


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_a_term_is_a_mean_per_sequence_that_weighs_what_the_sequence_counts(normaliser):
    model, batch = lively_model(**CAUSAL), prompted(noisy_batch(4))
    plain = diffusion_loss(model, batch, normaliser=normaliser)
    total = diffusion_loss(model, batch, normaliser=normaliser, auxiliary=AR)
    expected = plain.sum
    for index in (0, 1):
        alone = batch.select(torch.tensor([index]))
        parts = diffusion_loss(model, alone, normaliser=normaliser, auxiliary=AR)
        expected = expected + 0.3 * parts.count * parts.others["ar"] / parts.others["ar_count"]
    torch.testing.assert_close(total.sum, expected, rtol=1e-12, atol=0)
    assert total.count == plain.count
    torch.testing.assert_close(total.others["ce"], plain.sum.detach(), rtol=1e-12, atol=0)
    assert total.others["ce_count"] == plain.count


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_micro_batches_add_up_with_terms_too(normaliser):
    model, batch = lively_model(**CAUSAL), prompted(noisy_batch(4))
    both = AuxiliaryConfig(ar_weight=0.3, entropy_weight=2.0)
    whole = diffusion_loss(model, batch, normaliser=normaliser, auxiliary=both)
    halves = [batch.select(torch.tensor([i])) for i in (0, 1)]
    parts = [diffusion_loss(model, b, normaliser=normaliser, auxiliary=both) for b in halves]
    torch.testing.assert_close(whole.sum, parts[0].sum + parts[1].sum, rtol=1e-12, atol=0)
    assert whole.others.keys() == {"ce", "ce_count", "ar", "ar_count", "entropy", "entropy_count"}
    for name, value in whole.others.items():
        torch.testing.assert_close(value, parts[0].others[name] + parts[1].others[name])


@pytest.mark.parametrize(
    ("axes", "named"),
    [
        ({}, "model.clean_half=block_causal"),
        ({"attention": "bidirectional", "clean_half": "token_causal"}, "attention=bidirectional"),
        ({"block_size": 1, "logits": "shifted", "clean_half": "token_causal"}, "block_size=1"),
    ],
)
def test_a_model_whose_clean_half_sees_the_next_token_is_refused(axes, named):
    with pytest.raises(InputError, match=rf"ar_weight=0.3 .*{named}.*; use ar_weight=0"):
        diffusion_loss(lively_model(**axes), noisy_batch(4), auxiliary=AR)


def test_every_token_of_the_clean_half_sees_only_what_is_before_it():
    """Changing a token changes the term of no token before it."""
    model, batch = lively_model(**CAUSAL), noisy_batch(4, torch.zeros(2, 16, dtype=torch.int32))
    batch = dataclasses.replace(batch, is_masked=torch.zeros(2, 16, dtype=torch.bool))
    early = dataclasses.replace(batch, is_maskable=torch.arange(16).expand(2, -1) < 6)
    tokens = batch.clean_tokens.clone()
    tokens[:, 6:] = (tokens[:, 6:] + 1) % 12
    changed = dataclasses.replace(early, clean_tokens=tokens)
    before, after = (diffusion_loss(model, b, auxiliary=AR).others["ar"] for b in (early, changed))
    assert torch.equal(before, after)


def test_an_autoregressive_phase_has_no_second_autoregressive_term():
    model = lively_model(**CAUSAL, logits="shifted")
    parts = diffusion_loss(model, noisy_batch(1), auxiliary=AR)
    assert parts.others["ar_count"] == 0
    torch.testing.assert_close(parts.sum.detach(), parts.others["ce"], rtol=1e-12, atol=0)


def test_next_tokens_reach_the_head_in_chunks_that_change_no_gradient(monkeypatch):
    results = []
    for limit in (2**24, 16 * 5):
        monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", limit)
        model, batch, seen = lively_model(**CAUSAL), noisy_batch(4), []
        model.head.register_forward_hook(
            lambda module, args, out, seen=seen: seen.append(math.prod(args[0].shape[:-1]))
        )
        total = diffusion_loss(model, batch, auxiliary=AR).sum
        assert sum(seen) == int(batch.is_masked.sum()) + 2 * 16 - 3
        assert max(seen) <= limit // 16
        total.backward()
        results.append((total, model.embed.weight.grad, model.layers[0].q_proj.weight.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_entropy_is_that_of_the_correctly_predicted_masked_tokens(temperature):
    """Every second of the masked tokens is made right, which one block lets no prediction see."""
    model, batch = lively_model(block_size=16), noisy_batch(16)
    sequences, places = batch.is_masked.nonzero(as_tuple=True)
    logits = read_places(
        model, batch, sequences, places, lambda h, head: vocabulary_logits(h, head, [PAD, MASK])
    ).detach()
    best, is_right = logits.argmax(dim=-1), torch.arange(len(places)) % 2 == 0
    tokens = batch.clean_tokens.clone()
    tokens[sequences, places] = torch.where(is_right, best, (best + 1) % 12)
    auxiliary = AuxiliaryConfig(entropy_weight=2.0, entropy_temperature=temperature)
    told = dataclasses.replace(batch, clean_tokens=tokens)
    parts = diffusion_loss(model, told, auxiliary=auxiliary)
    p = (logits / temperature).softmax(dim=-1)
    expected = -torch.xlogy(p, p).sum(dim=-1)[is_right].sum()
    torch.testing.assert_close(parts.others["entropy"], expected, rtol=1e-12, atol=0)
    assert parts.others["entropy_count"] == int(is_right.sum())


def test_entropy_of_uniform_and_of_certain_logits():
    logits = torch.zeros(2, 16, dtype=torch.float64, requires_grad=True)
    shown = logits.index_fill(1, torch.tensor([PAD, MASK]), float("-inf"))
    certain = torch.zeros(2, 16)
    certain[1, 1] = 1000
    found = entropy(shown + certain, 1.0, [PAD, MASK])
    torch.testing.assert_close(found.detach(), torch.tensor([math.log(14), 0.0]).double())
    found.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def trained(auxiliary, steps=60):
    """The mean entropy of right predictions and the share of them, after training on one batch."""
    model = lively_model(seed=1).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        batch = noisy_batch(4, seed=step % 4)
        diffusion_loss(model, batch, auxiliary=auxiliary, normaliser="masked").sum.backward()
        optimizer.step()
    watch = AuxiliaryConfig(entropy_weight=1e-9)
    others = diffusion_loss(model, noisy_batch(4), auxiliary=watch).others
    return others["entropy"] / others["entropy_count"]


def test_the_few_step_stage_makes_right_predictions_more_certain():
    assert trained(FEW_STEPS) < 0.7 * trained(AuxiliaryConfig())


@pytest.mark.parametrize(
    "wrong",
    [{"ar_weight": -0.1}, {"entropy_weight": float("nan")}, {"entropy_temperature": 0.0}],
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        AuxiliaryConfig(**wrong)
