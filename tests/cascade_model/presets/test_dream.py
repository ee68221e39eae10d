"""Dream's sampler: refusals, times, confidences, where the general sampler is the same."""

import math

import pytest
import torch

from cascade_model.errors import InputError
from cascade_model.presets.dream import DreamSettings, confidences, count, dream, keep, times
from cascade_model.sampler import sample
from cascade_model.sampling import SamplingParams
from tests.cascade_model.presets.heads import DREAM, fed, masking_model, text_model
from tests.tiny_models import MASK

PROMPT = [1, 2, 3]


def settings_of(**changes) -> DreamSettings:
    values = {"steps": 6, "max_new_tokens": 12, "alg": "entropy", "mask_token_id": MASK}
    return DreamSettings(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"alg": "best"}, "alg=best is not known; use maskgit_plus, topk_margin, entropy, origin"),
        ({"alg": "origin"}, "alg=origin with steps=6 draws places at random; use steps=1 or"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"eps": 1.0}, "eps=1.0 must be at least 0 and below 1; use 0.001"),
        ({"top_k": 0}, "top_k=0 must be at least 1; leave it out for all"),
        ({"top_p": 1.5}, r"top_p=1.5 must be in 0..1; leave it out for all tokens"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        settings_of(**changes)


def committed(masks: int, steps: int) -> list[int]:
    counts, times_ = [], times(steps, 1e-3)
    for step in range(steps):
        counts.append(count(masks, times_, step))
        masks -= counts[-1]
    return counts


def test_as_many_steps_as_masks_begin_with_nothing():
    counts = committed(16, 16)
    assert counts[0] == 0
    assert sum(counts) == 16


@pytest.mark.parametrize(("masks", "steps"), [(24, 6), (12, 20), (5, 1), (1, 3)])
def test_the_last_step_commits_what_is_left(masks, steps):
    assert sum(committed(masks, steps)) == masks


@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
def test_every_place_is_filled_in_that_many_passes(alg):
    model = text_model(**DREAM)
    rows = fed(model)
    canvas = dream(model, PROMPT, settings_of(alg=alg))
    assert canvas[:3] == PROMPT
    assert MASK not in canvas
    assert rows == [15] * 6


def test_predicted_masks_stay():
    assert dream(masking_model(**DREAM), PROMPT, settings_of()) == PROMPT + [MASK] * 12


def test_confidences():
    shares = [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]
    expected = {
        "maskgit_plus": [0.5, 0.8],
        "topk_margin": [0.2, 0.7],
        "entropy": [sum(p * math.log(p) for p in row) for row in shares],
    }
    for alg, values in expected.items():
        tokens, found = confidences(torch.tensor(shares).log(), alg)
        assert tokens.tolist() == [0, 2]
        assert found.tolist() == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (None, None, 4),
        (2, None, 2),
        (9, None, 4),
        (None, 0.45, 2),  # .4 is below, the token that crosses is kept
        (None, 0.3, 1),
        (None, 0.0, 1),
        (None, 1.0, 4),
        (3, 0.45, 2),
    ],
)
def test_the_sets_of_tokens_that_confidences_count(top_k, top_p, kept):
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    left = keep(logits, top_k, top_p)
    assert (left > -1e30).sum() == kept
    shares = left.softmax(dim=-1)[0, :kept]
    whole = torch.tensor([0.4, 0.3, 0.2, 0.1])[:kept]
    assert torch.allclose(shares, whole / whole.sum())


def test_ties_of_the_last_best_token_are_kept():
    assert (keep(torch.tensor([[2.0, 1.0, 1.0, 0.0]]), 2, None) > -1e30).sum() == 3


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("alg", ["origin", "maskgit_plus"])
def test_one_step_is_one_step_of_any_sampler(seed, alg):
    model = text_model(seed, **DREAM)
    params = SamplingParams(max_tokens=12, block_length=12, steps_per_block=1, stop_at_eos=False)
    expected = [token for block in sample(model, PROMPT, params) for token in block.tokens]
    assert dream(model, PROMPT, settings_of(steps=1, alg=alg)) == PROMPT + expected
