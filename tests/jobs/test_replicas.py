"""A sampler without Ray around it: its greeting, its refusal, and the places that it frees."""

import asyncio
import dataclasses

import pytest

from cascade_model.engine_config import EngineConfig
from cascade_model.errors import DoesNotFit
from cascade_model.sampling import SamplingParams
from cascade_model.scoring import scored
from jobs.openai_protocol import ApiError
from jobs.replicas import Sampler, as_told
from tests.benchmarks.serve_runs import write_model

PROMPT = list(b"def f(")
LONG = dataclasses.asdict(SamplingParams(max_tokens=800, confidence_threshold=1.0, temperature=1.0))


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    model = write_model(tmp_path_factory.mktemp("replica") / "tiny")
    sampler = Sampler(model, 1, EngineConfig(), 8)
    yield sampler
    sampler._llm.close()


def blocks(sampler, weights=None, params=LONG, committed=(), steps_made=0):
    own = weights or sampler._weights
    return sampler.blocks(PROMPT, params, 0, own, list(committed), steps_made)


def test_it_greets_with_its_weights_and_refuses_others(sampler):
    async def said():
        return [item async for item in blocks(sampler, weights="other")]

    before = sampler._llm.counters.passes
    assert asyncio.run(said()) == [{"weights": sampler._weights}]
    assert sampler._llm.counters.passes == before


def test_it_scores_for_those_alone_that_ask_for_its_weights(sampler):
    async def said(weights: str):
        return [item async for item in sampler.score(PROMPT, 2, weights)]

    greeting = {"weights": sampler._weights}
    assert asyncio.run(said("other")) == [greeting]
    told = dict(pair for part in scored(sampler._llm.model, PROMPT, 2) for pair in part)
    scores = [told.get(place) for place in range(len(PROMPT))]
    assert asyncio.run(said(sampler._weights)) == [greeting, {"scores": scores}]
    assert sampler._texts_to_score == 0


def test_a_sampler_that_refuses_a_request_is_a_400_in_its_own_words():
    """As Ray brings it: an error of both kinds, whose text is the sampler's traceback."""
    from ray.exceptions import RayTaskError

    cause = DoesNotFit("the request needs more; shorten it")
    wrapped = RayTaskError("blocks", "Traceback: secret", cause).as_instanceof_cause()
    for raised in (wrapped, cause):
        with pytest.raises(ApiError) as refused, as_told():
            raise raised
        told = refused.value.body["error"]
        assert (refused.value.status, told["code"]) == (400, "invalid_value")
        assert told["message"] == "the request needs more; shorten it"


def test_it_goes_on_behind_committed_tokens(sampler):
    params = dataclasses.asdict(SamplingParams(max_tokens=14, temperature=1.0, seed=3))

    async def said(**changes):
        greeting, *told = [item async for item in blocks(sampler, params=params, **changes)]
        assert set(greeting) == {"weights"}
        return told

    whole = asyncio.run(said())
    done = whole[:2]
    tokens = [token for block in done for token in block["tokens"]]
    steps = sum(block["steps"] for block in done)
    rest = asyncio.run(said(committed=tokens, steps_made=steps))
    assert [block["tokens"] for block in rest] == [block["tokens"] for block in whole[2:]]


def test_eight_that_leave_free_their_places_within_two_rounds(sampler):
    async def leave() -> tuple[int, int, int]:
        streams = [blocks(sampler) for _ in range(8)]
        for stream in streams:
            await anext(stream)
            await anext(stream)
        held = sampler._llm.counters.running
        assert sampler._load.running == 8
        for stream in streams:
            await stream.aclose()
        left = sampler._llm.counters.rounds
        while sampler._llm.counters.running:
            await asyncio.sleep(0)
        return held, left, sampler._llm.counters.rounds

    held, left, free = asyncio.run(leave())
    assert held == 8
    assert free - left <= 2
    assert (sampler._load.running, sampler._load.blocks_left) == (0, 0)


def test_it_is_unhealthy_once_its_engine_has_ended(tmp_path):
    sampler = Sampler(write_model(tmp_path / "tiny"), 1, EngineConfig(), 8)
    sampler.check_health()
    sampler._llm.close()
    with pytest.raises(RuntimeError, match="has ended"):
        sampler.check_health()
