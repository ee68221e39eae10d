"""The loss: its special cases, its expectation over masks, and where predictions come from."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cascade_model import loss as loss_module
from cascade_model.attention import clean_mask, dense, training_mask
from cascade_model.batch import TrainBatch
from cascade_model.config import NoiseConfig
from cascade_model.errors import InputError
from cascade_model.loss import diffusion_loss, row_losses
from cascade_model.model import vocabulary_logits
from cascade_model.noise import mask_bits, thresholds
from cascade_model.training_input import source_rows
from tests.tiny_models import EOS, MASK, PAD, batch_of, lively_model
from tests.two_ranks import run_on_two_ranks

TWO_ROWS = [[1, 5, 2, 8, 3, 3, 0, 11], [7, 7, 4, 9, 10, 2, 6, 1]]
AUTOREGRESSIVE = {"block_size": 1, "logits": "shifted", "first_place": "clean"}


def causal_nats(model, tokens: torch.Tensor) -> torch.Tensor:
    """Chain-rule nats of tokens[1:] given tokens[:1], by one causal pass."""
    n, length = tokens.shape
    causal = dense(torch.ones(length, length, dtype=torch.bool).tril()[None, None])
    logits = model(
        tokens,
        torch.arange(length).expand(n, -1),
        causal,
        lambda hidden, head: vocabulary_logits(hidden, head, [PAD, MASK]),
    )
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def test_block_size_one_shifted_clean_is_the_chain_rule_likelihood():
    model = lively_model(**AUTOREGRESSIVE)
    tokens = torch.randint(0, 12, (3, 8))
    parts = diffusion_loss(model, batch_of(tokens, block_size=1))
    torch.testing.assert_close(parts.sum, causal_nats(model, tokens), rtol=1e-12, atol=0)
    assert parts.count == 3 * 7


def test_block_size_one_equals_the_doubled_pass_that_it_leaves_out():
    model = lively_model(**AUTOREGRESSIVE)
    tokens = torch.randint(0, 12, (1, 6))
    noisy = torch.full_like(tokens, MASK)
    attend = dense(training_mask(torch.zeros(1, 6, dtype=torch.int32), 1, "block_causal"))
    doubled = model(
        torch.cat([noisy, tokens], dim=1),
        torch.arange(6).repeat(2)[None],
        attend,
        lambda hidden, head: vocabulary_logits(hidden[:, 6:11], head, [PAD, MASK]),
    )
    nats = F.cross_entropy(doubled[0], tokens[0, 1:], reduction="sum")
    torch.testing.assert_close(nats, causal_nats(model, tokens), rtol=1e-12, atol=0)


def test_aligned_block_size_one_at_rate_one_is_a_chain_of_its_own_conditionals():
    model = lively_model(block_size=1)
    tokens = torch.randint(0, 12, (1, 5))
    total = diffusion_loss(model, batch_of(tokens, block_size=1)).sum
    expected = torch.zeros((), dtype=torch.float64)
    for place in range(5):
        seen = torch.cat([tokens[:, :place], torch.tensor([[MASK]])], dim=1)
        attend = dense(torch.ones(place + 1, place + 1, dtype=torch.bool).tril()[None, None])
        logits = model(
            seen,
            torch.arange(place + 1)[None],
            attend,
            lambda hidden, head: vocabulary_logits(hidden[:, -1], head, [PAD, MASK]),
        )
        expected = expected + F.cross_entropy(logits, tokens[:, place])
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)


def all_masks(length: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product([False, True], repeat=length)))


def exact_count_bound(per_mask: dict[tuple, torch.Tensor], size: int) -> float:
    """LLaDA's Eq. 6 per block: uniform count l, uniform subset of it, weight size / l."""
    total = 0.0
    for mask, nats in per_mask.items():
        count = sum(mask)
        if count:
            total += float(nats.sum()) * size / count / math.comb(size, count) / size
    return total


def block_nats(model, tokens: torch.Tensor, block: int, size: int) -> dict[tuple, torch.Tensor]:
    """Cross entropy of one block's masked tokens for each of its masks, the rest unmasked."""
    masks = all_masks(size)
    is_masked = torch.zeros(len(masks), tokens.shape[1], dtype=torch.bool)
    is_masked[:, block * size : (block + 1) * size] = masks
    batch = batch_of(tokens.expand(len(masks), -1), block_size=size, is_masked=is_masked)
    rows = row_losses(model, batch)
    return {
        tuple(mask.tolist()): rows.losses[rows.sequences == index].detach()
        for index, mask in enumerate(masks)
    }


def test_the_expectation_over_all_masks_and_rates_is_the_exact_count_bound():
    model = lively_model(vocab_size=8, mask_id=7, pad_id=6, eos_id=5, block_size=2)
    tokens = torch.tensor([[1, 4, 2, 0]])
    # Two Gauss-Legendre nodes integrate polynomials of degree 3 exactly; P(mask | t) / t is of 1.
    nodes, node_weights = np.polynomial.legendre.leggauss(2)
    expected = 0.0
    masks = all_masks(4)
    for (t0, w0), (t1, w1) in itertools.product(
        zip((nodes + 1) / 2, node_weights / 2, strict=True), repeat=2
    ):
        rates = torch.tensor([[t0, t1]], dtype=torch.float64).expand(len(masks), -1)
        batch = batch_of(tokens.expand(16, -1), block_size=2, is_masked=masks, rates=rates)
        rows = row_losses(model, batch)
        per_mask = torch.zeros(16, dtype=torch.float64)
        per_mask.index_add_(0, rows.sequences, (rows.weights * rows.losses).detach())
        place_rates = rates.repeat_interleave(2, dim=1)
        chance = torch.where(masks, place_rates, 1 - place_rates).prod(dim=1)
        expected += w0 * w1 * float((chance * per_mask).sum())
    exact = sum(exact_count_bound(block_nats(model, tokens, block, 2), 2) for block in (0, 1))
    assert expected == pytest.approx(exact, rel=1e-12)


def test_our_noise_gives_an_unbiased_estimate_of_the_bound():
    model = lively_model(vocab_size=8, mask_id=7, pad_id=6, eos_id=5, block_size=2)
    tokens = torch.tensor([[1, 4, 2, 0]])
    noise = NoiseConfig(seed=3, block_size=2, min_rate=1e-3, strata=1)
    count = 4096
    ids = np.arange(count, dtype=np.uint64)
    limits = thresholds(noise, 0, ids, 2)
    bits = mask_bits(noise, 0, ids, limits, 4)
    batch = batch_of(
        tokens.expand(count, -1),
        block_size=2,
        is_masked=torch.from_numpy(bits),
        rates=torch.from_numpy(limits.astype(np.float64) / 2**32),
    )
    with torch.no_grad():
        rows = row_losses(model, batch)
    samples = torch.zeros(count, dtype=torch.float64)
    samples.index_add_(0, rows.sequences, rows.weights * rows.losses)
    exact = sum(exact_count_bound(block_nats(model, tokens, block, 2), 2) for block in (0, 1))
    error = samples.std() / math.sqrt(count)
    # The rates start at 1e-3 and not at 0, which moves the target by less than 1e-3 of itself.
    assert abs(float(samples.mean()) - exact) < 3 * float(error) + 2e-3 * exact


@pytest.mark.parametrize(
    ("first_place", "expected"),
    [
        ("clean", [-1, 0, 1 + 8, 2, -1, 4, 5 + 8, 6]),
        ("noisy", [-1, 0, 1, 2, -1, 4, 5, 6]),
        ("own", [0, 0, 2, 2, 4, 4, 6, 6]),
    ],
)
def test_shifted_rows_come_from_the_left_within_the_document(first_place, expected):
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]], dtype=torch.int32)
    model = lively_model(block_size=2, logits="shifted", first_place=first_place)
    batch = batch_of([[1] * 8], block_size=2, segments=segments)
    assert source_rows(model.config, batch)[0].tolist() == expected


@pytest.mark.parametrize("clean_half", ["block_causal", "token_causal"])
@pytest.mark.parametrize(
    ("logits", "first_place"),
    [("aligned", "clean"), ("shifted", "clean"), ("shifted", "noisy"), ("shifted", "own")],
)
def test_the_loss_equals_a_plain_pass_under_the_dense_mask(clean_half, logits, first_place):
    axes = {"logits": logits, "first_place": first_place, "clean_half": clean_half}
    model = lively_model(**axes)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 12, (2, 16), generator=generator)
    is_masked = torch.rand(2, 16, generator=generator) < 0.5
    rates = torch.full((2, 4), 0.5, dtype=torch.float64)
    segments = torch.zeros(2, 16, dtype=torch.int32)
    segments[1, 8:] = 1
    batch = batch_of(tokens, block_size=4, is_masked=is_masked, rates=rates, segments=segments)
    noisy = torch.where(is_masked, MASK, tokens)
    logits_of_all = model(
        torch.cat([noisy, tokens], dim=1),
        batch.positions.repeat(1, 2),
        dense(training_mask(segments, 4, clean_half)),
        lambda hidden, head: vocabulary_logits(hidden, head, [PAD, MASK]),
    )
    sources = source_rows(model.config, batch)
    expected = sum(
        2 * F.cross_entropy(logits_of_all[row, sources[row, place]], tokens[row, place])
        for row, place in is_masked.nonzero().tolist()
        if sources[row, place] >= 0
    )
    torch.testing.assert_close(diffusion_loss(model, batch).sum, expected, rtol=1e-11, atol=0)


def random_batch(*, length=16, segments=None, block_size=4):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 12, (2, length), generator=generator)
    is_masked = torch.rand(2, length, generator=generator) < 0.5
    rates = torch.full((2, length // block_size), 0.5, dtype=torch.float64)
    return batch_of(
        tokens, block_size=block_size, is_masked=is_masked, rates=rates, segments=segments
    )


BIDIRECTIONAL_SOURCES = {
    ("aligned", "clean"): [0, 1, 2, 3, 4, 5, 6, 7],
    ("shifted", "clean"): [-1, 0, 1, 2, 3, -1, 5, 6],
    ("shifted", "own"): [0, 0, 1, 2, 3, 5, 5, 6],
}


@pytest.mark.parametrize(("axes", "expected"), BIDIRECTIONAL_SOURCES.items())
def test_a_bidirectional_model_shifts_over_whole_documents(axes, expected):
    model = lively_model(attention="bidirectional", logits=axes[0], first_place=axes[1])
    segments = torch.tensor([[0] * 5 + [1] * 3], dtype=torch.int32)
    batch = batch_of([[1] * 8], block_size=4, segments=segments)
    assert source_rows(model.config, batch)[0].tolist() == expected


@pytest.mark.parametrize("axes", BIDIRECTIONAL_SOURCES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_bidirectional_loss_equals_a_plain_pass_over_the_noisy_sequence(axes, packed):
    model = lively_model(attention="bidirectional", logits=axes[0], first_place=axes[1])
    segments = torch.zeros(2, 16, dtype=torch.int32)
    segments[1, 6:] = int(packed)
    batch = random_batch(segments=segments)
    together = (segments[:, :, None] == segments[:, None, :])[:, None]
    noisy = torch.where(batch.is_masked, MASK, batch.clean_tokens)
    logits = model(
        noisy,
        batch.positions,
        dense(together),
        lambda hidden, head: vocabulary_logits(hidden, head, [PAD, MASK]),
    )
    sources = source_rows(model.config, batch)
    expected = sum(
        2 * F.cross_entropy(logits[row, sources[row, place]], batch.clean_tokens[row, place])
        for row, place in batch.is_masked.nonzero().tolist()
        if sources[row, place] >= 0
    )
    torch.testing.assert_close(diffusion_loss(model, batch).sum, expected, rtol=1e-11, atol=0)


def test_a_bidirectional_model_is_fed_the_noisy_sequence_alone():
    seen = []
    model = lively_model(attention="bidirectional")
    model.embed.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    batch = random_batch()
    diffusion_loss(model, batch)
    assert torch.equal(seen[0], torch.where(batch.is_masked, MASK, batch.clean_tokens))


def test_one_block_over_the_whole_sequence_is_the_bidirectional_model():
    batch = random_batch(block_size=16)
    blocks = diffusion_loss(lively_model(block_size=16), batch)
    whole = diffusion_loss(lively_model(attention="bidirectional"), batch)
    torch.testing.assert_close(blocks.sum, whole.sum, rtol=1e-12, atol=0)
    assert blocks.count == whole.count


def test_a_bidirectional_model_may_have_a_rate_per_block_of_any_grid():
    model = lively_model(attention="bidirectional", block_size=4)
    rates = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]] * 2)
    rows = row_losses(model, dataclasses.replace(random_batch(), mask_rates=rates))
    torch.testing.assert_close(rows.rates.float(), rates[rows.sequences, rows.places // 2])


@pytest.mark.parametrize("kind", [{}, {"attention": "bidirectional"}, AUTOREGRESSIVE])
def test_only_supervised_rows_reach_the_head_and_never_all_at_once(kind, monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", 16 * 5)
    model, seen = lively_model(**kind), []
    model.head.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    batch = random_batch(block_size=model.config.block_size)
    diffusion_loss(model, batch).sum.detach()
    is_supervised = loss_module.supervised(model.config, batch)
    assert sum(math.prod(shape[:-1]) for shape in seen) == int(is_supervised.sum())
    assert max(math.prod(shape[:-1]) for shape in seen) <= 5


def test_outcomes_change_what_takes_probability():
    model, batch = lively_model(), random_batch()
    text, all_but_mask, everything = (
        row_losses(model, batch, outcomes=outcomes).losses
        for outcomes in ("text", "all_but_mask", "all")
    )
    assert (text < all_but_mask).all()
    assert (all_but_mask < everything).all()


def test_one_document_does_not_change_the_loss_of_another():
    model = lively_model()
    segments = torch.tensor([[0] * 8 + [1] * 8], dtype=torch.int32)
    tokens = torch.randint(0, 12, (1, 16))
    changed = tokens.clone()
    changed[0, :8] = (changed[0, :8] + 1) % 12
    before, after = (
        row_losses(model, batch_of(each, block_size=4, segments=segments)).losses[8:]
        for each in (tokens, changed)
    )
    torch.testing.assert_close(before, after, rtol=0, atol=1e-12)


def test_chunks_of_rows_change_neither_the_loss_nor_its_gradient(monkeypatch):
    tokens = torch.randint(0, 12, (2, 16))
    results = []
    for limit in (2**24, 16 * 5):
        monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", limit)
        model = lively_model()
        total = diffusion_loss(model, batch_of(tokens, block_size=4)).sum
        total.backward()
        results.append((total, model.embed.weight.grad, model.layers[0].q_proj.weight.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_the_mask_token_takes_no_probability():
    model = lively_model()
    with torch.no_grad():
        model.embed.weight[MASK] *= 100
    losses = row_losses(model, batch_of([[1, 2, 3, 4]], block_size=4)).losses
    assert torch.isfinite(losses).all()
    logits = vocabulary_logits(torch.randn(3, 16, dtype=torch.float64), model.head, [PAD, MASK])
    assert (logits.softmax(-1)[:, [PAD, MASK]] == 0).all()


def test_bands_add_up_to_all_supervised_tokens():
    rates = torch.tensor([[0.05, 0.5, 0.99, 1.0]])
    parts = diffusion_loss(lively_model(), batch_of([[1] * 16], block_size=4, rates=rates))
    assert parts.band_counts.tolist() == [4, 0, 0, 0, 4, 0, 0, 8]


def test_unit_weight_leaves_out_the_rate():
    batch = batch_of([[1] * 8], block_size=4, rates=torch.full((1, 2), 0.25))
    model = lively_model()
    unit = diffusion_loss(model, batch, weight="unit").sum
    torch.testing.assert_close(diffusion_loss(model, batch).sum, 4 * unit)


def test_a_batch_without_masked_tokens_has_a_zero_loss_and_zero_gradients():
    model = lively_model()
    is_masked = torch.zeros(1, 8, dtype=torch.bool)
    parts = diffusion_loss(model, batch_of([[1] * 8], block_size=4, is_masked=is_masked))
    parts.sum.backward()
    assert parts.sum.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def sharded_gradients(rank: int, folder: str) -> None:
    """The loss and gradient of one rank's half of the batch under FSDP2."""
    model, mesh = lively_model(), init_device_mesh("cpu", (2,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    diffusion_loss(model, batch_of(TWO_ROWS[rank : rank + 1], block_size=4)).sum.backward()
    whole = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    if rank == 0:
        torch.save(whole, folder + "/gradients")


def test_two_sharded_ranks_have_the_gradient_of_one_process(tmp_path):
    run_on_two_ranks(sharded_gradients, tmp_path)
    found = torch.load(tmp_path / "gradients", weights_only=True)
    model = lively_model()
    (diffusion_loss(model, batch_of(TWO_ROWS, block_size=4)).sum / 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-11)


def test_rows_of_another_block_size_are_refused_with_both_values():
    """Training follows its batches; what measures a model takes the model's own size."""
    with pytest.raises(InputError, match=r"noise.block_size=2 .* model.block_size=4"):
        row_losses(lively_model(), batch_of([[1] * 8], block_size=2))


def test_a_clean_mask_serves_the_likelihood_of_a_whole_document():
    mask = clean_mask(torch.zeros(1, 3, dtype=torch.int32), 1, "block_causal")
    assert torch.equal(mask[0, 0], torch.ones(3, 3, dtype=torch.bool).tril())


@pytest.mark.parametrize("attention", ["block_causal", "bidirectional"])
def test_nothing_in_the_noisy_half_tells_where_a_text_ends(attention):
    """A masked token sees masks behind it, as in decoding, be they padding or not."""
    model = lively_model(attention=attention)
    clean = torch.tensor([[1, 2, 3, 4, 5, 6, EOS, PAD]])
    is_masked = torch.tensor([[False, True, False, False, False, True, False, False]])
    is_text = clean != PAD
    padded = TrainBatch.of(clean, is_masked, block_size=4, is_maskable=is_text)
    longer = TrainBatch.of(torch.where(is_text, clean, 7), is_masked | ~is_text, block_size=4)
    seen = row_losses(model, padded)
    masked = row_losses(model, longer)
    torch.testing.assert_close(seen.losses, masked.losses[:2], rtol=0, atol=1e-12)
