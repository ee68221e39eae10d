"""What `/metrics` tells, read back by Prometheus' own parser."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cascade_model.counters import Counters
from jobs.serve_metrics import _OF_SAMPLERS, ServeMetrics

BLOCK = {"tokens": [1, 2, 3, 4], "passes": 3}


def told(metrics: ServeMetrics, *samplers) -> dict[str, float]:
    """Samples by name and labels."""
    families = text_string_to_metric_families(metrics.text(samplers).decode())
    return {
        sample.name + str(sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def of(name: str, **labels: str) -> str:
    return name + str(sorted({"ingress": "one", **labels}.items()))


def test_a_choice_is_counted_from_its_admission_to_its_end():
    metrics = ServeMetrics("one")
    with metrics.choice() as choice:
        assert told(metrics)[of("cascade_queue")] == 1
        choice.block(BLOCK)
        choice.block(BLOCK)
        now = told(metrics)
        assert (now[of("cascade_queue")], now[of("cascade_streams")]) == (0, 1)
    with pytest.raises(ValueError, match="x"), metrics.choice():
        raise ValueError("x")
    metrics.sampler_lost()
    now = told(metrics)
    assert (now[of("cascade_queue")], now[of("cascade_streams")]) == (0, 0)
    assert now[of("cascade_blocks_total")] == 2
    assert now[of("cascade_tokens_total")] == 8
    assert now[of("cascade_passes_total")] == 6
    assert now[of("cascade_sampler_losses_total")] == 1
    assert now[of("cascade_time_to_first_block_seconds_count")] == 1


def test_answers_are_counted_by_status():
    metrics = ServeMetrics("one")
    for status in (200, 429, 200):
        metrics.answered(status)
    now = told(metrics)
    assert now[of("cascade_requests_total", status="200")] == 2
    assert now[of("cascade_requests_total", status="429")] == 1


def test_every_sampler_is_told_of_with_its_name():
    state = {key: 7 for key, *_ in _OF_SAMPLERS}
    now = told(ServeMetrics("one"), {**state, "replica": "a"}, {**state, "replica": "b"})
    assert now["cascade_samplers[]"] == 2
    for _, name, family, _ in _OF_SAMPLERS:
        end = "_total" if "Counter" in family.__name__ else ""
        assert now[f"cascade_{name}{end}[('sampler', 'b')]"] == 7


def test_what_is_told_of_samplers_is_what_they_count():
    known = {*Counters.__slots__, "places", "blocks_left", "scoring"}
    assert {key for key, *_ in _OF_SAMPLERS} <= known
