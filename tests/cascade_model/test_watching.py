"""Steps as they are told: they rebuild every block, cost no token, and are the same after a cut."""

import asyncio
import itertools
import math

import pytest

from cascade_model.llm import LLM
from cascade_model.model import Transformer
from cascade_model.sampler import DecodedBlock, plan_completion
from cascade_model.sampling import SamplingParams
from cascade_model.tokenizer import byte_tokenizer
from cascade_model.watching import DenoisedStep
from tests.tiny_models import text_config

PROMPT = list(b"def find(")  # 9 tokens: the first block of 4 has one of them
SETTINGS = {
    "confidence": {"temperature": 1.0, "confidence_threshold": 0.3, "logprobs": 0},
    "remasking": {"temperature": 1.0, "remask_threshold": 0.6, "logprobs": 0},
    "editing": {"temperature": 1.0, "editing_threshold": 0.05, "max_post_steps": 3, "logprobs": 0},
    "guided": {"temperature": 1.0, "guidance_scale": 2.0, "rule": "margin", "logprobs": 0},
    "greedy": {"temperature": 0.0, "steps_per_block": 2, "logprobs": 0},
}


@pytest.fixture(scope="module", params=["block_causal", "bidirectional"])
def llm(request):
    tokenizer = byte_tokenizer()
    shape = text_config(tokenizer, max_sequence_length=256, attention=request.param)
    model = Transformer(shape)
    model.init_weights(0)
    with LLM(model.eval(), tokenizer) as llm:
        yield llm


def params_of(name: str, **changes) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 22, "seed": 3} | SETTINGS[name] | changes))


def told(llm: LLM, params: SamplingParams, **cut) -> list[DecodedBlock | DenoisedStep]:
    async def gather():
        return [each async for each in llm.stream_steps(PROMPT, params, **cut)]

    return asyncio.run(gather())


def blocks_with_steps(events) -> list[tuple[list[DenoisedStep], DecodedBlock]]:
    found, steps = [], []
    for each in events:
        if isinstance(each, DenoisedStep):
            steps.append(each)
        else:
            found.append((steps, each))
            steps = []
    assert steps == []
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_the_steps_of_a_block_rebuild_it_with_its_confidences(llm, name):
    offset = 0
    for steps, block in blocks_with_steps(told(llm, params_of(name))):
        assert [step.step for step in steps] == list(range(block.steps + 1))
        assert {(step.offset, step.length) for step in steps} == {(offset, steps[0].length)}
        assert steps[0].places == []
        places: dict[int, tuple] = {}
        for step in steps:
            assert all(0 <= place < step.length for place in step.places)
            written = zip(step.tokens, step.confidences, strict=True)
            places |= zip(step.places, written, strict=True)
        rebuilt = [places[place] for place in range(len(block.tokens))]
        assert [token for token, _ in rebuilt] == block.tokens
        assert [sure for _, sure in rebuilt] == [math.exp(own.logprob) for own in block.logprobs]
        offset += len(block.tokens)
    assert offset == 22 or block.finish_reason == "stop"


def test_remasking_is_told_as_a_mask_again(llm):
    steps = [each for each in told(llm, params_of("remasking")) if isinstance(each, DenoisedStep)]
    masked = [step for step in steps if None in step.tokens]
    assert masked
    for step in steps:
        pairs = zip(step.tokens, step.confidences, strict=True)
        assert all((token is None) == (sure is None) for token, sure in pairs)


@pytest.mark.parametrize("name", SETTINGS)
def test_watching_changes_nothing(llm, name):
    for params in (params_of(name), params_of(name, logprobs=None)):
        watched = [each for each in told(llm, params) if isinstance(each, DecodedBlock)]
        assert watched == list(llm.blocks(PROMPT, params))
        assert watched == told(llm, params, watch=False)


def test_nobody_asks_nothing_is_made(llm):
    """The control: a plan nobody watches keeps no log-probabilities and has no listener."""
    plan = plan_completion(llm.config, PROMPT, params_of("greedy", logprobs=None))
    assert plan.watcher is None
    assert not plan.strategy.is_told
    plan.watch(lambda step: None)
    assert plan.strategy.is_told


def test_going_on_behind_committed_blocks_tells_the_same_steps(llm):
    params = params_of("confidence")
    whole = blocks_with_steps(told(llm, params))
    assert len(whole) > 3
    for cut in range(1, len(whole)):
        done = [block for _, block in whole[:cut]]
        committed = list(itertools.chain.from_iterable(block.tokens for block in done))
        again = told(llm, params, committed=committed, steps_made=sum(b.steps for b in done))
        steps = [each for each in again if isinstance(each, DenoisedStep)]
        assert steps == list(itertools.chain.from_iterable(steps for steps, _ in whole[cut:]))
