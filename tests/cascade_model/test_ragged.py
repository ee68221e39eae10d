"""One pass over many sequences: bit for bit what each gives alone."""

import pytest
import torch

from cascade_model.engine_config import EngineConfig
from cascade_model.model import Transformer
from cascade_model.passes import Pass
from cascade_model.ragged import Job, run_together
from cascade_model.sampler import plan_completion
from cascade_model.sampling import SamplingParams
from cascade_model.scheduler import Scheduler, arena_of
from tests.tiny_models import tiny_config


def float_model(**axes) -> Transformer:
    """Large enough for the kernels that matter, in float32."""
    shape = {"hidden_size": 64, "head_dim": 16, "num_heads": 4, "num_kv_heads": 2}
    model = Transformer(tiny_config(**(shape | {"intermediate_size": 160, "vocab_size": 500,
                                                "mask_id": 499, "pad_id": 498, "eos_id": 497}
                                       | axes)))  # fmt: skip
    model.init_weights(1)
    return model.eval()


def prefill(rows: int, seed: int) -> Pass:
    generator = torch.Generator().manual_seed(seed)
    return Pass(
        tokens=torch.randint(0, 490, (rows,), generator=generator).tolist(),
        start=0,
        limits=[min((place // 4 + 1) * 4, rows) for place in range(rows)],
        visible=rows,
        reads=list(range(rows))[-2:],
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_logits_are_bit_equal_alone_and_in_any_company(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = float_model()
        arena = arena_of(model, EngineConfig(cache_bytes=1 << 24, page_tokens=4))
        passes = [prefill(rows, rows) for rows in (1, 2, 3, 4, 5, 7, 12, 33, 90)]
        jobs = [Job(wanted, arena.take(arena.pages_for(wanted.visible))) for wanted in passes]
        alone = [run_together(model, arena, [job])[0] for job in jobs]
        for company in (jobs, jobs[::-1], jobs[1::2], jobs[:3]):
            together = run_together(model, arena, company)
            for job, logits in zip(company, together, strict=True):
                [own] = [a for j, a in zip(jobs, alone, strict=True) if j is job]
                assert torch.equal(logits, own)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("axes", [{}, {"logits": "shifted"}, {"clean_half": "token_causal"}])
def test_all_logits_of_a_request_are_bit_equal_whatever_the_engine_does(axes):
    """Alone, in company, after a known prefix, after preemption, with prompts cut into chunks."""
    model = float_model(**axes)
    prompt = [number % 400 for number in range(70)]
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=5, stop_at_eos=False)
    small = 2 * 2 * 2 * 16 * 4 * 4 * 30  # bytes: 30 pages of 4 tokens
    ways = {
        "alone": ({}, 0),
        "company": ({}, 7),
        "chunks": ({"rows_per_round": 9}, 5),
        "pressure": ({"cache_bytes": small, "prefix_share": 0.0}, 5),
    }
    seen = {name: logits_of(model, prompt, params, *way) for name, way in ways.items()}
    seen["known prefix"] = logits_of(model, prompt, params, {}, 2, warm=True)
    for name, logits in seen.items():
        assert len(logits) == len(seen["alone"]), name
        for ours, alone in zip(logits, seen["alone"], strict=True):
            assert torch.equal(ours, alone), name


def logits_of(model, prompt, params, settings, company, *, warm=False) -> list[torch.Tensor]:
    """Every logit that one request's strategy was given."""
    config = EngineConfig(**({"page_tokens": 4} | settings))
    scheduler = Scheduler(model, config)
    if warm:
        scheduler.submit(plan_completion(model.config, prompt, params), lambda block: None)
        while scheduler.step():
            pass
    found: list[torch.Tensor] = []
    for number in range(company):
        other = [(number * 7 + k) % 400 for k in range(3 + number)]
        long = SamplingParams(max_tokens=40, seed=number, stop_at_eos=False)
        plan = plan_completion(model.config, other, long)
        scheduler.submit(plan, lambda block: None)
    plan = plan_completion(model.config, prompt, params)
    step = plan.strategy.step

    def watched(canvas, window, prediction):
        found.append(prediction.logits.clone())
        return step(canvas, window, prediction)

    plan.strategy.step = watched  # type: ignore[method-assign]
    scheduler.submit(plan, lambda block: None)
    while scheduler.step():
        pass
    if "cache_bytes" in settings:  # the youngest, watched one gives its pages up
        assert scheduler.counters.preemptions > 0
    if warm:
        assert scheduler.counters.prefix_tokens > 0
    return found
