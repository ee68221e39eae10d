"""The engine on a GPU: the same face, the attention of `ragged_attention.by_varlen`."""

import copy

import pytest
import torch

from cascade_model.engine_config import EngineConfig
from cascade_model.sampler import plan_completion
from cascade_model.sampling import SamplingParams
from cascade_model.scheduler import Scheduler
from tests.tiny_models import lively_model

pytestmark = pytest.mark.gpu
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 1, 2], [3] * 17]
AXES = [{}, {"logits": "shifted"}, {"clean_half": "token_causal"}, {"attention": "bidirectional"}]


def decode(model, prompts, params) -> list[list[int]]:
    """Tokens of all prompts, decoding together where the model is."""
    device = next(model.parameters()).device
    scheduler = Scheduler(model, EngineConfig(cache_bytes=1 << 22, page_tokens=8))
    found: list[list[int]] = [[] for _ in prompts]
    for own, prompt in zip(found, prompts, strict=True):
        plan = plan_completion(model.config, prompt, params, 0, device)
        scheduler.submit(plan, lambda block, own=own: own.extend(block.tokens))
    while scheduler.step():
        pass
    return found


@pytest.mark.parametrize("axes", AXES)
def test_in_float64_the_gpu_gives_the_cpus_tokens(axes):
    model = lively_model(**axes)
    on_gpu = copy.deepcopy(model).to("cuda")
    for temperature in (0.0, 1.0):
        params = SamplingParams(max_tokens=14, temperature=temperature, stop_at_eos=False)
        assert decode(on_gpu, PROMPTS, params) == decode(model, PROMPTS, params)


@pytest.mark.parametrize("axes", AXES)
def test_in_bfloat16_every_request_completes_and_repeats_itself(axes):
    model = lively_model(**axes).to(torch.bfloat16).to("cuda")
    params = SamplingParams(max_tokens=14, logprobs=2, stop_at_eos=False)
    first = decode(model, PROMPTS, params)
    assert [len(tokens) for tokens in first] == [14] * 3
    assert decode(model, PROMPTS, params) == first
