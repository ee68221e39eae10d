"""Budgets of steps and of seconds: never exceeded, never felt where they are ample."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade_model.budget import Budget, Need, share, steps_in_time
from cascade_model.errors import InputError
from cascade_model.passes import Runner
from cascade_model.sampler import decoded, plan_completion, plan_infilling, sample
from cascade_model.sampling import SamplingParams
from tests.tiny_models import MASK, lively_model

AXES = [
    {},
    {"logits": "shifted"},
    {"logits": "shifted", "block_size": 1},
    {"attention": "bidirectional", "logits": "shifted", "block_size": 8},
]
RULES = ["confidence_threshold", "low_confidence", "margin", "entropy", "random", "sequential"]
RULES += ["factor", "entropy_bound"]
SCHEDULES = ["even", "linear", "cosine", "exponential"]
OPTIONS = [
    {"remask_threshold": 0.95},
    {"remask_threshold": 0.95, "min_steps_per_block": 2},
    {"editing_threshold": 0.05},
    {"editing_threshold": 0.05, "steps_per_block": 2},
    {"guidance_scale": 1.5},
    {"min_steps_per_block": 3, "confidence_threshold": 0.0},
    {"position_temperature": 1.0},
    {"suppress_eos": "confidence"},
]
PROMPT = [1, 2, 3, 4, 5, 6, 7]
FREE = {"max_tokens": 22, "temperature": 1.0, "stop_at_eos": False}


def blocks_of(model, params, prompt=PROMPT):
    return list(sample(model, prompt, params))


def tokens_of(blocks) -> list[int]:
    return [token for block in blocks for token in block.tokens]


def steps_of(blocks) -> list[int]:
    return [block.steps for block in blocks]


def windows_of(model, params):
    return plan_completion(model.config, PROMPT, params).windows


needs = st.tuples(st.integers(1, 9), st.integers(0, 9)).map(lambda n: Need(n[0], n[0] + n[1]))


@given(st.lists(needs, min_size=1, max_size=8), st.integers(0, 40), st.data())
def test_shares_keep_to_the_budget_whatever_blocks_make_of_them(blocks, spare, data):
    left = sum(need.least for need in blocks) + spare
    is_ample = left >= sum(need.most for need in blocks)
    for index, own in enumerate(blocks):
        rest = blocks[index + 1 :]
        later = Need(sum(need.least for need in rest), sum(need.most for need in rest))
        mine = share(left, len(blocks) - index, own, later)
        assert own.least <= mine <= own.most
        assert not is_ample or mine == own.most
        left -= data.draw(st.integers(own.least, mine))
        assert left >= later.least


def test_a_share_is_equal_and_what_others_cannot_use_is_added():
    four = Need(1, 4)
    assert share(6, 3, four, Need(2, 8)) == 2
    assert share(7, 3, four, Need(2, 8)) == 2
    assert share(9, 3, four, Need(2, 5)) == 4
    assert share(4, 3, four, Need(3, 8)) == 1
    assert share(0, 3, four, Need(2, 8)) == 1


def test_steps_that_fit_into_the_time():
    assert steps_in_time(1.0, 0.25) == 4
    assert steps_in_time(0.99, 0.25) == 3
    assert steps_in_time(1.0, None) is None
    assert steps_in_time(0.0, None) == 0
    assert steps_in_time(-5.0, 0.25) == 0


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("rule", RULES)
def test_a_completion_takes_at_most_its_budget_of_steps(axes, rule):
    model = lively_model(**axes)
    for schedule, seed in zip(SCHEDULES, itertools.count(), strict=False):
        free = SamplingParams(**FREE, rule=rule, schedule=schedule, seed=seed)
        blocks = len(windows_of(model, free))
        for max_steps in (blocks, blocks + 1, blocks + 7):
            params = SamplingParams(
                **FREE, rule=rule, schedule=schedule, seed=seed, max_steps=max_steps
            )
            found = blocks_of(model, params)
            assert sum(steps_of(found)) <= max_steps
            assert len(tokens_of(found)) == 22
            assert found[-1].finish_reason == "length"


@pytest.mark.parametrize("axes", [AXES[0], AXES[1], AXES[3]])
@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_keeps_to_the_budget(axes, options):
    model = lively_model(**axes)
    free = SamplingParams(**FREE, **options)
    least = sum(free.least_steps(window.num_masked) for window in windows_of(model, free))
    for max_steps in range(least, least + 12, 2):
        found = blocks_of(model, SamplingParams(**FREE, **options, max_steps=max_steps))
        assert sum(steps_of(found)) <= max_steps
        assert len(tokens_of(found)) == 22


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("options", [{}, {"schedule": "cosine", "steps_per_block": 3}, *OPTIONS])
def test_enough_steps_give_the_same_tokens_as_no_budget(axes, options):
    model = lively_model(**axes)
    if axes.get("block_size") == 1 and "min_steps_per_block" in options:
        return
    free = SamplingParams(**FREE, **options)
    revisions = free.max_post_steps if free.editing_threshold is not None else 0
    enough = sum(window.max_steps + revisions for window in windows_of(model, free))
    params = SamplingParams(**FREE, **options, max_steps=enough)
    assert blocks_of(model, params) == blocks_of(model, free)


def test_steps_that_a_block_leaves_over_go_to_later_ones():
    model = lively_model()
    params = SamplingParams(
        max_tokens=21, rule="low_confidence", max_steps=16, stop_at_eos=False
    )  # masks 1, 4, 4, 4, 4, 4: a first share of 2 of which 1 is used, then 3, 3, 3, 3, 3
    assert steps_of(blocks_of(model, params)) == [1, 3, 3, 3, 3, 3]


def test_the_same_budget_gives_the_same_tokens_and_a_smaller_one_other_steps():
    model = lively_model()
    each = {
        steps: blocks_of(model, SamplingParams(**FREE, rule="low_confidence", max_steps=steps))
        for steps in (8, 12)
    }
    again = blocks_of(model, SamplingParams(**FREE, rule="low_confidence", max_steps=8))
    assert each[8] == again
    assert steps_of(each[8]) == [1, 1, 1, 1, 1, 1, 2]
    assert steps_of(each[12]) == [1, 1, 2, 2, 2, 2, 1]


def test_one_position_a_step_stays_so_within_an_uneven_budget():
    """Bidirectional blocks of 8, 8 and 6 masks: equal shares of 22 would be 7."""
    model = lively_model(**AXES[3])
    params = SamplingParams(**FREE, rule="first_hitting", max_steps=22)
    assert steps_of(blocks_of(model, params)) == [8, 8, 6]


def test_a_ragged_block_keeps_its_ceiling_where_masks_come_back():
    """Fewer masks than min_steps_per_block, and some of them masked again."""
    model = lively_model(block_size=8)
    for seed in range(12):
        params = SamplingParams(
            max_tokens=5, min_steps_per_block=8, remask_threshold=1.0, temperature=1.0, seed=seed
        )
        assert max(steps_of(blocks_of(model, params, [1, 2, 3]))) <= 5


@pytest.mark.parametrize("axes", [AXES[0], AXES[3]])
def test_holes_are_filled_within_the_budget(axes):
    model = lively_model(**axes)
    tokens = [1, 2, *[MASK] * 13]
    params = SamplingParams(rule="low_confidence", max_steps=6)
    plan = plan_infilling(model.config, tokens, params)
    found = list(decoded(plan, Runner(model, len(plan.canvas))))
    assert sum(steps_of(found)) == 6
    assert len(tokens_of(found)) == 13


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 5}, "max_steps=5 is below the 7 blocks.*raise max_steps to 7 or ask"),
        (
            {"max_steps": 12, "min_steps_per_block": 2},
            "max_steps=12 is below the 13 steps of 7 blocks with min_steps_per_block=2; "
            "raise max_steps to 13 or lower min_steps_per_block",
        ),
        (
            {"max_steps": 24, "rule": "first_hitting"},
            "max_steps=24 is below the 25 masks, which rule=first_hitting fills one a step",
        ),
    ],
)
def test_a_budget_that_must_be_exceeded_is_refused_with_the_numbers(options, message):
    params = SamplingParams(max_tokens=22, **options)
    with pytest.raises(InputError, match=message):
        blocks_of(lively_model(), params, [*PROMPT, 1, 2, 3, 4])
    with pytest.raises(InputError, match=message):
        plan_infilling(lively_model().config, [*PROMPT, *[MASK] * 22], params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "max_steps=0 must be at least 1"),
        ({"deadline_seconds": 0.0}, "deadline_seconds=0.0 must be above 0 and finite; leave"),
        ({"deadline_seconds": float("inf")}, "deadline_seconds=inf must be above 0"),
        ({"deadline_seconds": float("nan")}, "deadline_seconds=nan must be above 0"),
        (
            {"deadline_seconds": 1.0, "rule": "first_hitting"},
            "deadline_seconds=1.0 contradicts rule=first_hitting",
        ),
    ],
)
def test_a_limit_that_is_none_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        SamplingParams(**options)


class Timed(Runner):
    """Every pass takes one second on a clock of its own; the first one, which reads the prompt,
    takes twenty."""

    def __init__(self, model, capacity):
        super().__init__(model, capacity)
        self.now = 100.0

    def run(self, wanted):
        self.now += 20.0 if wanted.start == 0 else 1.0
        return super().run(wanted)


def timed(model, late: float = 0.0, **settings):
    """The blocks of a request that waited for `late` seconds, and the seconds from submission."""
    params = SamplingParams(**FREE, **settings)
    plan = plan_completion(model.config, PROMPT, params)
    runner = Timed(model, len(plan.canvas))
    plan.budget = Budget(plan.windows, params, clock=lambda: runner.now)
    runner.now += late
    return list(decoded(plan, runner)), runner.now - 100.0


@pytest.mark.parametrize("axes", AXES[:2])
def test_an_ample_deadline_changes_nothing(axes):
    model = lively_model(**axes)
    free = blocks_of(model, SamplingParams(**FREE, rule="low_confidence"))
    assert timed(model, rule="low_confidence", deadline_seconds=1000.0)[0] == free


def test_once_the_time_is_over_every_block_takes_one_step():
    found, _ = timed(lively_model(), late=1.0, rule="low_confidence", deadline_seconds=0.5)
    assert steps_of(found) == [1] * 7
    assert len(tokens_of(found)) == 22


def test_of_a_running_block_that_meets_the_deadline_one_step_is_left():
    """The second block is opened in time, its first step is not."""
    found, _ = timed(lively_model(), rule="low_confidence", deadline_seconds=20.5)
    assert steps_of(found) == [1, 2, 1, 1, 1, 1, 1]
    assert found[-1].finish_reason == "length"


def test_a_deadline_is_kept_by_what_a_step_was_measured_to_take():
    """Seven blocks; the prompt takes 20 seconds with the first step, each later step one."""
    model = lively_model()
    free, needed = timed(model, rule="low_confidence", deadline_seconds=1000.0)
    assert needed == 20.0 + sum(steps_of(free)) - 1
    for deadline in range(28, int(needed)):
        found, seconds = timed(model, rule="low_confidence", deadline_seconds=float(deadline))
        assert deadline - 4 <= seconds <= deadline + 1
        assert len(tokens_of(found)) == 22


def test_a_deadline_lets_no_block_below_its_least():
    settings = {"confidence_threshold": 0.0, "min_steps_per_block": 2, "deadline_seconds": 0.5}
    found, _ = timed(lively_model(), late=1.0, **settings)
    assert steps_of(found) == [1, 2, 2, 2, 2, 2, 1]


def test_revising_ends_with_the_time():
    settings = {"editing_threshold": 0.05, "steps_per_block": 1}
    free, _ = timed(lively_model(), deadline_seconds=1000.0, **settings)
    late, _ = timed(lively_model(), late=1.0, deadline_seconds=0.5, **settings)
    assert sum(steps_of(free)) > len(free)
    assert steps_of(late) == [1] * 7


def test_a_request_without_limits_asks_no_clock():
    def clock() -> float:
        raise AssertionError

    params = SamplingParams(**FREE)
    plan = plan_completion(lively_model().config, PROMPT, params)
    plan.budget = Budget(plan.windows, params, clock=clock)
    assert len(tokens_of(decoded(plan, Runner(lively_model(), len(plan.canvas))))) == 22
