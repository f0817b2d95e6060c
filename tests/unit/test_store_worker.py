"""The thread of the store, seen from the main thread, which also handles signals."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast
from unittest.mock import Mock

import pytest

from orderlib.errors import BrokerUnavailable
from orderlib.ingestion.consumer_core import Breaker, CheckTopics, ResolveOffsets, StoreTask
from orderlib.ingestion.records import TopicPartition
from services.consumer.metrics import ConsumerMetrics
from services.consumer.runner import Result, StoreWorker
from services.kafka import TopicInfo

P0, P1 = TopicPartition("orders", 0), TopicPartition("orders", 1)


@pytest.fixture
def worker() -> Iterator[StoreWorker]:
    unused = cast(Any, None)
    worker = StoreWorker(unused, unused, Breaker(0.9), ConsumerMetrics())
    yield worker
    worker.close(timeout_s=5)


@contextlib.contextmanager
def alarms(first_s: float, second_s: float) -> Iterator[None]:
    """Send two signals. The handler of the first returns late, and that of the second fails."""
    handlers = iter((lambda: time.sleep(0.1), lambda: pytest.fail("the wait has no limit")))
    before = signal.signal(signal.SIGALRM, lambda *_: next(handlers)())
    signal.setitimer(signal.ITIMER_REAL, first_s, second_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class OneLeader:
    """Kafka with two partitions. The second has no leader."""

    def __init__(self) -> None:
        self.asked: list[frozenset[TopicPartition]] = []

    def request_topics(self, *_: object) -> Callable[[], dict[str, TopicInfo]]:
        return lambda: {"orders": TopicInfo(topic_id="id", partitions=frozenset({0, 1}))}

    def earliest(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        self.asked.append(frozenset(partitions))
        if P1 in partitions:
            raise BrokerUnavailable("no leader")
        return dict.fromkeys(partitions, 0)


class OffsetsOf:
    """A store with these offsets."""

    def __init__(self, stored: dict[TopicPartition, int]) -> None:
        self._stored = stored

    def next_offsets(self, _: object, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        return {p: self._stored[p] for p in partitions if p in self._stored}

    def start_partitions(self, _: object, earliest: dict[TopicPartition, int]) -> dict[TopicPartition, int]:
        return earliest

    def index_advice(self) -> None:
        return None


def carry_out(stored: dict[TopicPartition, int], kafka: OneLeader, *tasks: StoreTask) -> list[Result | None]:
    worker = StoreWorker(cast(Any, OffsetsOf(stored)), cast(Any, kafka), Breaker(0.9), ConsumerMetrics())
    results = []
    for task in tasks:
        worker.submit(task)
        results.append(worker.take_result(5))
    worker.close(timeout_s=5)
    return results


def test_a_partition_that_was_read_before_needs_no_leader_to_be_resolved() -> None:
    kafka = OneLeader()
    [result] = carry_out({P1: 7}, kafka, ResolveOffsets(frozenset({P0, P1})))
    assert kafka.asked == [{P0}]
    core = Mock()
    assert callable(result)
    result(core)
    core.on_offsets_resolved.assert_called_once_with({"orders": "id"}, {P0: 0, P1: 7})
    [result] = carry_out({P0: 3}, kafka, ResolveOffsets(frozenset({P0, P1})))
    assert isinstance(result, BrokerUnavailable)


def test_a_new_partition_without_a_leader_is_asked_for_once_in_a_while() -> None:
    kafka = OneLeader()
    results = carry_out({P0: 3}, kafka, CheckTopics(), CheckTopics())
    assert kafka.asked == [{P1}]
    for result in results:
        core = Mock()
        assert callable(result)
        result(core)
        core.on_topics_checked.assert_called_once_with({"orders": "id"}, {P0: 3})


def test_a_wait_for_a_result_ends_although_a_signal_is_handled_until_after_its_limit(worker: StoreWorker) -> None:
    with alarms(0.02, 1):
        assert worker.take_result(0.05) is None
