"""`stream_steps`: a stream with each denoising step in it, and the same text as without."""

import asyncio
import dataclasses
import math

import pytest

from cascade_model.sampling import SamplingParams
from cascade_model.watching import DenoisedStep
from jobs.choices import STEP
from jobs.openai_answers import ChatEvent, CompletionEvent
from jobs.resuming import Patience, Pulse, SamplerLost, resuming
from tests.jobs.tiny_endpoint import (
    chat,
    client_of,
    complete,
    events_of,
    require_error,
    tiny_llm,
)

ASKED = {"stream": True, "max_tokens": 18, "seed": 4, "logprobs": 0, "remask_threshold": 0.3}
PARAMS = SamplingParams(max_tokens=22, temperature=1.0, seed=5)
PROMPT = list(b"def find(")


@pytest.fixture(scope="module")
def llm():
    with tiny_llm(max_sequence_length=256) as llm:
        yield llm


@pytest.fixture(scope="module")
def client(llm):
    return client_of(llm)


def pieces_of(response) -> list[dict]:
    *events, done = events_of(response)
    assert done == "[DONE]"
    return [choice for event in events for choice in event["choices"]]


def without_times(response) -> list:
    return [
        event if isinstance(event, str) else event | {"id": "", "created": 0}
        for event in events_of(response)
    ]


def test_without_the_steps_the_stream_is_the_one_that_nobody_watched(client):
    asked = ASKED | {"stream_options": {"include_usage": True}, "n": 2}
    plain = without_times(complete(client, **asked))
    watched = without_times(complete(client, stream_steps=True, **asked))
    left = []
    for event in watched:
        choices = [] if isinstance(event, str) else event["choices"]
        if any("denoised" in choice for choice in choices):
            continue
        for choice in choices:
            del choice["block"]
        left.append(event)
    own = [[e for e in events if _index(e) == i] for events in (plain, left) for i in (0, 1, None)]
    assert own[:3] == own[3:]
    assert len(watched) > len(plain) + 10


def _index(event) -> int | None:
    return event["choices"][0]["index"] if isinstance(event, dict) and event["choices"] else None


def test_steps_end_in_what_the_block_says(client):
    places, blocks = {}, 0
    for piece in pieces_of(complete(client, stream_steps=True, **ASKED)):
        if "denoised" in piece:
            step = piece["denoised"]
            assert (piece["text"], piece["finish_reason"]) == ("", None)
            places = {} if step["step"] == 0 else places
            written = zip(step["tokens"], step["confidences"], strict=True)
            places |= zip(step["places"], written, strict=True)
            continue
        told = piece["logprobs"]
        wanted = [math.exp(logprob) for logprob in told["token_logprobs"]]
        assert [places[i] for i in range(len(wanted))] == list(
            zip(told["tokens"], wanted, strict=True)
        )
        assert step["step"] == piece["block"]["steps"]
        blocks += 1
    assert blocks >= 3


def test_the_blocks_passes_add_up_to_the_usage(client):
    asked = ASKED | {"stream_options": {"include_usage": True}}
    events = events_of(complete(client, stream_steps=True, **asked))[:-1]
    passes = [c["block"]["passes"] for e in events for c in e["choices"] if "block" in c]
    assert sum(passes) == events[-1]["usage"]["completion_tokens_details"]["passes"]


def test_events_have_the_documented_shape_on_both_routes(client):
    fields = {"stream": True, "stream_steps": True, "seed": 1}
    events = events_of(complete(client, **fields, max_tokens=9))[:-1]
    assert any(CompletionEvent.model_validate(e).choices[0].denoised for e in events)
    told = events_of(chat(client, **fields, max_completion_tokens=9))[:-1]
    assert any(ChatEvent.model_validate(event).choices[0].denoised for event in told)
    assert told[0]["choices"][0]["delta"]["role"] == "assistant"


def test_steps_without_a_stream_are_refused(client):
    require_error(complete(client, stream_steps=True), 400, "stream_steps", "invalid_value")


def dying(llm, lives):
    """Samplers over one engine, each with so many words before it dies; none: it lives."""
    left = list(lives)

    async def source(params, committed, steps_made):
        life = left.pop(0)
        yield {"weights": "w"}
        told = llm.stream_steps(PROMPT, params, committed=committed, steps_made=steps_made)
        count = 0
        async for each in told:
            if count == life:
                raise SamplerLost
            count += 1
            own = dataclasses.asdict(each)
            yield {STEP: own} if isinstance(each, DenoisedStep) else own

    return source


def told_by(source, patience, slowly=False) -> list[dict]:
    async def gather():
        found = []
        stream = resuming(source, PARAMS, weights="w", pulse=Pulse(), patience=patience)
        async for each in stream:
            found.append(each)
            if slowly:
                await asyncio.sleep(0.002)
        return found

    return asyncio.run(asyncio.wait_for(gather(), timeout=240))


def shown(events: list[dict]) -> list:
    """What somebody who watches ends up with for each block: step 0 begins it anew."""
    found, steps = [], []
    for each in events:
        if STEP not in each:
            found.append((steps, each["tokens"]))
            steps = []
        elif each[STEP]["step"] == 0:
            steps = [each[STEP]]
        else:
            steps.append(each[STEP])
    return found


def test_a_loss_after_any_word_shows_the_same_blocks(llm):
    whole = told_by(dying(llm, [None]), Patience())
    assert shown(whole)[2][0]
    for life in range(len(whole)):
        again = told_by(dying(llm, [life, None]), Patience())
        assert shown(again) == shown(whole)
        assert len(again) >= len(whole)


@pytest.mark.parametrize("ahead", [1, 2, 3, 64])
def test_a_slow_reader_misses_steps_and_never_a_block(llm, ahead):
    whole = told_by(dying(llm, [None]), Patience())
    source = dying(llm, [None] * 100)
    slow = told_by(source, Patience(blocks_ahead=ahead), slowly=True)
    assert [e["tokens"] for e in slow if STEP not in e] == [t for _, t in shown(whole)]
