"""The only write path of orders: every row of every order passes here, by binary COPY straight into the tables."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import LiteralString

import psycopg

from orderlib.errors import OrderlibError, RefusedByDatabase, TransactionConflict
from orderlib.ingestion.records import PreparedOrder, RecordPosition, StoredVersion, WritePlan, plan_writes
from orderlib.postgres import queries
from orderlib.postgres.connections import Connection
from orderlib.postgres.errors import is_lost, translate
from orderlib.postgres.rows import COPY_HEADER, COPY_TRAILER, pack_timestamps
from orderlib.repository import Outcome

#: So Citus reports a unique violation, and it may only mean that somebody stored the same order_uid meanwhile; then a
#: new look settles it.
_LOOKS_AGAIN = 3
_MAYBE_SOMEBODY_ELSE = "XX000"


#: Decides what is to be done for some arrivals, given what is stored.
Rule = Callable[[Sequence[PreparedOrder], Mapping[str, StoredVersion]], WritePlan]


def store(
    connection: Connection, prepared_orders: Sequence[PreparedOrder], rule: Rule = plan_writes
) -> list[Outcome | RefusedByDatabase]:
    """Store orders inside the transaction in hand: what became of each, in their order.

    One that PostgreSQL refuses does not sink its neighbours: halving finds it, each half in a savepoint. Raises any
    other of our errors, or psycopg's LockNotAvailable where the caller limits such waits; the transaction must be
    rolled back then.
    """
    try:
        with connection.transaction():
            return list(_store(connection, prepared_orders, rule))
    except psycopg.errors.LockNotAvailable:
        raise
    except (psycopg.Error, UnicodeEncodeError) as exc:
        if _met_another_writer(exc) and not is_lost(connection, exc):
            raise TransactionConflict("another writer stored one of these orders meanwhile") from exc
        error = translate(exc, connection)
        if not isinstance(error, RefusedByDatabase):
            raise error from exc
    if len(prepared_orders) == 1:
        return [_store_alone(connection, prepared_orders[0], rule, error)]
    middle = len(prepared_orders) // 2
    return store(connection, prepared_orders[:middle], rule) + store(connection, prepared_orders[middle:], rule)


def _met_another_writer(exc: Exception) -> bool:
    """Each order is written once, so its key can be there already only because somebody stored it since we looked."""
    return isinstance(exc, psycopg.errors.UniqueViolation) and str(exc.diag.constraint_name).startswith("orders_pkey")


def _store_alone(
    connection: Connection, prepared_order: PreparedOrder, rule: Rule, error: OrderlibError
) -> Outcome | RefusedByDatabase:
    for _ in range(_LOOKS_AGAIN):
        assert isinstance(error, RefusedByDatabase)
        if error.sqlstate != _MAYBE_SOMEBODY_ELSE:
            break
        try:
            with connection.transaction():
                return _store(connection, [prepared_order], rule)[0]
        except psycopg.errors.LockNotAvailable:
            raise
        except psycopg.Error as exc:
            error = translate(exc, connection)
            if not isinstance(error, RefusedByDatabase):
                raise error from exc
    assert isinstance(error, RefusedByDatabase)
    return RefusedByDatabase(error.sqlstate, prepared_order.order_uid)


def _store(connection: Connection, prepared_orders: Sequence[PreparedOrder], rule: Rule) -> Sequence[Outcome]:
    stored, now = _stored_versions(connection, {prepared_order.order_uid for prepared_order in prepared_orders})
    plan = rule(prepared_orders, stored)
    replaced = [a.order_uid for a in plan.writes if a.order_uid in stored]
    if replaced:
        connection.execute(queries.DELETE_ORDERS, {"order_uids": replaced})
    if plan.writes:
        # In one order everywhere, so that of two writers one waits for the other and they never wait for each other.
        writes = sorted(plan.writes, key=lambda write: write.order_uid)
        _copy_orders(connection, writes, stored, now)
    if plan.moves:
        _move_sources(connection, plan.moves.values())
    return plan.outcomes


def _stored_versions(connection: Connection, order_uids: Iterable[str]) -> tuple[dict[str, StoredVersion], dt.datetime]:
    with connection.pipeline():
        connection.execute(queries.DISABLE_SEQSCAN)
        rows = connection.execute(queries.STORED_STATES, {"order_uids": _array(order_uids)}, binary=True)
        now = connection.execute(queries.CLOCK)
    [(moment,)] = now.fetchall()
    stored = {}
    for order_uid, sha256, topic_id, partition, offset, first_stored_at in rows.fetchall():
        source = RecordPosition(topic_id=topic_id, partition=partition, offset=offset) if topic_id else None
        stored[order_uid] = StoredVersion(content_sha256=sha256, source=source, first_stored_at=first_stored_at)
    return stored, moment


def _array(order_uids: Iterable[str]) -> str:
    """An array as PostgreSQL writes it: the contract leaves nothing in an order_uid that would need an escape.

    psycopg would look at each for that while the database waits.
    """
    return '{"' + '","'.join(order_uids) + '"}'


def _copy_orders(
    connection: Connection, writes: Sequence[PreparedOrder], stored: Mapping[str, StoredVersion], now: dt.datetime
) -> None:
    def order_row(prepared_order: PreparedOrder) -> bytes:
        version = stored.get(prepared_order.order_uid)
        if version is None or version.first_stored_at is None:
            return prepared_order.rows.order + new
        return prepared_order.rows.order + pack_timestamps(version.first_stored_at, max(now, version.first_stored_at))

    new = pack_timestamps(now, now)
    _copy(connection, queries.COPY_ORDERS, map(order_row, writes))
    _copy(connection, queries.COPY_DELIVERY, [prepared_order.rows.delivery for prepared_order in writes])
    _copy(connection, queries.COPY_PAYMENT, [prepared_order.rows.payment for prepared_order in writes])
    _copy(connection, queries.COPY_ITEMS, [prepared_order.rows.items for prepared_order in writes])


def _copy(connection: Connection, statement: LiteralString, rows: Iterable[bytes]) -> None:
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        copy.write(b"".join((COPY_HEADER, *rows, COPY_TRAILER)))


def _move_sources(connection: Connection, moves: Iterable[PreparedOrder]) -> None:
    ordered = [
        (move.order_uid, move.source, move.time)
        for move in sorted(moves, key=lambda move: move.order_uid)
        if move.source
    ]
    connection.execute(
        queries.MOVE_SOURCES,
        {
            "order_uids": [uid for uid, _, _ in ordered],
            "topic_ids": [source.topic_id for _, source, _ in ordered],
            "partitions": [source.partition for _, source, _ in ordered],
            "offsets": [source.offset for _, source, _ in ordered],
            "times": [time for _, _, time in ordered],
        },
    )
