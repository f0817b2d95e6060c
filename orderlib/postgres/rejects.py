"""List, show and redrive rejects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import attrs
from psycopg.rows import dict_row

from orderlib.errors import RejectNotFound
from orderlib.ingestion.records import OrderChange, Record, Reject, Tombstones, classify_record, plan_redrive
from orderlib.postgres import queries
from orderlib.postgres.async_repository import AsyncPostgresOrderRepository
from orderlib.postgres.connections import Connection
from orderlib.postgres.errors import translate_errors
from orderlib.postgres.reads import ReadQueries
from orderlib.postgres.reject_list import RejectPage, RejectPosition, RejectQuery
from orderlib.postgres.rows import pack_rows
from orderlib.postgres.wire import Wire
from orderlib.postgres.writes import run_transaction, store, within_bytes
from orderlib.repository import Outcome, RecordPosition

#: One transaction redrives rejects up to this number and size, but at least one. The consumer waits for it.
_REDRIVE_RECORDS = 100
_REDRIVE_BYTES = 8 * 1024 * 1024


@attrs.frozen
class Prefix:
    """The first bytes of a key, a value or headers. Its repr shows no content."""

    content: bytes = attrs.field(repr=False)
    #: The size of the complete part.
    size_bytes: int

    @property
    def is_complete(self) -> bool:
        """Whether it has all bytes."""
        return len(self.content) == self.size_bytes


class AsyncPostgresOrderAndRejectRepository(AsyncPostgresOrderRepository):
    """An ``AsyncOrderRepository`` that also lists rejects. It needs the reader's privileges."""

    async def list_rejects(self, query: RejectQuery) -> RejectPage:
        """Return a page of the list of rejects."""
        return await self._read(lambda read_queries: read_queries.list_rejects(query))


def list_rejects(connection: Connection, query: RejectQuery) -> tuple[RejectPage, int]:
    """Return a page of the list of rejects, and how many match in total."""
    reads = ReadQueries(Wire(connection.pgconn, keeps_statements=False))
    with translate_errors(connection):
        return connection.wait(reads.list_rejects(query)), connection.wait(reads.count_rejects(query))


def count_rejects_by_path(connection: Connection, query: RejectQuery) -> list[tuple[int, str, str | None]]:
    """Return (number, code, path of the first fault) of the rejects that match, the most frequent first.

    All elements of an array have one path, such as ``$.items[*].price``. Needs the reader's privileges only.
    """
    reads = ReadQueries(Wire(connection.pgconn, keeps_statements=False))
    with translate_errors(connection):
        return connection.wait(reads.count_rejects_by_path(query))


def get_rejects(connection: Connection, position: RejectPosition, max_bytes: int) -> Iterator[dict[str, Any]]:
    """Yield the rejects at a position, one for each topic id, the newest first.

    Each of key, value and headers (as JSON) has at most ``max_bytes``. Raises RejectNotFound.
    """
    found = False
    which = {**attrs.asdict(position), "max_bytes": max_bytes}
    with translate_errors(connection), connection.cursor(row_factory=dict_row) as cursor:
        for row in cursor.stream(queries.GET_REJECTS, which, binary=True):
            found = True
            for part in ("key", "value", "headers"):
                size_bytes = row.pop(f"{part}_bytes")
                if size_bytes is not None:
                    row[part] = Prefix(row[part], size_bytes)
            yield row
    if not found:
        raise RejectNotFound(str(position))


def redrive(
    connection: Connection,
    max_bytes: int,
    *,
    code: str | None = None,
    position: RejectPosition | None = None,
    tombstones: Tombstones = Tombstones.REJECT,
) -> Iterator[Counter[Outcome]]:
    """Process rejects again at their own positions: all, those with one code, or one. Yield outcomes by transaction.

    An order is stored, or erased by a tombstone, if the database does not have it, or has a version from a lower offset
    of the same partition. Otherwise the outcome is superseded. The reject stays, with outcome and time. Rejects with an
    outcome other than rejected are skipped, so redriving twice is safe. A value above ``max_bytes`` is not read and
    stays rejected. Raises TransactionConflict if other writers keep changing the same orders.
    """
    after = ("", -1, -1)
    while True:
        last, outcomes = run_transaction(
            connection, partial(_redrive_batch, connection, max_bytes, code, position, after, tombstones)
        )
        if last is None:
            return
        after = last
        yield outcomes


def _redrive_batch(
    connection: Connection,
    max_bytes: int,
    code: str | None,
    position: RejectPosition | None,
    after: tuple[str, int, int],
    tombstones: Tombstones,
) -> tuple[tuple[str, int, int] | None, Counter[Outcome]]:
    which = {
        "code": code,
        **(attrs.asdict(position) if position else {"topic": None, "partition": None, "offset": None}),
        **dict(zip(("after_topic_id", "after_partition", "after_offset"), after, strict=True)),
        "limit": _REDRIVE_RECORDS,
    }
    # Before any row is locked, because `forget` locks in this sequence.
    connection.execute(queries.FORGET_LOCK_SHARED)
    rows = within_bytes(connection.execute(queries.REJECTS_TO_REDRIVE, which).fetchall(), _REDRIVE_BYTES)
    connection.execute(queries.LOCK_OFFSETS, {"topic_ids": sorted({row[0] for row in rows})})
    # This time is after every batch that this redrive sees, and before every order that it stores. From it, reconcile
    # concludes which of them stored an order.
    [(redriven_at,)] = connection.execute(queries.CLOCK).fetchall()
    outcomes: Counter[Outcome] = Counter()
    for topic_id, partition, offset, topic, record_time, size_bytes in rows:
        key_columns = {"topic_id": topic_id, "partition": partition, "offset": offset}
        outcome = Outcome.REJECTED
        if size_bytes <= max_bytes:
            [(key, value)] = connection.execute(queries.REJECT_VALUE, key_columns, binary=True).fetchall()
            record = Record(position=RecordPosition(**key_columns), time=record_time, topic=topic, key=key, value=value)
            classified = classify_record(record, max_bytes, pack_rows, tombstones)
            if not isinstance(classified, Reject):
                outcome = _store_one(connection, classified)
        done = {**key_columns, "outcome": outcome, "redriven_at": redriven_at}
        connection.execute(queries.RECORD_REDRIVE, done)
        outcomes[outcome] += 1
    return (rows[-1][:3] if rows else None), outcomes


def _store_one(connection: Connection, change: OrderChange) -> Outcome:
    [result] = store(connection, [change], plan_redrive)
    return result if isinstance(result, Outcome) else Outcome.REJECTED
