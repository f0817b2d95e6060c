"""Redrive on PostgreSQL: which stored version a reject may replace."""

from __future__ import annotations

import datetime as dt
from collections import Counter

import attrs
import psycopg
import pytest

from orderlib import DatabaseUnavailable, Order, Outcome, decode_order, encode_order
from orderlib.errors import Fault, MalformedJson
from orderlib.ingestion.records import Batch, OffsetRange, PreparedOrder, Record, Reject, TopicPartition
from orderlib.postgres import queries, rejects
from orderlib.postgres.connections import open_connection
from orderlib.postgres.consumer_store import ConsumerStore
from orderlib.postgres.rejects import redrive
from orderlib.postgres.rows import pack_rows
from orderlib.postgres.writes import store
from orderlib.repository import RecordPosition
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
    record = Record(position=position(offset), time=TIME, topic="orders", key=None, value=encode_order(order))
    consumer_store = ConsumerStore(database.writer_url, "tests", lambda: 0.0)
    partition = TopicPartition("orders", 0)
    consumer_store.start_partitions({"orders": "topic"}, {partition: offset})
    batch = Batch(
        topic_ids={"orders": "topic"},
        ranges={partition: OffsetRange(expected_offset=offset, next_offset=offset + 1)},
        classified=((record, Reject.of(record, REFUSAL)),),
    )
    consumer_store.write(batch, lambda _: None)
    consumer_store.close()


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


def test_a_conflict_repeats_the_transaction_until_there_are_too_many(database: Database) -> None:
    keep_reject(database, ORDER, 5)
    with open_connection(database.writer_url, application_name="tests") as writer:
        with given_up_after_conflicts(rejects):
            list(redrive(writer, 10_000))
        assert sum(redrive(writer, 10_000), Counter()) == Counter({Outcome.STORED: 1})
