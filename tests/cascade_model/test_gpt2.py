"""The network of GPT-2: recorded logits and greedy tokens, positions, keep and caches."""

import json

import pytest
import torch

from cascade_model.attention import Keep, clean_mask, dense, prefix_mask
from cascade_model.errors import InputError
from cascade_model.gpt2 import GPT2
from cascade_model.kv_cache import KVCache
from tests.cascade_model.families.published_cases import DATA, expected_logits, network_of
from tests.tiny_models import tiny_config

RECORDED = json.loads((DATA / "ar/cases.json").read_text())
CASES = [case for case in RECORDED if case["weights"] == "gpt2"]


def lively(seed: int = 0, **changes) -> GPT2:
    """Float64 and nothing at zero, so that every parameter matters."""
    model = GPT2(tiny_config(**({"network": "gpt2", "num_kv_heads": 4} | changes)))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator) * 0.4
        parameter.data.copy_(drawn + name.endswith("norm.weight"))
    return model.double().eval()


def causal(tokens: torch.Tensor) -> torch.Tensor:
    return clean_mask(torch.zeros(tokens.shape, dtype=torch.int32), 1, "token_causal")


def logits_of(model, tokens, attend, cache=None, start=0, keep=None):
    positions = torch.arange(start, start + tokens.shape[1]).expand_as(tokens)
    return model(tokens, positions, attend, lambda rows, head: head(rows), cache, keep)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
@torch.inference_mode()
def test_logits_and_greedy_tokens_equal_the_published_code(case):
    model, checkpoint = network_of("ar/gpt2")
    prompt = len(case["input_ids"][0])
    tokens = torch.tensor(case["expected"].get("output_ids", case["input_ids"]))
    found = logits_of(model, tokens, dense(causal(tokens)))[..., : checkpoint.rows]
    if case["kind"] == "logits":
        assert (found - expected_logits("ar", case)).abs().max() <= 1e-3
    else:
        assert torch.equal(found.argmax(-1)[:, prompt - 1 : -1], tokens[:, prompt:])


def test_every_parameter_is_reached_by_the_gradient():
    model = lively()
    tokens = torch.randint(0, 12, (2, 8))
    logits_of(model, tokens, dense(causal(tokens))).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("rows", [slice(2, 5), torch.tensor([6, 1])], ids=["slice", "places"])
def test_keep_drops_only_rows_that_nobody_reads(rows):
    model, tokens = lively(), torch.randint(0, 12, (2, 8))
    mask = causal(tokens)
    whole = logits_of(model, tokens, dense(mask))
    kept = logits_of(model, tokens, dense(mask), keep=Keep(rows, dense(mask[:, :, rows])))
    torch.testing.assert_close(kept, whole[:, rows], rtol=0, atol=1e-12)


def test_token_by_token_with_a_cache_equals_one_pass_over_everything():
    model, tokens = lively(), torch.randint(0, 12, (1, 9))
    whole = logits_of(model, tokens, dense(causal(tokens)))
    cache = KVCache(model.config, 9, torch.float64, torch.device("cpu"))
    pieces = []
    for start, end in ((0, 4), (4, 8), (8, 9)):
        attend = dense(prefix_mask(torch.arange(start, end) + 1, end))
        slot = cache.slot(start, end - start, end)
        pieces.append(logits_of(model, tokens[:, start:end], attend, slot, start))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-10)


def test_bfloat16_stays_near_float32():
    model, tokens = lively().float(), torch.randint(0, 12, (1, 8))
    exact = logits_of(model, tokens, dense(None))
    short = logits_of(model.bfloat16(), tokens, dense(None))
    assert short.dtype == torch.bfloat16
    assert (short - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_place_beyond_the_learned_positions_is_refused():
    model, tokens = lively(max_sequence_length=8), torch.randint(0, 12, (1, 4))
    assert logits_of(model, tokens, dense(None), start=4).shape == (1, 4, 16)
    with pytest.raises(InputError, match=r"has 9 tokens and model.max_sequence_length=8 learned"):
        logits_of(model, tokens, dense(None), start=5)


def test_the_head_is_tied_where_the_config_says_so_and_seeds_give_the_weights():
    first, again, other = (GPT2(lively().config) for _ in range(3))
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        model.init_weights(seed)
    assert first.head.weight is first.embed.weight
    assert torch.equal(first.layers[0].qkv.weight, again.layers[0].qkv.weight)
    assert not torch.equal(first.layers[0].qkv.weight, other.layers[0].qkv.weight)
    untied = lively(tied_head=False)
    assert untied.head.weight is not untied.embed.weight


def test_fewer_key_heads_are_refused():
    with pytest.raises(InputError, match=r"num_kv_heads=2 does not fit model.network=gpt2; use 4"):
        GPT2(tiny_config(network="gpt2"))
