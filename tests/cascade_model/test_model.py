"""The transformer: shifts of position, keep, caches, seeds, and its causal special case."""

import pytest
import torch

from cascade_model.attention import Keep, clean_mask, dense
from cascade_model.config import ExpertsConfig
from cascade_model.errors import InputError
from cascade_model.kv_cache import KVCache
from cascade_model.model import Transformer, never_emitted
from tests.tiny_models import lively_model, tiny_config

EXPERTS = ExpertsConfig(
    num_experts=4, experts_per_token=2, intermediate_size=12, shared_intermediate_size=8
)


def all_logits(model, tokens, attend, cache=None, start=0):
    positions = torch.arange(start, start + tokens.shape[1]).expand_as(tokens)
    return model(tokens, positions, attend, lambda hidden, head: head(hidden), cache)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    first, again, other = (Transformer(tiny_config()) for _ in range(3))
    first.init_weights(1)
    again.init_weights(1)
    other.init_weights(2)
    assert torch.equal(first.layers[0].q_proj.weight, again.layers[0].q_proj.weight)
    assert not torch.equal(first.layers[0].q_proj.weight, other.layers[0].q_proj.weight)


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not():
    assert (tied := Transformer(tiny_config())).head.weight is tied.embed.weight
    untied = Transformer(tiny_config(tied_head=False))
    assert untied.head.weight is not untied.embed.weight


def test_logits_depend_on_relative_positions_only():
    model = lively_model()
    tokens = torch.randint(0, 12, (1, 8))
    near = all_logits(model, tokens, dense(None))
    far = all_logits(model, tokens, dense(None), start=57)
    torch.testing.assert_close(near, far, rtol=0, atol=1e-9)


@pytest.mark.parametrize("settings", [{"qk_norm": True}, {"qkv_bias": True}, {"tied_head": False}])
def test_the_options_run_and_reach_every_parameter(settings):
    model = lively_model(**settings)
    all_logits(model, torch.randint(0, 12, (2, 8)), dense(None)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("rows", [slice(5), torch.tensor([7, 2, 2]), torch.tensor([], dtype=int)])
@pytest.mark.parametrize("experts", [None, EXPERTS])
def test_keep_computes_the_rows_that_are_read(rows, experts):
    model = lively_model(experts=experts)
    tokens = torch.randint(0, 12, (1, 8))
    positions = torch.arange(8)[None]
    mask = clean_mask(torch.zeros(1, 8, dtype=torch.int32), 4, "block_causal")
    keep = Keep(rows, dense(mask[:, :, rows]))
    whole = model(tokens, positions, dense(mask), lambda hidden, head: head(hidden))
    kept = model(tokens, positions, dense(mask), lambda hidden, head: head(hidden), keep=keep)
    torch.testing.assert_close(kept, whole[:, rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize("clean_half", ["block_causal", "token_causal"])
@pytest.mark.parametrize("settings", [{}, {"rotary_dim": 2}, {"experts": EXPERTS}])
def test_block_by_block_with_a_cache_equals_one_pass_over_everything(clean_half, settings):
    model = lively_model(clean_half=clean_half, **settings)
    tokens = torch.randint(0, 12, (1, 12))
    mask = clean_mask(torch.zeros(1, 12, dtype=torch.int32), 4, clean_half)
    whole = all_logits(model, tokens, dense(mask))
    cache = KVCache(model.config, 12, torch.float64, torch.device("cpu"))
    pieces = []
    for start in (0, 4, 8):
        attend = dense(mask[:, :, start : start + 4, : start + 4])
        slot = cache.slot(start, 4, start + 4)
        pieces.append(all_logits(model, tokens[:, start : start + 4], attend, slot, start))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-10)


def test_a_pass_writes_its_own_rows_only():
    model = lively_model()
    cache = KVCache(model.config, 8, torch.float64, torch.device("cpu"))
    all_logits(model, torch.randint(0, 12, (1, 4)), dense(None), cache.slot(0, 4, 4))
    before = cache.entries[..., :4, :].clone()
    all_logits(model, torch.randint(0, 12, (1, 4)), dense(None), cache.slot(4, 4, 8), start=4)
    assert torch.equal(cache.entries[..., :4, :], before)
    assert bool((cache.entries[..., 4:, :] != 0).any())


def test_a_full_cache_says_what_does_not_fit():
    cache = KVCache(tiny_config(), 8, torch.float64, torch.device("cpu"))
    with pytest.raises(InputError, match="has 9 tokens and the cache holds 8"):
        cache.slot(5, 4, 9)


def test_mask_and_padding_are_never_emitted_unless_padding_ends_texts():
    assert never_emitted(tiny_config()) == [14, 15]
    assert never_emitted(tiny_config(pad_id=13)) == [15]
