"""A batch's own block size, and the one block that needs no clean half."""

import pytest
import torch

from cascade_model.loss import diffusion_loss
from cascade_model.training_config import AuxiliaryConfig
from cascade_model.training_input import config_for, source_rows
from tests.tiny_models import batch_of, lively_model

SHIFTED = {"logits": "shifted", "first_place": "clean"}
TWO_DOCUMENTS = torch.tensor([[0] * 16, [0] * 8 + [1] * 8], dtype=torch.int32)


def noisy_batch(block_size, segments=TWO_DOCUMENTS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 12, (2, 16), generator=generator)
    is_masked = torch.rand(2, 16, generator=generator) < 0.5
    rates = torch.full((2, 16 // block_size), 0.5)
    return batch_of(
        tokens, block_size=block_size, is_masked=is_masked, rates=rates, segments=segments
    )


@pytest.mark.parametrize("axes", [{}, SHIFTED, {"logits": "shifted", "first_place": "own"}])
@pytest.mark.parametrize("block_size", [1, 2, 8])
def test_a_batch_of_another_block_size_is_learnt_as_a_model_of_that_size_learns_it(
    axes, block_size
):
    batch = noisy_batch(block_size)
    ours = diffusion_loss(lively_model(block_size=4, **axes), batch)
    theirs = diffusion_loss(lively_model(block_size=block_size, **axes), batch)
    assert torch.equal(ours.sum, theirs.sum)
    assert ours.count == theirs.count


def test_a_phase_of_block_size_one_is_autoregressive_with_shifted_logits_from_the_clean_half():
    model, batch = lively_model(block_size=4, **SHIFTED), noisy_batch(1)
    config = config_for(model.config, batch)
    assert config.is_autoregressive
    assert not model.config.is_autoregressive
    assert diffusion_loss(model, batch).count == 2 * 16 - 3  # every token but the first of a text


def test_a_bidirectional_model_keeps_its_config():
    config = lively_model(attention="bidirectional", block_size=4).config
    assert config_for(config, noisy_batch(2)) is config


@pytest.mark.parametrize("first_place", ["clean", "noisy", "own"])
@pytest.mark.parametrize("logits", ["aligned", "shifted"])
def test_one_block_without_its_clean_half_has_the_loss_of_the_doubled_pass(logits, first_place):
    """An autoregressive term makes the pass doubled; what is told of the masked tokens is equal."""
    axes = {"logits": logits, "first_place": first_place, "clean_half": "token_causal"}
    model, batch, fed = lively_model(block_size=4, **axes), noisy_batch(16), []
    model.embed.register_forward_hook(lambda module, args, out: fed.append(args[0].shape[1]))
    alone = diffusion_loss(model, batch)
    doubled = diffusion_loss(model, batch, auxiliary=AuxiliaryConfig(ar_weight=0.3))
    assert fed == [16, 32]
    torch.testing.assert_close(doubled.others["ce"], alone.others["ce"], rtol=1e-12, atol=0)
    assert doubled.count == alone.count


def test_the_grid_of_blocks_restarts_with_a_document_inside_a_block():
    batch = noisy_batch(16)
    for first_place, first in (("own", 8), ("clean", -1), ("noisy", -1)):
        config = lively_model(block_size=16, logits="shifted", first_place=first_place).config
        assert source_rows(config, batch)[1, 8] == first
