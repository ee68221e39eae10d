"""LLaDA2.1's samplers against a plain loop without a cache, and against general editing."""

import pytest
import torch

from cascade_model.attention import dense
from cascade_model.canvas import Window
from cascade_model.errors import InputError
from cascade_model.passes import Prediction, Runner
from cascade_model.presets.llada21 import Editing, LLaDA21Settings, llada21
from cascade_model.sampler import sample
from cascade_model.sampling import SamplingParams
from tests.tiny_models import EOS, MASK, PAD, lively_model

PROMPT = [1, 2, 3, 4, 5, 6, 7]


def settings_of(**changes) -> LLaDA21Settings:
    values = {"gen_length": 12, "block_length": 4, "threshold": 0.4, "editing_threshold": 0.3}
    return LLaDA21Settings(**(values | {"mask_id": MASK, "eos_id": EOS} | changes))


class Muted(torch.nn.Module):
    """A head that never predicts the mask or padding."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden):
        return self.head(hidden).index_fill(-1, torch.tensor([MASK, PAD]), float("-inf"))


def muted_model(seed: int = 0, **changes):
    model = lively_model(seed, tied_head=False, **changes)
    model.head = Muted(model.head)
    return model


def block_causal_logits(model, tokens, size):
    """All places' logits of one pass over everything."""
    block = torch.arange(len(tokens)) // size
    mask = (block[None] <= block[:, None])[None, None]
    place = torch.arange(len(tokens))[None]
    with torch.no_grad():
        return model(torch.tensor([tokens]), place, dense(mask), lambda h, head: head(h[0]))


def plain_llada21(model, prompt, settings):
    """The published loops as their description says them, all tokens fed in every pass."""
    size, start = settings.block_length, len(prompt)
    length = -(-(start + settings.gen_length) // size) * size
    canvas = prompt + [MASK] * (length - start)
    for end in range((start // size + 1) * size, length + 1, size):
        post_steps = 0
        while True:
            masks = [place for place in range(end - size, end) if canvas[place] == MASK]
            post_steps += not masks
            if post_steps > settings.max_post_steps:
                break
            top, tokens = block_causal_logits(model, canvas[:end], size).softmax(-1).max(dim=-1)
            chosen = [place for place in masks if top[place] > settings.threshold]
            if len(chosen) < settings.num_to_transfer:
                ranked = sorted(masks, key=lambda place: -float(top[place]))
                chosen = ranked[: settings.num_to_transfer]
            edits = [
                place
                for place in range(max(end - size, start), end)
                if place not in masks
                and tokens[place] != canvas[place]
                and top[place] > settings.editing_threshold
            ]
            for place in chosen + edits:
                canvas[place] = int(tokens[place])
            if not masks and not edits:
                break
        if settings.eos_early_stop and settings.eos_id in canvas[start:end]:
            break
    made = canvas[start : start + settings.gen_length]
    if settings.variant == "dllm":
        return canvas
    return made[: made.index(settings.eos_id) + 1] if settings.eos_id in made else made


@pytest.mark.parametrize("variant", ["official", "dllm"])
@pytest.mark.parametrize("known", [0, 1, 4, 7])
def test_cached_decoding_equals_the_plain_loop(variant, known):
    """The published loop may run forever where a mask is predicted; here it never is."""
    model = muted_model(known)
    for changes in (
        {},
        {"max_post_steps": 0},
        {"max_post_steps": 3, "editing_threshold": 0.0, "eos_id": 3, "eos_early_stop": True},
        {"block_length": 5, "num_to_transfer": 3, "eos_id": 7},
    ):
        settings = settings_of(variant=variant, **changes)
        expected = plain_llada21(model, PROMPT[:known], settings)
        assert llada21(model, PROMPT[:known], settings) == expected


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("editing", [0.0, 0.3, 1.0])
def test_editing_is_the_general_editing(seed, editing):
    model = muted_model(seed)
    settings = settings_of(variant="dllm", editing_threshold=editing, max_post_steps=5)
    params = SamplingParams(
        max_tokens=13,
        confidence_threshold=0.4,
        editing_threshold=editing,
        max_post_steps=5,
        stop_at_eos=False,
    )
    expected = [token for block in sample(model, PROMPT, params) for token in block.tokens]
    assert llada21(model, PROMPT, settings)[7:] == expected[:13]


@pytest.mark.parametrize("seed", range(12))
def test_editing_ends_even_where_masks_are_predicted(seed):
    settings = settings_of(variant="dllm", threshold=0.0, editing_threshold=0.0, max_post_steps=4)
    canvas = llada21(lively_model(seed), PROMPT, settings)
    assert canvas[:7] == PROMPT
    assert len(canvas) == 20


def test_a_block_that_comes_back_to_itself_ends():
    """One place predicts the mask, and the two others swap tokens forever."""
    strategy = Editing(settings_of(block_length=3, editing_threshold=0.0), 0)
    canvas, steps = torch.tensor([MASK, 1, 2]), 0
    window = Window(number=0, start=0, end=3, keep=3, max_steps=3)
    while not strategy.is_done(canvas, window):
        logits = torch.zeros(3, 16)
        logits[torch.arange(3), torch.tensor([MASK, 3 - canvas[1], 3 - canvas[2]])] = 5.0
        change = strategy.step(canvas, window, Prediction(strategy.places(canvas, window), logits))
        canvas[change.places], steps = change.tokens, steps + 1
    assert steps == 3
    assert canvas[0] == MASK


def test_a_full_block_is_read_at_least_once_more(monkeypatch):
    """So a block costs one pass that changes nothing, and none with max_post_steps=0."""
    passes, run = [], Runner.run
    monkeypatch.setattr(Runner, "run", lambda self, p: passes.append(p) or run(self, p))
    for most, count in ((16, 6), (0, 3)):
        passes.clear()
        settings = settings_of(threshold=0.0, editing_threshold=1.0, max_post_steps=most)
        llada21(muted_model(), PROMPT[:4], settings)
        assert len(passes) == count


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"variant": "fast"}, "variant=fast is unknown; use official or dllm"),
        ({"temperature": 1.0}, "temperature=1.0 draws numbers .* use 0"),
        ({"num_to_transfer": 0}, "num_to_transfer=0 must be at least 1"),
        ({"max_post_steps": -1}, "max_post_steps=-1 must not be negative"),
    ],
)
def test_what_is_refused(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        settings_of(**changes)
