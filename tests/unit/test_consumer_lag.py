"""When a partition without progress makes the consumer not ready. Kafka and the clock are simulated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest

from orderlib.errors import BrokerUnavailable, OrderlibError, UnreadableRecord
from orderlib.ingestion.records import TopicPartition
from services.consumer.kafka_client import FetchFailed, KafkaClient
from services.consumer.lag import LagMonitor
from services.consumer.metrics import ConsumerMetrics

OWN, FOREIGN = TopicPartition("orders", 0), TopicPartition("orders", 1)
OFFSETS = {OWN: 5, FOREIGN: 7}


class Monitored:
    """A monitor whose partitions have the given log ends, and the clock of both."""

    def __init__(self, ends: Mapping[TopicPartition, int]) -> None:
        self.now_s = 1_000.0
        self._ends = ends
        self.logged: list[dict[str, Any]] = []
        self.metrics = ConsumerMetrics()
        kafka = cast("KafkaClient", SimpleNamespace(request_ends=self._request_ends))
        self.monitor = LagMonitor(kafka, self.metrics.lag, lambda: self.now_s, self._log)
        self.monitor.on_assigned({OWN: OFFSETS[OWN]})

    def _request_ends(self, partitions: Iterable[TopicPartition]) -> Callable[[], Mapping[TopicPartition, int]]:
        return lambda: {partition: self._ends[partition] for partition in partitions if partition in self._ends}

    def _log(self, _name: str, _level: int, **fields: object) -> None:
        self.logged.append(fields)

    def run(self, seconds: float, *, in_outage: bool = False, error: FetchFailed | None = None) -> str | None:
        """Let the time pass. Return why the consumer is not ready then."""
        for _ in range(round(seconds * 2)):
            self.now_s += 0.5
            if error is not None:
                self.monitor.on_error(error)
            self.monitor.update(frozenset({OWN}), OFFSETS, in_outage=in_outage)
        return self.monitor.stalled_reason()

    def shown_lag(self, partition: TopicPartition) -> float | None:
        return self.metrics.registry.get_sample_value("orders_lag_records", {"partition": str(partition.partition)})


def test_a_partition_of_another_member_without_progress_is_named_with_its_lag() -> None:
    monitored = Monitored({OWN: 5, FOREIGN: 1_007})
    assert monitored.run(15) is None
    assert monitored.shown_lag(FOREIGN) is None
    reason = monitored.run(10)
    assert reason is not None
    assert reason.endswith("none was stored for 20 s; partition and lag: orders[1] 1,000")
    assert monitored.shown_lag(FOREIGN) == 1_000


def test_a_partition_whose_leader_does_not_answer_is_named() -> None:
    monitored = Monitored({FOREIGN: 7})
    assert monitored.run(15) is None
    assert monitored.shown_lag(OWN) is None
    assert monitored.run(10) == "the leader has not answered for 20 s, so the lag is unknown: orders[0]"
    assert monitored.run(1, in_outage=True) is None
    assert monitored.run(15) is None


def test_no_partition_is_without_progress_in_an_outage_or_without_lag() -> None:
    assert Monitored(OFFSETS).run(100) is None
    monitored = Monitored({OWN: 5, FOREIGN: 1_007})
    assert monitored.run(100, in_outage=True) is None
    assert monitored.run(15) is None
    assert monitored.run(10) is not None


@pytest.mark.parametrize("partition", [None, OWN], ids=["group", "partition"])
def test_an_error_that_repeats_is_the_reason_until_it_is_over(partition: TopicPartition | None) -> None:
    monitored = Monitored(OFFSETS)
    error = FetchFailed(partition, BrokerUnavailable("inconsistent group protocol"))
    assert monitored.run(0.5, error=error) is None
    assert monitored.run(60, error=error) == "inconsistent group protocol"
    # It occurred twice a second, and is logged twice a minute.
    assert [fields["reason"] for fields in monitored.logged] == ["inconsistent group protocol"] * 3
    assert monitored.run(10) == "inconsistent group protocol"
    assert monitored.run(10) is None


@pytest.mark.parametrize("progress", [{OWN: 6}, {FOREIGN: 8}], ids=["same partition", "other partition"])
def test_an_unreadable_record_is_the_reason_at_once_and_until_its_partition_moves(
    progress: Mapping[TopicPartition, int],
) -> None:
    monitored = Monitored(OFFSETS)
    error: OrderlibError = UnreadableRecord("orders[0] at offset 5: invalid compressed data")
    assert monitored.run(0.5, error=FetchFailed(OWN, error)) == str(error)
    monitored.monitor.on_stored(progress)
    assert (monitored.monitor.stalled_reason() is None) is (OWN in progress)
