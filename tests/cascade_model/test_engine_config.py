"""What an engine has room for is said before there is one, and holds when there is."""

import pytest

from cascade_model.engine_config import EngineConfig, room_of
from cascade_model.errors import DoesNotFit
from cascade_model.llm import LLM
from cascade_model.sampler import plan_infilling
from cascade_model.sampling import SamplingParams
from cascade_model.scheduler import Scheduler
from tests.benchmarks.serve_runs import write_model
from tests.tiny_models import MASK, lively_model

FAMILIES = {"causal": {}, "both ways": {"attention": "bidirectional", "block_size": 6}}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_of_a_model_folder_has_the_room_that_its_config_says(
    tmp_path, precision, family
):
    folder = write_model(tmp_path / "tiny", **FAMILIES[family])
    config = EngineConfig(precision=precision, cache_bytes=100_000, page_tokens=14)
    with LLM.load(folder, config) as llm:
        arena = llm.engine.scheduler.arena
        room = room_of(llm.config, config)
        assert (room.num_pages, room.page_tokens) == (arena.num_pages, arena.page_tokens)
        held = arena.entries.numel() * arena.entries.element_size()
        assert held <= 100_000 < held + held // arena.num_pages


@pytest.mark.parametrize("guidance", [0.0, 1.0])
@pytest.mark.parametrize("pages", [2, 3, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_text_is_taken_and_one_token_more_is_refused(family, pages, guidance):
    model = lively_model(**FAMILIES[family])
    page = 2 * 2 * 2 * 4 * 8 * 8  # keys and values, layers, heads, size, bytes, tokens
    config = EngineConfig(cache_bytes=pages * page, page_tokens=8)
    scheduler = Scheduler(model, config)
    room = room_of(model.config, config, number_bytes=8)
    assert room == scheduler.room
    longest = room.longest(2 if guidance else 1)
    assert longest == 8 * (pages // (2 if guidance else 1))
    params = SamplingParams(max_tokens=1, guidance_scale=guidance)

    def plan(length: int):
        return plan_infilling(model.config, [1] * (length - 1) + [MASK], params)

    scheduler.check(plan(longest))
    with pytest.raises(DoesNotFit, match=f"cache_bytes={pages * page} holds {8 * pages};"):
        scheduler.check(plan(longest + 1))
