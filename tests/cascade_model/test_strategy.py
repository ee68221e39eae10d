"""The general strategy: each step as its formulas say, whatever shortcuts are taken."""

import math
from dataclasses import replace

import pytest
import torch

from cascade_model.canvas import Window
from cascade_model.drawing import draw_tokens, position_noise, uniforms
from cascade_model.noise import POSITION
from cascade_model.passes import Prediction
from cascade_model.sampler import plan_completion
from cascade_model.sampling import SamplingParams
from cascade_model.schedules import masks_left
from cascade_model.strategy import General
from cascade_model.unmasking import RULES, Drawn
from tests.tiny_models import EOS, MASK, PAD, tiny_config

B, V = 12, 16
OPTIONS = [
    {},
    {"schedule": "cosine", "steps_per_block": 3},
    {"min_steps_per_block": 3, "confidence_threshold": 0.0},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.7, "top_k": 4},
    {"temperature": 1.0, "token_draw": "gumbel"},
    {"position_temperature": 0.5},
    {"position_temperature": 0.5, "suppress_eos": "confidence"},
    {"suppress_eos": "token"},
    {"suppress_eos": "confidence", "entropy_bound": 9.0},
    {"remask_threshold": 0.5},
    {"editing_threshold": 0.3},
]


def plain_probability(logits, tokens):
    return (logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)).exp()


def plain_scores(rule, logits, tokens, drawn):
    if rule in ("random", "first_hitting"):
        return drawn
    if rule == "sequential":
        return -torch.arange(len(logits), dtype=logits.dtype)
    if rule == "margin":
        best = (logits.topk(2).values - logits.logsumexp(-1, keepdim=True)).exp()
        return best[:, 0] - best[:, 1]
    if rule in ("entropy", "entropy_bound"):
        logs = logits.log_softmax(-1)
        return torch.where(logs.isneginf(), 0.0, logs.exp() * logs).sum(-1)
    return plain_probability(logits, tokens)


def plain_sure(rule, scores, params):
    """Taken beyond the schedule's share, rank by rank."""
    order = scores.argsort(descending=True, stable=True)
    sure, before = torch.zeros(len(scores), dtype=torch.bool), torch.zeros(1, dtype=torch.float64)
    for rank, place in enumerate(order.tolist(), start=1):
        if rule == "confidence_threshold":
            holds = scores[place] >= params.confidence_threshold
        elif rule == "factor":
            bar = 1 - params.factor * torch.tensor(rank + 1.0).reciprocal()
            holds = scores[place] >= bar
        elif rule == "entropy_bound":
            before -= scores[place].double()
            holds = before.to(scores.dtype) + scores[place] <= params.entropy_bound
        else:
            return sure
        if rule != "confidence_threshold" and not holds:
            return sure
        sure[place] = holds
    return sure


def plain_step(params, window, canvas, places, logits):
    """What a step writes, {place: token}: one formula after the other, on tensors."""
    banned = [MASK, PAD] + [EOS] * (params.suppress_eos == "token")
    logits = logits.index_fill(-1, torch.tensor(banned), float("-inf"))
    is_masked = canvas[places] == MASK
    return _plain_unmask(params, window, canvas, places[is_masked], logits[is_masked]) | (
        _plain_revision(params, window, canvas, places[~is_masked], logits[~is_masked])
    )


def _plain_unmask(params, window, canvas, places, logits):
    if len(places) == 0:
        return {}
    key = (0, window.number, window.step, (places - window.start).tolist())
    tokens = draw_tokens(logits, params, *key)
    drawn = torch.from_numpy(uniforms(POSITION, params.seed, *key))
    scores = order = plain_scores(params.rule, logits, tokens, drawn)
    if params.position_temperature:
        is_entropy = params.rule in ("entropy", "entropy_bound")
        weights = scores.double() if is_entropy else scores.double().clamp(min=1e-30).log()
        noise = torch.from_numpy(position_noise(params.seed, *key))
        order = weights + params.position_temperature * noise
    if params.suppress_eos == "confidence":
        order = order.masked_fill(tokens == EOS, float("-inf"))
        scores = scores.masked_fill(tokens == EOS, float("-inf"))
    masks, made = int((canvas[window.start : window.end] == MASK).sum()), window.step + 1
    left = masks_left(params.schedule, window.num_masked, made, window.max_steps)
    least = max(1, masks - left)
    most = max(1, masks - max(0, params.min_steps_per_block - made))
    rank = torch.empty(len(order), dtype=torch.int64)
    rank[order.argsort(descending=True, stable=True)] = torch.arange(len(order))
    taken = (plain_sure(params.rule, scores, params) | (rank < least)) & (rank < most)
    return dict(zip(places[taken].tolist(), tokens[taken].tolist(), strict=True))


def _plain_revision(params, window, canvas, places, logits):
    old, best = canvas[places], logits.argmax(-1)
    if params.editing_threshold is not None:
        changed = (plain_probability(logits, best) > params.editing_threshold) & (best != old)
        return dict(zip(places[changed].tolist(), best[changed].tolist(), strict=True))
    if params.remask_threshold is None:
        return {}
    doubted = plain_probability(logits, old) < params.remask_threshold
    return {place: MASK for place in places[doubted].tolist() if place not in window.revised}


def rough_logits(rows: int, seed: int) -> torch.Tensor:
    """Float32 with many exact ties, inside rows and between them."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, V, generator=generator) * 3).round()
    if rows > 2 and seed % 2:
        logits[1] = logits[0]
    return logits


def window_of(params: SamplingParams) -> tuple[torch.Tensor, Window, General]:
    """Three given tokens, then a window's rest of masks."""
    plan = plan_completion(tiny_config(block_size=B), [1, 2, 3], params)
    return plan.canvas, plan.windows[0], plan.strategy


def is_allowed(rule: str, options: dict) -> bool:
    """Noise on an order without scores, and fewer steps than one a place, are refused."""
    is_blind = rule in ("sequential", "random", "first_hitting")
    return not (is_blind and "position_temperature" in options) and not (
        rule == "first_hitting" and "steps_per_block" in options
    )


CASES = [(rule, options) for rule in RULES for options in OPTIONS if is_allowed(rule, options)]


@pytest.mark.parametrize(("rule", "options"), CASES, ids=str)
def test_every_step_writes_what_its_formulas_say(rule, options):
    for seed in range(8):
        values = {"confidence_threshold": 0.4, "stop_at_eos": False} | options
        params = SamplingParams(rule=rule, seed=seed, max_tokens=B - 3, **values)
        canvas, window, strategy = window_of(params)
        while not strategy.is_done(canvas, window):
            places = strategy.places(canvas, window)
            logits = rough_logits(len(places), 100 * seed + window.step)
            expected = plain_step(params, window, canvas, places, logits)
            change = strategy.step(canvas, window, Prediction(places, logits))
            found = dict(zip(change.places.tolist(), change.tokens.tolist(), strict=True))
            assert found == expected
            canvas[change.places] = change.tokens
            window.step += 1
        assert not {MASK, PAD} & set(canvas.tolist())
        assert canvas[:3].tolist() == [1, 2, 3]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_last_write_of_a_place_is_told(options):
    """Also where it was edited, or masked again and filled once more."""
    num_rewritten = 0
    for seed in range(12):
        values = {"confidence_threshold": 0.4, "stop_at_eos": False} | options
        params = SamplingParams(seed=seed, max_tokens=B - 3, logprobs=3, **values)
        canvas, window, strategy = window_of(params)
        expected: dict[int, tuple] = {}
        while not strategy.is_done(canvas, window):
            places = strategy.places(canvas, window)
            logits = rough_logits(len(places), 100 * seed + window.step)
            banned = [MASK, PAD] + [EOS] * (params.suppress_eos == "token")
            logs = logits.index_fill(-1, torch.tensor(banned), float("-inf")).log_softmax(-1)
            change = strategy.step(canvas, window, Prediction(places, logits))
            canvas[change.places] = change.tokens
            window.step += 1
            for place, token in zip(change.places.tolist(), change.tokens.tolist(), strict=True):
                if token != MASK:
                    row = logs[places.tolist().index(place)]
                    ranked = sorted(range(V), key=lambda i, row=row: (-row[i].item(), i))[:3]
                    num_rewritten += place in expected
                    expected[place] = (row[token].item(), ranked)
        assert sorted(window.logprobs) == list(range(3, B))
        for place, (value, ranked) in expected.items():
            told = window.logprobs[place]
            assert told.logprob == pytest.approx(value, abs=1e-5)
            assert [token for token, _ in told.top] == ranked
            assert told.top[0][1] >= told.logprob
            assert sum(math.exp(one) for _, one in told.top) <= 1 + 1e-6
    revises = {"remask_threshold", "editing_threshold"} & set(options)
    assert bool(num_rewritten) == bool(revises)


REPORTS = ["logprobs_of", "unmasking_margin", "remasking_margin", "editing_margin"]


@pytest.mark.parametrize("options", OPTIONS[-2:], ids=str)
def test_nothing_is_computed_that_was_not_asked_for(monkeypatch, options):
    def refuse(*args):
        raise AssertionError("computed without being asked for")

    for name in REPORTS:
        monkeypatch.setattr(f"cascade_model.strategy.{name}", refuse)
    canvas, window, strategy = window_of(SamplingParams(max_tokens=B - 3, **options))
    for _ in range(2):
        places = strategy.places(canvas, window)
        logits = rough_logits(len(places), 0)
        change = strategy.step(canvas, window, Prediction(places, logits))
        canvas[change.places] = change.tokens
        window.step += 1
    assert (window.logprobs, window.margin) == ({}, 1.0)


@pytest.mark.parametrize(
    ("options", "share", "revised", "margin"),
    [
        ({"remask_threshold": 0.5}, 0.52, set(), 0.02),  # stays, barely
        ({"remask_threshold": 0.5}, 0.49, set(), 0.01),  # is masked again
        ({"remask_threshold": 0.5}, 0.49, {5}, 0.4),  # once only; the others stand at 0.9
        ({"editing_threshold": 0.5}, 0.47, set(), 0.03),  # 0.53 of another token rewrites it
        ({"editing_threshold": 0.5}, 0.52, set(), 0.04),  # the others have 0.48
        ({"editing_threshold": 0.5}, 0.9, set(), 0.8),
    ],
    ids=str,
)
def test_written_places_have_margins_of_their_own(options, share, revised, margin):
    """All places hold token 1 and the last one is a mask; all stand at 0.9 but place 5."""
    params = SamplingParams(max_tokens=B - 3, report_margin=True, **options)
    canvas, window, strategy = window_of(params)
    canvas[3:] = torch.tensor([1] * (B - 4) + [MASK])
    window.revised, places = set(revised), torch.arange(3, B)
    logits = torch.full((len(places), V), float("-inf"), dtype=torch.float64)
    logits[:, 1], logits[:, 2] = math.log(0.9), math.log(0.1)
    logits[2, 1], logits[2, 2] = math.log(share), math.log(1 - share)
    change = strategy.step(canvas, window, Prediction(places, logits))
    assert window.margin == pytest.approx(margin)
    assert (5 in change.places.tolist()) == (share < 0.5 and not revised)


@pytest.mark.parametrize(("rule", "options"), CASES, ids=str)
def test_logits_that_move_less_than_the_margin_write_the_same(rule, options):
    """Logits that move by e at most move probabilities by 2 e of their own, and the entropy of 16
    tokens by less than 6 e; two are compared, or nine summed up."""
    reach = 5e-4 if rule == "entropy_bound" else 5e-3
    moved_at_most = {"entropy": 12, "entropy_bound": 54}.get(rule, 5) * reach
    num_sure = 0
    for seed in range(8):
        values = {"confidence_threshold": 0.4, "stop_at_eos": False} | options
        params = SamplingParams(
            rule=rule, seed=seed, max_tokens=B - 3, report_margin=True, **values
        )
        canvas, window, strategy = window_of(params)
        generator = torch.Generator().manual_seed(seed)
        while not strategy.is_done(canvas, window):
            places = strategy.places(canvas, window)
            logits = torch.randn(len(places), V, generator=generator) * 3
            noise = reach * (2 * torch.rand(logits.shape, generator=generator) - 1)
            twin = replace(window, revised=set(window.revised))
            moved = strategy.step(canvas.clone(), twin, Prediction(places, logits + noise))
            window.margin = 1.0
            change = strategy.step(canvas, window, Prediction(places, logits))
            if window.margin > moved_at_most:
                num_sure += 1
                assert change.places.tolist() == moved.places.tolist()
                assert change.tokens.tolist() == moved.tokens.tolist()
            canvas[change.places] = change.tokens
            window.step += 1
    assert num_sure > 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_are_their_formulas_to_the_last_bit(dtype):
    for seed in range(20):
        logits = rough_logits(6, seed).to(dtype) * 0.37
        logits[:, [MASK, PAD]] = float("-inf")
        tokens = logits.argmax(-1)
        for name, rule in RULES.items():
            if rule.score is not None:
                expected = plain_scores(name, logits, tokens, None)
                assert rule.score(Drawn(logits, tokens)).equal(expected), name
