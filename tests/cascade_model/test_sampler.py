"""The denoising loop: caches, laws of committing, keys of randomness, ends."""

import math

import pytest
import torch

from cascade_model.attention import dense
from cascade_model.canvas import Window
from cascade_model.contexts import BlockCausal, Guided
from cascade_model.errors import InputError
from cascade_model.likelihood import sequential
from cascade_model.model import vocabulary_logits
from cascade_model.passes import Runner
from cascade_model.requests import rearranged
from cascade_model.sampler import (
    decoded,
    drive,
    infill,
    plan_completion,
    plan_infilling,
    sample,
)
from cascade_model.sampling import SamplingParams
from tests.tiny_models import EOS, MASK, PAD, lively_model, tiny_config

AXES = [
    {"logits": "aligned"},
    {"logits": "aligned", "clean_half": "token_causal"},
    {"logits": "shifted"},
    {"logits": "shifted", "clean_half": "token_causal"},
    {"logits": "shifted", "first_place": "own"},
    {"logits": "shifted", "first_place": "noisy"},
    {"logits": "shifted", "block_size": 1},
    {"logits": "aligned", "block_size": 1},
    {"logits": "aligned", "block_size": 16},
    {"attention": "bidirectional", "block_size": 8},
    {"attention": "bidirectional", "logits": "shifted", "first_place": "own", "block_size": 8},
]
CAUSAL = [axes for axes in AXES if "attention" not in axes]
RULES = ["confidence_threshold", "low_confidence", "margin", "entropy", "random", "sequential"]
RULES += ["factor", "entropy_bound", "first_hitting"]
OPTIONS = [
    {},
    {"schedule": "cosine", "steps_per_block": 3},
    {"min_steps_per_block": 3, "confidence_threshold": 0.0},
    {"position_temperature": 1.0},
    {"guidance_scale": 1.5},
    {"remask_threshold": 0.9},
    {"editing_threshold": 0.2},
    {"suppress_eos": "token"},
    {"suppress_eos": "confidence"},
    {"top_k": 3, "token_draw": "gumbel"},
]
PROMPT = [1, 2, 3, 4, 5, 6, 7]


class UncachedRunner:
    """The slow oracle: every row that a cache would hold is computed anew in every pass.

    It knows of each cache entry only its token and how far that row saw.
    """

    def __init__(self, model):
        self.model, self.entries = model, {}

    def run(self, wanted):
        entries = self.entries.setdefault(wanted.stream, {})
        for row, (token, limit) in enumerate(zip(wanted.tokens, wanted.limits, strict=True)):
            entries[wanted.start + row] = (token, limit)
        tokens = torch.tensor([[entries[place][0] for place in range(wanted.visible)]])
        limits = torch.tensor([entries[place][1] for place in range(wanted.visible)])
        mask = torch.arange(wanted.visible) < limits[:, None]
        with torch.no_grad():
            return self.model(
                tokens,
                torch.arange(wanted.visible)[None],
                dense(mask[None, None]),
                lambda hidden, head: head(hidden[0, [wanted.start + row for row in wanted.reads]]),
            )


class Recorder(Runner):
    """Keeps every pass and every logit."""

    def __init__(self, model, capacity=128):
        super().__init__(model, capacity)
        self.seen, self.given = [], []

    def run(self, wanted):
        self.seen.append(wanted)
        self.given.append(super().run(wanted))
        return self.given[-1]


class UniformRunner:
    """Knows nothing: every token is as likely as any other."""

    def __init__(self, config):
        self.config = config

    def run(self, wanted):
        return torch.zeros(len(wanted.reads), self.config.vocab_size)


def decode(config, runner, prompt, params, *, is_fused=None):
    """The library's own way, with another runner."""
    plan = plan_completion(config, prompt, params)
    if is_fused is not None:
        contexts = [plan.context]
        if isinstance(plan.context, Guided):
            contexts = [plan.context.seeing, plan.context.blind]
        for context in contexts:
            assert isinstance(context, BlockCausal)
            context.is_fused = is_fused
    return decoded(plan, runner)


def tokens_of(blocks) -> list[int]:
    return [token for block in blocks for token in block.tokens]


@pytest.mark.parametrize("axes", CAUSAL)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("is_fused", [True, False])
def test_cached_decoding_equals_uncached_decoding(axes, options, is_fused):
    model = lively_model(**axes)
    params = SamplingParams(
        **({"max_tokens": 18, "confidence_threshold": 0.6, "temperature": 1.0} | options),
        stop_at_eos=False,
    )
    if axes.get("block_size") == 1 and "min_steps_per_block" in options:
        return
    fast, slow = Recorder(model), UncachedRunner(model)
    slow_logits = []
    run = slow.run
    slow.run = lambda wanted: slow_logits.append(run(wanted)) or slow_logits[-1]
    expected = tokens_of(decode(model.config, slow, PROMPT, params, is_fused=is_fused))
    found = tokens_of(decode(model.config, fast, PROMPT, params, is_fused=is_fused))
    assert found == expected
    for ours, theirs in zip(fast.given, slow_logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("axes", CAUSAL)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("steps", [None, 1, 2])
def test_a_fused_commit_equals_a_pass_of_its_own(axes, options, steps):
    model = lively_model(**axes)
    values = {"max_tokens": 22, "temperature": 1.0, "confidence_threshold": 0.5} | options
    values.setdefault("steps_per_block", steps)
    if (steps or 9) < values.get("min_steps_per_block", 1):
        return
    params = SamplingParams(**values, stop_at_eos=False)
    fused, alone = (
        list(decode(model.config, Runner(model, 64), PROMPT, params, is_fused=is_fused))
        for is_fused in (True, False)
    )
    assert tokens_of(fused) == tokens_of(alone)
    assert [block.steps for block in fused] == [block.steps for block in alone]
    assert sum(block.passes for block in fused) <= sum(block.passes for block in alone)


def test_committed_entries_of_the_cache_are_never_written_again():
    for axes in CAUSAL:
        recorder = Recorder(lively_model(**axes))
        params = SamplingParams(max_tokens=24, temperature=1.0, stop_at_eos=False)
        list(decode(recorder.model.config, recorder, PROMPT, params))
        final = {}
        for wanted in recorder.seen:
            for row, limit in enumerate(wanted.limits):
                place = wanted.start + row
                assert place not in final
                clean = MASK not in wanted.tokens[: limit - wanted.start]
                if clean and limit < wanted.visible:
                    final[place] = True


def test_block_size_one_shifted_is_greedy_autoregressive_decoding_at_one_pass_a_token():
    model = lively_model(block_size=1, logits="shifted")
    params = SamplingParams(max_tokens=9, stop_at_eos=False)
    blocks = list(sample(model, PROMPT, params))
    context = list(PROMPT)
    for _ in range(9):
        tokens = torch.tensor([context])
        causal = dense(torch.ones(len(context), len(context), dtype=torch.bool).tril()[None, None])
        logits = model(
            tokens,
            torch.arange(len(context))[None],
            causal,
            lambda hidden, head: vocabulary_logits(hidden[:, -1], head, [PAD, MASK]),
        )
        context.append(int(logits.argmax()))
    assert tokens_of(blocks) == context[len(PROMPT) :]
    assert [block.passes for block in blocks] == [1] * 9


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("rule", RULES)
def test_every_step_commits_and_committed_tokens_never_change(axes, rule):
    model = lively_model(**axes)
    params = SamplingParams(max_tokens=18, rule=rule, temperature=1.0, stop_at_eos=False)
    plan = plan_completion(model.config, PROMPT, params)
    runner, before = Runner(model, len(plan.canvas)), plan.canvas.clone()
    loop = plan.loop()
    event, steps = next(loop), 0
    while True:
        known = before != MASK
        assert plan.canvas[known].equal(before[known])
        steps += int((plan.canvas != MASK).sum() > known.sum())
        before = plan.canvas.clone()
        try:
            event = loop.send(None if isinstance(event, Window) else runner.run(event))
        except StopIteration:
            break
    assert not (plan.canvas == MASK).any() or axes.get("attention") is None
    assert steps == sum(window.step for window in plan.windows)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_fills_everything_with_text_in_bounded_steps(axes, options):
    model = lively_model(**axes)
    values = {"max_tokens": 21, "temperature": 2.0, "seed": 3} | options
    params = SamplingParams(**values, stop_at_eos=False)
    blocks = list(sample(model, PROMPT, params))
    tokens = tokens_of(blocks)
    assert len(tokens) == 21
    assert not {MASK, PAD} & set(tokens)
    extra = params.max_post_steps if params.editing_threshold is not None else 0
    assert max(block.steps for block in blocks) <= model.config.block_size + extra


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_mask_and_padding_are_never_emitted(axes, temperature):
    model = lively_model(**axes)
    with torch.no_grad():
        model.embed.weight[[MASK, PAD]] *= 30
    params = SamplingParams(max_tokens=24, temperature=temperature, stop_at_eos=False)
    assert not {MASK, PAD} & set(tokens_of(sample(model, PROMPT, params)))


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_block_takes_no_more_steps_than_its_ceiling(axes, steps):
    params = SamplingParams(
        max_tokens=30, steps_per_block=steps, confidence_threshold=1.0, stop_at_eos=False
    )
    blocks = list(decode(tiny_config(**axes), UniformRunner(tiny_config()), PROMPT, params))
    assert max(block.steps for block in blocks) <= steps
    assert len(tokens_of(blocks)) == 30


@pytest.mark.parametrize("max_tokens", [1, 3, 4, 5, 9, 10])
def test_any_number_of_tokens_is_given_and_a_lower_one_is_a_prefix(max_tokens):
    model = lively_model()
    longest, shorter = (
        tokens_of(
            sample(model, PROMPT, SamplingParams(max_tokens=n, temperature=1.0, stop_at_eos=False))
        )
        for n in (20, max_tokens)
    )
    assert shorter == longest[:max_tokens]


def test_a_ragged_prompt_tail_opens_the_first_block():
    recorder = Recorder(lively_model())
    params = SamplingParams(max_tokens=5, stop_at_eos=False)
    list(decode(recorder.model.config, recorder, PROMPT, params))
    assert recorder.seen[0].tokens == [*PROMPT, MASK]
    assert recorder.seen[0].limits == [4] * 4 + [8] * 4


def test_decoding_on_from_a_committed_prefix_gives_the_same_rest():
    model = lively_model(logits="shifted")
    params = SamplingParams(max_tokens=17, temperature=1.0, seed=9, stop_at_eos=False)
    whole = tokens_of(sample(model, PROMPT, params))
    rest = SamplingParams(max_tokens=12, temperature=1.0, seed=9, stop_at_eos=False)
    assert tokens_of(sample(model, PROMPT + whole[:5], rest)) == whole[5:]


GOING_ON = [*OPTIONS, {"max_steps": 14}, {"max_steps": 14, "editing_threshold": 0.2}]


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("options", GOING_ON)
def test_a_run_cut_behind_any_block_goes_on_with_the_same_rest(axes, options):
    """What counts as given stays the prompt: guidance hides it, revising leaves it alone."""
    model = lively_model(**axes)
    if axes.get("block_size") == 1 and {"max_steps", "min_steps_per_block"} & set(options):
        return
    values = {"max_tokens": 22, "temperature": 1.0, "confidence_threshold": 0.5, "seed": 6}
    params = SamplingParams(**(values | options), stop_at_eos=False)
    whole = list(sample(model, PROMPT, params))
    for count in range(len(whole)):
        plan = plan_completion(
            model.config,
            PROMPT,
            params,
            committed=tokens_of(whole[:count]),
            steps_made=sum(block.steps for block in whole[:count]),
        )
        rest = list(decoded(plan, Runner(model, len(plan.canvas))))
        assert tokens_of(rest) == tokens_of(whole[count:])
        assert [block.steps for block in rest] == [block.steps for block in whole[count:]]


@pytest.mark.parametrize("axes", [axes for axes in AXES if "attention" in axes])
@pytest.mark.parametrize("options", GOING_ON)
def test_a_hole_cut_behind_any_block_goes_on_with_the_same_rest(axes, options):
    model = lively_model(**axes)
    values = {"max_tokens": 22, "temperature": 1.0, "confidence_threshold": 0.5, "seed": 6}
    params = SamplingParams(**(values | options))
    text = [*PROMPT, *[MASK] * 14, 3, 4, *[MASK] * 5, *PROMPT]

    def run(**cut) -> list:
        plan = plan_infilling(model.config, text, params, **cut)
        found = list(decoded(plan, Runner(model, len(plan.canvas))))
        filled.append(plan.canvas.tolist())
        return found

    filled: list[list[int]] = []
    whole = run()
    assert len(whole) == 4
    for count in range(len(whole)):
        steps = sum(block.steps for block in whole[:count])
        rest = run(committed=tokens_of(whole[:count]), steps_made=steps)
        assert tokens_of(rest) == tokens_of(whole[count:])
        assert [block.steps for block in rest] == [block.steps for block in whole[count:]]
        assert filled[-1] == filled[0]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_approximate_caches_begin_anew_in_every_block_and_go_on_too(cache):
    model = lively_model(attention="bidirectional", block_size=8)
    params = SamplingParams(max_tokens=24, temperature=1.0, cache=cache, stop_at_eos=False)
    whole = list(sample(model, PROMPT, params))
    plan = plan_completion(model.config, PROMPT, params, committed=tokens_of(whole[:1]))
    assert tokens_of(decoded(plan, Runner(model, len(plan.canvas)))) == tokens_of(whole[1:])


def test_the_same_seed_gives_the_same_tokens_and_seeds_and_choices_differ():
    model = lively_model()

    def run(seed, choice=0):
        params = SamplingParams(max_tokens=24, temperature=2.0, seed=seed, stop_at_eos=False)
        return tuple(tokens_of(sample(model, PROMPT, params, choice)))

    assert run(1) == run(1)
    assert len({run(1), run(2), run(1, choice=1)}) == 3


class Scripted(UniformRunner):
    """Is sure of one given text, more so on the right than on the left or the other way."""

    def __init__(self, config, text, left_first=True):
        super().__init__(config)
        self.text, self.left_first = text, left_first

    def run(self, wanted):
        result = super().run(wanted)
        for index, read in enumerate(wanted.reads):
            row = (wanted.start + read) % len(self.text)
            result[index, self.text[row]] = 20.0 - row if self.left_first else 10.0 + row
        return result


def scripted(text, params, **options):
    config = tiny_config()
    return list(decode(config, Scripted(config, text, **options), [1, 2, 3, 4], params))


def test_an_end_of_text_with_everything_before_it_filled_ends_early():
    params = SamplingParams(max_tokens=40, rule="low_confidence")
    blocks = scripted([1, EOS, 2, 3], params)
    assert [block.tokens for block in blocks] == [[1, EOS]]
    assert (blocks[0].finish_reason, blocks[0].steps) == ("stop", 2)


def test_an_end_of_text_waits_until_everything_before_it_is_filled():
    params = SamplingParams(max_tokens=40, rule="low_confidence")
    blocks = scripted([1, EOS, 2, 3], params, left_first=False)
    assert [block.tokens for block in blocks] == [[1, EOS]]
    assert blocks[0].steps == 4


def test_the_end_of_text_can_be_ignored():
    params = SamplingParams(max_tokens=8, stop_at_eos=False)
    blocks = scripted([1, EOS, 2, 3], params)
    assert tokens_of(blocks) == [1, EOS, 2, 3] * 2
    assert [block.finish_reason for block in blocks] == [None, "length"]


@pytest.mark.parametrize("stop_at_eos", [True, False])
def test_a_token_of_the_request_ends_it_too_and_is_told(stop_at_eos):
    params = SamplingParams(
        max_tokens=40, rule="low_confidence", stop_ids=(9, 2), stop_at_eos=stop_at_eos
    )
    [block] = scripted([1, 2, EOS, 3], params)
    assert (block.tokens, block.finish_reason, block.stop_reason) == ([1, 2], "stop", 2)
    assert block.steps == 2
    [first, last] = scripted([1, EOS, 2, 3], SamplingParams(max_tokens=8, stop_at_eos=False))
    assert (first.stop_reason, last.stop_reason, last.finish_reason) == (None, None, "length")
    [block] = scripted([1, EOS, 2, 3], SamplingParams(max_tokens=40, rule="low_confidence"))
    assert block.stop_reason == EOS


def test_passes_are_one_a_step():
    params = SamplingParams(
        max_tokens=8, rule="low_confidence", steps_per_block=2, stop_at_eos=False
    )
    blocks = list(decode(tiny_config(), UniformRunner(tiny_config()), [1, 2, 3, 4], params))
    assert [(block.passes, block.steps) for block in blocks] == [(2, 2), (2, 2)]


@pytest.mark.parametrize(
    ("axes", "prompt", "max_tokens", "message"),
    [
        ({}, [99], 4, "99, outside the vocabulary of 16"),
        ({}, [MASK], 4, "mask or padding token 15"),
        ({}, [], 4, "prompt is empty"),
        ({}, [1] * 100, 40, "100 tokens plus max_tokens=40 makes 140, over the context of 128"),
    ],
)
def test_prompts_that_cannot_be_decoded_are_refused_with_the_cure(
    axes, prompt, max_tokens, message
):
    with pytest.raises(InputError, match=message):
        sample(lively_model(**axes), prompt, SamplingParams(max_tokens=max_tokens))


@pytest.mark.parametrize(
    ("axes", "options", "message"),
    [
        ({}, {"cache": "dual"}, "cache=dual is for bidirectional models"),
        ({}, {"block_length": 8}, "block_length=8 is for bidirectional models"),
        (
            {"logits": "shifted", "first_place": "noisy", "clean_half": "token_causal"},
            {},
            "train with first_place=clean",
        ),
    ],
)
def test_settings_that_contradict_the_model_are_refused(axes, options, message):
    with pytest.raises(InputError, match=message):
        sample(lively_model(**axes), PROMPT, SamplingParams(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "first_hitting", "steps_per_block": 2}, "steps_per_block=2 contradicts"),
        ({"min_steps_per_block": 3, "steps_per_block": 2}, "min_steps_per_block=3 is above"),
        ({"remask_threshold": 0.5, "editing_threshold": 0.5}, "choose one"),
        ({"rule": "sequential", "position_temperature": 1.0}, "has no meaning"),
        ({"top_k": -1}, "top_k=-1 must not be negative"),
        ({"logprobs": 21}, r"logprobs=21 must be in 0\.\.20"),
        ({"logprobs": -1}, r"logprobs=-1 must be in 0\.\.20"),
    ],
)
def test_contradictory_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        SamplingParams(**options)


BIDIRECTIONAL = [axes for axes in AXES if "attention" in axes]


@pytest.mark.parametrize("axes", BIDIRECTIONAL)
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_approximate_caches_are_exact_in_the_first_step_of_a_block(axes, cache):
    """With one step a block every pass is a full one."""
    model = lively_model(**axes)
    plain, cached = (
        SamplingParams(max_tokens=20, steps_per_block=1, cache=kind, stop_at_eos=False)
        for kind in ("exact", cache)
    )
    assert tokens_of(sample(model, PROMPT, plain)) == tokens_of(sample(model, PROMPT, cached))


@pytest.mark.parametrize("axes", BIDIRECTIONAL)
def test_approximate_caches_feed_less(axes):
    model = lively_model(**axes)
    fed = {}
    for cache in ("exact", "prefix", "dual"):
        recorder = Recorder(model)
        params = SamplingParams(max_tokens=24, rule="low_confidence", cache=cache)
        list(decode(model.config, recorder, PROMPT, params))
        fed[cache] = sum(len(wanted.tokens) for wanted in recorder.seen)
    assert fed["dual"] < fed["prefix"] < fed["exact"]


@pytest.mark.parametrize("axes", BIDIRECTIONAL)
def test_a_bidirectional_hole_sees_its_suffix(axes):
    model = lively_model(**axes)
    text = [1, 2, MASK, MASK, 5, 6, 7, 8, 9, 10, 1, 2]
    logits = []
    for suffix in (3, 4):
        recorder = Recorder(model)
        plan_text = [*text[:-1], suffix]
        plan = plan_infilling(model.config, plan_text, SamplingParams())
        loop = plan.loop()
        list(drive(loop, recorder))
        assert plan.canvas.tolist()[4:] == plan_text[4:]
        assert not {MASK, PAD} & set(plan.canvas.tolist())
        logits.append(recorder.given[0])
    assert not torch.allclose(logits[0], logits[1])


@pytest.mark.parametrize("axes", CAUSAL[:7])
def test_a_hole_sees_a_suffix_in_its_own_block_only(axes):
    model = lively_model(**axes)
    if model.config.block_size > 1:
        filled = infill(model, [1, 2, 3, 4, 5, MASK, MASK, 8], SamplingParams())
        assert filled[:5] + filled[7:] == [1, 2, 3, 4, 5, 8]
        assert not {MASK, PAD} & set(filled)
    with pytest.raises(InputError, match="followed by text beyond its block"):
        infill(model, [1, 2, 3, MASK, 5, 6, 7, 8], SamplingParams())


def test_a_hole_sees_the_suffix_of_its_own_block():
    model = lively_model()
    logits = []
    for suffix in (8, 9):
        recorder = Recorder(model)
        plan = plan_infilling(model.config, [1, 2, 3, 4, 5, MASK, MASK, suffix], SamplingParams())
        list(drive(plan.loop(), recorder))
        logits.append(recorder.given[0])
    assert not torch.allclose(logits[0], logits[1])


@pytest.mark.parametrize("axes", [*CAUSAL, *BIDIRECTIONAL])
def test_a_middle_sees_every_token_of_its_suffix(axes):
    model = lively_model(**axes, infill="psm", infill_ids=(10, 11, 12))
    suffix, params = [5, 6, 7, 8, 9, 5, 6], SamplingParams(max_tokens=9)

    def first_logits(tokens) -> torch.Tensor:
        recorder = Recorder(model)
        found = decode(model.config, recorder, rearranged(model.config, [1, 2, 3], tokens), params)
        written = [token for block in found for token in block.tokens]
        assert not {10, 11, 12, MASK, PAD} & set(written)
        return recorder.given[0]

    as_it_is = first_logits(suffix)
    for place in range(len(suffix)):
        changed = [*suffix[:place], 4, *suffix[place + 1 :]]
        assert not torch.allclose(first_logits(changed), as_it_is)
    assert torch.equal(first_logits(suffix), as_it_is)


def told(blocks) -> list:
    return [one for block in blocks for one in block.logprobs]


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 4}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_one_place_a_step_from_the_left_they_add_up_to_the_likelihood(axes, options, dtype):
    """At block size 1 with shifted logits: to the autoregressive one."""
    model = lively_model(**axes).to(dtype)
    params = SamplingParams(
        rule="sequential", max_tokens=13, logprobs=0, stop_at_eos=False, **options
    )
    blocks = list(sample(model, PROMPT, params))
    found = torch.tensor([one.logprob for one in told(blocks)], dtype=torch.float64)
    expected = sequential(model, PROMPT, tokens_of(blocks))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10  # nats a token
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert abs(found.sum() - expected.sum()) < 13 * tolerance


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_token_is_told_and_nothing_else_changes(axes, options):
    model = lively_model(**axes)
    values = {"max_tokens": 11, "temperature": 1.0, "seed": 2} | options
    plain, asking = (
        list(sample(model, PROMPT, SamplingParams(logprobs=count, **values))) for count in (None, 2)
    )
    assert [block.tokens for block in asking] == [block.tokens for block in plain]
    assert [block.logprobs for block in plain] == [None] * len(plain)
    assert [len(block.logprobs) for block in asking] == [len(block.tokens) for block in asking]
    for token, one in zip(tokens_of(asking), told(asking), strict=True):
        (_, best), (_, second) = one.top
        assert second <= best
        assert one.logprob <= best <= 0
        assert dict(one.top).get(token, one.logprob) == one.logprob
        assert sum(math.exp(value) for value in {token: one.logprob, **dict(one.top)}.values()) <= (
            1 + 1e-9
        )


def test_guidance_is_in_the_distribution_that_is_told():
    """One place, one step: u + (scale + 1)(c - u), by hand."""
    model = lively_model(block_size=1)
    params = SamplingParams(max_tokens=1, guidance_scale=1.5, logprobs=1)
    recorder = Recorder(model)
    [block] = decode(model.config, recorder, PROMPT, params)
    c, u = (given for given in recorder.given if len(given))
    logits = (u + 2.5 * (c - u)).index_fill(-1, torch.tensor([MASK, PAD]), float("-inf"))
    logs = logits.log_softmax(-1)[0]
    [one] = block.logprobs
    assert one.logprob == pytest.approx(logs[block.tokens[0]].item(), abs=1e-12)
    assert one.top == ((block.tokens[0], one.logprob),)


def test_guidance_of_scale_zero_is_no_guidance_and_a_large_one_changes_the_text():
    model = lively_model()
    texts = {
        scale: tokens_of(sample(model, PROMPT, SamplingParams(guidance_scale=scale)))
        for scale in (0.0, 1e-12, 4.0)
    }
    assert texts[0.0] == texts[1e-12]
    assert texts[0.0] != texts[4.0]
