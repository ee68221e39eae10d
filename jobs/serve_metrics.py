"""What `/metrics` tells, in Prometheus' text format.

An ingress counts what passes through it, with its own id as a label. What the samplers do is read
when somebody asks and from all of them (`DeploymentHandle.broadcast`): they count anyway, so
nothing is measured for it while they decode. Blocks per second is `rate(cascade_blocks_total)`;
passes per token is `cascade_passes_total / cascade_tokens_total`.
"""

import time
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

_FIRST_BLOCK_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

# What a sampler states (`Sampler.state`): its key, the metric, the kind, and what it is.
_OF_SAMPLERS = (
    ("places", "slots", GaugeMetricFamily, "Choices that a sampler decodes at once"),
    ("running", "running", GaugeMetricFamily, "Choices that hold pages in the engine"),
    ("waiting", "engine_queue", GaugeMetricFamily, "Choices that wait inside the engine"),
    ("blocks_left", "blocks_left", GaugeMetricFamily, "Blocks that running choices may yet take"),
    ("scoring", "scoring", GaugeMetricFamily, "Texts that are scored or wait for it"),
    ("pages_free", "pages_free", GaugeMetricFamily, "Pages of keys and values that are free"),
    ("rounds", "engine_rounds", CounterMetricFamily, "Forward passes over many choices"),
    ("passes", "engine_passes", CounterMetricFamily, "Passes of single choices in them"),
    ("tokens", "engine_tokens", CounterMetricFamily, "Tokens that were decoded"),
    ("preemptions", "preemptions", CounterMetricFamily, "Times pages were given up for another"),
    ("prefix_lookups", "cache_lookups", CounterMetricFamily, "Prompts looked up in the cache"),
    ("prefix_hits", "cache_hits", CounterMetricFamily, "Prompts whose beginning was known"),
    ("prefix_tokens", "cache_tokens", CounterMetricFamily, "Tokens taken over from the cache"),
)


class ServeMetrics:
    """The counts of one ingress replica."""

    def __init__(self, ingress: str) -> None:
        self._registry = CollectorRegistry()
        self._labels = {"ingress": ingress}

        def of(kind: Any, name: str, told: str, *labels: str, **settings: Any) -> Any:
            names = ("ingress", *labels)
            metric = kind(name, told, names, registry=self._registry, **settings)
            return metric if labels else metric.labels(ingress)

        self._requests = of(Counter, "cascade_requests", "HTTP answers by status", "status")
        self._blocks = of(Counter, "cascade_blocks", "Blocks that reached the ingress")
        self._tokens = of(Counter, "cascade_tokens", "Tokens in them")
        self._passes = of(Counter, "cascade_passes", "Forward passes that they took")
        self._losses = of(
            Counter, "cascade_sampler_losses", "Times a choice lost its sampler in mid-stream"
        )
        self._waiting = of(
            Gauge, "cascade_queue", "Choices without a first block: queued, or prompt being read"
        )
        self._decoding = of(Gauge, "cascade_streams", "Choices between first and last block")
        self._first = of(
            Histogram,
            "cascade_time_to_first_block_seconds",
            "From the request's admission to its first block",
            buckets=_FIRST_BLOCK_SECONDS,
        )

    def answered(self, status: int) -> None:
        """Count an HTTP answer as it begins."""
        self._requests.labels(**self._labels, status=str(status)).inc()

    def sampler_lost(self) -> None:
        """Count a choice that has to look for another sampler."""
        self._losses.inc()

    def choice(self) -> "ChoiceMetrics":
        """What happens to one choice; a context."""
        return ChoiceMetrics(self)

    def text(self, samplers: Iterable[dict[str, Any]]) -> bytes:
        """The exposition, with the state of every sampler that answered."""
        registry = CollectorRegistry()
        registry.register(_Samplers(list(samplers)))
        return generate_latest(self._registry) + generate_latest(registry)


class ChoiceMetrics:
    """The metrics of one choice from its admission to its end, however it ends."""

    def __init__(self, metrics: ServeMetrics) -> None:
        self._metrics, self._began, self._has_begun = metrics, time.monotonic(), False

    def __enter__(self) -> "ChoiceMetrics":
        self._metrics._waiting.inc()
        return self

    def block(self, block: dict[str, Any]) -> None:
        """Count a block."""
        metrics = self._metrics
        if not self._has_begun:
            self._has_begun = True
            metrics._first.observe(time.monotonic() - self._began)
            metrics._waiting.dec()
            metrics._decoding.inc()
        metrics._blocks.inc()
        metrics._tokens.inc(len(block["tokens"]))
        metrics._passes.inc(block["passes"])

    def __exit__(self, *_: object) -> None:
        (self._metrics._decoding if self._has_begun else self._metrics._waiting).dec()


class _Samplers:
    """Turns what samplers state into metric families."""

    def __init__(self, states: list[dict[str, Any]]) -> None:
        self._states = states

    def collect(self) -> Iterable[Any]:
        """The families (called by the registry)."""
        count = GaugeMetricFamily("cascade_samplers", "Samplers that answered this scrape")
        count.add_metric([], len(self._states))
        yield count
        for key, name, family, told in _OF_SAMPLERS:
            metric = family(f"cascade_{name}", told, labels=["sampler"])
            for state in self._states:
                metric.add_metric([state["replica"]], state[key])
            yield metric
