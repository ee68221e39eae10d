"""Fast-dLLM's sampler for Dream: refusals, the first place of a block, what a pass feeds."""

import pytest
import torch

from cascade_model.attention import dense
from cascade_model.errors import InputError
from cascade_model.presets.fast_dllm_dream import FastDLLMDreamSettings, fast_dllm_dream
from tests.cascade_model.presets.heads import DREAM, fed, masking_model, text_model
from tests.tiny_models import MASK

PROMPT = [1, 2, 3]
CACHES = ["prefix", "dual"]


def settings_of(**changes) -> FastDLLMDreamSettings:
    values = {"steps": 12, "max_new_tokens": 12, "block_length": 4, "mask_token_id": MASK}
    return FastDLLMDreamSettings(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"cache": "none"}, "cache=none is not known; use prefix or dual, or Dream's own sampler"),
        ({"alg": "best"}, "alg=best is not known; use confidence_threshold, maskgit_plus"),
        ({"block_length": 0}, "block_length=0 must be at least 1"),
        ({"block_length": 5}, "block_length=5 does not divide max_new_tokens=12; use a divisor"),
        ({"max_new_tokens": 0}, "block_length=4 does not divide max_new_tokens=0; use a divisor"),
        ({"steps": 10}, "steps=10 is no multiple of the 3 blocks; use one"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"eps": -0.1}, "eps=-0.1 must be at least 0 and below 1; use 0.001"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        settings_of(**changes)


@pytest.mark.parametrize(("cache", "later"), [("prefix", [12, 8, 4]), ("dual", [4, 4, 4])])
def test_a_threshold_of_zero_takes_two_passes_a_block(cache, later):
    model = text_model(**DREAM)
    rows = fed(model)
    canvas = fast_dllm_dream(model, PROMPT, settings_of(cache=cache, threshold=0.0))
    assert rows == [size for rest in later for size in (15, rest)]
    assert MASK not in canvas


@pytest.mark.parametrize("cache", CACHES)
def test_a_threshold_of_one_takes_a_pass_a_place(cache):
    model = text_model(**DREAM)
    rows = fed(model)
    assert MASK not in fast_dllm_dream(model, PROMPT, settings_of(cache=cache, threshold=1.0))
    assert len(rows) == 12


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("steps", [6, 12, 24])
def test_times_fill_every_place_in_that_many_passes(cache, steps):
    model = text_model(**DREAM)
    rows = fed(model)
    settings = settings_of(cache=cache, steps=steps, alg="entropy")
    assert MASK not in fast_dllm_dream(model, PROMPT, settings)
    assert len(rows) <= steps


def test_one_step_a_block_fills_its_first_place_alone():
    """It is predicted by the row on its left, in a pass over the whole canvas."""
    model = text_model(**DREAM)
    canvas = fast_dllm_dream(model, PROMPT, settings_of(steps=3, alg="entropy"))
    expected = PROMPT + [MASK] * 12
    for place in (3, 7, 11):
        with torch.no_grad():
            logits = model(
                torch.tensor([expected]),
                torch.arange(15)[None],
                dense(None),
                lambda hidden, head, row=place - 1: head(hidden[0, row]),
            )
        expected[place] = int(logits.argmax())
    assert canvas == expected


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("alg", ["confidence_threshold", "entropy"])
def test_a_network_that_predicts_the_mask_does_not_hang(cache, alg):
    settings = settings_of(cache=cache, alg=alg)
    canvas = fast_dllm_dream(masking_model(**DREAM), PROMPT, settings)
    assert canvas == PROMPT + [MASK] * 12


@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "origin"])
def test_every_other_name_means_negative_entropy(alg):
    model = text_model(**DREAM)
    expected = fast_dllm_dream(model, PROMPT, settings_of(steps=6, alg="entropy"))
    assert fast_dllm_dream(model, PROMPT, settings_of(steps=6, alg=alg)) == expected
