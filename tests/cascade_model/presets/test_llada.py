"""LLaDA's sampler: what it refuses, what it costs, and where the general sampler is the same."""

import pytest

from cascade_model.errors import InputError
from cascade_model.presets.llada import LLaDASettings, llada
from cascade_model.sampler import sample
from cascade_model.sampling import SamplingParams
from tests.cascade_model.presets.heads import WHOLE, fed, text_model
from tests.tiny_models import EOS, MASK, lively_model

PROMPT = [1, 2, 3]


def settings_of(**changes) -> LLaDASettings:
    values = {"steps": 12, "gen_length": 12, "block_length": 4}
    ids = {"mask_id": MASK, "eos_id": EOS, "eot_id": 12}
    return LLaDASettings(**(values | ids | changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"block_length": 5}, "block_length=5 does not divide gen_length=12; use a divisor"),
        ({"steps": 10}, "steps=10 is no multiple of the 3 blocks; use one"),
    ],
)
def test_divisions_with_a_rest_are_refused(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        settings_of(**changes)


def test_every_pass_feeds_the_whole_canvas():
    model = text_model(**WHOLE)
    rows = fed(model)
    llada(model, PROMPT, settings_of(steps=6))
    assert rows == [15] * 6


def test_guidance_doubles_the_passes():
    model = text_model(**WHOLE)
    rows = fed(model)
    llada(model, PROMPT, settings_of(steps=6, cfg_scale=1.5))
    assert rows == [15] * 12


@pytest.mark.parametrize("seed", range(4))
def test_eos_is_never_predicted_where_its_logit_is_minus_infinity(seed):
    canvas = llada(lively_model(seed, **WHOLE), PROMPT, settings_of(logits_eos_inf=True))
    assert EOS not in canvas


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("steps", [3, 6, 12])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_it_is_the_general_rule_low_confidence(seed, steps, guidance):
    model = text_model(seed, **WHOLE)
    params = SamplingParams(
        max_tokens=12,
        block_length=4,
        steps_per_block=steps // 3,
        rule="low_confidence",
        guidance_scale=guidance,
        stop_at_eos=False,
    )
    expected = [token for block in sample(model, PROMPT, params) for token in block.tokens]
    found = llada(model, PROMPT, settings_of(steps=steps, cfg_scale=guidance))
    assert found == PROMPT + expected
