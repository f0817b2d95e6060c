"""Stored originals are decoded again by a release that knows more fields."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs
import psycopg
import pytest

import orderlib
from orderlib import InvalidOrder, Outcome, decode_order, encode_order
from orderlib.ingestion.records import (
    Batch,
    OffsetRange,
    OrderChange,
    PreparedOrder,
    Record,
    Tombstone,
    TopicPartition,
    classify_record,
)
from orderlib.postgres import backfill as module
from orderlib.postgres.backfill import BackfillBatch, backfill
from orderlib.postgres.connections import open_connection
from orderlib.postgres.consumer_store import ConsumerStore
from orderlib.postgres.operations import forget
from orderlib.postgres.rows import pack_rows
from orderlib.postgres.writes import store
from orderlib.repository import RecordPosition
from orderlib.testing import SAMPLE
from tests.support.conflicts import given_up_after_conflicts
from tests.support.databases import Database

ORDER = decode_order(SAMPLE)
TIME = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
POSITION = RecordPosition(topic_id="topic", partition=0, offset=5)


def text(uid: str, sm_id: object = 7, unknown: bytes = b"") -> bytes:
    order = encode_order(attrs.evolve(ORDER, order_uid=uid, sm_id=0))
    return order.replace(b'"sm_id":0', b'"sm_id":' + str(sm_id).encode())[:-1] + unknown + b"}"


def by_an_earlier_release(uid: str, original: bytes, position: RecordPosition | None = POSITION) -> PreparedOrder:
    """What a release would prepare that does not know ``sm_id``, and whose default for it is 0."""
    order = attrs.evolve(ORDER, order_uid=uid, sm_id=0)
    known = PreparedOrder.of(order, position, TIME if position else None, pack_rows=pack_rows)
    return attrs.evolve(known, original=original)


@pytest.fixture
def writer(database: Database) -> Iterator[psycopg.Connection]:
    with open_connection(database.writer_url, application_name="tests") as connection:
        yield connection


def stored(connection: psycopg.Connection) -> dict[str, tuple[Any, ...]]:
    """Everything of an order that a backfill may change or must keep."""
    return {
        row[0]: row[1:]
        for row in connection.execute(
            "SELECT order_uid, sm_id, version, has_original, value, source_offset, source_time, first_stored_at"
            " FROM orders LEFT JOIN order_originals USING (order_uid)"
        )
    }


def save(connection: psycopg.Connection, *changes: OrderChange) -> None:
    with connection.transaction():
        store(connection, changes)


def outcomes(batches: Iterable[BackfillBatch]) -> Counter[Outcome]:
    return +sum((batch.outcomes for batch in batches), Counter[Outcome]())


def test_orders_get_the_fields_of_their_originals_as_new_versions_of_the_same_records(
    writer: psycopg.Connection,
) -> None:
    partly = text("partly", unknown=b',"later":1')
    save(
        writer,
        by_an_earlier_release("completely", text("completely")),
        by_an_earlier_release("partly", partly),
        by_an_earlier_release("from-python", text("from-python"), None),
        PreparedOrder.of_text(text("current", unknown=b',"later":1'), POSITION, TIME, pack_rows=pack_rows),
        PreparedOrder.of_text(text("no-original"), POSITION, TIME, pack_rows=pack_rows),
    )
    before = stored(writer)
    assert outcomes(backfill(writer, dry_run=True)) == Counter({Outcome.STORED: 3, Outcome.DUPLICATE: 1})
    assert stored(writer) == before

    assert outcomes(backfill(writer)) == Counter({Outcome.STORED: 3, Outcome.DUPLICATE: 1})
    first = before["partly"][-1]
    assert stored(writer) == {
        "completely": (7, 2, False, None, 5, TIME, first),
        "partly": (7, 2, True, partly, 5, TIME, first),
        "from-python": (7, 2, False, None, None, None, first),
        "current": before["current"],
        "no-original": before["no-original"],
    }
    after = stored(writer)
    assert outcomes(backfill(writer)) == Counter({Outcome.DUPLICATE: 2})
    assert stored(writer) == after


def test_a_rewind_after_a_backfill_changes_nothing(writer: psycopg.Connection) -> None:
    save(writer, by_an_earlier_release("a", text("a")))
    assert outcomes(backfill(writer)) == Counter({Outcome.STORED: 1})
    with writer.transaction():
        again = PreparedOrder.of_text(text("a"), POSITION, TIME, pack_rows=pack_rows)
        assert store(writer, [again]) == [Outcome.DUPLICATE]


def test_it_works_in_batches_and_continues_after_an_order(
    writer: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BATCH_ORIGINALS", 2)
    save(writer, *(by_an_earlier_release(uid, text(uid)) for uid in ("B", "a", "c", "d", "e")))
    assert [batch.last for batch in backfill(writer, dry_run=True)] == ["a", "d", "e"]
    assert next(backfill(writer)).last == "a"
    assert [(batch.last, batch.outcomes[Outcome.STORED]) for batch in backfill(writer, after="a")] == [
        ("d", 2),
        ("e", 1),
    ]
    assert {row[0] for row in stored(writer).values()} == {7}
    monkeypatch.setattr(module, "_BATCH_BYTES", 1)
    save(writer, *(by_an_earlier_release(uid, text(uid)) for uid in ("f", "g")))
    assert [batch.last for batch in backfill(writer)] == ["f", "g"]


def test_an_original_that_the_rules_refuse_is_named_and_stays_with_its_order(writer: psycopg.Connection) -> None:
    save(
        writer,
        by_an_earlier_release("invalid", text("invalid", sm_id=-1)),
        by_an_earlier_release("swapped", text("of-another-order")),
        by_an_earlier_release("valid", text("valid")),
    )
    before = stored(writer)
    [batch] = backfill(writer)
    assert batch.outcomes == Counter({Outcome.STORED: 1, Outcome.REJECTED: 2})
    assert {uid: (type(error), error.faults[0].path) for uid, error in batch.errors.items()} == {
        "invalid": (InvalidOrder, "$.sm_id"),
        "swapped": (InvalidOrder, "$.order_uid"),
    }
    after = stored(writer)
    assert {**after, "valid": None} == {**before, "valid": None}


def test_an_order_that_postgresql_refuses_is_named_and_stays(database: Database, writer: psycopg.Connection) -> None:
    with psycopg.connect(database.superuser_url) as superuser:
        superuser.execute("ALTER TABLE orders ADD CHECK (order_uid <> 'refused' OR sm_id = 0)")
    save(writer, *(by_an_earlier_release(uid, text(uid)) for uid in ("a", "refused", "z")))
    [batch] = backfill(writer)
    assert (batch.outcomes[Outcome.STORED], list(batch.errors)) == (2, ["refused"])
    assert {uid: row[:3] for uid, row in stored(writer).items()} == {
        "a": (7, 2, False),
        "refused": (0, 1, True),
        "z": (7, 2, False),
    }


def test_what_changed_after_it_was_read_is_left_as_it_is(
    database: Database, writer: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch is read again, unless the change is a ``forget``."""
    save(writer, *(by_an_earlier_release(uid, text(uid)) for uid in ("erased", "forgotten", "replaced", "z")))
    changes = ["forgotten", "replaced", "erased"]

    def change_first(connection: psycopg.Connection, changed: Sequence[PreparedOrder], rule: Any) -> object:
        uid = changes.pop()
        if uid == "replaced":
            with orderlib.connect(database.writer_url) as repository:
                repository.save(attrs.evolve(ORDER, order_uid=uid, sm_id=9))
        elif uid == "erased":
            with open_connection(database.writer_url, application_name="tests") as other:
                save(other, Tombstone(order_uid=uid, position=attrs.evolve(POSITION, offset=6), time=TIME))
        else:
            with open_connection(database.migrator_url, application_name="tests") as migrator:
                forget(migrator, uid)
        return store(connection, changed, rule)

    monkeypatch.setattr(module, "store", change_first)
    assert outcomes(backfill(writer)) == Counter({Outcome.STORED: 1, Outcome.FORGOTTEN: 1})
    assert {uid: row[:2] for uid, row in stored(writer).items()} == {"replaced": (9, 2), "z": (7, 2)}


def test_the_position_that_a_batch_of_the_consumer_confirms_meanwhile_does_not_move_back(
    database: Database, writer: psycopg.Connection
) -> None:
    save(writer, by_an_earlier_release("a", text("a")))
    partition = TopicPartition("orders", 0)
    consumer = ConsumerStore(database.writer_url, "tests", lambda: 0.0)
    consumer.start_partitions({"orders": "topic"}, {partition: 6})
    position = attrs.evolve(POSITION, offset=6)
    record = Record(position=position, time=TIME, topic="orders", key=None, value=text("a", sm_id=0))
    confirming = Batch(
        topic_ids={"orders": "topic"},
        ranges={partition: OffsetRange(expected_offset=6, next_offset=7)},
        classified=((record, classify_record(record, 10_000, pack_rows)),),
    )
    with ThreadPoolExecutor(1) as executor:
        running: list[Any] = []

        def start_backfill(_result: object) -> None:
            running.append(executor.submit(lambda: outcomes(backfill(writer))))
            wait_until_blocked(database, running[0].done)

        consumer.write(confirming, start_backfill)
        assert running[0].result(10) == Counter({Outcome.STORED: 1})
    consumer.close()
    assert [row[:2] + row[4:5] for row in stored(writer).values()] == [(7, 2, 6)]


def wait_until_blocked(database: Database, is_done: Callable[[], bool]) -> None:
    with psycopg.connect(database.superuser_url, autocommit=True) as observer:
        while not observer.execute("SELECT FROM pg_locks WHERE NOT granted").fetchall():
            assert not is_done()


def test_it_gives_up_after_too_many_conflicts_in_one_transaction(writer: psycopg.Connection) -> None:
    save(writer, by_an_earlier_release("a", text("a")))
    before = stored(writer)
    with given_up_after_conflicts(module):
        list(backfill(writer))
    assert stored(writer) == before
