"""dllm's samplers against plain loops over whole padded batches, without a cache."""

import functools

import pytest
import torch

from cascade_model.attention import dense
from cascade_model.canvas import Window
from cascade_model.contexts import BlockCausal
from cascade_model.errors import InputError
from cascade_model.passes import Runner
from cascade_model.presets.a2d import (
    BD3LMSettings,
    MDLMSettings,
    Unpadded,
    a2d_bd3lm,
    a2d_infill,
    a2d_mdlm,
)
from cascade_model.presets.transfer import transfer_counts
from tests.tiny_models import EOS, MASK, PAD, lively_model, tiny_config

PROMPTS = [[1, 2, 3, 4, 5, 6], [7, 8, 9]]
BOS = 12


def bd3lm(**changes) -> BD3LMSettings:
    values = {"max_new_tokens": 10, "block_size": 4, "steps": 9, "pad_id": PAD}
    return BD3LMSettings(**(values | {"mask_id": MASK, "eos_id": EOS, "bos_id": BOS} | changes))


def mdlm(**changes) -> MDLMSettings:
    values = {"max_new_tokens": 10, "block_size": 4, "steps": 9}
    return MDLMSettings(**(values | {"mask_id": MASK, "eos_id": EOS, "bos_id": BOS} | changes))


def logits_of(model, rows, mask, positions):
    """All places of all rows; mask bool [n, q, k]."""
    with torch.no_grad():
        return model(rows, positions, dense(mask[:, None]), lambda hidden, head: head(hidden))


def guided_logits(predict, rows, is_given, settings):
    """The combination of both streams."""
    seeing = predict(rows)
    if settings.cfg_scale == 0:
        return seeing
    kept = torch.isin(rows, torch.tensor(settings.cfg_keep_tokens or [], dtype=torch.int64))
    blind = predict(torch.where(is_given & ~kept, MASK, rows))
    return blind + (settings.cfg_scale + 1) * (seeing - blind)


def commit(row, places, top, tokens, count):
    for place in sorted(places, key=lambda place: -float(top[place]))[:count]:
        row[place] = tokens[place]


def plain_bd3lm(model, prompts, settings):
    """The published loop as its description says it, everything fed in every pass."""
    size, made = settings.block_size, settings.max_new_tokens
    width, blocks = -(-max(map(len, prompts)) // size) * size, -(-made // size)
    steps = settings.steps_per_block or -(-settings.steps // blocks)
    rows = torch.tensor(
        [[settings.pad_id] * (width - len(prompt)) + prompt + [MASK] * made for prompt in prompts]
    )
    is_given = (rows != MASK) & (rows != settings.pad_id)
    ended = torch.zeros(len(rows), dtype=torch.bool)
    for start in range(width, width + made, size):
        end = min(start + size, width + made)
        block = torch.arange(end) // size
        is_text = torch.ones(len(rows), end, dtype=torch.bool)
        is_text[:, :start] = rows[:, :start] != settings.pad_id
        mask = (block[None] <= block[:, None]) & is_text[:, None] & is_text[:, :, None]
        positions = (is_text.cumsum(1) - 1).clamp(min=0)
        predict = functools.partial(logits_of, model, mask=mask, positions=positions)
        counts = transfer_counts(end - start, steps, settings.scheduler)
        for count in counts:
            given = is_given[:, :end]
            logits = guided_logits(predict, rows[:, :end], given, settings)
            if settings.right_shift_logits:
                logits = logits.roll(1, dims=1)
            top, tokens = logits.softmax(-1).max(dim=-1)
            for row, best, token in zip(rows, top, tokens, strict=True):
                masks = [place for place in range(start, end) if row[place] == MASK]
                commit(row, masks, best, token, count)
        ended |= (rows[:, start:end] == settings.eos_id).any(dim=1)
        if ended.all():
            return rows[:, :end].tolist()
    return rows.tolist()


def plain_mdlm(model, rows, starts, made, settings, is_infilling=False):
    """Both published loops over full attention; rows int64 [n, L] padded, each `made` long."""
    ends = [start + count for start, count in zip(starts, made, strict=True)]
    width = rows.shape[1]
    is_real = torch.arange(width) < torch.tensor(ends)[:, None]
    mask = is_real[:, None].expand(-1, width, -1)
    is_given = (rows != MASK) & is_real
    length = width if is_infilling else max(made)
    size = settings.block_size or width
    steps = -(-settings.steps // -(-length // size))
    positions = torch.arange(width).expand(len(rows), -1)
    predict = functools.partial(logits_of, model, mask=mask, positions=positions)
    for block in range(-(-length // size)):
        spans = [
            (start + block * size, min(start + (block + 1) * size, end))
            for start, end in zip(starts, ends, strict=True)
        ]
        counts = [
            transfer_counts(int((row[a : max(a, b)] == MASK).sum()), steps, settings.scheduler)
            for row, (a, b) in zip(rows, spans, strict=True)
        ]
        for step in range(max(map(len, counts))):
            logits = guided_logits(predict, rows, is_given, settings)
            logits[:, :, settings.suppress_tokens or []] = float("-inf")
            if settings.right_shift_logits:
                logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
            tokens = logits.argmax(dim=-1)
            logits[:, :, settings.begin_suppress_tokens or []] = float("-inf")
            top = logits.softmax(-1).gather(-1, tokens[:, :, None])[:, :, 0]
            for index, row in enumerate(rows):
                first = spans[index][0] if is_infilling else 0
                masks = [p for p in range(first, spans[index][1]) if row[p] == MASK]
                count = counts[index][step] if step < len(counts[index]) else 0
                commit(row, masks, top[index], tokens[index], count)
    return rows.tolist()


BD3LM_CHANGES = [
    {},
    {"scheduler": "cosine", "steps_per_block": 3},
    {"right_shift_logits": True},
    {"cfg_scale": 1.5, "cfg_keep_tokens": [2, 8]},
    {"right_shift_logits": True, "cfg_scale": 0.5, "block_size": 3},
    {"block_size": 16},
]


@pytest.mark.parametrize("changes", BD3LM_CHANGES)
@pytest.mark.parametrize("pad_id", [PAD, 11])
@pytest.mark.parametrize("seed", range(2))
def test_block_diffusion_equals_the_plain_loop(changes, pad_id, seed):
    model = lively_model(seed, tied_head=False)
    settings = bd3lm(pad_id=pad_id, **changes)
    assert a2d_bd3lm(model, PROMPTS, settings) == plain_bd3lm(model, PROMPTS, settings)


@pytest.mark.parametrize("changes", BD3LM_CHANGES[:5])
def test_padding_that_is_generated_is_left_out_from_the_next_block_on(changes):
    """Every token is taken for padding once, and some of them are generated."""
    generated = last_in_block = 0
    model = lively_model(5, tied_head=False)
    for pad_id in range(13):
        prompts = [[token for token in prompt if token != pad_id] for prompt in PROMPTS]
        settings = bd3lm(pad_id=pad_id, max_new_tokens=16, **changes)
        rows = a2d_bd3lm(model, prompts, settings)
        assert rows == plain_bd3lm(model, prompts, settings)
        size = settings.block_size
        width = -(-max(map(len, prompts)) // size) * size
        generated += sum(row[width:-size].count(pad_id) for row in rows)
        last_in_block += sum(row[width + size - 1 : -size : size].count(pad_id) for row in rows)
    assert generated > 10
    assert last_in_block > 0


def test_without_padding_the_context_is_the_exact_cache():
    model = lively_model(tied_head=False)
    settings = bd3lm(right_shift_logits=True)
    canvas = torch.tensor([PAD] * 2 + [1, 2, 3, 4, 5, 6] + [MASK] * 4)
    places, gone = torch.arange(8, 12), 2
    window = Window(number=0, start=8, end=12, keep=12, max_steps=4)
    ours = answer(Unpadded(settings), model, canvas, window, places)
    config = tiny_config(logits="shifted")
    context = BlockCausal(config, origin=-gone, is_first_alone=False)
    inside = Window(number=0, start=6, end=10, keep=10, max_steps=4)
    theirs = answer(context, model, canvas[gone:], inside, places - gone)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-10)


def answer(context, model, canvas, window, places):
    """Run a context's passes until it answers."""
    loop, runner, reply = context.predict(canvas, window, places), Runner(model, 16), None
    while True:
        try:
            reply = runner.run(loop.send(reply))
        except StopIteration as end:
            return end.value


def test_it_stops_when_every_row_has_ended():
    model = lively_model(tied_head=False)
    whole = a2d_bd3lm(model, PROMPTS, bd3lm(eos_id=0))
    for eos in set(whole[0][8:]) & set(whole[1][8:]):
        first = max(row.index(eos, 8) for row in whole)
        end = min((first // 4 + 1) * 4, 18)
        assert a2d_bd3lm(model, PROMPTS, bd3lm(eos_id=eos)) == [row[:end] for row in whole]
        alone = a2d_bd3lm(model, PROMPTS[:1], bd3lm(eos_id=eos))[0]
        assert len(alone) == min((whole[0].index(eos, 8) // 4 + 1) * 4, 18)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scheduler": "cosine", "steps": 20},
        {"right_shift_logits": True, "block_size": 10},
        {"cfg_scale": 1.5, "cfg_keep_tokens": [2, 8]},
        {"suppress_tokens": [1, 4], "begin_suppress_tokens": [2, 5, 9], "block_size": 3},
    ],
)
def test_full_attention_equals_the_plain_loop(changes):
    for seed in range(2):
        model, settings = lively_model(seed, tied_head=False), mdlm(**changes)
        prompts = [*PROMPTS, [5, MASK, 6]]
        rows = [row + [MASK] * 10 + [EOS] * (6 - len(row)) for row in prompts]
        starts = [len(prompt) for prompt in prompts]
        expected = plain_mdlm(model, torch.tensor(rows), starts, [10] * 3, settings)
        assert a2d_mdlm(model, prompts, settings) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"block_size": None, "right_shift_logits": True},
        {"block_size": 5, "scheduler": "cosine", "steps": 20},
        {"cfg_scale": 1.5, "cfg_keep_tokens": [2]},
    ],
)
def test_infilling_equals_the_plain_loop(changes):
    rows = [[1, MASK, MASK, 4, MASK, 6, MASK, MASK, 9, 3, MASK], [MASK, 2, MASK, 4, 5], [7] * 3]
    for seed in range(2):
        model, settings = lively_model(seed, tied_head=False), mdlm(**changes)
        padded = torch.tensor([row + [EOS] * (11 - len(row)) for row in rows])
        lengths = [len(row) for row in rows]
        expected = plain_mdlm(model, padded, [0] * 3, lengths, settings, is_infilling=True)
        filled = a2d_infill(model, rows, settings)
        assert filled == expected
        for row, given in zip(filled, rows, strict=True):
            assert all(b in (a, MASK) for a, b in zip(row, given, strict=False))


def test_an_empty_prompt_begins_a_text_where_logits_are_shifted():
    model, settings = lively_model(tied_head=False), mdlm(right_shift_logits=True)
    assert a2d_mdlm(model, [[]], settings) == a2d_mdlm(model, [[BOS]], settings)
    assert a2d_bd3lm(model, [[]], bd3lm(right_shift_logits=True))[0][3] == BOS
    assert len(a2d_bd3lm(model, [[]], bd3lm(eos_id=0))[0]) == 10


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"scheduler": "sine"}, "scheduler=sine is unknown; use linear or cosine"),
        ({"remasking": "random"}, "remasking=random is not reproduced; use low_confidence"),
        ({"temperature": 0.5}, "temperature=0.5 draws numbers .* use 0"),
        ({"cfg_scale": -1.0}, "cfg_scale=-1.0 must not be negative"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
    ],
)
@pytest.mark.parametrize("settings", [bd3lm, mdlm])
def test_what_is_refused(changes, sentence, settings):
    with pytest.raises(InputError, match=sentence):
        settings(**changes)


def test_what_only_one_of_them_refuses():
    with pytest.raises(InputError, match="pad_id=15 is mask_id too"):
        bd3lm(pad_id=MASK)
    with pytest.raises(InputError, match="sampler=mdlm has other settings"):
        bd3lm(sampler="mdlm")
    with pytest.raises(InputError, match="sampler=bd3lm has other settings"):
        mdlm(sampler="bd3lm")
    with pytest.raises(InputError, match="steps_per_block=0 must be at least 1"):
        bd3lm(steps_per_block=0)
    with pytest.raises(InputError, match="block_size=None is for infilling alone"):
        a2d_mdlm(lively_model(tied_head=False), PROMPTS, mdlm(block_size=None))
    with pytest.raises(InputError, match="bos_id=None with right_shift_logits=True"):
        a2d_bd3lm(lively_model(), [[]], bd3lm(right_shift_logits=True, bos_id=None))
    with pytest.raises(InputError, match="the batch has no row"):
        a2d_infill(lively_model(tied_head=False), [], mdlm())
