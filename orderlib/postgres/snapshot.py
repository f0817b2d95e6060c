"""One snapshot of everything that is stored."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, LiteralString, Unpack

import attrs
import psycopg

from orderlib.ingestion.reconcile import SnapshotErased, SnapshotOrder, SnapshotOriginal, SnapshotReject
from orderlib.ingestion.records import StoredOffset
from orderlib.postgres import operations, queries
from orderlib.postgres.connections import Connection, open_connection
from orderlib.postgres.errors import translate_errors
from orderlib.postgres.grants import expect_role
from orderlib.postgres.privileges import READER
from orderlib.postgres.reject_list import RejectPosition
from orderlib.postgres.rows import JOINED_WIDTH, order_from_rows
from orderlib.postgres.schema import check_schema
from orderlib.postgres.using import using
from orderlib.repository import Filters, RecordPosition, StoredOrder

_FETCH_SIZE = 500
#: The columns of the content. Those of delivery or payment are null if that part is missing.
_CONTENT = slice(0, JOINED_WIDTH)
#: The other columns: digest, position and times.
_STORE = slice(JOINED_WIDTH, None)


@attrs.frozen(kw_only=True)
class OrderUidState:
    """What is known of an order_uid. It has no values of the order."""

    #: The number and the ``stored_at`` of the current version, if the order is stored.
    version: int | None
    stored_at: dt.datetime | None
    #: The position of the tombstone that erased it, and when it did.
    tombstone: RecordPosition | None
    erased_at: dt.datetime | None
    forgotten_at: dt.datetime | None
    #: The newest rejects with this key, and how many there are: (position, code, outcome of its redrive).
    rejects: tuple[tuple[RejectPosition, str, str | None], ...]
    total_rejects: int

    @property
    def is_known(self) -> bool:
        """Whether anything is known."""
        return any((self.version, self.tombstone, self.forgotten_at, self.rejects))


class Snapshot:
    """What was stored at one moment. Needs the reader's privileges only."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def group(self) -> str | None:
        """Return the consumer group that the database belongs to."""
        return operations.consumer_group(self._connection)

    def forgotten(self) -> list[bytes]:
        """Return the SHA-256 digests of all forgotten order_uids."""
        return operations.forgotten(self._connection)

    def offsets(self) -> list[StoredOffset]:
        """Return the stored offsets of all topics."""
        return operations.stored_offsets(self._connection)

    def has_topic(self, topic_id: str) -> bool:
        """Return whether an order or a reject of this topic id is stored."""
        row = self._connection.execute(queries.SNAPSHOT_HAS_TOPIC, {"topic_id": topic_id}).fetchone()
        return row is not None and bool(row[0])

    def rejects(self) -> Iterator[SnapshotReject]:
        """Yield the rejects of all topics."""
        with self._connection.cursor("rejects_of_snapshot") as cursor:
            for row in cursor.execute(queries.SNAPSHOT_REJECTS):
                topic_id, partition, offset, topic, record_time, key, value, headers, code, total, paths = row[:11]
                redriven_at, outcome, times_in_order = row[11:]
                yield SnapshotReject(
                    topic_id=topic_id,
                    partition=partition,
                    offset=offset,
                    topic=topic,
                    record_time=record_time,
                    key_sha256=key,
                    value_sha256=value,
                    headers_sha256=headers,
                    code=code,
                    faults_total=total,
                    fault_paths=paths,
                    redriven_at=redriven_at,
                    redrive_outcome=outcome,
                    times_in_order=times_in_order,
                )

    def erased(self) -> Iterator[SnapshotErased]:
        """Yield every order that a tombstone erased."""
        with self._connection.cursor("erased_of_snapshot") as cursor:
            for order_uid, topic_id, partition, offset in cursor.execute(queries.ALL_ERASED):
                yield SnapshotErased(order_uid=order_uid, topic_id=topic_id, partition=partition, offset=offset)

    def orders(self) -> Iterator[SnapshotOrder]:
        """Yield every order."""
        with self._connection.cursor("orders_of_snapshot") as cursor:
            cursor.execute(queries.SNAPSHOT_ORDERS)
            while rows := cursor.fetchmany(_FETCH_SIZE):
                items: dict[str, list[tuple[object, ...]]] = {row[0]: [] for row in rows}
                with psycopg.RawCursor(self._connection) as items_cursor:
                    for row in items_cursor.execute(queries.SNAPSHOT_ITEMS, [list(items)]):
                        items[row[0]].append(row)
                    # One value at a time: each may be as large as a record.
                    stream = items_cursor.stream(queries.GET_ORIGINALS, [list(items)], binary=True)
                    digests = {row[0]: row[_STORE][0] for row in rows}
                    originals = {uid: SnapshotOriginal.of(value, digests[uid]) for uid, value in stream}
                for row in rows:
                    yield _order(row, items[row[0]], originals.get(row[0]))

    def original_digests(self) -> Iterator[bytes]:
        """Yield the SHA-256 of each original."""
        with self._connection.cursor("originals_of_snapshot") as cursor:
            yield from (digest for (digest,) in cursor.execute(queries.ORIGINAL_DIGESTS))

    def state_of(self, order_uid: str, max_rejects: int) -> OrderUidState:
        """Return what is known of an order_uid, with at most this number of its rejects, the newest first."""
        digest = hashlib.sha256(order_uid.encode()).digest()
        parameters = {"order_uid": order_uid, "digest": digest, "limit": max_rejects}

        def row_of(statement: LiteralString) -> tuple[Any, ...]:
            return self._connection.execute(statement, parameters).fetchone() or (None,) * 4

        version, stored_at, *_ = row_of(queries.VERSION_OF)
        topic_id, partition, offset, erased_at = row_of(queries.TOMBSTONE_OF)
        rejects = self._connection.execute(queries.REJECTS_OF_KEY, parameters).fetchall()
        return OrderUidState(
            version=version,
            stored_at=stored_at,
            tombstone=RecordPosition(topic_id=topic_id, partition=partition, offset=offset) if topic_id else None,
            erased_at=erased_at,
            forgotten_at=row_of(queries.FORGOTTEN_AT)[0],
            rejects=tuple(
                (RejectPosition(topic=topic, partition=reject_partition, offset=reject_offset), code, outcome)
                for topic, reject_partition, reject_offset, code, outcome, _ in rejects
            ),
            total_rejects=rejects[0][-1] if rejects else 0,
        )

    def originals(self) -> Iterator[tuple[dt.datetime, bytes]]:
        """Yield each original with the time when its order was stored, one at a time."""
        with self._connection.cursor() as cursor:
            yield from cursor.stream(queries.ALL_ORIGINALS, binary=True)

    def stream(self, **filters: Unpack[Filters]) -> Iterator[StoredOrder]:
        """Yield orders, newest first, like ``OrderRepository.stream``."""
        return using(self._connection).stream(**filters)

    def original(self, order_uid: str) -> bytes:
        """Return the original of an order that has one."""
        value = using(self._connection).original(order_uid)
        assert value is not None
        return value

    def orphans(self) -> Iterator[tuple[str, str]]:
        """Yield (table, order_uid) of each row of another table whose order is not stored."""
        yield from self._connection.execute(queries.SNAPSHOT_ORPHANS)


def _order(row: tuple[Any, ...], items: list[tuple[object, ...]], original: SnapshotOriginal | None) -> SnapshotOrder:
    sha256, topic_id, partition, offset, source_time, stored_at, times_in_order, has_original = row[_STORE]
    is_complete = None not in row[_CONTENT] and items and [item[-1] for item in items] == list(range(len(items)))
    return SnapshotOrder(
        order_uid=row[0],
        order=order_from_rows(row, [item[:-1] for item in items]) if is_complete else None,
        content_sha256=sha256,
        topic_id=topic_id,
        partition=partition,
        offset=offset,
        source_time=source_time,
        stored_at=stored_at,
        times_in_order=times_in_order,
        has_original=has_original,
        original=original,
    )


@contextmanager
def snapshot(url: str, application_name: str) -> Iterator[Snapshot]:
    """Open a snapshot for the block. Errors of the block are translated, too.

    Raises DatabaseUnavailable or ConfigurationError.
    """
    with (
        open_connection(url, application_name=application_name) as connection,
        expect_role(connection, READER),
        translate_errors(connection),
    ):
        check_schema(connection)
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        with connection.transaction():
            connection.execute(queries.LIFT_TIME_LIMITS)
            yield Snapshot(connection)
