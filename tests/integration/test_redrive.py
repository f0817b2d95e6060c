"""Redrive on PostgreSQL: which stored version a reject may replace."""

from __future__ import annotations

import datetime as dt
from collections import Counter

import attrs
import psycopg
import pytest

import orderlib
from orderlib import DatabaseUnavailable, Order, Outcome, decode_order, encode_order
from orderlib.errors import Fault, MalformedJson
from orderlib.ingestion.records import (
    Batch,
    Classified,
    OffsetRange,
    PreparedOrder,
    Record,
    Reject,
    TopicPartition,
    classify_record,
)
from orderlib.postgres import queries, rejects
from orderlib.postgres.connections import open_connection
from orderlib.postgres.consumer_store import ConsumerStore
from orderlib.postgres.rejects import redrive
from orderlib.postgres.rows import pack_rows
from orderlib.postgres.writes import store
from orderlib.repository import RecordPosition, RecordState
from orderlib.testing import SAMPLE
from tests.support.conflicts import given_up_after_conflicts
from tests.support.databases import Database

TIME = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
ORDER = decode_order(SAMPLE)
REFUSAL = MalformedJson([Fault(path="$", expected="an order", found="something else")])


def position(offset: int) -> RecordPosition:
    return RecordPosition(topic_id="topic", partition=0, offset=offset)


def keep_reject(database: Database, order: Order, offset: int) -> None:
    """Store a record as a reject, as a consumer would that could not read it."""
    record = record_of(order, offset)
    handle(database, (record, Reject.of(record, REFUSAL)))


def record_of(order: Order, offset: int) -> Record:
    return Record(position=position(offset), time=TIME, topic="orders", key=None, value=encode_order(order))


def handle(database: Database, *classified: tuple[Record, Classified]) -> None:
    """Handle records as one batch of a consumer that starts at the first."""
    offset = classified[0][0].position.offset
    consumer_store = ConsumerStore(database.writer_url, "tests", lambda: 0.0)
    partition = TopicPartition("orders", 0)
    with psycopg.connect(database.superuser_url) as operator:
        operator.execute("UPDATE consumer_offsets SET next_offset = %s", [offset])
    consumer_store.start_partitions({"orders": "topic"}, {partition: offset})
    batch = Batch(
        topic_ids={"orders": "topic"},
        ranges={partition: OffsetRange(expected_offset=offset, next_offset=offset + len(classified))},
        classified=classified,
    )
    consumer_store.write(batch, lambda _: None)
    consumer_store.close()


def states(database: Database, *offsets: int) -> list[RecordState]:
    with orderlib.connect(database.reader_url) as repository:
        return [repository.position_state("orders", 0, offset).state for offset in offsets]


@pytest.mark.parametrize(
    ("stored_offset", "outcome"), [(4, Outcome.STORED), (5, Outcome.SUPERSEDED), (6, Outcome.SUPERSEDED)]
)
@pytest.mark.parametrize("same_content", [True, False])
def test_a_reject_replaces_only_a_version_from_a_lower_offset(
    database: Database, stored_offset: int, outcome: Outcome, same_content: bool
) -> None:
    in_reject = ORDER if same_content else attrs.evolve(ORDER, sm_id=ORDER.sm_id + 1)
    if same_content and outcome is Outcome.STORED:
        outcome = Outcome.DUPLICATE
    keep_reject(database, in_reject, 5)
    with open_connection(database.writer_url, application_name="tests") as writer:
        # The time of the stored record is before that of the reject, at it, or after it: it decides nothing.
        for time in (TIME - dt.timedelta(days=1), TIME, TIME + dt.timedelta(days=1)):
            writer.execute("DELETE FROM orders")
            with writer.transaction():
                store(writer, [PreparedOrder.of(ORDER, position(stored_offset), time, pack_rows=pack_rows)])
            found = sum(redrive(writer, 10_000), Counter())
            assert found == Counter({outcome: 1})
            writer.execute("UPDATE rejects SET redriven_at = NULL, redrive_outcome = NULL")
            stored = writer.execute("SELECT sm_id, source_offset FROM orders").fetchall()
            replaced = outcome in {Outcome.STORED, Outcome.DUPLICATE}
            assert stored == [(in_reject.sm_id if replaced else ORDER.sm_id, 5 if replaced else stored_offset)]


def test_a_frozen_consumer_delays_a_redrive_no_longer_than_a_wait_for_a_lock(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "LIMIT_LOCK_WAIT", "SET LOCAL lock_timeout = '100ms'")
    keep_reject(database, ORDER, 5)
    with (
        psycopg.connect(database.superuser_url) as consumer,
        open_connection(database.writer_url, application_name="tests") as writer,
    ):
        assert consumer.execute("SELECT FROM consumer_offsets FOR UPDATE").rowcount > 0
        with pytest.raises(DatabaseUnavailable, match="55P03"):
            list(redrive(writer, 10_000))
        consumer.rollback()
        assert sum(redrive(writer, 10_000), Counter()) == Counter({Outcome.STORED: 1})


def test_a_reject_that_is_accepted_after_a_rewind_is_handled_and_needs_no_redrive(database: Database) -> None:
    bad, other = record_of(ORDER, 4), record_of(attrs.evolve(ORDER, order_uid="other"), 5)
    handle(database, (bad, Reject.of(bad, REFUSAL)), (other, Reject.of(other, REFUSAL)))
    keep_reject(database, ORDER, 6)
    assert states(database, 4, 5, 6) == [RecordState.REJECTED] * 3
    handle(database, (bad, Reject.of(bad, REFUSAL)), (other, classify_record(other, 10_000, pack_rows)))
    # The record after them was not handled again.
    assert states(database, 4, 5, 6) == [RecordState.REJECTED, RecordState.HANDLED, RecordState.WAITING]
    with open_connection(database.writer_url, application_name="tests") as writer:
        found = writer.execute("SELECT record_offset, redrive_outcome FROM rejects").fetchall()
        assert dict(found) == {4: None, 5: "superseded", 6: None}
        assert sum(redrive(writer, 10_000), Counter()).total() == 2


def test_a_batch_does_not_wait_for_a_redrive_of_the_rejects_that_it_accepts(database: Database) -> None:
    keep_reject(database, ORDER, 5)
    record = record_of(ORDER, 5)
    with psycopg.connect(database.superuser_url) as redriving:
        redriving.execute("SELECT FROM rejects FOR UPDATE")
        handle(database, (record, classify_record(record, 10_000, pack_rows)))
    assert states(database, 5) == [RecordState.REJECTED]
    with open_connection(database.writer_url, application_name="tests") as writer:
        assert sum(redrive(writer, 10_000), Counter()) == Counter({Outcome.SUPERSEDED: 1})
    assert states(database, 5) == [RecordState.HANDLED]


def test_a_conflict_repeats_the_transaction_until_there_are_too_many(database: Database) -> None:
    keep_reject(database, ORDER, 5)
    with open_connection(database.writer_url, application_name="tests") as writer:
        with given_up_after_conflicts(rejects):
            list(redrive(writer, 10_000))
        assert sum(redrive(writer, 10_000), Counter()) == Counter({Outcome.STORED: 1})
