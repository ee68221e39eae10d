"""SDAR's sampler against a plain loop without a cache, and against the general sampler."""

import pytest
import torch

from cascade_model.attention import dense
from cascade_model.errors import InputError
from cascade_model.passes import Runner
from cascade_model.presets.sdar import SDARSettings, sdar
from cascade_model.sampler import sample
from cascade_model.sampling import SamplingParams
from tests.tiny_models import MASK, PAD, lively_model

STRATEGIES = ["sequential", "low_confidence_static", "low_confidence_dynamic"]
PROMPT = [1, 2, 3, 4, 5, 6, 7]


def settings_of(**changes) -> SDARSettings:
    values = {"gen_length": 12, "block_length": 4, "denoising_steps": 4, "draw": "argmax"}
    return SDARSettings(**(values | {"mask_id": MASK, "confidence_threshold": 0.4} | changes))


class Muted(torch.nn.Module):
    """A head that never predicts the mask or padding."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden):
        return self.head(hidden).index_fill(-1, torch.tensor([MASK, PAD]), float("-inf"))


def muted_model(seed: int = 0, **changes):
    model = lively_model(seed, **changes)
    model.head = Muted(model.head)
    return model


def block_causal_logits(model, tokens, size):
    """All places' logits of one pass over everything."""
    block = torch.arange(len(tokens)) // size
    mask = (block[None] <= block[:, None])[None, None]
    place = torch.arange(len(tokens))[None]
    with torch.no_grad():
        return model(torch.tensor([tokens]), place, dense(mask), lambda h, head: head(h[0]))


def plain_sdar(model, prompt, settings):
    """The published loop as its description says it, all tokens fed in every pass."""
    size, steps = settings.block_length, settings.denoising_steps
    blocks = -(-(len(prompt) + settings.gen_length) // size)
    canvas = prompt + [MASK] * (blocks * size - len(prompt))
    for start in range(len(prompt) // size * size, len(canvas), size):
        for step in range(steps):
            masks = [place for place in range(start, start + size) if canvas[place] == MASK]
            if not masks:
                break
            quota = size // steps + (step < size % steps)
            logits = block_causal_logits(model, canvas[: start + size], size)
            shares = (logits / settings.temperature).softmax(dim=-1)
            if settings.top_k:
                least = shares.sort(dim=-1, descending=True).values[:, settings.top_k - 1, None]
                shares = torch.where(shares < least, 0, shares)
                shares /= shares.sum(dim=-1, keepdim=True)
            top, tokens = shares.max(dim=-1)
            ranked = sorted(masks, key=lambda place: -float(top[place]))
            chosen = ranked[:quota]
            above = [place for place in masks if top[place] > settings.confidence_threshold]
            if settings.remasking_strategy == "low_confidence_dynamic" and len(above) >= quota:
                chosen = above
            if settings.remasking_strategy == "sequential":
                chosen = range(masks[0], min(masks[0] + quota, start + size))
            for place in chosen:
                canvas[place] = int(tokens[place])
        if set(settings.stopping_criteria_idx or []) & set(canvas[len(prompt) :]):
            break
    return canvas


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("known", [0, 1, 4, 7])
def test_cached_decoding_equals_the_plain_loop(strategy, known):
    model = lively_model(known, block_size=8, tied_head=False)
    for changes in (
        {},
        {"denoising_steps": 6},
        {"block_length": 5, "denoising_steps": 5, "temperature": 0.5},
        {"block_length": 1, "denoising_steps": 1, "gen_length": 5},
        {"top_k": 2, "stopping_criteria_idx": [3, 9]},
    ):
        settings = settings_of(remasking_strategy=strategy, **changes)
        expected = plain_sdar(model, PROMPT[:known], settings)
        assert sdar(model, PROMPT[:known], settings) == expected


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_static_is_the_general_rule_low_confidence(seed, steps):
    """Whole blocks, and a mask that is never predicted."""
    model = muted_model(seed, tied_head=False)
    settings = settings_of(remasking_strategy="low_confidence_static", denoising_steps=steps)
    params = SamplingParams(
        max_tokens=12, rule="low_confidence", steps_per_block=steps, stop_at_eos=False
    )
    blocks = sample(model, PROMPT[:4], params)
    assert sdar(model, PROMPT[:4], settings)[4:] == [t for block in blocks for t in block.tokens]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("known", [1, 4, 6])
def test_dynamic_is_the_general_rule_confidence_threshold(seed, known):
    """One place a step at least, and a mask that is never predicted."""
    model = muted_model(seed, tied_head=False)
    params = SamplingParams(
        max_tokens=12, rule="confidence_threshold", confidence_threshold=0.4, stop_at_eos=False
    )
    blocks = sample(model, PROMPT[:known], params)
    expected = [token for block in blocks for token in block.tokens]
    assert sdar(model, PROMPT[:known], settings_of())[known : known + 12] == expected


def test_a_sole_candidate_is_drawn_with_certainty():
    """Then every confidence is 1 and every block one step."""
    model = muted_model(tied_head=False)
    drawn = settings_of(draw="multinomial", top_k=1, confidence_threshold=0.999)
    assert sdar(model, PROMPT, drawn) == sdar(model, PROMPT, settings_of(top_k=1))


def test_a_draw_is_repeated_by_its_seed():
    model = lively_model(tied_head=False)
    drawn = [
        sdar(model, PROMPT, settings_of(draw="multinomial", temperature=3.0, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_masks_follow_the_block_with_a_stop_token():
    model = muted_model(tied_head=False)
    whole = sdar(model, PROMPT[:4], settings_of())
    stopped = sdar(model, PROMPT[:4], settings_of(stopping_criteria_idx=[whole[9]]))
    first = whole.index(whole[9], 4)
    end = (first // 4 + 1) * 4
    assert stopped == whole[:end] + [MASK] * (len(whole) - end)


def test_a_finished_block_costs_no_pass_of_its_own(monkeypatch):
    passes = []
    run = Runner.run
    monkeypatch.setattr(Runner, "run", lambda self, p: passes.append(p) or run(self, p))
    sdar(muted_model(tied_head=False), PROMPT[:4], settings_of(remasking_strategy=STRATEGIES[1]))
    assert len(passes) == 12
    assert [len(p.tokens) for p in passes] == [8, 4, 4, 4] * 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"remasking_strategy": "entropy_bounded"},
            "remasking_strategy=entropy_bounded is unknown",
        ),
        ({"confidence_threshold": None}, "confidence_threshold=None leaves .* use 0.85"),
        ({"draw": "greedy"}, "draw=greedy is unknown; use argmax, multinomial"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0; .* draw=argmax"),
        ({"denoising_steps": 0}, "denoising_steps=0 must be at least 1"),
        ({"block_length": 0}, "block_length=0 must be at least 1"),
        ({"top_k": -1}, "top_k=-1 must not be negative"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
    ],
)
def test_what_is_refused(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        settings_of(**changes)
