"""Fast-dLLM's samplers: refusals, what a pass feeds, where the general sampler is the same."""

import itertools

import pytest
import torch

from cascade_model.errors import InputError
from cascade_model.presets.fast_dllm import FastDLLMSettings, accepted, best_and_above, fast_dllm
from cascade_model.sampler import sample
from cascade_model.sampling import SamplingParams
from tests.cascade_model.presets.heads import WHOLE, fed, masking_model, text_model
from tests.tiny_models import EOS, MASK

PROMPT = [1, 2, 3]
CACHES = ["none", "prefix", "dual"]
VARIANTS = ["nvlabs", "dllm"]
BOTH = list(itertools.product(VARIANTS, CACHES))


def settings_of(**changes) -> FastDLLMSettings:
    values = {"steps": 12, "gen_length": 12, "block_length": 4, "mask_id": MASK, "eos_id": EOS}
    return FastDLLMSettings(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"variant": "v3"}, "variant=v3 is not known; use nvlabs or dllm"),
        ({"cache": "whole"}, "cache=whole is not known; use none or prefix or dual"),
        ({"remasking": "random"}, "remasking=random is not known; use low_confidence"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"gen_length": 0}, "gen_length=0 must be at least 1"),
        ({"block_length": 0}, "block_length=0 must be at least 1"),
        ({"block_length": 5}, "block_length=5 does not divide gen_length=12; use a divisor"),
        ({"steps": 10}, "steps=10 is no multiple of the 3 blocks; use one"),
        ({"factor": 1.0}, "factor=1.0 is a rule of variant=dllm; use that, or a threshold"),
        (
            {"variant": "dllm", "factor": 1.0, "threshold": 0.9},
            "threshold=0.9 and factor=1.0 both choose the places; give one",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        settings_of(**changes)


@pytest.mark.parametrize(("variant", "cache"), [("nvlabs", "none"), ("dllm", "dual")])
def test_rows_of_unequal_length_need_dllm_without_a_cache(variant, cache):
    settings = settings_of(variant=variant, cache=cache)
    with pytest.raises(InputError, match="use variant=dllm with cache=none, or decode them one"):
        fast_dllm(text_model(**WHOLE), PROMPT, settings, padding=2)


def test_padding_stays_and_is_seen():
    model, settings = text_model(**WHOLE), settings_of(variant="dllm", threshold=0.5)
    rows = fed(model)
    canvas = fast_dllm(model, PROMPT, settings, padding=2)
    assert canvas[-2:] == [EOS, EOS]
    assert MASK not in canvas
    assert set(rows) == {17}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("cache", "later"),
    [("none", [15, 15, 15]), ("prefix", [12, 8, 4]), ("dual", [4, 4, 4])],
)
def test_what_the_passes_of_a_block_feed(variant, cache, later):
    model = text_model(**WHOLE)
    rows = fed(model)
    fast_dllm(model, PROMPT, settings_of(variant=variant, cache=cache))
    assert rows == [size for rest in later for size in (15, rest, rest, rest)]


@pytest.mark.parametrize(("variant", "cache"), BOTH)
def test_a_threshold_of_zero_fills_a_block_at_once(variant, cache):
    model = text_model(**WHOLE)
    rows = fed(model)
    canvas = fast_dllm(model, PROMPT, settings_of(variant=variant, cache=cache, threshold=0.0))
    assert rows == [15] * 3
    assert MASK not in canvas


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("seed", range(4))
def test_a_cache_of_nothing_changes_nothing(cache, seed):
    """One block that is the whole canvas: nothing lies before it or behind it."""
    model = text_model(seed, **WHOLE)
    one_block = settings_of(block_length=12, steps=6)
    cached = settings_of(block_length=12, steps=6, cache=cache)
    assert fast_dllm(model, [], cached) == fast_dllm(model, [], one_block)


def test_dllm_with_the_dual_cache_ends_with_its_schedule():
    model = text_model(**WHOLE)
    rows = fed(model)
    settings = settings_of(variant="dllm", cache="dual", threshold=1.0, steps=6)
    canvas = fast_dllm(model, PROMPT, settings)
    assert len(rows) == 6
    assert canvas.count(MASK) == 12 - 6


@pytest.mark.parametrize(("variant", "cache"), BOTH)
@pytest.mark.parametrize("rule", [{}, {"threshold": 0.5}])
def test_a_network_that_predicts_the_mask_does_not_hang(variant, cache, rule):
    settings = settings_of(variant=variant, cache=cache, **rule)
    canvas = fast_dllm(masking_model(**WHOLE), PROMPT, settings)
    assert canvas == PROMPT + [MASK] * 12


def test_dllm_rounds_blocks_and_steps_up():
    settings = settings_of(variant="dllm", gen_length=10, steps=5)
    assert settings.blocks == 3
    assert settings.quota(4) == [2, 2]
    canvas = fast_dllm(text_model(**WHOLE), PROMPT, settings)
    assert len(canvas) == 13
    assert MASK not in canvas


def test_the_factor_rule_loosens_with_the_rank():
    confidence = torch.tensor([0.5, 0.9, 0.1, 0.7])
    # In order .9 .7 .5 .1 against (always) 1/3 1/2 3/5 for factor 2.
    assert accepted(confidence, 2.0) == 3
    assert accepted(confidence, 0.1) == 1
    assert accepted(confidence, 5.0) == 4


def test_the_best_place_is_always_among_those_above():
    confidence = torch.tensor([0.2, 0.4, 0.3])
    assert best_and_above(confidence, 0.9).tolist() == [1]
    assert best_and_above(confidence, 0.3).tolist() == [1, 2]


def general(model, **changes) -> list[int]:
    params = SamplingParams(max_tokens=12, block_length=4, stop_at_eos=False, **changes)
    return PROMPT + [token for block in sample(model, PROMPT, params) for token in block.tokens]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("variant", "cache"), BOTH)
def test_the_threshold_is_the_general_rule(seed, variant, cache):
    model = text_model(seed, **WHOLE)
    kept = "exact" if cache == "none" else cache
    expected = general(model, rule="confidence_threshold", confidence_threshold=0.6, cache=kept)
    settings = settings_of(variant=variant, cache=cache, threshold=0.6)
    assert fast_dllm(model, PROMPT, settings) == expected


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cache", CACHES)
def test_the_factor_is_the_general_rule(seed, cache):
    model = text_model(seed, **WHOLE)
    kept = "exact" if cache == "none" else cache
    expected = general(model, rule="factor", factor=1.5, cache=kept)
    settings = settings_of(variant="dllm", cache=cache, factor=1.5)
    assert fast_dllm(model, PROMPT, settings) == expected


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cache", CACHES)
def test_the_quota_is_the_general_rule_low_confidence(seed, cache):
    model = text_model(seed, **WHOLE)
    kept = "exact" if cache == "none" else cache
    expected = general(model, rule="low_confidence", steps_per_block=3, cache=kept)
    assert fast_dllm(model, PROMPT, settings_of(steps=9, cache=cache)) == expected
