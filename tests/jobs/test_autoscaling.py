"""The policy on numbers, what a sampler states, and Serve's own wrapper around the policy."""

import math
from types import SimpleNamespace

import pytest

from jobs.autoscaling import POLICY, Load, QueuedBlocks

POLICY_OF_8 = {"places": 8.0, "blocks_a_request": 20.0, "blocks_per_second": 50.0}


def wanted(replicas, running, queued, policy=None, **changes) -> int:
    policy = policy or QueuedBlocks(queue_seconds=2.0, free_share=0.25)
    settings = {**POLICY_OF_8, **changes}
    return policy.wanted(replicas=replicas, running=running, queued=queued, **settings)


def test_nothing_to_do_wants_nobody_and_anything_wants_one():
    assert wanted(3, 0, 0) == 0
    assert wanted(0, 0, 1) == wanted(1, 0.2, 0) == wanted(3, 1, 0) == 1


def test_replicas_are_added_before_a_queue_is_there():
    assert [wanted(1, running, 0) for running in (6, 7, 12, 13)] == [1, 2, 2, 3]
    full = QueuedBlocks(free_share=0.0)
    assert [wanted(1, running, 0, full) for running in (8, 9)] == [1, 2]


def test_a_short_queue_of_blocks_is_left_to_those_that_are_there():
    few = wanted(2, 12, 4, blocks_a_request=2.0)
    many = wanted(2, 12, 4, blocks_a_request=200.0)
    assert (few, many) == (2, 2)  # four requests could not fill a third replica
    assert wanted(2, 12, 20, blocks_a_request=2.0) == 2
    assert wanted(2, 12, 20, blocks_a_request=200.0) == 4


def test_more_is_never_wanted_than_the_requests_could_fill():
    for running in range(0, 40, 3):
        for queued in range(0, 40, 3):
            found = wanted(2, running, queued, blocks_a_request=1e6)
            assert found <= max(1, math.ceil(running / 6), math.ceil((running + queued) / 8))


def test_more_load_never_wants_fewer():
    for queued in range(30):
        row = [wanted(2, running, queued) for running in range(40)]
        assert row == sorted(row)
    column = [wanted(2, 16, queued) for queued in range(60)]
    assert column == sorted(column)
    assert column[-1] > column[0]


def test_an_unknown_speed_counts_places_alone():
    assert wanted(0, 0, 17, blocks_per_second=0.0) == 3


def test_a_load_counts_blocks_left_and_speed_while_busy():
    clock = SimpleNamespace(now=0.0)
    load = Load(8, lambda: clock.now)
    assert load.statement()["blocks_per_second"] == 0
    with load.request(10) as block_done:
        for _ in range(5):
            clock.now += 0.5
            block_done()
        told = load.statement()
        assert (told["running"], told["places"], told["blocks_left"]) == (1, 8, 5)
        assert told["blocks_per_second"] == pytest.approx(2.0)
    clock.now += 100  # idle time is no slowness
    told = load.statement()
    assert (told["running"], told["blocks_left"]) == (0, 0)
    assert told["blocks_per_second"] == pytest.approx(2.0)
    assert told["blocks_a_request"] == pytest.approx(0.9 * 16 + 0.1 * 5)


def test_a_choice_that_fails_leaves_nothing_behind():
    load = Load(8)
    with pytest.raises(ValueError, match="lost"), load.request(10):
        raise ValueError("lost")
    assert (load.running, load.blocks_left) == (0, 0)


def context(**changes):
    told = {
        "running": {"a": 8.0, "b": 8.0},
        "places": {"a": 8.0, "b": 8.0},
        "blocks_a_request": {"a": 100.0},
        "blocks_per_second": {"a": 10.0, "b": 0.0},
    }
    fields = {
        "aggregated_metrics": told,
        "total_queued_requests": 16.0,
        "total_num_requests": 32.0,
        "current_num_replicas": 2,
    }
    return SimpleNamespace(**{**fields, **changes})


def test_the_policy_reads_serves_context():
    assert QueuedBlocks()(context()) == (4, {})
    assert QueuedBlocks()(context(aggregated_metrics=None)) == (4, {})
    nothing = {"aggregated_metrics": {}, "total_queued_requests": 0.0, "total_num_requests": 0.0}
    assert QueuedBlocks()(context(**nothing)) == (0, {})
    # What Serve's handles count is believed where no sampler states it yet.
    only_handles = {**nothing, "total_num_requests": 13.0}
    assert QueuedBlocks()(context(**only_handles))[0] == 3


def test_serve_loads_the_policy_by_its_name_with_its_settings():
    from ray.serve.config import AutoscalingPolicy

    policy = AutoscalingPolicy(policy_function=POLICY, policy_kwargs={"queue_seconds": 9.0})
    loaded = policy.get_policy()(**policy.policy_kwargs)
    assert loaded.queue_seconds == 9.0
    assert loaded(context())[0] == 4
