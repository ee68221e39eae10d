"""Fast-dLLM v2's sampler against a plain loop, with and without its block cache."""

import pytest
import torch

from cascade_model.attention import dense, prefix_mask
from cascade_model.errors import InputError
from cascade_model.kv_cache import KVCache
from cascade_model.passes import Runner
from cascade_model.presets.fast_dllm_v2 import FastDLLMV2Settings, fast_dllm_v2
from tests.tiny_models import EOS, MASK, lively_model

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0]


class Muted(torch.nn.Module):
    """A head that never predicts the mask, nor the end: the published loop would not end."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden):
        return self.head(hidden).index_fill(-1, torch.tensor([MASK, EOS]), float("-inf"))


def muted_model(seed: int = 0):
    model = lively_model(seed, tied_head=False)
    model.head = Muted(model.head)
    return model


class Masking(torch.nn.Module):
    """A head that predicts the mask and nothing else."""

    def forward(self, hidden):
        return torch.nn.functional.one_hot(torch.full(hidden.shape[:-1], MASK), 16).double()


def settings_of(**changes) -> FastDLLMV2Settings:
    values = {"max_new_tokens": 13, "block_size": 6, "small_block_size": 3, "threshold": 0.4}
    return FastDLLMV2Settings(**(values | {"mask_id": MASK, "stop_token": EOS} | changes))


def feed(model, cache, tokens, start, visible, size):
    """Logits of some places against a cache, which keeps them."""
    places = torch.arange(start, start + len(tokens))
    mask = prefix_mask((places // size + 1) * size, visible)
    slot = cache.slot(start, len(tokens), visible)
    with torch.no_grad():
        rows = torch.tensor([tokens])
        return model(rows, places[None], dense(mask), lambda h, head: head(h[0]), slot)


def plain_fast_dllm_v2(model, prompt, settings):
    """The published loop as its description says it."""
    size, small, stop = settings.block_size, settings.small_block_size, settings.stop_token
    canvas, known, cache = list(prompt), len(prompt), KVCache(model.config, 99, torch.double, "cpu")
    whole = known // size * size
    if whole:
        logits = feed(model, cache, canvas[:whole], 0, whole, size)
        canvas += [int(logits[-1].argmax())] if whole == known else []
    for start in range(whole, whole + settings.max_new_tokens // size * size, size):
        end = start + size
        canvas += [MASK] * (end - len(canvas))
        for first in range(start, end, small):
            is_new = True
            while MASK in canvas[first : first + small]:
                if stop in canvas[known:] and MASK not in canvas[known : canvas.index(stop, known)]:
                    break
                begin, length = start, size
                if settings.use_block_cache and not is_new and canvas[first] != MASK:
                    begin, length = first, small
                fed = canvas[begin : begin + length]
                logits = feed(model, cache, fed, begin, end, size)
                logits = torch.cat([logits[:1], logits[:-1]])[first - begin :][:small]
                top, tokens = logits.softmax(-1).max(dim=-1)
                masks = [n for n in range(small) if canvas[first + n] == MASK]
                best = max(masks, key=lambda n, top=top: (float(top[n]), -n))
                for n in masks:
                    if n == best or top[n] > settings.threshold:
                        canvas[first + n] = int(tokens[n])
                is_new = False
        if stop in canvas[known:] and MASK not in canvas[known : canvas.index(stop, known)]:
            break
        canvas.append(int(feed(model, cache, canvas[start:], start, end, size)[-1].argmax()))
    return canvas[: canvas.index(stop, known) + 1] if stop in canvas[known:] else canvas


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("known", [0, 1, 4, 5, 7, 10, 12, 13])
def test_decoding_equals_the_plain_loop(cached, known):
    for seed in range(2):
        model = muted_model(seed)
        for changes in (
            {},
            {"threshold": 0.2, "stop_token": 4},
            {"threshold": 1.0, "small_block_size": 2, "stop_token": 9},
            {"small_block_size": 1, "max_new_tokens": 6},
            {"small_block_size": 6, "block_size": 6, "max_new_tokens": 18},
        ):
            settings = settings_of(use_block_cache=cached, **changes)
            expected = plain_fast_dllm_v2(model, PROMPT[:known], settings)
            assert fast_dllm_v2(model, PROMPT[:known], settings) == expected


def test_a_prompt_of_exactly_one_block_is_not_seen():
    model = muted_model()
    decoded = fast_dllm_v2(model, PROMPT[:6], settings_of())
    assert decoded == PROMPT[:6] + fast_dllm_v2(model, [], settings_of())


@pytest.mark.parametrize(("known", "length"), [(3, 13), (6, 19), (7, 19), (12, 25), (13, 25)])
def test_the_result_is_one_token_longer_than_whole_blocks(known, length):
    assert len(fast_dllm_v2(muted_model(), PROMPT[:known], settings_of())) == length


def test_without_room_for_a_block_only_the_first_token_is_added():
    model, settings = muted_model(), settings_of(max_new_tokens=5)
    for known in (0, 4, 6, 7):
        assert fast_dllm_v2(model, PROMPT[:known], settings) == PROMPT[:known]
    decoded = fast_dllm_v2(model, PROMPT[:12], settings)
    assert decoded[:12] == PROMPT[:12]
    assert len(decoded) == 13


def test_the_block_cache_changes_nothing_where_small_blocks_take_one_pass():
    for seed in range(3):
        decoded = [
            fast_dllm_v2(
                muted_model(seed), PROMPT[:4], settings_of(threshold=0.0, use_block_cache=cached)
            )
            for cached in (False, True)
        ]
        assert decoded[0] == decoded[1]


def test_with_the_block_cache_later_passes_feed_the_small_block(monkeypatch):
    lengths, run = [], Runner.run
    monkeypatch.setattr(
        Runner, "run", lambda self, p: lengths.append(len(p.tokens)) or run(self, p)
    )
    fast_dllm_v2(muted_model(), PROMPT[:5], settings_of(use_block_cache=True, threshold=1.0))
    assert set(lengths) == {6, 3}
    lengths.clear()
    fast_dllm_v2(muted_model(), PROMPT[:5], settings_of(threshold=1.0))
    assert set(lengths) == {6}


def test_it_ends_with_masks_where_the_published_loop_would_not_end():
    model = lively_model(tied_head=False)
    model.head = Masking()
    for cached in (False, True):
        decoded = fast_dllm_v2(model, PROMPT[:4], settings_of(use_block_cache=cached))
        assert decoded == PROMPT[:4] + [MASK] * 9


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"small_block_size": 4}, "small_block_size=4 does not divide block_size=6"),
        ({"small_block_size": 0}, "small_block_size=0 must be at least 1"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 must not be negative"),
        ({"temperature": 0.5}, "temperature=0.5 draws numbers .* use 0"),
    ],
)
def test_what_is_refused(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        settings_of(**changes)
