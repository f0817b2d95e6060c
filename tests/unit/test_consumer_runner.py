"""How long records wait in the runner. Kafka, the store and the clock are simulated; nothing takes real time."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from random import Random
from typing import Any

import pytest

from orderlib.entry_point import EXIT_CONFIGURATION, EXIT_FAILED, StopEvent
from orderlib.errors import ConfigurationError, DatabaseUnavailable, FenceLost, OrderlibError
from orderlib.ingestion.consumer_core import (
    MAX_RECORDS,
    AwaitedServer,
    CheckTopics,
    CommitBatch,
    ConsumerCore,
    ResolveOffsets,
    StoreTask,
)
from orderlib.ingestion.records import PreparedOrder, Record, Reject, TopicPartition
from orderlib.repository import Outcome, RecordPosition
from services.consumer.health import Health
from services.consumer.kafka_client import FetchFailed, KafkaClient, PollResult
from services.consumer.metrics import ConsumerMetrics
from services.consumer.runner import ConsumerRunner, Result
from services.kafka import TopicInfo

PARTITION = TopicPartition("orders", 0)
TIME = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)

#: A batch takes this long in the simulated store.
BATCH_S = 0.008
#: A fetch takes this long, and returns at most this number of records, however many there are.
FETCH_S = 0.001
READY_RECORDS = 90

METRICS = ConsumerMetrics()


def rejected(record: Record) -> PreparedOrder | Reject:
    return Reject(record=record, code="malformed_json", faults=(), total_faults=0)


class World(KafkaClient):
    """A partition whose records arrive at given times, the store, and the clock of both."""

    unavailable = False
    unavailable_message = ""
    awaited = AwaitedServer.POSTGRES

    def __init__(self, arrivals_s: Iterable[float]) -> None:
        self.now_s = 0.0
        self._arrivals_s = list(arrivals_s)
        self._fetched = 0
        self._task: StoreTask | None = None
        self._done_at_s = 0.0
        self.down_until_s = 0.0
        #: Returns the result of a store task in place of the simulated store's own, or ``None``.
        self.fail_task: Callable[[StoreTask], Result | None] = lambda _task: None
        #: What the first fetch returns instead of records.
        self.failures: list[PollResult] = []
        #: Seconds from the arrival of each record until it was committed.
        self.waited_s: list[float] = []
        self.batches: list[int] = []
        self.outcomes: Counter[Outcome] = Counter()
        #: When each event was logged, and its fields.
        self.logged: list[tuple[float, str, dict[str, Any]]] = []
        self.committed_to_kafka: list[Mapping[TopicPartition, int]] = []
        self.stop_event = StopEvent()
        self.core = ConsumerCore(rejected, Random(1))
        self.core.on_partitions_assigned([PARTITION])

    def run(self) -> int:
        """Run until all records are committed, and stop. Return the exit status."""
        runner = ConsumerRunner(
            self.core, self, self, Health(self.clock), METRICS, self.clock, self.stop_event, self.log
        )
        while (status := runner.run_once()) is None:
            if len(self.waited_s) == len(self._arrivals_s):
                self.stop_event.set()
        return status

    def clock(self) -> float:
        return self.now_s

    def log(self, name: str, _level: int = 0, **fields: object) -> None:
        self.logged.append((self.now_s, name, fields))

    # Kafka.

    def fetch(self, _topic_ids: Mapping[str, str], limit: int, timeout_s: float) -> list[PollResult]:
        if timeout_s and PARTITION in self.core.assigned and self._fetched < len(self._arrivals_s):
            self.now_s = max(self.now_s, min(self.now_s + timeout_s, self._arrivals_s[self._fetched]))
        elif timeout_s:
            self.now_s += timeout_s
        self.now_s += FETCH_S
        found, self.failures = self.failures, []
        while (
            PARTITION in self.core.assigned
            and len(found) < min(limit, READY_RECORDS)
            and self._fetched < len(self._arrivals_s)
            and self._arrivals_s[self._fetched] <= self.now_s
        ):
            position = RecordPosition(topic_id="id", partition=0, offset=self._fetched)
            found.append(Record(position=position, time=TIME, topic="orders", key=None, value=b"value"))
            self._fetched += 1
        return found

    def poll(self, _topic_ids: Mapping[str, str], timeout_s: float) -> list[PollResult]:
        self.now_s += timeout_s
        return []

    def request_ends(self, partitions: Iterable[TopicPartition]) -> Callable[[], Mapping[TopicPartition, int] | None]:
        end = sum(arrival_s <= self.now_s for arrival_s in self._arrivals_s)
        return lambda: dict.fromkeys(partitions, end)

    def assign(self, next_offsets: Mapping[TopicPartition, int]) -> None:
        pass

    def seek(self, _partition: TopicPartition, next_offset: int) -> None:
        self._fetched = next_offset

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    def commit(self, next_offsets: Mapping[TopicPartition, int]) -> None:
        self.committed_to_kafka.append(next_offsets)

    def describe(self) -> Mapping[str, TopicInfo]:
        raise NotImplementedError

    request_topics = earliest = ends = join = close = describe  # type: ignore[assignment]  # never called

    # The store.

    stored_offsets: Mapping[TopicPartition, int] = {}

    def submit(self, task: StoreTask) -> None:
        self._task, self._done_at_s = task, self.now_s + BATCH_S

    def take_result(self, timeout_s: float) -> Result | None:
        if self._task is None or self._done_at_s > self.now_s + timeout_s:
            self.now_s += timeout_s
            return None
        self.now_s = max(self.now_s, self._done_at_s)
        task, self._task = self._task, None
        if self.now_s < self.down_until_s:
            return DatabaseUnavailable("down")
        if (result := self.fail_task(task)) is not None:
            return result
        match task:
            case CommitBatch(batch):
                self.batches.append(len(batch.classified))
                self.outcomes = self.outcomes + Counter({Outcome.REJECTED: len(batch.classified)})
                self.waited_s += [
                    self.now_s - self._arrivals_s[record.position.offset] for record, _ in batch.classified
                ]
                return ConsumerCore.on_batch_committed
            case ResolveOffsets():
                return lambda core: core.on_offsets_resolved({"orders": "id"}, {PARTITION: 0})
            case _:
                return lambda core: core.on_topics_checked({}, {})

    def abort(self) -> None:
        raise NotImplementedError


def evenly(per_s: int, seconds: float) -> list[float]:
    rng = Random(1)
    return sorted(1 + seconds * rng.random() for _ in range(int(per_s * seconds)))


@pytest.mark.parametrize("per_s", [1, 100, 1_000, 5_000])
def test_a_record_waits_for_the_batch_before_it_and_for_its_own_and_for_nothing_else(per_s: int) -> None:
    world = World(evenly(per_s, min(20, 2_000 / per_s)))
    world.run()
    assert max(world.waited_s) < 2 * BATCH_S + 5 * FETCH_S
    assert min(world.waited_s) < BATCH_S + 3 * FETCH_S


def test_with_a_large_lag_the_batches_are_full() -> None:
    world = World([0.0] * 10 * MAX_RECORDS)
    world.run()
    # At first neither the lag nor the size of records is known. At the end the lag is no larger than a batch.
    assert world.batches[1:9] == [MAX_RECORDS] * 8


def test_after_an_outage_the_waiting_records_are_stored_and_later_ones_do_not_wait() -> None:
    world = World(evenly(1_000, 10))
    world.down_until_s = 5
    world.run()
    assert len(world.waited_s) == 10_000
    # The lag is measured once a second. Until then, batches wait for more records.
    assert max(world.waited_s[-2_000:]) < 2 * BATCH_S + 5 * FETCH_S


def test_offsets_are_committed_to_kafka_once_a_second_and_when_it_stops() -> None:
    world = World(evenly(100, 10))
    world.run()
    assert world.committed_to_kafka[-1] == {PARTITION: 1_000}
    assert 8 <= len(world.committed_to_kafka) <= 14


def test_a_new_member_commits_the_stored_offsets_of_its_partitions_to_kafka() -> None:
    world = World([])
    world.run()
    assert world.committed_to_kafka == [{PARTITION: 0}]


def summaries(world: World, name: str = "summary") -> list[tuple[float, dict[str, Any]]]:
    return [(at_s, fields) for at_s, logged, fields in world.logged if logged == name]


def test_while_records_arrive_they_are_summed_up_every_10_s_and_at_the_end() -> None:
    world = World([1 + n / 100 for n in range(2_500)])
    world.run()
    found = summaries(world)
    assert [round(at_s) for at_s, _ in found] == [11, 21]
    assert all(abs(fields["records_per_second"] - 100) <= 2 and fields["lag"] < 5 for _, fields in found)
    [(_, of_all)] = summaries(world, "summary_of_all")
    expected = {"records": 2_500, "rejected": 2_500, "records_per_second": 100, "seconds": 25.0, "lag": 0}
    assert of_all == expected


def test_idle_time_is_not_summed_up_and_does_not_count_in_the_rate() -> None:
    world = World([*(1 + n / 100 for n in range(200)), *(60 + n / 100 for n in range(200))])
    world.run()
    found = summaries(world)
    assert [round(at_s) for at_s, _ in found] == [11]
    assert (found[0][1]["records"], found[0][1]["seconds"]) == (200, 2.0)
    [(_, of_all)] = summaries(world, "summary_of_all")
    assert (of_all["records"], of_all["seconds"]) == (400, 4.0)
    assert abs(of_all["records_per_second"] - 100) <= 2


def test_the_exit_status_has_the_reason_that_is_logged() -> None:
    acl, lost = ConfigurationError("no ACL"), OrderlibError("record lost")
    for first, second, expected in ((acl, lost, EXIT_CONFIGURATION), (lost, acl, EXIT_FAILED)):
        world = World([1.0])
        world.failures = [FetchFailed(None, first), FetchFailed(None, second)]
        assert world.run() == expected
        assert [fields["reason"] for _, name, fields in world.logged if name == "stopped"] == [str(first)]


def test_a_lost_fence_and_a_changed_stored_offset_are_logged_each_by_its_name() -> None:
    names = {"fence_lost", "stored_offset_changed"}

    def commit_twice(task: StoreTask) -> Result | None:
        """An earlier COMMIT of this batch succeeded, and its response was lost."""
        if not isinstance(task, CommitBatch):
            return None
        world.stop_event.set()
        return FenceLost({PARTITION}, {PARTITION: 1})

    def go_back(task: StoreTask) -> Result | None:
        """A standby without the last transactions was promoted. The idle consumer notices that by itself."""
        if isinstance(task, CheckTopics):
            return lambda core: core.on_topics_checked({}, {PARTITION: 0})
        return None

    world = World([1.0])
    world.fail_task = commit_twice
    world.run()
    assert [name for _, name, _ in world.logged if name in names] == ["fence_lost"]

    world = World([1.0, 60.0])
    world.fail_task = go_back
    world.run()
    found = [(name, fields) for _, name, fields in world.logged if name in names]
    assert found == [("stored_offset_changed", {"topic": "orders", "partition": 0, "next_offset": 0})]
