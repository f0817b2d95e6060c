"""What the consumer does next, event by event. ``tests.simulation`` tries the same at random."""

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
from orderlib.ingestion import consumer_core as consumption
from orderlib.ingestion.consumer_core import (
    BREAKER_RECORDS,
    END_CHECK_S,
    FETCH_BYTES,
    FETCH_RECORDS,
    MAX_AGE_S,
    MAX_RECORDS,
    STALL_S,
    TOPIC_CHECK_S,
    TURN_BYTES,
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
    source = RecordPosition(topic_id="id", partition=partition, offset=offset)
    return Record(source=source, time=TIME, topic="orders", key=None, value=value, headers=headers)


def refused(one: Record) -> PreparedOrder | Reject:
    return Reject(record=one, code="malformed_json", faults=(), total_faults=0)


class Driver:
    """A core, the time, and what it asked for since one last looked."""

    def __init__(self, until: Mapping[TopicPartition, int] | None = None) -> None:
        self.core = ConsumerCore(refused, Random(1), until)
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

    def write(self, seconds: float = MAX_AGE_S * 1.01) -> Batch:
        """The batch that is due now."""
        [action] = self.tick(seconds)
        assert isinstance(action, CommitBatch)
        return action.batch

    def written(self) -> list[Command]:
        self.core.on_batch_committed()
        return self.core.take_commands()


def started(*numbers: int, until: Mapping[TopicPartition, int] | None = None) -> Driver:
    """A consumer that fetches these partitions from 0 on."""
    driver = Driver(until)
    partitions = [TopicPartition("orders", number) for number in numbers]
    driver.core.on_partitions_assigned(partitions)
    assert driver.tick() == [ResolveOffsets(frozenset(partitions))]
    driver.core.on_offsets_resolved(IDS, dict.fromkeys(partitions, 0))
    assert driver.core.take_commands() == [Assign(dict.fromkeys(partitions, 0))]
    return driver


# Batches.


def test_a_batch_closes_when_its_first_record_is_50_ms_old() -> None:
    driver = started(0)
    driver.fetch(record(0))
    assert driver.tick(0.045) == []
    driver.fetch(record(1))
    assert driver.write(0.01).ranges == {P0: OffsetRange(expected_offset=0, next_offset=2)}


def test_a_batch_closes_at_2000_records_and_nothing_more_is_wanted() -> None:
    driver = started(0)
    driver.fetch(*map(record, range(1_999)))
    assert driver.wants_records()
    assert driver.tick() == []
    driver.fetch(record(1_999))
    assert not driver.wants_records()
    assert len(driver.write(0).classified) == 2_000
    assert driver.wants_records()


def test_a_batch_closes_at_16_mib() -> None:
    driver = started(0)
    driver.fetch(record(0, value=bytes(2**24 - 1)))
    assert driver.wants_records()
    assert driver.tick() == []
    driver.fetch(record(1, value=b"1"))
    assert not driver.wants_records()
    assert len(driver.write(0).classified) == 2


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
    assert len(driver.write(0).classified) == records_in_batch


def test_one_turn_classifies_a_bounded_amount_and_the_next_continues_in_order() -> None:
    driver = started(0, 1)
    value = bytes(TURN_BYTES // 2)
    driver.core.on_fetched([record(offset, value=value) for offset in range(5)])
    driver.core.on_fetched([PartitionEof(P0, 7), record(0, 1, bytes(8 * TURN_BYTES)), record(1, 1)])
    assert not driver.wants_records()
    turns = 0
    while driver.core.has_more:
        driver.core.classify(driver.now_s)
        assert driver.core.assigned == {P0, P1}
        turns += 1
    assert turns == 4
    batch = driver.write()
    assert [one.source.offset for one, _ in batch.classified] == [0, 1, 2, 3, 4, 0, 1]
    assert batch.ranges == {
        P0: OffsetRange(expected_offset=0, next_offset=7),
        P1: OffsetRange(expected_offset=0, next_offset=2),
    }


def test_what_one_turn_left_is_in_the_next_batch_if_this_one_is_full() -> None:
    driver = started(0)
    driver.core.on_fetched(map(record, range(MAX_RECORDS + 1)))
    driver.core.classify(driver.now_s)
    assert not driver.core.has_more
    assert not driver.idle()
    assert driver.write(0).ranges == {P0: OffsetRange(expected_offset=0, next_offset=2_000)}
    driver.core.classify(driver.now_s)
    driver.written()
    assert driver.write().ranges == {P0: OffsetRange(expected_offset=2_000, next_offset=2_001)}


def test_what_was_fetched_before_a_seek_or_a_rebalance_is_not_taken_after_it() -> None:
    driver = started(0, 1)
    driver.fetch(record(0, 0), record(0, 1))
    driver.write()
    driver.core.on_fetched([record(1, 0), record(1, 1), PartitionEof(P0, 9), PartitionEof(P1, 9)])
    driver.core.on_partitions_revoked([P1])
    assert driver.fail(FenceLost({P0, P1}, {P0: 0, P1: 0})) == [Seek(P0, 0)]
    driver.core.on_partitions_assigned([P1])
    driver.tick()
    driver.core.on_offsets_resolved(IDS, {P1: 0})
    driver.core.classify(driver.now_s)
    assert driver.tick(MAX_AGE_S * 1.01) == [Assign({P1: 0})]
    assert driver.idle()


def test_records_that_came_with_the_revocation_of_their_partition_are_not_taken_once_it_is_back() -> None:
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


def test_fewer_records_are_fetched_at_once_where_they_are_large() -> None:
    driver = started(0)
    assert driver.core.fetch_limit == 1
    driver.fetch(*[record(offset, value=bytes(1_000)) for offset in range(9)])
    assert driver.core.fetch_limit == FETCH_RECORDS
    driver.fetch(record(9, value=bytes(FETCH_BYTES // 4)))
    assert driver.core.fetch_limit == 4
    driver.fetch(record(10, headers=(("h", b""),) * 99_000))
    assert driver.core.fetch_limit == 1


def test_while_one_batch_is_written_the_next_is_collected_and_follows_it() -> None:
    driver = started(0)
    driver.fetch(record(0))
    driver.write()
    driver.fetch(record(1))
    assert driver.tick(MAX_AGE_S) == []
    assert driver.written() == [CommitKafkaOffsets({P0: 1})]
    assert driver.write().ranges == {P0: OffsetRange(expected_offset=1, next_offset=2)}


def test_gaps_are_part_of_a_batch_also_where_no_record_follows() -> None:
    driver = started(0, 1)
    driver.fetch(record(5))
    driver.end(1, 3)
    batch = driver.write()
    assert batch.ranges == {
        P0: OffsetRange(expected_offset=0, next_offset=6),
        P1: OffsetRange(expected_offset=0, next_offset=3),
    }
    assert len(batch.classified) == 1


def test_a_position_that_is_not_further_changes_nothing() -> None:
    driver = started(0)
    driver.end(0, 5)
    driver.end(0, 4)
    driver.end(1, 9)
    assert driver.write().ranges == {P0: OffsetRange(expected_offset=0, next_offset=5)}
    driver.written()
    driver.end(0, 5)
    assert driver.tick(MAX_AGE_S) == []


def test_a_record_that_was_seen_already_is_passed_over() -> None:
    driver = started(0)
    driver.fetch(record(0), record(1), record(0))
    assert [one.source.offset for one, _ in driver.write().classified] == [0, 1]


# The group.


def test_partitions_are_located_together_and_fetched_from_where_the_store_is() -> None:
    driver = Driver()
    driver.core.on_partitions_assigned([P2])
    driver.core.on_partitions_assigned([P0])
    assert not driver.idle()
    assert driver.tick() == [ResolveOffsets(frozenset({P0, P2}))]
    driver.core.on_offsets_resolved(IDS, {P0: 7, P2: 9})
    assert driver.core.take_commands() == [Assign({P0: 7, P2: 9})]
    assert driver.core.assigned == {P0, P2}
    assert driver.idle()


def test_a_partition_that_was_taken_while_it_was_located_is_not_fetched() -> None:
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


def test_records_of_a_partition_that_was_taken_are_dropped_and_those_of_others_kept() -> None:
    driver = started(0, 1)
    driver.fetch(record(0, 0), record(0, 1))
    driver.core.on_partitions_revoked([P0])
    driver.fetch(record(1, 0))
    batch = driver.write()
    assert batch.ranges == {P1: OffsetRange(expected_offset=0, next_offset=1)}
    assert [one.source.partition for one, _ in batch.classified] == [1]


def test_records_that_were_dropped_make_room_and_leave_no_age_behind() -> None:
    driver = started(0, 1)
    driver.fetch(record(0, value=bytes(2**24)))
    assert not driver.wants_records()
    driver.core.on_partitions_revoked([P0])
    assert driver.wants_records()
    assert driver.tick(MAX_AGE_S) == []
    driver.fetch(record(0, 1))
    assert driver.tick() == []
    driver.write()


def test_what_was_collected_of_others_is_not_made_to_wait_by_a_partition_that_was_taken() -> None:
    driver = started(0, 1)
    driver.fetch(record(0, 0), record(0, 1))
    driver.now_s += MAX_AGE_S
    driver.core.on_partitions_revoked([P0])
    driver.fetch(record(1, 1))
    assert driver.write(0).ranges == {P1: OffsetRange(expected_offset=0, next_offset=2)}


def test_a_partition_that_went_and_came_back_is_located_anew_once_the_batch_in_hand_is_written() -> None:
    driver = started(0)
    driver.fetch(record(0))
    driver.write()
    driver.core.on_partitions_revoked([P0])
    driver.core.on_partitions_assigned([P0])
    assert driver.tick() == []
    assert driver.written() == []
    assert driver.tick() == [ResolveOffsets(frozenset({P0}))]


def test_a_batch_whose_partition_was_taken_is_written_and_not_reported() -> None:
    driver = started(0)
    driver.fetch(record(0))
    assert not driver.idle()
    driver.write()
    driver.core.on_partitions_revoked([P0])
    assert not driver.idle()
    assert driver.written() == []
    assert driver.idle()


def test_a_topic_with_another_id_stops_the_consumer() -> None:
    driver = started(0)
    driver.core.on_partitions_assigned([P1])
    driver.tick()
    driver.core.on_offsets_resolved({"orders": "another id"}, {P1: 0})
    assert driver.core.take_commands() == []
    assert driver.stopped()
    assert isinstance(driver.core.error, TopicRecreated)


# The fence.


def test_a_lost_fence_goes_on_where_the_store_is_and_the_others_are_written_without_it() -> None:
    driver = started(0, 1)
    driver.fetch(record(0, 0), record(0, 1))
    batch = driver.write()
    driver.fetch(record(1, 0), record(1, 1))
    assert driver.fail(FenceLost({P0}, {P0: 5})) == [Seek(P0, 5), CommitBatch(batch.without({P0}))]
    assert driver.written() == [CommitKafkaOffsets({P1: 1})]
    driver.fetch(record(5, 0))
    assert driver.write().ranges == {
        P0: OffsetRange(expected_offset=5, next_offset=6),
        P1: OffsetRange(expected_offset=1, next_offset=2),
    }


def test_a_stop_after_a_lost_fence_does_not_begin_the_rest_of_the_batch() -> None:
    driver = started(0, 1)
    driver.fetch(record(0, 0), record(0, 1))
    driver.write()
    driver.core.on_failed(FenceLost({P0}, {P0: 5}), driver.now_s)
    driver.core.on_stop()
    assert driver.core.take_commands() == [Seek(P0, 5)]
    assert driver.core.stopped


def test_a_fence_that_our_own_lost_commit_moved_costs_nothing() -> None:
    driver = started(0)
    driver.fetch(record(0))
    driver.write()
    driver.fetch(record(1))
    assert driver.fail(FenceLost({P0}, {P0: 1})) == []
    assert driver.write().ranges == {P0: OffsetRange(expected_offset=1, next_offset=2)}


def test_a_lost_fence_of_a_partition_that_was_taken_is_dropped() -> None:
    driver = started(0)
    driver.fetch(record(0))
    driver.write()
    driver.core.on_partitions_revoked([P0])
    assert driver.fail(FenceLost({P0}, {P0: 5})) == []
    assert driver.idle()


# Errors.


def test_an_outage_is_waited_out_in_growing_waits_and_the_same_batch_is_tried_again() -> None:
    driver = started(0)
    driver.fetch(record(0))
    batch = driver.write()
    waits_s = []
    for _ in range(6):
        [pause] = driver.fail(DatabaseUnavailable("away"))
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
    [pause] = driver.fail(DatabaseUnavailable("away"))
    assert isinstance(pause, Pause)
    assert pause.wait_s <= 2 * waits_s[0]


def test_an_outage_at_the_start_is_waited_out_too() -> None:
    driver = Driver()
    driver.core.on_partitions_assigned([P0])
    locate = driver.tick()
    [pause] = driver.fail(DatabaseUnavailable("away"))
    assert isinstance(pause, Pause)
    assert driver.tick(pause.wait_s) == locate
    driver.core.on_offsets_resolved(IDS, {P0: 3})
    assert driver.core.take_commands() == [Resume(), Assign({P0: 3})]


def test_a_store_that_does_not_answer_is_an_outage_said_once() -> None:
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
    [(consumption.Server.KAFKA, BrokerUnavailable), (consumption.Server.POSTGRES, DatabaseUnavailable)],
)
def test_the_reason_of_a_pause_names_the_server_that_does_not_answer(
    awaited: consumption.Server, kind: type[OrderlibError]
) -> None:
    driver = started(0)
    driver.fetch(record(0))
    driver.write()
    driver.now_s += STALL_S
    driver.core.on_tick(driver.now_s, awaited)
    [pause] = driver.core.take_commands()
    assert isinstance(pause, Pause)
    assert type(pause.reason) is kind
    assert str(pause.reason) == f"{awaited.value} has not answered for 2 s"


def test_each_try_has_its_own_time_to_answer() -> None:
    driver = started(0)
    driver.tick(2 * STALL_S)
    driver.fetch(record(0))
    driver.write()
    assert driver.tick(STALL_S * 0.9) == []
    driver.fail(TransactionConflict("deadlock"))
    driver.tick()
    assert driver.tick(STALL_S * 0.9) == []


def test_two_transactions_that_met_are_tried_again_at_once() -> None:
    driver = started(0)
    driver.fetch(record(0))
    batch = driver.write()
    assert driver.fail(TransactionConflict("deadlock")) == []
    assert driver.tick() == [CommitBatch(batch)]


@pytest.mark.parametrize(
    "error",
    [ConfigurationError("no such right"), BreakerTripped("nearly all"), OrderlibError("never seen before")],
)
def test_what_no_retry_can_mend_stops_the_consumer(error: OrderlibError) -> None:
    driver = started(0)
    driver.fetch(record(0))
    driver.write()
    assert driver.fail(error) == []
    assert driver.core.error is error
    assert driver.stopped()
    assert driver.tick(60) == []


def test_an_error_from_kafka_that_no_retry_can_help_stops_it_after_the_batch_in_hand() -> None:
    driver = started(0)
    driver.fetch(record(0))
    driver.write()
    error = ConfigurationError("not authorized")
    driver.core.on_fatal(error)
    assert (driver.core.stopping, driver.stopped()) == (True, False)
    assert driver.fail(ConfigurationError("no such right")) == []
    assert driver.stopped()
    assert driver.core.error is error


# The end.


def test_told_to_stop_it_waits_for_the_batch_in_hand_and_begins_nothing() -> None:
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
    "error", [DatabaseUnavailable("away"), TransactionConflict("deadlock"), FenceLost({P0}, {P0: 5})]
)
def test_told_to_stop_a_batch_that_failed_is_left_to_the_next(error: OrderlibError) -> None:
    driver = started(0)
    driver.fetch(record(0))
    driver.write()
    driver.core.on_stop()
    assert driver.fail(error) == []
    assert driver.stopped()


def test_told_to_stop_a_set_up_that_is_broken_is_said_all_the_same() -> None:
    driver = started(0)
    driver.fetch(record(0))
    driver.write()
    driver.core.on_stop()
    error = ConfigurationError("no such right")
    assert driver.fail(error) == []
    assert driver.core.error is error
    assert driver.stopped()


@pytest.mark.parametrize("error", [DatabaseUnavailable("away"), TransactionConflict("deadlock")])
def test_told_to_stop_before_the_next_try_it_leaves_at_once(error: OrderlibError) -> None:
    driver = started(0)
    driver.fetch(record(0))
    driver.write()
    driver.fail(error)
    driver.core.on_stop()
    assert driver.stopped()
    assert driver.tick(60) == []


def test_told_to_stop_with_records_collected_it_leaves_them_to_the_next() -> None:
    driver = started(0)
    driver.fetch(record(0))
    driver.core.on_stop()
    assert driver.stopped()
    assert driver.tick(MAX_AGE_S) == []


def test_told_to_stop_while_partitions_are_located_it_waits_for_the_answer() -> None:
    driver = Driver()
    driver.core.on_partitions_assigned([P0])
    driver.tick()
    driver.core.on_stop()
    assert not driver.stopped()
    driver.core.on_offsets_resolved(IDS, {P0: 0})
    assert driver.stopped()
    assert not driver.wants_records()


def test_it_leaves_when_the_group_has_handled_everything_asked_for() -> None:
    driver = started(0, until={P0: 1, P1: 4})
    driver.fetch(record(0))
    driver.write()
    driver.written()
    assert driver.tick(END_CHECK_S) == [CheckTopics(frozenset({P0, P1}))]
    driver.core.on_topics_checked(IDS, {P0: 1, P1: 3})
    assert driver.tick() == []
    assert driver.tick(END_CHECK_S) == [CheckTopics(frozenset({P0, P1}))]
    driver.core.on_topics_checked(IDS, {P0: 1, P1: 4})
    assert driver.stopped()
    assert driver.core.error is None


def test_the_ends_asked_for_are_not_looked_at_while_there_is_something_to_write() -> None:
    driver = started(0, until={P0: 1})
    driver.fetch(record(0))
    assert driver.tick() == []
    driver.write()
    assert driver.tick() == []


def test_with_nothing_to_do_it_looks_whether_the_topic_is_still_the_same() -> None:
    driver = started(0)
    assert driver.tick(TOPIC_CHECK_S * 0.49) == []
    assert driver.tick(TOPIC_CHECK_S * 0.52) == [CheckTopics(frozenset())]
    driver.core.on_topics_checked(IDS, {})
    assert driver.tick(TOPIC_CHECK_S * 0.49) == []
    driver.fetch(record(0))
    driver.write()
    driver.written()
    assert driver.tick(TOPIC_CHECK_S * 0.49) == []
    assert driver.tick(TOPIC_CHECK_S * 0.52) == [CheckTopics(frozenset())]
    driver.core.on_topics_checked({"orders": "another id"}, {})
    assert driver.core.take_commands() == []
    assert driver.stopped()
    assert isinstance(driver.core.error, TopicRecreated)


def test_without_partitions_it_still_surveys_for_those_that_starve() -> None:
    assert Driver().tick(2 * TOPIC_CHECK_S) == [CheckTopics(frozenset())]


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
