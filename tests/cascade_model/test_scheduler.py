"""Continuous batching: the same tokens in any company, room for all, no page lost."""

import random

import pytest

from cascade_model.errors import InputError
from cascade_model.sampler import plan_completion, sample
from cascade_model.sampling import SamplingParams
from cascade_model.scheduler import Scheduler, SchedulerConfig
from tests.tiny_models import lively_model

AXES = [
    {},
    {"clean_half": "token_causal"},
    {"logits": "shifted"},
    {"logits": "shifted", "first_place": "own"},
    {"logits": "shifted", "block_size": 1},
    {"attention": "bidirectional", "block_size": 8},
]
MIXED = [
    {"temperature": 1.0, "seed": 1},
    {"rule": "low_confidence", "steps_per_block": 2},
    {"temperature": 0.7, "confidence_threshold": 0.2, "seed": 3},
    {"rule": "entropy_bound", "entropy_bound": 0.4},
    {"guidance_scale": 1.0, "temperature": 1.0},
    {"remask_threshold": 0.8},
    {"editing_threshold": 0.3},
    {"rule": "random", "seed": 5},
]


def requests(count: int, seed: int = 0) -> list[tuple[list[int], SamplingParams]]:
    """Prompts and settings of all kinds."""
    chance = random.Random(seed)
    made = []
    for number in range(count):
        prompt = [chance.randrange(13) for _ in range(chance.randrange(1, 40))]
        settings = dict(MIXED[number % len(MIXED)], max_tokens=chance.randrange(1, 24))
        made.append((prompt, SamplingParams(**settings)))
    return made


def decode_all(scheduler: Scheduler, wanted, *, at_once: bool = True) -> list[list[int]]:
    """Tokens of every request, submitted all at once or one every other round."""
    results: list[list[int]] = [[] for _ in wanted]
    for number, (prompt, params) in enumerate(wanted):
        plan = plan_completion(scheduler.model.config, prompt, params)
        scheduler.check(plan)
        scheduler.submit(plan, lambda block, number=number: results[number].extend(block.tokens))
        if not at_once:
            scheduler.step()
            scheduler.step()
    while scheduler.step():
        pass
    return results


def alone(model, wanted) -> list[list[int]]:
    return [
        [token for block in sample(model, prompt, params) for token in block.tokens]
        for prompt, params in wanted
    ]


def assert_nothing_left(scheduler: Scheduler) -> None:
    assert not scheduler.running
    assert not scheduler.waiting
    scheduler.prefixes.clear()
    assert scheduler.arena.free_pages == scheduler.arena.num_pages


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("at_once", [True, False])
def test_a_request_gives_the_same_tokens_alone_and_in_company(axes, at_once):
    model = lively_model(**axes)
    wanted = requests(24)
    scheduler = Scheduler(model, SchedulerConfig(max_sequences=9, page_tokens=8))
    assert decode_all(scheduler, wanted, at_once=at_once) == alone(model, wanted)
    assert scheduler.counters.rounds < scheduler.counters.passes / 2
    assert_nothing_left(scheduler)


@pytest.mark.parametrize("axes", AXES)
def test_small_rounds_cut_prompts_and_change_nothing(axes):
    model = lively_model(**axes)
    wanted = requests(10, seed=4)
    config = SchedulerConfig(rows_per_round=6, page_tokens=4, prefix_share=0.0)
    assert decode_all(Scheduler(model, config), wanted) == alone(model, wanted)


def bytes_of(pages: int, page_tokens: int = 8) -> int:
    config = lively_model().config
    return pages * page_tokens * 2 * config.num_layers * config.num_kv_heads * config.head_dim * 8


@pytest.mark.parametrize("axes", AXES)
def test_under_memory_pressure_sequences_give_way_and_lose_nothing(axes):
    model = lively_model(**axes)
    wanted = requests(24, seed=2)
    config = SchedulerConfig(cache_bytes=bytes_of(18), page_tokens=8, prefix_share=0.3)
    scheduler = Scheduler(model, config)
    assert decode_all(scheduler, wanted) == alone(model, wanted)
    if axes.get("attention") != "bidirectional":
        assert scheduler.counters.preemptions > 0
    assert_nothing_left(scheduler)


@pytest.mark.parametrize("axes", AXES[:5])
def test_a_known_beginning_is_not_computed_again(axes):
    model = lively_model(**axes)
    prompt = [number % 13 for number in range(64)]
    wanted = [([*prompt, number], SamplingParams(max_tokens=6)) for number in range(4)]
    scheduler = Scheduler(model, SchedulerConfig(page_tokens=8))
    found = [decode_all(scheduler, [item])[0] for item in wanted]
    assert found == alone(model, wanted)
    assert scheduler.counters.prefix_tokens == 3 * 64
    assert_nothing_left(scheduler)


def test_a_turn_of_a_conversation_finds_the_turns_before_it():
    model = lively_model()
    scheduler = Scheduler(model, SchedulerConfig(page_tokens=4))
    params = SamplingParams(max_tokens=12, stop_at_eos=False)
    first = decode_all(scheduler, [([1, 2, 3, 4, 5], params)])[0]
    before = scheduler.counters.prefix_tokens
    second = [1, 2, 3, 4, 5, *first, 6, 7]
    assert decode_all(scheduler, [(second, params)]) == alone(model, [(second, params)])
    assert scheduler.counters.prefix_tokens - before >= 12


@pytest.mark.parametrize("axes", AXES[:5])
@pytest.mark.parametrize("length", [7, 8, 15, 23, 24, 31])
@pytest.mark.parametrize("steps", [1, None])
def test_only_clean_entries_become_known(axes, length, steps):
    """Prompts that end just before, on and behind the edges of pages and blocks."""
    model = lively_model(**axes)
    scheduler = Scheduler(model, SchedulerConfig(page_tokens=8))
    params = SamplingParams(max_tokens=18, steps_per_block=steps, stop_at_eos=False)
    prompt = [number % 13 for number in range(length)]
    for _ in range(3):
        wanted = [(prompt, params)]
        [found] = decode_all(scheduler, wanted)
        assert [found] == alone(model, wanted)
        prompt = [*prompt, *found[:11], 3]


def test_the_failure_of_one_sequence_is_its_own():
    model = lively_model()
    scheduler = Scheduler(model, SchedulerConfig(page_tokens=8))
    wanted, errors, good = requests(6, seed=9), [], []

    def refuse(block):
        raise OSError("the reader is gone")

    for number, (prompt, params) in enumerate(wanted):
        deliver = refuse if number == 2 else good.append
        plan = plan_completion(model.config, prompt, params)
        scheduler.submit(plan, deliver, errors.append)
    while scheduler.step():
        pass
    assert [str(error) for error in errors] == ["the reader is gone"]
    assert len(good) == sum(
        len(list(sample(model, *item))) for number, item in enumerate(wanted) if number != 2
    )
    assert_nothing_left(scheduler)


def test_a_cache_of_less_than_a_page_is_refused():
    with pytest.raises(InputError, match="cache_bytes=10 holds not one page"):
        Scheduler(lively_model(), SchedulerConfig(cache_bytes=10))


@pytest.mark.parametrize("axes", AXES)
def test_cancelling_at_any_step_gives_every_page_back(axes):
    model = lively_model(**axes)
    for rounds in range(12):
        scheduler = Scheduler(model, SchedulerConfig(page_tokens=8))
        wanted = requests(6, seed=rounds)
        plans = [plan_completion(model.config, *item) for item in wanted]
        sequences = [scheduler.submit(plan, lambda block: None) for plan in plans]
        for _ in range(rounds):
            scheduler.step()
        for sequence in sequences:
            scheduler.cancel(sequence)
            scheduler.cancel(sequence)
        assert not scheduler.step()
        assert_nothing_left(scheduler)


def test_a_short_request_does_not_wait_for_a_long_one():
    model = lively_model(max_sequence_length=1024)
    scheduler = Scheduler(model, SchedulerConfig(rows_per_round=32))
    done: list[str] = []
    ends = {"long": [1] * 600, "short": [1, 2, 3]}
    for name, prompt in ends.items():
        params = SamplingParams(max_tokens=8 if name == "short" else 64, stop_at_eos=False)
        plan = plan_completion(model.config, prompt, params)
        scheduler.submit(plan, lambda block, name=name: done.append(name))
    rounds = 0
    while "short" not in done or done.count("short") < 3:
        rounds += 1
        assert scheduler.step()
    alone_rounds = 12  # 5 places of the ragged block and 8 more, a pass each at most
    assert rounds <= alone_rounds + 1
    assert "long" not in done


def test_a_long_prompt_gets_its_turn_among_short_requests():
    """Short ones keep coming; the long one, which cannot be cut, is not passed over twice."""
    model = lively_model(attention="bidirectional", block_size=8, max_sequence_length=512)
    scheduler = Scheduler(model, SchedulerConfig(rows_per_round=32))
    done: list[str] = []

    def add(name, prompt):
        plan = plan_completion(model.config, prompt, SamplingParams(max_tokens=4))
        scheduler.submit(plan, lambda block: done.append(name))

    add("long", [1] * 100)
    for _ in range(40):
        add("short", [1, 2, 3])
        scheduler.step()
    assert "long" in done


def test_what_can_never_fit_is_refused_before_anything_is_taken():
    model = lively_model()
    scheduler = Scheduler(model, SchedulerConfig(cache_bytes=bytes_of(2), page_tokens=8))
    plan = plan_completion(model.config, [1] * 30, SamplingParams(max_tokens=20))
    with pytest.raises(InputError, match="needs keys and values of 52 tokens"):
        scheduler.check(plan)
    assert scheduler.arena.free_pages == 2
