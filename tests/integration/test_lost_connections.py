"""A connection cut at any point is an outage, for every error of the driver, and a retry stores everything once."""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import random
import struct
import time
from collections.abc import Iterator

import attrs
import psycopg
import pytest

from orderlib.errors import ConfigurationError, DatabaseUnavailable, FenceLost, OrderlibError, TransactionConflict
from orderlib.ingestion.records import Batch, OffsetRange, Record, TopicPartition, classify_record
from orderlib.postgres import schema
from orderlib.postgres.connections import open_connection
from orderlib.postgres.consumer_store import ConsumerStore
from orderlib.postgres.rows import pack_rows
from orderlib.repository import Outcome, RecordPosition
from orderlib.testing import SAMPLE
from tests.support.batches import batch, consumer_store, ignore
from tests.support.databases import Database
from tests.support.fake_postgres import error_response
from tests.support.sending import order
from tests.support.tcp_proxy import CutConnection, TcpProxy

TOPIC_ID = "topic-id"
TOPIC_IDS = {"orders": TOPIC_ID}
PARTITION = TopicPartition("orders", 0)

#: What a server or a pooler says last: nothing, one error, several, or an error between other messages.
LAST_WORDS = {
    "silence": b"",
    "terminated": error_response("57P01", "terminating connection due to administrator command"),
    "idle": error_response("57P05", "terminating connection due to idle-session timeout"),
    "idle in transaction": error_response("25P03", "Zeitüberschreitung", "SCHWERWIEGEND"),
    "pgbouncer": error_response("08P01", "server conn crashed?"),
    "an error, then the end": error_response("XX000", "cache lookup failed", "ERROR").replace(b"VFATAL", b"VERROR")
    + error_response("57P01", "terminating connection"),
    "half a message": error_response("57P01", "terminating connection")[:20],
    "an unrequested answer": b"C" + struct.pack("!I", 10) + b"BEGIN\0" + b"Z\0\0\0\x05T",
    "no message at all": b"\xff\xff\xff\xff\xff\xff",
}


class Cutter:
    """Cuts one connection after some messages of the server or bytes of the client."""

    def __init__(self) -> None:
        self.reset()

    def reset(self, *, messages: int | None = None, bytes: int | None = None, last_words: bytes = b"") -> None:  # noqa: A002 - the unit, like messages
        #: What is still forwarded before the next cut; None for no cut.
        self.messages, self.bytes, self.last_words = messages, bytes, last_words
        #: What was forwarded since the last reset.
        self.forwarded_messages = self.forwarded_bytes = 0

    def on_message(self, message: bytes, is_request: bool) -> None:
        if is_request:
            self._on_request(message)
        else:
            self._on_answer()

    def _on_request(self, message: bytes) -> None:
        if self.bytes is not None:
            if len(message) >= self.bytes:
                left, self.bytes = self.bytes, None
                raise CutConnection(message[:left], self.last_words)
            self.bytes -= len(message)
        self.forwarded_bytes += len(message)

    def _on_answer(self) -> None:
        if self.messages is not None:
            if self.messages == 0:
                self.messages = None
                raise CutConnection(reply=self.last_words)
            self.messages -= 1
        self.forwarded_messages += 1


@attrs.define
class Writer:
    """Writes batches, each with a new order, a changed one, a duplicate, a reject and a row that a table refuses."""

    database: Database
    url: str
    group: str = "tests"
    number: int = 0

    def batch(self, at: int) -> Batch:
        number = self.number
        values = [
            order(f"new-{number}"),
            order("changed", version=number + 1),
            order("same", version=1),
            order(f"refused-{number}", version=666),
            b"{",
        ]
        classified = []
        for line, value in enumerate(values):
            position = RecordPosition(topic_id=TOPIC_ID, partition=0, offset=at + line)
            record = Record(position=position, time=dt.datetime.now(dt.UTC), topic="orders", key=None, value=value)
            classified.append((record, classify_record(record, 8 << 20, pack_rows)))
        offset_range = OffsetRange(expected_offset=at, next_offset=at + len(values))
        return Batch(topic_ids=TOPIC_IDS, ranges={PARTITION: offset_range}, classified=tuple(classified))

    def write(self) -> list[OrderlibError]:
        """Write the next batch as the consumer does; return the errors on the way."""
        store = ConsumerStore(self.url, self.group, time.monotonic)
        errors: list[OrderlibError] = []
        self.number += 1
        deadline = time.monotonic() + 20
        at = None
        try:
            while time.monotonic() < deadline:
                try:
                    store.claim_database()
                    if at is None:
                        at = store.start_partitions(TOPIC_IDS, {PARTITION: 0})[PARTITION]
                    store.write(self.batch(at), lambda _: None)
                except DatabaseUnavailable as exc:
                    errors.append(exc)
                except FenceLost as exc:
                    # The COMMIT took effect, and its answer was lost.
                    return [*errors, exc]
                else:
                    return errors
            raise AssertionError("not written in time")
        finally:
            store.close()

    def assert_stored_once(self) -> None:
        with psycopg.connect(self.database.superuser_url) as connection:
            [(next_offset,)] = connection.execute("SELECT next_offset FROM consumer_offsets").fetchall()
            uids = {uid for (uid,) in connection.execute("SELECT order_uid FROM orders")}
            [(rejects,)] = connection.execute("SELECT count(*) FROM rejects").fetchall()
            [(version,)] = connection.execute("SELECT amount FROM payment WHERE order_uid = 'changed'").fetchall()
        assert next_offset == 5 * self.number
        assert uids == {"changed", "same", *(f"new-{number}" for number in range(1, self.number + 1))}
        assert rejects == 2 * self.number
        assert version == self.number + 1


@pytest.fixture
def refusing_table(database: Database) -> Database:
    with psycopg.connect(database.superuser_url, autocommit=True) as connection:
        connection.execute("ALTER TABLE payment ADD CONSTRAINT tests CHECK (amount <> 666)")
    return database


@contextlib.contextmanager
def cutting(database: Database) -> Iterator[tuple[Cutter, Writer]]:
    """A writer behind a proxy that cuts its connections. The cutter has counted one write."""
    cutter = Cutter()
    with TcpProxy(database.writer_url, cutter.on_message) as proxy:
        writer = Writer(database, proxy.url)
        writer.write()
        cutter.reset()
        writer.write()
        yield cutter, writer


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.faults)])
def test_a_connection_may_be_cut_after_each_message_of_the_server(refusing_table: Database, stride: int) -> None:
    words = itertools.cycle(LAST_WORDS.values())
    with cutting(refusing_table) as (cutter, writer):
        messages = cutter.forwarded_messages
        assert messages > 50
        cuts = 0
        for after in range(0, messages, stride):
            cutter.reset(messages=after, last_words=next(words))
            cuts += bool(writer.write())
        # The last messages answer the end of the session.
        assert cuts >= messages // stride - 2
    writer.assert_stored_once()


@pytest.mark.parametrize("number", [15, pytest.param(100, marks=pytest.mark.faults)])
def test_a_connection_may_be_cut_at_any_byte_that_the_client_sends(refusing_table: Database, number: int) -> None:
    rng = random.Random(11)
    with cutting(refusing_table) as (cutter, writer):
        for after in sorted(rng.sample(range(cutter.forwarded_bytes), number)):
            words = rng.choice(list(LAST_WORDS.values()))
            cutter.reset(bytes=after, last_words=words)
            writer.write()
    writer.assert_stored_once()


def test_an_idle_connection_that_was_lost_is_replaced_silently(refusing_table: Database) -> None:
    writer = Writer(refusing_table, refusing_table.writer_url)
    store = ConsumerStore(writer.url, "tests", time.monotonic)
    store.claim_database()
    with open_connection(refusing_table.superuser_url, application_name="tests") as connection:
        for _ in range(3):
            ended = connection.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE application_name = 'orderlib-consumer' AND datname = current_database()"
            ).fetchall()
            assert ended == [(True,)]
            store.start_partitions(TOPIC_IDS, {PARTITION: 0})
    store.close()


def test_a_session_whose_first_batch_fails_writes_the_next_one(database: Database) -> None:
    with consumer_store(database) as store:
        with pytest.raises(FenceLost):
            store.write(batch(7, (None, SAMPLE)), ignore)
        assert store.write(batch(0, (None, SAMPLE)), ignore).outcomes[Outcome.STORED] == 1


def test_a_table_that_changed_after_its_statements_were_prepared_costs_a_batch_one_retry(database: Database) -> None:
    with consumer_store(database) as store:
        store.write(batch(0, (None, SAMPLE)), ignore)
        with psycopg.connect(database.superuser_url, autocommit=True) as superuser:
            superuser.execute("ALTER TABLE consumer_offsets ALTER COLUMN partition TYPE bigint")
        with pytest.raises(TransactionConflict, match="a table has changed"):
            store.write(batch(1, (None, SAMPLE)), ignore)
        assert store.write(batch(1, (None, SAMPLE)), ignore).outcomes[Outcome.DUPLICATE] == 1


def test_a_connection_whose_schema_was_not_accepted_is_not_used_by_the_next_call(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "LATEST_MIGRATION", schema.LATEST_MIGRATION + 1)
    with contextlib.closing(ConsumerStore(database.writer_url, "tests", lambda: 0.0)) as store:
        for _ in range(2):
            with pytest.raises(ConfigurationError, match="orderlib migrate"):
                store.next_offsets(TOPIC_IDS, [PARTITION])
