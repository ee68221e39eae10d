"""Flex attention against the dense oracle."""

import pytest
import torch

from cascade_model.attention import dense, training_mask
from cascade_model.flex import flex_training
from cascade_model.loss import diffusion_loss
from tests.tiny_models import batch_of, lively_model

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
SEGMENTS = torch.tensor([[0] * 16, [0] * 4 + [1] * 8 + [2] * 4], dtype=torch.int32)


@pytest.mark.parametrize("clean_half", ["block_causal", "token_causal"])
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("has_clean_rows", [True, False])
def test_flex_equals_the_dense_oracle(clean_half, block_size, has_clean_rows):
    generator = torch.Generator().manual_seed(3)
    segments = SEGMENTS if block_size < 16 else SEGMENTS[:1]
    n, rows = len(segments), 32 if has_clean_rows else 16
    q = torch.randn(n, 4, rows, 8, generator=generator)
    k, v = (torch.randn(n, 2, 32, 8, generator=generator) for _ in "kv")
    mask = training_mask(segments, block_size, clean_half)
    expected = dense(mask[:, :, :rows])(q, k, v)
    found = flex_training(segments, block_size, clean_half)(q, k, v)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("clean_half", ["block_causal", "token_causal"])
def test_the_compiled_kernel_equals_the_oracle_forward_and_backward(clean_half):
    segments = torch.zeros(2, 256, dtype=torch.int32, device="cuda")
    inputs = [
        torch.randn(2, heads, 512, 64, device="cuda", requires_grad=True) for heads in (4, 2, 2)
    ]
    results = []
    for attend in (
        dense(training_mask(segments, 8, clean_half)),
        flex_training(segments, 8, clean_half),
    ):
        out = attend(*inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for ours, oracle in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, oracle, rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_the_loss_with_flex_is_the_loss_with_groups():
    model = lively_model()
    clean = torch.randint(0, 12, (2, 16), generator=torch.Generator().manual_seed(1))
    batch = batch_of(clean, block_size=4, segments=SEGMENTS)
    grouped = diffusion_loss(model, batch).sum
    model.training_attention = flex_training
    torch.testing.assert_close(diffusion_loss(model, batch).sum, grouped, rtol=1e-9, atol=0)
