"""LLaDA2.0's samplers against a plain loop without a cache; their ends."""

import pytest
import torch

from cascade_model.attention import dense
from cascade_model.errors import InputError
from cascade_model.passes import Runner
from cascade_model.presets.llada2 import LLaDA2Settings, llada2
from tests.tiny_models import EOS, MASK, lively_model

PROMPT = [1, 2, 3, 4, 5, 6, 7]


def settings_of(**changes) -> LLaDA2Settings:
    values = {"gen_length": 12, "block_length": 4, "steps": 4, "threshold": 0.4}
    return LLaDA2Settings(**(values | {"mask_id": MASK, "eos_id": EOS} | changes))


def block_causal_logits(model, tokens, size):
    """All places' logits of one pass over everything."""
    block = torch.arange(len(tokens)) // size
    mask = (block[None] <= block[:, None])[None, None]
    place = torch.arange(len(tokens))[None]
    with torch.no_grad():
        return model(torch.tensor([tokens]), place, dense(mask), lambda h, head: head(h[0]))


def plain_llada2(model, prompt, settings):
    """The published loops as their description says them, all tokens fed in every pass."""
    size, start, is_official = settings.block_length, len(prompt), settings.variant == "official"
    steps = min(settings.steps, settings.gen_length // settings.minimal_topk)
    length = -(-(start + settings.gen_length) // size) * size
    canvas = prompt + [MASK] * (length - start)
    for end in range((start // size + 1) * size, length + 1, size):
        for step in range(steps):
            masks = [place for place in range(end - size, end) if canvas[place] == MASK]
            if not masks:
                break
            quota = size // steps + (step < size % steps)
            top, tokens = block_causal_logits(model, canvas[:end], size).softmax(-1).max(dim=-1)
            chosen = [place for place in masks if top[place] > settings.threshold]
            if len(chosen) < quota:
                chosen = sorted(masks, key=lambda place: -float(top[place]))[:quota]
            for place in chosen:
                canvas[place] = int(tokens[place])
            has_new = any(tokens[place] == settings.eos_id for place in chosen)
            if is_official and settings.eos_early_stop and has_new:
                first = canvas.index(settings.eos_id)
                if MASK not in canvas[start:first]:
                    return canvas[start : first + 1]
        if is_official and settings.eos_id in canvas[start:]:
            break
    made = canvas[start : start + settings.gen_length]
    if not is_official:
        return canvas
    return made[: made.index(settings.eos_id) + 1] if settings.eos_id in made else made


@pytest.mark.parametrize("variant", ["official", "dllm"])
@pytest.mark.parametrize("known", [0, 1, 4, 7])
def test_cached_decoding_equals_the_plain_loop(variant, known):
    model = lively_model(known, block_size=8, tied_head=False)
    for changes in (
        {},
        {"steps": 6, "eos_early_stop": True},
        {"steps": 3, "threshold": 0.9, "eos_id": 3, "eos_early_stop": True},
        {"block_length": 5, "minimal_topk": 5, "eos_id": 7},
    ):
        settings = settings_of(variant=variant, **changes)
        expected = plain_llada2(model, PROMPT[:known], settings)
        assert llada2(model, PROMPT[:known], settings) == expected


@pytest.mark.parametrize("is_early", [False, True])
def test_the_official_completion_ends_with_its_end_of_text(is_early):
    model = lively_model(tied_head=False)
    whole = llada2(model, PROMPT[:3], settings_of(variant="dllm"))[3:]
    eos = next(token for token in whole[4:] if token not in PROMPT[:3])
    settings = settings_of(eos_id=eos, eos_early_stop=is_early)
    assert llada2(model, PROMPT[:3], settings) == whole[: whole.index(eos) + 1]


def test_an_early_stop_does_not_wait_for_the_block(monkeypatch):
    model, counts = lively_model(tied_head=False), []
    one_block = {"block_length": 16, "steps": 16, "threshold": 1.0}
    whole = llada2(model, PROMPT[:1], settings_of(variant="dllm", **one_block))
    passes, run = [], Runner.run
    monkeypatch.setattr(Runner, "run", lambda self, p: passes.append(p) or run(self, p))
    for is_early in (False, True):
        passes.clear()
        settings = settings_of(eos_id=whole[1], eos_early_stop=is_early, **one_block)
        assert llada2(model, PROMPT[:1], settings) == [whole[1]]
        counts.append(len(passes))
    assert counts[1] < counts[0]


def test_an_early_stop_takes_an_end_of_text_in_the_prompt_for_its_own():
    """As published: the first one of the canvas counts, and nothing is masked before it."""
    model = lively_model(tied_head=False)
    end = next(
        token
        for token in range(MASK)
        if token in llada2(model, [token, *PROMPT], settings_of(eos_id=token))
    )
    settings = settings_of(eos_id=end, eos_early_stop=True)
    assert llada2(model, [end, *PROMPT], settings) == []


def test_minimal_topk_lowers_the_steps():
    assert settings_of(steps=8, gen_length=16, minimal_topk=4).steps_per_block == 4
    assert settings_of(steps=3, gen_length=16, minimal_topk=4).steps_per_block == 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"variant": "fast"}, "variant=fast is unknown; use official or dllm"),
        ({"temperature": 1.0}, "temperature=1.0 draws numbers .* use 0"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"minimal_topk": 20}, "minimal_topk=20 is above gen_length=12"),
    ],
)
def test_what_is_refused(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        settings_of(**changes)
