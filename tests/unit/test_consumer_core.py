"""The commands of ConsumerCore, event by event. ``tests.simulation`` tests random schedules of events."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from random import Random

import pytest

from orderlib.errors import (
    BreakerTripped,
    BrokerUnavailable,
    ConfigurationError,
    DatabaseUnavailable,
    Fault,
    FenceLost,
    OrderlibError,
    TopicRecreated,
    TransactionConflict,
)
from orderlib.ingestion import consumer_core
from orderlib.ingestion.consumer_core import (
    BREAKER_RECORDS,
    CLASSIFY_BYTES,
    END_CHECK_S,
    FETCH_BYTES,
    FETCH_RECORDS,
    LINGER_S,
    MAX_RECORDS,
    STALL_S,
    TOPIC_CHECK_S,
    Assign,
    Breaker,
    CheckTopics,
    Command,
    CommitBatch,
    CommitKafkaOffsets,
    ConsumerCore,
    PartitionEof,
    Pause,
    ResolveOffsets,
    Resume,
    Seek,
)
from orderlib.ingestion.records import Batch, Headers, OffsetRange, PreparedOrder, Record, Reject, TopicPartition
from orderlib.repository import RecordPosition

TIME = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
IDS = {"orders": "id"}
P0, P1, P2 = (TopicPartition("orders", number) for number in range(3))


def record(offset: int, partition: int = 0, value: bytes = b"", headers: Headers = ()) -> Record:
    position = RecordPosition(topic_id="id", partition=partition, offset=offset)
    return Record(position=position, time=TIME, topic="orders", key=None, value=value, headers=headers)


def rejected(one: Record) -> PreparedOrder | Reject:
    return Reject(record=one, code="malformed_json", faults=(), total_faults=0)


class Driver:
    """A core with a clock."""

    def __init__(self, until: Mapping[TopicPartition, int] | None = None) -> None:
        self.core = ConsumerCore(rejected, Random(1), until)
        self.now_s = 0.0

    def end(self, partition: int, next_offset: int) -> None:
        self.core.on_fetched([PartitionEof(TopicPartition("orders", partition), next_offset)])
        self.core.classify(self.now_s)

    def fetch(self, *records: Record) -> None:
        self.core.on_fetched(records)
        while self.core.has_more:
            self.core.classify(self.now_s)

    def wants_records(self) -> bool:
        return self.core.wants_records

    def idle(self) -> bool:
        return self.core.idle

    def stopped(self) -> bool:
        return self.core.stopped

    def tick(self, seconds: float = 0.0) -> list[Command]:
        self.now_s += seconds
        self.core.on_tick(self.now_s)
        return self.core.take_commands()

    def fail(self, error: OrderlibError) -> list[Command]:
        self.core.on_failed(error, self.now_s)
        return self.core.take_commands()

    def write(self) -> Batch:
        """Return the batch that is due now."""
        [command] = self.tick()
        assert isinstance(command, CommitBatch)
        return command.batch

    def written(self) -> list[Command]:
        self.core.on_batch_committed()
        return self.core.take_commands()


def started(*numbers: int, until: Mapping[TopicPartition, int] | None = None, lag: int = 0) -> Driver:
    """Return a consumer that fetches these partitions from offset 0."""
    driver = Driver(until)
    partitions = [TopicPartition("orders", number) for number in numbers]
    driver.core.on_partitions_assigned(partitions)
    assert driver.tick() == [ResolveOffsets(frozenset(partitions))]
    driver.core.on_offsets_resolved(IDS, dict.fromkeys(partitions, 0))
    assert driver.core.take_commands() == [Assign(dict.fromkeys(partitions, 0))]
    driver.core.on_lag(lag)
    return driver


# Batches.


def test_a_batch_closes_at_once_if_the_store_is_idle_and_the_next_one_when_the_store_is_idle_again() -> None:
    driver = started(0)
    driver.fetch(record(0))
    assert driver.write().ranges == {P0: OffsetRange(expected_offset=0, next_offset=1)}
    driver.fetch(record(1))
    driver.fetch(record(2))
    assert driver.tick() == []
    driver.written()
    assert driver.write().ranges == {P0: OffsetRange(expected_offset=1, next_offset=3)}


def test_with_a_lag_of_more_than_a_batch_the_store_waits_50_ms_for_a_full_one() -> None:
    driver = started(0, lag=MAX_RECORDS + 1)
    driver.fetch(record(0))
    assert driver.core.waits_only_for_records
    assert driver.tick(0.045) == []
    driver.fetch(record(1))
    [command] = driver.tick(0.01)
    assert isinstance(command, CommitBatch)
    assert command.batch.ranges == {P0: OffsetRange(expected_offset=0, next_offset=2)}


def test_without_that_lag_a_batch_that_fills_closes_at_once() -> None:
    driver = started(0, lag=MAX_RECORDS + 1)
    driver.fetch(record(0))
    assert driver.tick() == []
    driver.core.on_lag(MAX_RECORDS)
    assert not driver.core.waits_only_for_records
    assert driver.write().ranges == {P0: OffsetRange(expected_offset=0, next_offset=1)}


def test_a_batch_closes_at_2000_records_and_fetching_stops() -> None:
    driver = started(0, lag=MAX_RECORDS + 1)
    driver.fetch(*map(record, range(1_999)))
    assert driver.wants_records()
    assert driver.tick() == []
    driver.fetch(record(1_999))
    assert not driver.wants_records()
    assert len(driver.write().classified) == 2_000
    assert driver.wants_records()


def test_a_batch_closes_at_16_mib() -> None:
    driver = started(0, lag=MAX_RECORDS + 1)
    driver.fetch(record(0, value=bytes(2**24 - 1)))
    assert driver.wants_records()
    assert driver.tick() == []
    driver.fetch(record(1, value=b"1"))
    assert not driver.wants_records()
    assert len(driver.write().classified) == 2


@pytest.mark.parametrize(
    ("headers", "records_in_batch"),
    [
        pytest.param((("name", bytes(700 * 1024)),), 24, id="large values"),
        pytest.param((("n" * 700 * 1024, b""),), 24, id="large names"),
        pytest.param((("h", b""),) * 99_000, 2, id="many"),
        pytest.param((("h", None),) * 99_000, 2, id="many without a value"),
    ],
)
def test_headers_count_towards_the_size_of_a_batch(headers: Headers, records_in_batch: int) -> None:
    driver = started(0)
    for offset in range(100):
        driver.fetch(record(offset, headers=headers))
    assert len(driver.write().classified) == records_in_batch


def test_one_turn_classifies_a_bounded_amount_and_the_next_continues_in_order() -> None:
    driver = started(0, 1)
    value = bytes(CLASSIFY_BYTES // 2)
    driver.core.on_fetched([record(offset, value=value) for offset in range(5)])
    driver.core.on_fetched([PartitionEof(P0, 7), record(0, 1, bytes(8 * CLASSIFY_BYTES)), record(1, 1)])
    assert not driver.wants_records()
    turns = 0
    while driver.core.has_more:
        driver.core.classify(driver.now_s)
        assert driver.core.assigned == {P0, P1}
        turns += 1
    assert turns == 4
    batch = driver.write()
    assert [one.position.offset for one, _ in batch.classified] == [0, 1, 2, 3, 4, 0, 1]
    assert batch.ranges == {
        P0: OffsetRange(expected_offset=0, next_offset=7),
        P1: OffsetRange(expected_offset=0, next_offset=2),
    }


def test_records_beyond_a_full_batch_are_in_the_next_batch() -> None:
    driver = started(0)
    driver.core.on_fetched(map(record, range(MAX_RECORDS + 1)))
    driver.core.classify(driver.now_s)
    assert not driver.core.has_more
    assert not driver.idle()
    assert driver.write().ranges == {P0: OffsetRange(expected_offset=0, next_offset=2_000)}
    driver.core.classify(driver.now_s)
    driver.written()
    assert driver.write().ranges == {P0: OffsetRange(expected_offset=2_000, next_offset=2_001)}


def test_records_fetched_before_a_seek_or_a_rebalance_are_dropped() -> None:
    driver = started(0, 1)
    driver.fetch(record(0, 0), record(0, 1))
    driver.write()
    driver.core.on_fetched([record(1, 0), record(1, 1), PartitionEof(P0, 9), PartitionEof(P1, 9)])
    driver.core.on_partitions_revoked([P1])
    assert driver.fail(FenceLost({P0, P1}, {P0: 0, P1: 0})) == [Seek(P0, 0), CommitKafkaOffsets({P0: 0})]
    driver.core.on_partitions_assigned([P1])
    driver.tick()
    driver.core.on_offsets_resolved(IDS, {P1: 0})
    driver.core.classify(driver.now_s)
    assert driver.tick() == [Assign({P1: 0})]
    assert driver.idle()


def test_records_returned_with_the_revocation_of_their_partition_are_dropped_even_if_it_is_assigned_again() -> None:
    driver = started(0, 1)
    driver.core.on_partitions_revoked([P0])
    driver.core.on_fetched([record(3, 0), PartitionEof(P0, 9), record(0, 1)])
    driver.core.on_partitions_assigned([P0])
    driver.tick()
    driver.core.on_offsets_resolved(IDS, {P0: 0})
    driver.core.take_commands()
    driver.core.classify(driver.now_s)
    driver.fetch(record(0, 0))
    assert driver.write().ranges == {
        P0: OffsetRange(expected_offset=0, next_offset=1),
        P1: OffsetRange(expected_offset=0, next_offset=1),
    }


def test_fewer_records_are_fetched_at_once_if_they_are_large() -> None:
    driver = started(0)
    assert driver.core.fetch_limit == 1
    driver.fetch(*[record(offset, value=bytes(1_000)) for offset in range(9)])
    assert driver.core.fetch_limit == FETCH_RECORDS
    driver.fetch(record(9, value=bytes(FETCH_BYTES // 4)))
    assert driver.core.fetch_limit == 4
    driver.fetch(record(10, headers=(("h", b""),) * 99_000))
    assert driver.core.fetch_limit == 1


def test_the_next_batch_fills_while_one_is_committed_and_follows_it() -> None:
    driver = started(0)
    driver.fetch(record(0))
    driver.write()
    driver.fetch(record(1))
    assert driver.tick() == []
    assert driver.written() == [CommitKafkaOffsets({P0: 1})]
    assert driver.write().ranges == {P0: OffsetRange(expected_offset=1, next_offset=2)}


def test_gaps_are_part_of_a_batch_even_if_no_record_follows() -> None:
    driver = started(0, 1)
    driver.fetch(record(5))
    driver.end(1, 3)
    batch = driver.write()
    assert batch.ranges == {
        P0: OffsetRange(expected_offset=0, next_offset=6),
        P1: OffsetRange(expected_offset=0, next_offset=3),
    }
    assert len(batch.classified) == 1


def test_a_partition_end_that_is_not_further_changes_nothing() -> None:
    driver = started(0)
    driver.end(0, 5)
    driver.end(0, 4)
    driver.end(1, 9)
    assert driver.write().ranges == {P0: OffsetRange(expected_offset=0, next_offset=5)}
    driver.written()
    driver.end(0, 5)
    assert driver.tick() == []


def test_a_record_that_was_fetched_before_is_skipped() -> None:
    driver = started(0)
    driver.fetch(record(0), record(1), record(0))
    assert [one.position.offset for one, _ in driver.write().classified] == [0, 1]


# The group.


def test_offsets_are_resolved_together_and_partitions_are_fetched_from_their_stored_offsets() -> None:
    driver = Driver()
    driver.core.on_partitions_assigned([P2])
    driver.core.on_partitions_assigned([P0])
    assert not driver.idle()
    assert driver.tick() == [ResolveOffsets(frozenset({P0, P2}))]
    driver.core.on_offsets_resolved(IDS, {P0: 7, P2: 9})
    assert driver.core.take_commands() == [Assign({P0: 7, P2: 9})]
    assert driver.core.assigned == {P0, P2}
    assert driver.idle()


def test_a_partition_revoked_while_its_offset_is_resolved_is_not_fetched() -> None:
    driver = Driver()
    driver.core.on_partitions_assigned([P0, P1])
    driver.tick()
    driver.core.on_partitions_revoked([P1])
    driver.core.on_offsets_resolved(IDS, {P0: 0, P1: 0})
    assert driver.core.take_commands() == [Assign({P0: 0})]
    driver.core.on_partitions_assigned([P1])
    driver.tick()
    driver.core.on_partitions_revoked([P1])
    driver.core.on_offsets_resolved(IDS, {P1: 0})
    assert driver.core.take_commands() == []


def test_a_revocation_drops_the_records_of_its_partition_and_keeps_the_others() -> None:
    driver = started(0, 1)
    driver.fetch(record(0, 0), record(0, 1))
    driver.core.on_partitions_revoked([P0])
    driver.fetch(record(1, 0))
    batch = driver.write()
    assert batch.ranges == {P1: OffsetRange(expected_offset=0, next_offset=1)}
    assert [one.position.partition for one, _ in batch.classified] == [1]


def test_dropped_records_count_neither_for_the_size_nor_for_the_age_of_a_batch() -> None:
    driver = started(0, 1, lag=MAX_RECORDS + 1)
    driver.fetch(record(0, value=bytes(2**24)))
    assert not driver.wants_records()
    driver.core.on_partitions_revoked([P0])
    assert driver.wants_records()
    assert driver.tick(LINGER_S) == []
    driver.fetch(record(0, 1))
    assert driver.tick() == []
    assert len(driver.tick(LINGER_S * 1.01)) == 1


def test_a_revocation_does_not_delay_the_records_of_other_partitions() -> None:
    driver = started(0, 1, lag=MAX_RECORDS + 1)
    driver.fetch(record(0, 0), record(0, 1))
    driver.now_s += LINGER_S
    driver.core.on_partitions_revoked([P0])
    driver.fetch(record(1, 1))
    assert driver.write().ranges == {P1: OffsetRange(expected_offset=0, next_offset=2)}


def test_a_partition_revoked_and_assigned_again_is_resolved_after_the_batch_in_progress() -> None:
    driver = started(0)
    driver.fetch(record(0))
    driver.write()
    driver.core.on_partitions_revoked([P0])
    driver.core.on_partitions_assigned([P0])
    assert driver.tick() == []
    assert driver.written() == []
    assert driver.tick() == [ResolveOffsets(frozenset({P0}))]


def test_a_batch_whose_partition_was_revoked_is_committed_but_not_to_kafka() -> None:
    driver = started(0)
    driver.fetch(record(0))
    assert not driver.idle()
    driver.write()
    driver.core.on_partitions_revoked([P0])
    assert not driver.idle()
    assert driver.written() == []
    assert driver.idle()


def test_a_recreated_topic_stops_the_consumer() -> None:
    driver = started(0)
    driver.core.on_partitions_assigned([P1])
    driver.tick()
    driver.core.on_offsets_resolved({"orders": "another id"}, {P1: 0})
    assert driver.core.take_commands() == []
    assert driver.stopped()
    assert isinstance(driver.core.error, TopicRecreated)


# The fence.


def test_after_a_lost_fence_its_partition_continues_at_the_stored_offset_and_the_others_are_committed() -> None:
    driver = started(0, 1)
    driver.fetch(record(0, 0), record(0, 1))
    batch = driver.write()
    driver.fetch(record(1, 0), record(1, 1))
    assert driver.fail(FenceLost({P0}, {P0: 5})) == [
        Seek(P0, 5),
        CommitKafkaOffsets({P0: 5}),
        CommitBatch(batch.without({P0})),
    ]
    assert driver.written() == [CommitKafkaOffsets({P1: 1})]
    driver.fetch(record(5, 0))
    assert driver.write().ranges == {
        P0: OffsetRange(expected_offset=5, next_offset=6),
        P1: OffsetRange(expected_offset=1, next_offset=2),
    }


def test_a_stop_after_a_lost_fence_does_not_commit_the_rest_of_the_batch() -> None:
    driver = started(0, 1)
    driver.fetch(record(0, 0), record(0, 1))
    driver.write()
    driver.core.on_failed(FenceLost({P0}, {P0: 5}), driver.now_s)
    driver.core.on_stop()
    assert driver.core.take_commands() == [Seek(P0, 5), CommitKafkaOffsets({P0: 5})]
    assert driver.core.stopped


def test_a_fence_lost_to_a_commit_of_the_same_batch_causes_no_seek() -> None:
    driver = started(0)
    driver.fetch(record(0))
    driver.write()
    driver.fetch(record(1))
    assert driver.fail(FenceLost({P0}, {P0: 1})) == [CommitKafkaOffsets({P0: 1})]
    assert driver.write().ranges == {P0: OffsetRange(expected_offset=1, next_offset=2)}


def test_a_lost_fence_of_a_revoked_partition_is_ignored() -> None:
    driver = started(0)
    driver.fetch(record(0))
    driver.write()
    driver.core.on_partitions_revoked([P0])
    assert driver.fail(FenceLost({P0}, {P0: 5})) == []
    assert driver.idle()


# Errors.


def test_in_an_outage_the_same_batch_is_retried_with_growing_waits() -> None:
    driver = started(0)
    driver.fetch(record(0))
    batch = driver.write()
    waits_s = []
    for _ in range(6):
        [pause] = driver.fail(DatabaseUnavailable("down"))
        assert isinstance(pause, Pause)
        waits_s.append(pause.wait_s)
        assert driver.core.in_outage
        assert not driver.wants_records()
        assert driver.tick(pause.wait_s * 0.99) == []
        assert driver.tick(pause.wait_s * 0.02) == [CommitBatch(batch)]
    assert waits_s == sorted(waits_s)
    assert driver.written() == [Resume(), CommitKafkaOffsets({P0: 1})]
    assert driver.wants_records()
    driver.fetch(record(1))
    driver.write()
    [pause] = driver.fail(DatabaseUnavailable("down"))
    assert isinstance(pause, Pause)
    assert pause.wait_s <= 2 * waits_s[0]


def test_an_outage_at_the_start_is_retried_too() -> None:
    driver = Driver()
    driver.core.on_partitions_assigned([P0])
    resolve = driver.tick()
    [pause] = driver.fail(DatabaseUnavailable("down"))
    assert isinstance(pause, Pause)
    assert driver.tick(pause.wait_s) == resolve
    driver.core.on_offsets_resolved(IDS, {P0: 3})
    assert driver.core.take_commands() == [Resume(), Assign({P0: 3})]


def test_a_store_that_does_not_respond_is_an_outage_reported_once() -> None:
    driver = started(0)
    driver.fetch(record(0))
    driver.write()
    assert driver.tick(STALL_S * 0.9) == []
    [pause] = driver.tick(STALL_S * 0.2)
    assert isinstance(pause, Pause)
    assert not driver.wants_records()
    assert driver.tick(STALL_S) == []
    assert driver.written() == [Resume(), CommitKafkaOffsets({P0: 1})]


@pytest.mark.parametrize(
    ("awaited", "kind"),
    [
        (consumer_core.AwaitedServer.KAFKA, BrokerUnavailable),
        (consumer_core.AwaitedServer.POSTGRES, DatabaseUnavailable),
    ],
)
def test_the_reason_of_a_pause_names_the_server_that_does_not_respond(
    awaited: consumer_core.AwaitedServer, kind: type[OrderlibError]
) -> None:
    driver = started(0)
    driver.fetch(record(0))
    driver.write()
    driver.now_s += STALL_S
    driver.core.on_tick(driver.now_s, awaited)
    [pause] = driver.core.take_commands()
    assert isinstance(pause, Pause)
    assert type(pause.reason) is kind
    assert str(pause.reason) == f"{awaited.value} did not answer within 2 s"


def test_each_attempt_has_its_own_time_limit() -> None:
    driver = started(0)
    driver.tick(2 * STALL_S)
    driver.fetch(record(0))
    driver.write()
    assert driver.tick(STALL_S * 0.9) == []
    driver.fail(TransactionConflict("deadlock"))
    driver.tick()
    assert driver.tick(STALL_S * 0.9) == []


def test_a_transaction_conflict_is_retried_immediately() -> None:
    driver = started(0)
    driver.fetch(record(0))
    batch = driver.write()
    assert driver.fail(TransactionConflict("deadlock")) == []
    assert driver.tick() == [CommitBatch(batch)]


@pytest.mark.parametrize(
    "error",
    [ConfigurationError("no such privilege"), BreakerTripped("nearly all"), OrderlibError("never seen before")],
)
def test_an_error_that_a_retry_cannot_correct_stops_the_consumer(error: OrderlibError) -> None:
    driver = started(0)
    driver.fetch(record(0))
    driver.write()
    assert driver.fail(error) == []
    assert driver.core.error is error
    assert driver.stopped()
    assert driver.tick(60) == []


def test_a_fatal_error_of_kafka_stops_the_consumer_after_the_batch_in_progress() -> None:
    driver = started(0)
    driver.fetch(record(0))
    driver.write()
    error = ConfigurationError("not authorized")
    driver.core.on_fatal(error)
    assert (driver.core.stopping, driver.stopped()) == (True, False)
    assert driver.fail(ConfigurationError("no such privilege")) == []
    assert driver.stopped()
    assert driver.core.error is error


# The end.


def test_a_stop_waits_for_the_batch_in_progress_and_starts_nothing_new() -> None:
    driver = started(0)
    driver.fetch(record(0))
    driver.write()
    driver.fetch(record(1))
    driver.core.on_stop()
    assert (driver.wants_records(), driver.stopped()) == (False, False)
    assert driver.written() == [CommitKafkaOffsets({P0: 1})]
    assert (driver.wants_records(), driver.stopped()) == (False, True)
    assert driver.tick(60) == []


@pytest.mark.parametrize(
    "error", [DatabaseUnavailable("down"), TransactionConflict("deadlock"), FenceLost({P0}, {P0: 5})]
)
def test_a_batch_that_fails_during_a_stop_is_not_retried(error: OrderlibError) -> None:
    driver = started(0)
    driver.fetch(record(0))
    driver.write()
    driver.core.on_stop()
    assert driver.fail(error) == []
    assert driver.stopped()


def test_a_configuration_error_during_a_stop_is_reported() -> None:
    driver = started(0)
    driver.fetch(record(0))
    driver.write()
    driver.core.on_stop()
    error = ConfigurationError("no such privilege")
    assert driver.fail(error) == []
    assert driver.core.error is error
    assert driver.stopped()


@pytest.mark.parametrize("error", [DatabaseUnavailable("down"), TransactionConflict("deadlock")])
def test_a_stop_before_a_retry_takes_effect_at_once(error: OrderlibError) -> None:
    driver = started(0)
    driver.fetch(record(0))
    driver.write()
    driver.fail(error)
    driver.core.on_stop()
    assert driver.stopped()
    assert driver.tick(60) == []


def test_a_stop_drops_records_that_are_not_in_a_submitted_batch() -> None:
    driver = started(0)
    driver.fetch(record(0))
    driver.core.on_stop()
    assert driver.stopped()
    assert driver.tick() == []


def test_a_stop_waits_for_offsets_that_are_being_resolved() -> None:
    driver = Driver()
    driver.core.on_partitions_assigned([P0])
    driver.tick()
    driver.core.on_stop()
    assert not driver.stopped()
    driver.core.on_offsets_resolved(IDS, {P0: 0})
    assert driver.stopped()
    assert not driver.wants_records()


def test_it_stops_when_the_group_has_reached_the_offsets_to_stop_at() -> None:
    driver = started(0, until={P0: 1, P1: 4})
    driver.fetch(record(0))
    driver.write()
    driver.written()
    assert driver.tick(END_CHECK_S) == [CheckTopics()]
    driver.core.on_topics_checked(IDS, {P0: 1, P1: 3})
    assert driver.tick() == []
    assert driver.tick(END_CHECK_S) == [CheckTopics()]
    driver.core.on_topics_checked(IDS, {P0: 1, P1: 4})
    assert driver.stopped()
    assert driver.core.error is None


def test_the_offsets_to_stop_at_are_not_checked_while_there_are_records_to_commit() -> None:
    driver = started(0, until={P0: 1})
    driver.fetch(record(0))
    driver.write()
    assert driver.tick() == []


def test_it_stops_at_the_offsets_to_stop_at_although_records_keep_arriving() -> None:
    driver = started(0, until={P0: 1, P1: 4})
    driver.fetch(record(0))
    driver.write()
    driver.written()
    for offset in range(1, 100):
        driver.fetch(record(offset))
        [task] = driver.tick(0.01)
        if task == CheckTopics():
            break
        driver.written()
    assert driver.now_s == pytest.approx(END_CHECK_S)
    # Another member has not reached the end of its partition yet.
    driver.core.on_topics_checked(IDS, {P0: offset, P1: 3})
    batch = driver.write()
    assert batch.ranges == {P0: OffsetRange(expected_offset=offset, next_offset=offset + 1)}
    driver.written()
    driver.fetch(record(offset + 1))
    assert driver.tick(END_CHECK_S * 1.01) == [CheckTopics()]
    driver.core.on_topics_checked(IDS, {P0: offset + 1, P1: 4})
    assert driver.stopped()
    assert driver.core.error is None


def test_an_idle_consumer_checks_the_topic_ids() -> None:
    driver = started(0)
    assert driver.tick(TOPIC_CHECK_S * 0.49) == []
    assert driver.tick(TOPIC_CHECK_S * 0.52) == [CheckTopics()]
    driver.core.on_topics_checked(IDS, {})
    assert driver.tick(TOPIC_CHECK_S * 0.49) == []
    driver.fetch(record(0))
    driver.write()
    driver.written()
    assert driver.tick(TOPIC_CHECK_S * 0.49) == []
    assert driver.tick(TOPIC_CHECK_S * 0.52) == [CheckTopics()]
    driver.core.on_topics_checked({"orders": "another id"}, {})
    assert driver.core.take_commands() == []
    assert driver.stopped()
    assert isinstance(driver.core.error, TopicRecreated)


def test_a_consumer_without_partitions_checks_the_topics_too() -> None:
    assert Driver().tick(2 * TOPIC_CHECK_S) == [CheckTopics()]


def test_offsets_that_went_back_are_followed_although_their_partition_has_no_new_records() -> None:
    """A server was promoted without the last transactions."""
    driver = started(0, 1)
    driver.fetch(record(0, 0), record(0, 1))
    driver.write()
    driver.written()
    driver.tick(TOPIC_CHECK_S)
    driver.fetch(record(1, 1))
    driver.core.on_topics_checked(IDS, {P0: 0, P1: 1, P2: 7})
    assert driver.core.take_commands() == [Seek(P0, 0), CommitKafkaOffsets({P0: 0})]
    driver.fetch(record(0, 0))
    assert driver.write().ranges == {
        P0: OffsetRange(expected_offset=0, next_offset=1),
        P1: OffsetRange(expected_offset=1, next_offset=2),
    }


def test_offsets_that_went_back_are_followed_after_a_batch_of_another_partition() -> None:
    driver = started(0, 1)
    driver.fetch(record(0, 0))
    driver.write()
    driver.written()
    driver.fetch(record(0, 1))
    driver.write()
    driver.fetch(record(1, 0))
    driver.core.on_batch_committed({P0: 0, P1: 1})
    assert driver.core.take_commands() == [CommitKafkaOffsets({P1: 1}), Seek(P0, 0), CommitKafkaOffsets({P0: 0})]
    assert driver.idle()


# The breaker.


def test_the_breaker_trips_when_95_percent_of_the_last_1000_records_were_rejected() -> None:
    breaker = Breaker(0.95)
    assert not breaker.would_trip([True] * 949 + [False] * 51)
    assert breaker.would_trip([True] * 950 + [False] * 50)


def test_the_breaker_counts_records_of_earlier_batches() -> None:
    breaker = Breaker(0.95)
    breaker.record([False] * 50 + [True] * 900)
    assert not breaker.would_trip([True] * 49)
    assert breaker.would_trip([True] * 50)


def test_the_breaker_does_not_count_rejects_older_than_1000_records() -> None:
    breaker = Breaker(0.95)
    for _ in range(3):
        assert not breaker.would_trip([True] * 949)
        breaker.record([True] * 949)
        assert not breaker.would_trip([False] * 51)
        breaker.record([False] * 51)


def test_the_breaker_never_trips_on_fewer_than_1000_records() -> None:
    breaker = Breaker(0.95)
    breaker.record([True] * (BREAKER_RECORDS - 1))
    assert breaker.would_trip([True])


def test_the_breaker_does_not_count_a_batch_that_was_rolled_back() -> None:
    breaker = Breaker(0.95)
    for _ in range(3):
        assert not breaker.would_trip([True] * (BREAKER_RECORDS - 1))


def test_the_breaker_trips_in_the_middle_of_a_batch_that_ends_with_valid_records() -> None:
    assert Breaker(0.95).would_trip([True] * BREAKER_RECORDS + [False] * BREAKER_RECORDS)


def test_a_fraction_of_0_switches_the_breaker_off() -> None:
    assert not Breaker(0.0).would_trip([True] * 5 * BREAKER_RECORDS)


def test_the_error_of_the_breaker_names_the_most_frequent_cause_without_a_value() -> None:
    fault = Fault(path="$.items", expected="an array", found="a string")
    rejects = [Reject(record=record(0), code="invalid_order", faults=(fault,), total_faults=1)] * 2
    error = str(Breaker(0.95).error(rejects))
    assert error.startswith(
        "at least 95 % of the last 1,000 records were rejected (most often invalid_order at $.items, found a string)"
    )
