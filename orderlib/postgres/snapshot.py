"""One consistent look at everything that is stored, however long it takes."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from contextlib import contextmanager

import attrs
import psycopg

from orderlib import queries
from orderlib.ingest import RecordPosition
from orderlib.models import Order
from orderlib.postgres.connection import Connection, connect
from orderlib.postgres.errors import translated_errors
from orderlib.repository import Outcome
from orderlib.rows import JOINED_WIDTH, order_from_rows

_ORDERS_AT_ONCE = 500
#: Behind the joined columns come first_stored_at and stored_at, then what the proof needs.
_PROOF_AT = JOINED_WIDTH + 2
#: The joined columns of delivery and payment are null where that part is missing.
_REQUIRED = slice(0, JOINED_WIDTH)


@attrs.frozen(kw_only=True)
class KeptOrder:
    """A stored order as it reads, with what is kept to prove it."""

    order_uid: str
    #: ``None`` if its delivery, its payment or all its items are missing, or its lines have a gap.
    order: Order | None
    content_sha256: bytes
    #: Both ``None`` for an order saved from Python.
    source: RecordPosition | None
    source_time: dt.datetime | None


class Snapshot:
    """What was stored at one moment. The reader's rights suffice."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def next_offsets(self, group: str, topic_id: str) -> dict[int, int]:
        """Where the group stood in each partition that it ever read."""
        position = {"group": group, "topic_id": topic_id}
        return dict(self._connection.execute(queries.GROUP_OFFSETS, position).fetchall())

    def rejects(self, topic_id: str) -> dict[tuple[int, int], Outcome | None]:
        """The (partition, offset) of every reject of the topic, with the outcome of its redrive."""
        rows = self._connection.execute(queries.REJECT_POSITIONS, {"topic_id": topic_id})
        return {(partition, offset): outcome and Outcome(outcome) for partition, offset, outcome in rows}

    def orders(self) -> Iterator[KeptOrder]:
        """Every order."""
        with self._connection.cursor("orders_of_snapshot") as cursor:
            cursor.execute(queries.ALL_ORDERS)
            while rows := cursor.fetchmany(_ORDERS_AT_ONCE):
                items: dict[str, list[tuple[object, ...]]] = {row[0]: [] for row in rows}
                with psycopg.RawCursor(self._connection) as asked:
                    for row in asked.execute(queries.GET_ITEMS_OF_ORDERS, [list(items)]):
                        items[row[0]].append(row)
                for row in rows:
                    sha256, topic_id, partition, offset, time = row[_PROOF_AT:]
                    whole = None not in row[_REQUIRED] and items[row[0]]
                    yield KeptOrder(
                        order_uid=row[0],
                        order=order_from_rows(row, items[row[0]]) if whole else None,
                        content_sha256=sha256,
                        source=topic_id and RecordPosition(topic_id=topic_id, partition=partition, offset=offset),
                        source_time=time,
                    )


@contextmanager
def snapshot(url: str, application_name: str) -> Iterator[Snapshot]:
    """Hold one look at the store. Raises StoreUnreachable or BrokenSetup, also from within."""
    with connect(url, application_name=application_name) as connection, translated_errors(connection):
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        with connection.transaction():
            connection.execute(queries.LIFT_TIME_LIMITS)
            yield Snapshot(connection)
