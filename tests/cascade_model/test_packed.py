"""A packed network is the same function, and a row's result has the same bits in any company."""

import pytest
import torch
import torch.nn.functional as F

from cascade_model.attention import Keep, dense
from cascade_model.config import ExpertsConfig
from cascade_model.feed_forward import MixtureOfExperts, gelu
from cascade_model.kv_cache import KVCache
from cascade_model.networks import Network, build_network
from cascade_model.packed import PackedFeedForward, PackedMixture, Product, pack
from cascade_model.rows import in_whole_rows
from tests.tiny_models import tiny_config

KINDS = {
    "plain": {},
    "qwen2": {"qkv_bias": True, "num_kv_heads": 2},
    "qwen3": {"qk_norm": True, "num_kv_heads": 1},
    "partial rotary": {"rotary_dim": 4},
    "tied": {"tied_head": True},
    "softmax experts": {
        "experts": ExpertsConfig(num_experts=4, experts_per_token=2, intermediate_size=32)
    },
    "sigmoid experts": {
        "experts": ExpertsConfig(
            num_experts=8,
            experts_per_token=2,
            intermediate_size=32,
            router="sigmoid_groups",
            router_bias=True,
            num_groups=2,
            groups_per_token=1,
            shared_intermediate_size=16,
            first_dense_layers=1,
        )
    },
    "gpt2": {"network": "gpt2", "num_kv_heads": 4, "tied_head": True},
    "dit": {"network": "dit", "num_kv_heads": 4, "tied_head": False, "conditioning_size": 8},
}


def network(kind: str, dtype: torch.dtype) -> Network:
    shape = {"hidden_size": 32, "head_dim": 8, "num_heads": 4, "num_kv_heads": 4}
    model = build_network(tiny_config(**(shape | KINDS[kind])))
    model.init_weights(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "modulation" in name or name == "head.weight":
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model.to(dtype).eval()


def logits_of(model: Network, tokens: torch.Tensor, keep: Keep | None = None) -> torch.Tensor:
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    weight = next(model.parameters())
    slot = KVCache(model.config, 32, weight.dtype, weight.device).slot(0, tokens.shape[1], 16)
    with torch.inference_mode():
        return model(tokens, places, dense(None), lambda rows, head: head(rows), slot, keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_packing_changes_no_more_than_the_last_bits(kind, dtype):
    model = network(kind, dtype)
    tokens = torch.arange(16)[None] % 9
    keep = Keep(torch.tensor([1, 5, 6]), dense(None))
    before = [logits_of(model, tokens), logits_of(model, tokens, keep)]
    pack(model)
    after = [logits_of(model, tokens), logits_of(model, tokens, keep)]
    bound = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 0.1}[dtype]
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old, rtol=bound, atol=bound)
    pack(model)
    assert torch.equal(logits_of(model, tokens), after[0])


@pytest.mark.parametrize("kind", ["plain", "softmax experts", "gpt2"])
def test_every_product_is_packed(kind):
    model = network(kind, torch.float32)
    pack(model)
    assert not [part for part in model.modules() if isinstance(part, torch.nn.Linear)]
    assert all(part.is_packed for part in model.modules() if isinstance(part, Product))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(96, 64), (64, 160), (500, 64), (576, 1536), (30, 20)])
def test_a_row_has_the_same_bits_among_any_other_rows(sizes, dtype):
    torch.manual_seed(0)
    product = Product([torch.randn(sizes).to(dtype)])
    rows = torch.randn(200, sizes[1]).to(dtype)
    with torch.inference_mode():
        whole = product(rows)
        for count in (4, 8, 12, 16, 32, 60, 128):
            for start in (0, 3, 57):
                part = product(rows[start : start + count].contiguous())
                assert torch.equal(part, whole[start : start + count])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_of_a_feed_forward_has_the_same_bits_among_many(threads):
    """Enough numbers for torch to cut them among its threads, at a place that is no row's end."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        part = PackedFeedForward(torch.randn(1024, 32), torch.randn(1024, 32), torch.eye(1024))
        rows = torch.randn(1, 400, 32)
        with torch.inference_mode():
            whole = part(rows)
            for start in range(0, 400, 4):
                some = slice(start, start + 4)
                assert torch.equal(part(rows[:, some]), whole[:, some])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["softmax experts", "sigmoid experts"])
def test_a_row_of_a_mixture_has_the_same_bits_whoever_else_meets_its_experts(kind):
    model, rows = network(kind, torch.float32), torch.randn(40, 32)
    pack(model)
    mixture = model.layers[-1].mlp
    assert isinstance(mixture, PackedMixture)
    with torch.inference_mode():
        whole = mixture(rows)
        for start in range(0, 40, 4):
            assert torch.equal(mixture(rows[start : start + 4]), whole[start : start + 4])


def test_a_row_of_a_large_mixture_has_the_same_bits_alone_at_its_expert():
    """Sizes at which a product of one row sums in another order."""
    experts = ExpertsConfig(num_experts=16, experts_per_token=2, intermediate_size=1408)
    mixture, rows = PackedMixture(MixtureOfExperts(1024, experts)), torch.randn(64, 1024)
    with torch.inference_mode():
        whole = mixture(rows)
        for start in range(0, 64, 4):
            assert torch.equal(mixture(rows[start : start + 4]), whole[start : start + 4])


@pytest.mark.parametrize("function", [torch.sigmoid, F.silu, gelu])
def test_no_function_is_cut_within_a_row(function):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        rows = torch.randn(400, 1024)
        with torch.inference_mode():
            whole = in_whole_rows(function, rows)
            for start in range(0, 400, 4):
                part = slice(start, start + 4)
                assert torch.equal(in_whole_rows(function, rows[part]), whole[part])
    finally:
        torch.set_num_threads(before)
