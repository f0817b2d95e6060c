"""A connection that is cut anywhere is an outage, whatever the driver raises, and a retry stores everything once."""

from __future__ import annotations

import datetime as dt
import itertools
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import attrs
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from orderlib.errors import DatabaseUnavailable, FenceLost, OrderlibError
from orderlib.ingestion.records import Batch, OffsetRange, Record, RecordPosition, classify_record
from orderlib.postgres.connections import connect
from orderlib.postgres.consumer_store import ConsumerStore
from orderlib.postgres.rows import pack_rows
from tests.conftest import Database
from tests.support.fake_postgres import error_response
from tests.support.sending import order

TOPIC_ID = "topic-id"

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
    "an answer nobody asked for": b"C" + struct.pack("!I", 10) + b"BEGIN\0" + b"Z\0\0\0\x05T",
    "no message at all": b"\xff\xff\xff\xff\xff\xff",
}


class Cutter:
    """Carries connections to a server, and cuts one after some messages of the server or bytes of the client."""

    def __init__(self, url: str) -> None:
        given = conninfo_to_dict(url)
        self._server = (str(given["host"]), int(given["port"] or 5432))
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        port = self._listener.getsockname()[1]
        self.url = make_conninfo(url, host="127.0.0.1", port=port, sslmode="disable", gssencmode="disable")
        #: What is still carried before the next cut; None for no cut.
        self.messages: int | None = None
        self.bytes: int | None = None
        self.last_words = b""
        #: What was carried since the last reset.
        self.carried_messages = 0
        self.carried_bytes = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def reset(self, *, messages: int | None = None, bytes: int | None = None, last_words: bytes = b"") -> None:  # noqa: A002
        self.messages, self.bytes, self.last_words = messages, bytes, last_words
        self.carried_messages = self.carried_bytes = 0

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=[client], daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with client, suppress(OSError), socket.create_connection(self._server) as server:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            answers = threading.Thread(target=self._pump_answers, args=[server, client], daemon=True)
            answers.start()
            self._pump_requests(client, server)
            answers.join()

    def _pump_requests(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                if self.bytes is not None and len(data) >= self.bytes:
                    server.sendall(data[: self.bytes])
                    self.bytes = None
                    self._cut(client, server)
                    return
                if self.bytes is not None:
                    self.bytes -= len(data)
                self.carried_bytes += len(data)
                server.sendall(data)
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)

    def _pump_answers(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while kind := server.recv(1):
                if self.messages == 0:
                    self.messages = None
                    self._cut(client, server)
                    return
                if self.messages is not None:
                    self.messages -= 1
                self.carried_messages += 1
                length = server.recv(4, socket.MSG_WAITALL)
                rest = (
                    server.recv(struct.unpack("!I", length)[0] - 4, socket.MSG_WAITALL) if length[3:] != b"\4" else b""
                )
                client.sendall(kind + length + rest)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)

    def _cut(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            client.sendall(self.last_words)
        for end in (client, server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def cutter(url: str) -> Iterator[Cutter]:
    between = Cutter(url)
    try:
        yield between
    finally:
        between.close()


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
            source = RecordPosition(topic_id=TOPIC_ID, partition=0, offset=at + line)
            record = Record(source=source, time=dt.datetime.now(dt.UTC), topic="orders", key=None, value=value)
            classified.append((record, classify_record(record, 8 << 20, pack_rows)))
        offset_range = OffsetRange(expected_offset=at, next_offset=at + len(values))
        return Batch(topic="orders", topic_id=TOPIC_ID, ranges={0: offset_range}, classified=tuple(classified))

    def write(self) -> list[OrderlibError]:
        """Write the next batch as the consumer does; return the errors on the way."""
        ledger = ConsumerStore(self.url, self.group, time.monotonic)
        errors: list[OrderlibError] = []
        self.number += 1
        deadline = time.monotonic() + 20
        at = None
        try:
            while time.monotonic() < deadline:
                try:
                    ledger.check()
                    if at is None:
                        at = ledger.start_partitions("orders", TOPIC_ID, {0: 0})[0]
                    ledger.write(self.batch(at), lambda _: None)
                except DatabaseUnavailable as exc:
                    errors.append(exc)
                except FenceLost as exc:
                    # The COMMIT took effect, and its answer was lost.
                    return [*errors, exc]
                else:
                    return errors
            raise AssertionError("not written in time")
        finally:
            ledger.close()

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


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.faults)])
def test_a_cut_after_each_message_of_the_server(refusing_table: Database, stride: int) -> None:
    words = itertools.cycle(LAST_WORDS.values())
    with cutter(refusing_table.writer_url) as between:
        writer = Writer(refusing_table, between.url)
        writer.write()
        between.reset()
        writer.write()
        messages = between.carried_messages
        assert messages > 50
        cuts = 0
        for after in range(0, messages, stride):
            between.reset(messages=after, last_words=next(words))
            cuts += bool(writer.write())
        # The last messages answer the end of the session.
        assert cuts >= messages // stride - 2
    writer.assert_stored_once()


@pytest.mark.parametrize("number", [15, pytest.param(100, marks=pytest.mark.faults)])
def test_a_cut_anywhere_in_what_the_client_sends(refusing_table: Database, number: int) -> None:
    rng = random.Random(11)
    with cutter(refusing_table.writer_url) as between:
        writer = Writer(refusing_table, between.url)
        writer.write()
        between.reset()
        writer.write()
        for after in sorted(rng.sample(range(between.carried_bytes), number)):
            words = rng.choice(list(LAST_WORDS.values()))
            between.reset(bytes=after, last_words=words)
            writer.write()
    writer.assert_stored_once()


def test_an_idle_connection_that_was_lost_is_replaced_silently(refusing_table: Database) -> None:
    writer = Writer(refusing_table, refusing_table.writer_url)
    ledger = ConsumerStore(writer.url, "tests", time.monotonic)
    ledger.check()
    with connect(refusing_table.superuser_url, application_name="tests") as connection:
        for _ in range(3):
            ended = connection.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE application_name = 'orderlib-consumer' AND datname = current_database()"
            ).fetchall()
            assert ended == [(True,)]
            ledger.start_partitions("orders", TOPIC_ID, {0: 0})
    ledger.close()
