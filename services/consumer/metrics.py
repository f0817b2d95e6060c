"""The metrics of the consumer."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Gauge, Histogram, disable_created_metrics
from prometheus_client import Counter as Count
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from orderlib.repository import Outcome


class _EndToEnd(Collector):
    """A histogram of the seconds from a record's timestamp to its commit.

    It takes the values of a batch at once, because one call of ``Histogram.observe`` per record is too slow.
    """

    _BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 60, 600, 3600)

    def __init__(self) -> None:
        self._counts = [0] * (len(self._BOUNDS_S) + 1)
        self._sum_s = 0.0

    def observe(self, ages_s: Iterable[float]) -> None:
        for age_s in ages_s:
            self._counts[bisect_left(self._BOUNDS_S, age_s)] += 1
            # The clock of a producer may be ahead, and the sum of a histogram must never decrease.
            if age_s > 0:
                self._sum_s += age_s

    def collect(self) -> Iterator[Metric]:
        total, buckets = 0, []
        for bound, count in zip([*map(str, self._BOUNDS_S), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        yield HistogramMetricFamily(
            "orders_end_to_end_seconds", "Seconds from a record's timestamp to its commit", buckets, self._sum_s
        )


class ConsumerMetrics:
    """The metrics of the consumer; ``docs/metrics.md`` describes them."""

    def __init__(self) -> None:
        # Without this, each counter and histogram would also export the time of its creation.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # it has no annotations
        self.registry = CollectorRegistry()
        self.records = Count("orders_records", "Records handled", ["outcome"], registry=self.registry)
        self.rejects = Count("orders_rejects", "Records rejected", ["code"], registry=self.registry)
        self.unknown_fields = Count(
            "orders_unknown_fields", "Records with fields that orderlib does not know", registry=self.registry
        )
        self.batch_records = Histogram(
            "orders_batch_records",
            "Records in a committed batch",
            buckets=(1, 10, 50, 100, 500, 1000, 2000),
            registry=self.registry,
        )
        self.batch_seconds = Histogram(
            "orders_batch_seconds", "Seconds a batch spent in a step", ["step"], registry=self.registry
        )
        self.lag = Gauge("orders_lag_records", "Log end minus next offset", ["partition"], registry=self.registry)
        self.retries = Count(
            "orders_retries",
            "Failed attempts to use PostgreSQL or Kafka, and unreadable records",
            ["cause"],
            registry=self.registry,
        )
        started = Gauge(
            "process_start_time_seconds",
            "Start time of the process since unix epoch in seconds.",
            registry=self.registry,
        )
        started.set_to_current_time()
        self.end_to_end = _EndToEnd()
        self.registry.register(self.end_to_end)
        for outcome in Outcome:
            self.records.labels(outcome)

    def count_rejects(self, codes: Counter[str]) -> None:
        """Count rejected records by code."""
        for code, count in codes.items():
            self.rejects.labels(code).inc(count)
