"""Choices, holes, going on elsewhere and event loops: all through one engine."""

import asyncio
import gc
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

from cascade_model.engine_config import EngineConfig
from cascade_model.errors import InputError
from cascade_model.llm import LLM
from cascade_model.model import Transformer
from cascade_model.requests import Infilling
from cascade_model.sampler import infill
from cascade_model.sampling import SamplingParams
from cascade_model.text_stream import TextStream
from cascade_model.tokenizer import byte_tokenizer
from cascade_model.weights import save_model
from tests.tiny_models import text_config

TOKENIZER = byte_tokenizer()
MASK = TOKENIZER.mask_id
HELLO = TOKENIZER.encode("Hello")


def model_of(**changes) -> Transformer:
    model = Transformer(text_config(TOKENIZER, **changes))
    model.init_weights(0)
    with torch.no_grad():
        model.embed.weight.mul_(20)
    return model.double().eval()


@pytest.fixture(scope="module")
def llm():
    own = LLM(model_of(), TOKENIZER)
    yield own
    own.close()


@pytest.fixture(scope="module")
def both_ways():
    own = LLM(model_of(attention="bidirectional", block_size=8), TOKENIZER)
    yield own
    own.close()


@pytest.fixture(scope="module")
def long():
    """Takes thousands of steps: what is not ended runs on for longer than a test waits."""
    own = LLM(model_of(max_sequence_length=8192), TOKENIZER)
    yield own
    own.close()


LONG = SamplingParams(max_tokens=8000, confidence_threshold=1.0, stop_at_eos=False)


def free(**settings) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 18, "temperature": 1.0} | settings), stop_at_eos=False)


def until_idle(llm: LLM, seconds: float = 10) -> None:
    """Whatever was left before is over, and every page is free or holds a known prefix."""
    llm.generate(["x"], SamplingParams(max_tokens=1))
    scheduler, deadline = llm.engine.scheduler, time.monotonic() + seconds
    while scheduler.running or scheduler.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert scheduler.arena.free_pages + scheduler.prefixes.pages == scheduler.arena.num_pages


def test_choices_stand_beside_each_other_and_the_first_is_the_only_one(llm):
    params = free(seed=4)
    prompts = ["abc", "xyz"]
    three = llm.generate(prompts, params, n=3)
    assert [three[0], three[3]] == llm.generate(prompts, params)
    assert three[:2] == llm.generate(["abc"], params, n=2)
    assert len({answer.token_ids for answer in three}) == 6
    keys = [(answer.index, answer.choice) for answer in llm.answers(prompts, params, n=3)]
    assert sorted(keys) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_a_refused_prompt_is_refused_for_every_choice(llm):
    answers = {(a.index, a.choice): a.result for a in llm.answers(["a", []], free(), n=2)}
    assert len(answers) == 4
    assert [isinstance(answers[1, choice], InputError) for choice in (0, 1)] == [True, True]
    assert [answers[0, 0], answers[0, 1]] == llm.generate(["a"], free(), n=2)


def test_a_refusal_ends_the_other_requests_at_once(long):
    with pytest.raises(InputError, match="prompt is empty") as refused:
        long.generate(["Hello", []], LONG)
    until_idle(long)
    assert refused.value is not None


def test_numbers_that_do_not_fit_are_refused_and_nothing_runs(llm):
    with pytest.raises(InputError, match="n=0 must be a whole number of at least 1"):
        llm.generate(["a"], free(), n=0)
    with pytest.raises(InputError, match="params has 1 settings for 2 prompts; give one for all"):
        llm.generate(["a", "b"], [free()])
    with pytest.raises(InputError, match="the prompts are 'Hello'; give a list"):
        llm.generate("Hello", free())
    with pytest.raises(InputError, match="the prompts are Infilling"):
        llm.infill(Infilling(prefix="a", length=1, suffix=""), free())
    for wrong in (5, [1.5], [None], ["a"]):
        with pytest.raises(InputError, match="is neither text nor a list of token ids"):
            llm.generate([wrong], free())
    with pytest.raises(InputError, match="stop='END' must be a list of texts"):
        llm.generate(["a"], free(), stop="END")
    for wrong in (5, [5], ("a",)):
        with pytest.raises(InputError, match="must be a tuple of token ids"):
            SamplingParams(stop_ids=wrong)
    assert not llm.engine.scheduler.running


def test_what_ended_a_completion_is_told(llm):
    [whole] = llm.generate(["Hello"], free(seed=5))
    assert (whole.finish_reason, whole.stop_reason) == ("length", None)
    [cut] = llm.generate(["Hello"], free(seed=5), stop=["never", whole.text[5:7]])
    assert (cut.finish_reason, cut.stop_reason) == ("stop", whole.text[5:7])
    token = whole.token_ids[7]
    [ended] = llm.generate(["Hello"], free(seed=5, stop_ids=(token,)))
    assert (ended.finish_reason, ended.stop_reason) == ("stop", token)
    assert ended.token_ids == whole.token_ids[: whole.token_ids.index(token) + 1]


def test_a_stop_string_comes_before_the_token_that_would_end_the_block():
    chunk = TextStream(TOKENIZER.decode, ["ell"]).push(
        HELLO, passes=1, steps=1, finish_reason="stop", stop_reason=HELLO[-1]
    )
    assert (chunk.text, chunk.stop_reason, len(chunk.token_ids)) == ("H", "ell", 4)
    chunk = TextStream(TOKENIZER.decode, ["elx"]).push(
        HELLO, passes=1, steps=1, finish_reason="stop", stop_reason=HELLO[-1]
    )
    assert (chunk.text, chunk.stop_reason) == ("Hello", HELLO[-1])


def test_a_budget_is_kept_beside_other_requests(llm):
    params = [free(max_steps=9, confidence_threshold=1.0), free(seed=1), free(max_steps=6)]
    answers = llm.generate(["Hello"] * 3, params)
    assert sum(answers[0].steps_per_block) == 9
    assert sum(answers[2].steps_per_block) <= 6
    assert [len(answer.token_ids) for answer in answers] == [18] * 3
    assert answers == [llm.generate(["Hello"], own)[0] for own in params]
    with pytest.raises(InputError, match="max_steps=2 is below the 5 blocks"):
        llm.generate(["Hello"], free(max_steps=2))
    assert llm.generate(["Hello"], params[0]) == answers[:1]


def test_a_deadline_that_is_over_leaves_one_step_a_block(llm):
    [answer] = llm.generate(["Hello"], free(deadline_seconds=1e-9, confidence_threshold=1.0))
    assert answer.steps_per_block == (1,) * 5
    assert len(answer.token_ids) == 18


@pytest.mark.parametrize(
    ("axes", "settings"),
    [
        ({}, {"max_steps": 12, "remask_threshold": 0.6}),
        ({"logits": "shifted"}, {"guidance_scale": 1.0}),
        ({"attention": "bidirectional"}, {"position_temperature": 0.5, "max_steps": 12}),
    ],
)
def test_a_fresh_engine_goes_on_where_another_was_cut(axes, settings):
    params = free(**settings, seed=8)
    first, second = LLM(model_of(**axes), TOKENIZER), LLM(model_of(**axes), TOKENIZER)
    whole = list(first.blocks(HELLO, params, 1))
    for count in range(len(whole)):
        committed = [token for block in whole[:count] for token in block.tokens]
        steps = sum(block.steps for block in whole[:count])
        rest = list(second.blocks(HELLO, params, 1, committed=committed, steps_made=steps))
        assert [block.tokens for block in rest] == [block.tokens for block in whole[count:]]
        assert rest[-1].finish_reason == "length"

    async def awaited() -> list[list[int]]:
        source = second.stream_blocks(
            HELLO, params, 1, committed=whole[0].tokens, steps_made=whole[0].steps
        )
        return [block.tokens async for block in source]

    assert asyncio.run(awaited()) == [block.tokens for block in whole[1:]]
    with pytest.raises(InputError, match="ends within a block"):
        second.blocks(HELLO, params, committed=whole[0].tokens[:-1])
    for llm in (first, second):
        until_idle(llm)
        llm.close()


TEXT = [*HELLO, *[MASK] * 11, *TOKENIZER.encode("world!")]
INSIDE = [*HELLO[:4], *TOKENIZER.encode("a"), MASK, MASK, *TOKENIZER.encode("b")]


@pytest.mark.parametrize(
    "settings", [{}, {"guidance_scale": 1.0}, {"editing_threshold": 0.3}, {"max_steps": 6}]
)
def test_a_hole_is_filled_as_by_the_sampler_and_beside_completions(both_ways, settings):
    params = free(**settings, seed=3)
    expected = [infill(both_ways.model, TEXT, params, choice) for choice in range(3)]
    found: list = []
    thread = threading.Thread(
        target=lambda: found.extend(both_ways.generate(["Hello"] * 4, free(seed=9), n=2))
    )
    thread.start()
    answers = both_ways.infill([TEXT], params, n=3)
    thread.join()
    for answer, whole in zip(answers, expected, strict=True):
        assert list(answer.token_ids) == whole[5:16]
        assert whole[:5] + whole[16:] == TEXT[:5] + TEXT[16:]
        assert answer.text == TOKENIZER.decode(whole[5:16])
        assert (answer.finish_reason, answer.stop_reason) == ("length", None)
    assert found == both_ways.generate(["Hello"] * 4, free(seed=9), n=2)
    until_idle(both_ways)


def test_a_hole_may_be_given_as_text(both_ways, llm):
    [answer] = both_ways.infill([Infilling(prefix="Hello", length=11, suffix="world!")], free())
    assert [answer] == both_ways.infill([TEXT], free())
    changed = both_ways.infill([Infilling(prefix="Hello", length=11, suffix="worlds")], free())
    assert changed != [answer]
    [within] = llm.infill([INSIDE], free())
    assert list(within.token_ids) == infill(llm.model, INSIDE, free())[5:7]


@pytest.fixture(scope="module")
def filling():
    """Claims to be trained on rearranged texts; what it writes depends on all that it is given."""
    tokenizer = TOKENIZER.with_infill()
    shape = text_config(tokenizer, infill="psm", infill_ids=tokenizer.infill_ids)
    model = Transformer(shape)
    model.init_weights(0)
    with torch.no_grad():
        model.embed.weight.mul_(20)
    own = LLM(model.double().eval(), tokenizer)
    yield own
    own.close()


def test_a_suffix_makes_a_prompt_of_both_texts(filling, llm):
    prefix, suffix, middle = filling.config.infill_ids
    tokens = [prefix, *HELLO, suffix, *TOKENIZER.encode("world"), middle]
    assert filling.prompt_tokens("Hello", "world") == tokens
    assert filling.prompt_tokens(HELLO, "world") == tokens
    assert filling.prompt_tokens("Hello", "") == filling.prompt_tokens("Hello") == HELLO
    [expected] = filling.generate([tokens], free())
    assert filling.generate(["Hello"], free(), suffix="world") == [expected]
    assert filling.generate(["Hello"], free(), suffix="worlds") != [expected]
    assert filling.generate(["Hello"], free()) != [expected]
    asked = {"suffix": "world"}
    assert "".join(c.text for c in filling.chunks("Hello", free(), **asked)) == expected.text

    async def streamed() -> str:
        return "".join([c.text async for c in filling.stream("Hello", free(), **asked)])

    assert asyncio.run(streamed()) == expected.text
    until_idle(filling)


def test_each_prompt_may_have_a_suffix_of_its_own_and_known_blocks_are_not_fed_again(filling):
    both = filling.generate(["Hello", "Hi"], free(), n=2, suffix=["world", None])
    assert both[:2] == filling.generate(["Hello"], free(), n=2, suffix="world")
    assert both[2:] == filling.generate(["Hi"], free(), n=2)
    text = "Hello, what is the weather like in the north of the country today"
    first = filling.generate([text], free(), suffix="of")
    before = filling.counters.prefix_hits
    assert filling.generate([text], free(), suffix="of") == first
    assert filling.counters.prefix_hits == before + 1
    until_idle(filling)


def test_no_text_becomes_what_stands_before_a_part(filling):
    text = "<|fim_suffix|>"
    tokens = filling.prompt_tokens(f"a{text}", f"{text}b")
    assert [token for token in tokens if token >= 256] == list(filling.config.infill_ids)


@pytest.mark.parametrize(
    ("suffix", "words"),
    [
        (["a"], "suffix has 1 texts for 2 prompts"),
        ([5, 5], r"prompts\[0\]: the prompt 5 is neither text"),
        ([[257], "a"], r"prompts\[0\]: .*padding token 257"),
        ([[260], "a"], r"prompts\[0\]: suffix has the token 260"),
    ],
)
def test_a_suffix_that_makes_no_sense_is_refused_in_a_sentence(filling, suffix, words):
    with pytest.raises(InputError, match=words):
        filling.generate(["Hello", "Hi"], free(), suffix=suffix)


def test_a_suffix_that_the_hole_would_not_see_is_refused(llm, both_ways):
    with pytest.raises(InputError, match=r"prompts\[0\]: suffix of 5 tokens .* beyond the hole"):
        llm.generate(["Hello"], free(), suffix="world")
    for own in (llm, both_ways):
        assert own.generate(["Hello"], free(), suffix="") == own.generate(["Hello"], free())
    with pytest.raises(InputError, match=r"prompts\[0\]: prompt has the mask"):
        both_ways.generate([[MASK]], free(), suffix="world")


def test_a_suffix_that_a_hole_sees_in_its_place_is_as_an_infilled_text(llm, both_ways):
    for own, prompt, length in ((llm, "Hello", 2), (both_ways, "Hello", 18)):
        params = free(max_tokens=length)
        for n, suffix in ((2, "w"), (1, "x")):
            found = own.generate([prompt], params, n=n, suffix=suffix)
            assert found == own.infill([Infilling(prefix=prompt, length=length, suffix=suffix)],
                                       params, n=n)  # fmt: skip
            assert all(len(answer.token_ids) == length for answer in found)
        chunks = list(own.chunks(prompt, params, suffix="x"))
        assert "".join(chunk.text for chunk in chunks) == found[0].text
    either = both_ways.generate(["Hello"], free(), suffix="w")
    assert both_ways.generate(["Hello"], free(), suffix="x") != either


def test_several_holes_are_answered_from_left_to_right(both_ways):
    text = [1, 2, MASK, 4, *[MASK] * 2, *[7] * 12, MASK, 9]
    whole = infill(both_ways.model, text, free())
    [answer] = both_ways.infill([text], free())
    assert list(answer.token_ids) == [whole[place] for place in (2, 4, 5, 18)]
    assert len(answer.steps_per_block) == 2


def test_no_token_ends_a_hole_early(both_ways):
    ends = tuple(range(256))
    params = SamplingParams(temperature=1.0, stop_ids=ends)
    [answer] = both_ways.infill([TEXT], params)
    assert len(answer.token_ids) == 11


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        (TEXT, {}, "followed by text beyond its block of block_size=4"),
        (HELLO, {}, "the text has no mask token"),
        ([*HELLO, *[MASK] * 19], {}, "the hole has 19 tokens, over max_tokens=18"),
        ([*HELLO, *[MASK] * 9], {"max_steps": 2}, "max_steps=2 is below the 3 blocks"),
    ],
)
def test_a_hole_that_cannot_be_filled_is_refused_and_the_engine_lives_on(
    llm, text, settings, message
):
    with pytest.raises(InputError, match=message):
        llm.infill([text], free(**settings))
    assert len(llm.infill([INSIDE], free())[0].token_ids) == 2


def test_an_event_loop_gets_the_same_chunks(llm):
    params = free(seed=7)
    expected = list(llm.chunks("Hello", params, ["never"]))

    async def one() -> list:
        return [chunk async for chunk in llm.stream("Hello", params, ["never"])]

    async def gather() -> list:
        return await asyncio.gather(*(one() for _ in range(3)))

    assert asyncio.run(gather()) == [expected] * 3
    stop = "".join(chunk.text for chunk in expected)[5:7]

    async def stopped() -> list:
        return [chunk async for chunk in llm.stream("Hello", params, [stop])]

    assert asyncio.run(stopped())[-1].stop_reason == stop


def test_cancelled_tasks_free_their_pages(long):
    async def cancelled() -> None:
        started = [asyncio.Event() for _ in range(3)]

        async def read(event: asyncio.Event) -> None:
            async for _ in long.stream("Hello", LONG):
                event.set()

        async def hold(event: asyncio.Event) -> None:
            async for _ in long.stream("Hello", LONG):
                event.set()
                await asyncio.sleep(60)

        tasks = [asyncio.create_task(read(started[0])), asyncio.create_task(hold(started[1]))]
        tasks.append(asyncio.create_task(hold(started[2])))
        await asyncio.gather(*(event.wait() for event in started))
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends)
        until_idle(long)

    asyncio.run(cancelled())


def test_a_stream_that_nobody_reads_is_ended_when_it_is_dropped(long):
    async def dropped() -> None:
        blocks = long.stream_blocks(HELLO, LONG)
        del blocks
        gc.collect()
        until_idle(long)

    asyncio.run(dropped())


def test_chunks_that_nobody_reads_on_are_ended(long):
    chunks = long.chunks("Hello", LONG)
    next(chunks)
    del chunks
    gc.collect()
    until_idle(long)


def test_a_refusal_reaches_the_task_that_asked(llm):
    async def ask() -> None:
        async for _ in llm.stream([], free()):
            pass

    with pytest.raises(InputError, match="prompt is empty"):
        asyncio.run(ask())


def test_an_engine_in_bfloat16_keeps_weights_and_cache_in_it_and_repeats_itself(llm, tmp_path):
    plain = Transformer(llm.config)
    plain.init_weights(3)
    save_model(tmp_path / "model", plain, llm.tokenizer)
    small = LLM.load(tmp_path / "model", EngineConfig(precision="bfloat16"))
    arena = small.engine.scheduler.arena
    assert {weight.dtype for weight in small.model.parameters()} == {torch.bfloat16}
    assert arena.entries.dtype == torch.bfloat16
    params = SamplingParams(max_tokens=12, temperature=1.0, stop_at_eos=False)
    [alone] = small.generate(["Hello"], params)
    together = small.generate(["Hello", "Another one", "And yet another"], params)
    assert together[0] == alone
    small.close()


ENDS = {
    "generate": "llm.generate(['def', 'x'], params)",
    "in the middle": "chunks = llm.chunks('def', params); next(chunks)",
    "stopped": "[chunk for chunk, _ in zip(llm.chunks('def', params), range(2))]",
    "refused": "llm.generate(['def'] * 4 + [[]], params)",
}


@pytest.mark.parametrize("end", ENDS)
def test_python_ends_cleanly_whatever_the_engine_is_doing(end, tmp_path, llm):
    plain = Transformer(llm.config)
    plain.init_weights(3)
    save_model(tmp_path / "model", plain, llm.tokenizer)
    script = f"""
from cascade_model.llm import LLM
from cascade_model.sampling import SamplingParams
llm = LLM.load({str(tmp_path / "model")!r})
params = SamplingParams(max_tokens=100, confidence_threshold=1.0, stop_at_eos=False)
{ENDS[end]}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert done.returncode == (1 if end == "refused" else 0), done.stderr.decode()[-500:]


def test_a_dropped_engine_is_freed_with_its_thread():
    before = threading.active_count()
    own = LLM(model_of(), TOKENIZER)
    [done] = own.generate(["Hello"], free())
    assert len(done.token_ids) == 18
    assert threading.active_count() == before + 1
    seen = weakref.ref(own.engine.scheduler)
    del own
    deadline = time.monotonic() + 60  # its last round may not be over
    while seen() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert seen() is None
    assert threading.active_count() == before


def test_a_with_block_closes():
    with LLM(model_of(), TOKENIZER) as own:
        own.generate(["Hello"], free())
    with pytest.raises(RuntimeError, match="closed"):
        own.generate(["Hello"], free())


@pytest.mark.parametrize(
    ("prompts", "params", "words"),
    [
        (["a", "b", [MASK]], free(), r"prompts\[2\]: prompt has the mask"),
        ([5, 6], free(), "the prompt 5 is neither text nor a list of token ids"),
        ([b"def"], free(), "neither text nor a list of token ids"),
        ("def", free(), "the prompts are 'def'; give a list"),
        (None, free(), "the prompts are None; give a list"),
        (["a"], None, "params=None must be SamplingParams"),
        (["a"], [None], "must be SamplingParams, or a list"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused_in_a_sentence(llm, prompts, params, words):
    with pytest.raises(InputError, match=words):
        llm.generate(prompts, params)
    until_idle(llm)


@pytest.mark.parametrize(
    "setting",
    [
        {"rule": "foo"}, {"rule": None}, {"schedule": "foo"}, {"cache": "Exact"},
        {"token_draw": "gumbl"}, {"suppress_eos": True}, {"max_tokens": 2.5},
        {"max_tokens": "5"}, {"max_tokens": None}, {"steps_per_block": 2.5}, {"top_k": "1"},
        {"seed": 1.5}, {"logprobs": True}, {"temperature": None}, {"temperature": "1"},
        {"report_margin": "x"}, {"stop_ids": (True,)}, {"max_steps": 1.5},
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_of_another_type_is_refused_by_name(setting):
    [(name, value)] = setting.items()
    with pytest.raises(InputError, match=rf"^{name}={re.escape(repr(value))} must be"):
        SamplingParams(**setting)


def test_settings_of_an_engine_are_checked_too():
    with pytest.raises(InputError, match=r"engine\.precision='float16' must be one of float32"):
        EngineConfig(precision="float16")
    with pytest.raises(InputError, match=r"engine\.cache_bytes=1500000.0 must be a whole number"):
        EngineConfig(cache_bytes=1.5e6)
    with pytest.raises(InputError, match="device=cuda is not there"):
        LLM.load("anywhere", EngineConfig(device="cuda"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_loading_leaves_no_helping_threads_behind(tmp_path):
    """They would put the engine's to sleep; the control: a product of the same size starts some."""
    tokenizer = byte_tokenizer()
    network = Transformer(text_config(tokenizer, hidden_size=256, intermediate_size=512))
    network.init_weights(0)
    save_model(tmp_path / "model", network, tokenizer)
    script = """
import os, sys, torch
from cascade_model.llm import LLM
def threads(): return len(os.listdir("/proc/self/task"))
torch.zeros(1)
before = threads()
llm = LLM.load(sys.argv[1])
loaded = threads()
torch.ones(512, 512).exp()
print(before, loaded, threads(), torch.get_num_threads())
"""
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model")],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    before, loaded, helped, own = map(int, ran.stdout.split())
    assert loaded == before
    assert helped == before + 1
    assert own == 2
