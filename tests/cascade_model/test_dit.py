"""The network of MDLM and BD3-LM: recorded logits, keep, caches, noise levels, ranks."""

import json

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cascade_model.attention import Keep, clean_mask, dense, prefix_mask, training_mask
from cascade_model.dit import DiT, sinusoids
from cascade_model.errors import InputError
from cascade_model.kv_cache import KVCache
from tests.cascade_model.families.published_cases import DATA, expected_logits, network_of
from tests.tiny_models import tiny_config
from tests.two_ranks import run_on_two_ranks

CASES = [
    pytest.param(system, case, id=f"{system}-{case['name']}")
    for system in ("mdlm_dit", "bd3lm_dit")
    for case in json.loads((DATA / system / "cases.json").read_text())
    if case["kind"].startswith("logits")
]


def lively(seed: int = 0) -> DiT:
    """Float64 and nothing at zero, so that every parameter matters."""
    sizes = {"num_kv_heads": 4, "conditioning_size": 6}
    model = DiT(tiny_config(network="dit", tied_head=False, **sizes))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator) * 0.4
        parameter.data.copy_(drawn + name.endswith("norm.weight"))
    return model.double().eval()


def segments(tokens: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tokens.shape, dtype=torch.int32)


def logits_of(model, tokens, attend, cache=None, start=0, **options):
    positions = torch.arange(start, start + tokens.shape[1]).expand_as(tokens)
    return model(tokens, positions, attend, lambda rows, head: head(rows), cache, **options)


@pytest.mark.parametrize(("system", "case"), CASES)
@torch.inference_mode()
def test_logits_equal_the_published_code(system, case):
    model, settings = network_of(system)[0], case["settings"]
    tokens = torch.tensor(case["input_ids"])
    if case["kind"] == "logits":
        noise_level = torch.tensor(case["sigma_conditioning"])
        found = logits_of(model, tokens, dense(None), noise_level=noise_level)
    elif case["kind"] == "logits_block_causal":
        mask = clean_mask(segments(tokens), settings["block_size"], "block_causal")
        found = logits_of(model, tokens, dense(mask))
    else:
        length = settings["model_length"]
        mask = training_mask(segments(tokens[:, :length]), settings["block_size"], "block_causal")
        positions = torch.arange(length).repeat(2).expand_as(tokens)
        keep = Keep(slice(0, length), dense(mask[:, :, :length]))
        found = model(tokens, positions, dense(mask), lambda rows, head: head(rows), keep=keep)
    assert (found - expected_logits(system, case)).abs().max() <= 1e-3


def test_a_noise_level_of_zero_is_the_default_and_another_differs():
    model, tokens = lively(), torch.randint(0, 12, (2, 8))
    plain = logits_of(model, tokens, dense(None))
    zero = logits_of(model, tokens, dense(None), noise_level=torch.zeros(2))
    torch.testing.assert_close(plain, zero, rtol=0, atol=1e-12)
    second = logits_of(model, tokens, dense(None), noise_level=torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(second[0], plain[0], rtol=0, atol=1e-12)
    assert (second[1] - plain[1]).abs().max() > 1e-3


def test_sinusoids_have_the_cosines_first_and_fall_to_a_frequency_of_1e_4():
    found = sinusoids(torch.tensor([0.0, 2.0], dtype=torch.float64))
    assert torch.equal(found[0], torch.tensor([1.0] * 128 + [0.0] * 128, dtype=torch.float64))
    last = torch.tensor(2.0 * 10000.0 ** (-127 / 128), dtype=torch.float64)
    torch.testing.assert_close(found[1, [127, 255]], torch.stack([last.cos(), last.sin()]))


def test_logits_depend_on_relative_positions_only():
    model, tokens = lively(), torch.randint(0, 12, (1, 8))
    near = logits_of(model, tokens, dense(None))
    far = logits_of(model, tokens, dense(None), start=57)
    torch.testing.assert_close(near, far, rtol=0, atol=1e-9)


def test_every_parameter_is_reached_by_the_gradient():
    model = lively()
    logits_of(model, torch.randint(0, 12, (2, 8)), dense(None)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("rows", [slice(2, 5), torch.tensor([6, 1])], ids=["slice", "places"])
def test_keep_drops_only_rows_that_nobody_reads(rows):
    model, tokens = lively(), torch.randint(0, 12, (2, 8))
    mask = clean_mask(segments(tokens), 4, "block_causal")
    whole = logits_of(model, tokens, dense(mask))
    keep = Keep(rows, dense(mask[:, :, rows]))
    kept = logits_of(model, tokens, dense(mask), keep=keep)
    torch.testing.assert_close(kept, whole[:, rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize("clean_half", ["block_causal", "token_causal"])
def test_block_by_block_with_a_cache_equals_one_pass_over_everything(clean_half):
    model, tokens = lively(), torch.randint(0, 12, (1, 12))
    whole = logits_of(model, tokens, dense(clean_mask(segments(tokens), 4, clean_half)))
    cache = KVCache(model.config, 12, torch.float64, torch.device("cpu"))
    pieces = []
    for start in (0, 4, 8):
        end = start + 4
        ends = torch.full((4,), end)
        limits = torch.arange(start, end) + 1 if clean_half == "token_causal" else ends
        attend = dense(prefix_mask(limits, end))
        slot = cache.slot(start, 4, end)
        pieces.append(logits_of(model, tokens[:, start:end], attend, slot, start))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-10)


def test_bfloat16_stays_near_float32():
    model, tokens = lively().float(), torch.randint(0, 12, (1, 8))
    exact = logits_of(model, tokens, dense(None))
    short = logits_of(model.bfloat16(), tokens, dense(None))
    assert short.dtype == torch.bfloat16
    assert (short - exact).abs().max() < 0.05 * exact.abs().max()


def test_fresh_weights_predict_uniformly_and_follow_the_seed():
    first, again, other = (DiT(lively().config) for _ in range(3))
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        model.init_weights(seed)
    assert not logits_of(first, torch.randint(0, 12, (1, 8)), dense(None)).any()
    assert torch.equal(first.layers[0].qkv.weight, again.layers[0].qkv.weight)
    assert not torch.equal(first.layers[0].qkv.weight, other.layers[0].qkv.weight)


def squared_logits(model, tokens):
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model(tokens, positions, dense(None), lambda rows, head: head(rows).square().sum())


def sharded_gradients(rank: int, folder: str) -> None:
    """The gradient of one rank's sequence under FSDP2."""
    model, mesh = lively(), init_device_mesh("cpu", (2,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    squared_logits(model, torch.arange(16).view(2, 8)[rank : rank + 1]).backward()
    whole = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    if rank == 0:
        torch.save(whole, folder + "/gradients")


def test_two_sharded_ranks_have_the_gradient_of_one_process(tmp_path):
    run_on_two_ranks(sharded_gradients, tmp_path)
    found = torch.load(tmp_path / "gradients", weights_only=True)
    model = lively()
    (squared_logits(model, torch.arange(16).view(2, 8)) / 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("changes", [{"tied_head": True}, {"num_kv_heads": 2}])
def test_a_tied_head_and_fewer_key_heads_are_refused(changes):
    fitting = {"network": "dit", "tied_head": False, "num_kv_heads": 4}
    with pytest.raises(InputError, match=r"do not fit model.network=dit; use 4 and false"):
        DiT(tiny_config(**(fitting | changes)))
