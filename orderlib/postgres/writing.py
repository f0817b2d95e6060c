"""The only write path of orders: every row of every order passes here, by binary COPY straight into the tables."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import LiteralString

import psycopg

from orderlib import queries
from orderlib.contract import column_type, rule_of, rules_of
from orderlib.errors import Collision, OrderError, RefusedByDatabase
from orderlib.ingest import Arrival, Settlement, Source, StoredVersion, settle
from orderlib.models import Delivery, Item, Order, Payment
from orderlib.postgres.connection import Connection
from orderlib.postgres.errors import translate
from orderlib.repository import Outcome
from orderlib.rows import (
    DELIVERY_COLUMNS,
    ITEM_COLUMNS,
    ORDER_COLUMNS,
    PAYMENT_COLUMNS,
    Row,
    delivery_row,
    item_row,
    order_row,
    payment_row,
)

#: So Citus reports a unique violation, and it may only mean that somebody stored the same order_uid meanwhile; then a
#: new look settles it.
_LOOKS_AGAIN = 3
_MAYBE_SOMEBODY_ELSE = "XX000"


def _types(model: type, columns: Sequence[str]) -> list[str]:
    rules = {field.name: rule_of(field) for field in rules_of(model).fields}
    return [column_type(rules[name]) for name in columns]


_ORDER_TYPES = [
    *_types(Order, ORDER_COLUMNS),
    *("bytea", "text", "integer", "bigint", "timestamptz", "timestamptz", "timestamptz"),
]
_DELIVERY_TYPES = ["text", *_types(Delivery, DELIVERY_COLUMNS)]
_PAYMENT_TYPES = ["text", *_types(Payment, PAYMENT_COLUMNS)]
_ITEM_TYPES = ["text", "integer", *_types(Item, ITEM_COLUMNS)]


#: Decides what is to be done for some arrivals, given what is stored.
Rule = Callable[[Sequence[Arrival], Mapping[str, StoredVersion]], Settlement]


def store(
    connection: Connection, arrivals: Sequence[Arrival], rule: Rule = settle
) -> list[Outcome | RefusedByDatabase]:
    """Store orders inside the transaction in hand: what became of each, in their order.

    One that PostgreSQL refuses does not sink its neighbours: halving finds it, each half in a savepoint. Raises any
    other of our errors; the transaction must be rolled back then.
    """
    try:
        with connection.transaction():
            return list(_store(connection, arrivals, rule))
    except (psycopg.Error, UnicodeEncodeError) as exc:
        if _met_another_writer(exc):
            raise Collision("another writer stored one of these orders meanwhile") from exc
        error = translate(exc)
        if not isinstance(error, RefusedByDatabase):
            raise error from exc
    if len(arrivals) == 1:
        return [_store_alone(connection, arrivals[0], rule, error)]
    middle = len(arrivals) // 2
    return store(connection, arrivals[:middle], rule) + store(connection, arrivals[middle:], rule)


def _met_another_writer(exc: Exception) -> bool:
    """Each order is written once, so its key can be there already only because somebody stored it since we looked."""
    return isinstance(exc, psycopg.errors.UniqueViolation) and str(exc.diag.constraint_name).startswith("orders_pkey")


def _store_alone(
    connection: Connection, arrival: Arrival, rule: Rule, error: OrderError
) -> Outcome | RefusedByDatabase:
    for _ in range(_LOOKS_AGAIN):
        assert isinstance(error, RefusedByDatabase)
        if error.sqlstate != _MAYBE_SOMEBODY_ELSE:
            break
        try:
            with connection.transaction():
                return _store(connection, [arrival], rule)[0]
        except psycopg.Error as exc:
            error = translate(exc)
            if not isinstance(error, RefusedByDatabase):
                raise error from exc
    assert isinstance(error, RefusedByDatabase)
    return RefusedByDatabase(error.sqlstate, arrival.order.order_uid)


def _store(connection: Connection, arrivals: Sequence[Arrival], rule: Rule) -> Sequence[Outcome]:
    stored, now = _stored_versions(connection, {arrival.order.order_uid for arrival in arrivals})
    settlement = rule(arrivals, stored)
    replaced = [a.order.order_uid for a in settlement.writes if a.order.order_uid in stored]
    if replaced:
        connection.execute(queries.DELETE_ORDERS, {"order_uids": replaced})
    if settlement.writes:
        # In one order everywhere, so that of two writers one waits for the other and they never wait for each other.
        writes = sorted(settlement.writes, key=lambda write: write.order.order_uid)
        _copy_orders(connection, writes, stored, now)
    if settlement.moves:
        _move_sources(connection, settlement.moves.items())
    return settlement.outcomes


def _stored_versions(connection: Connection, order_uids: Iterable[str]) -> tuple[dict[str, StoredVersion], dt.datetime]:
    with connection.pipeline():
        now = connection.execute(queries.NOW)
        rows = connection.execute(queries.STORED_STATES, {"order_uids": sorted(order_uids)}, binary=True)
    [(moment,)] = now.fetchall()
    stored = {}
    for order_uid, sha256, topic_id, partition, offset, first_stored_at in rows.fetchall():
        source = Source(topic_id=topic_id, partition=partition, offset=offset, time=moment) if topic_id else None
        stored[order_uid] = StoredVersion(content_sha256=sha256, source=source, first_stored_at=first_stored_at)
    return stored, moment


def _copy_orders(
    connection: Connection, writes: Sequence[Arrival], stored: dict[str, StoredVersion], now: dt.datetime
) -> None:
    def order_rows() -> Iterable[Row]:
        for arrival in writes:
            version, source = stored.get(arrival.order.order_uid), arrival.source
            position = (source.topic_id, source.partition, source.offset, source.time) if source else (None,) * 4
            first_stored_at = version.first_stored_at if version else now
            yield (*order_row(arrival.order), arrival.content_sha256, *position, first_stored_at, now)

    def item_rows() -> Iterable[Row]:
        for arrival in writes:
            uid = arrival.order.order_uid
            for line, item in enumerate(arrival.order.items):
                yield (uid, line, *item_row(item))

    orders = [arrival.order for arrival in writes]
    deliveries = ((order.order_uid, *delivery_row(order.delivery)) for order in orders)
    payments = ((order.order_uid, *payment_row(order.payment)) for order in orders)
    _copy(connection, queries.COPY_ORDERS, _ORDER_TYPES, order_rows())
    _copy(connection, queries.COPY_DELIVERY, _DELIVERY_TYPES, deliveries)
    _copy(connection, queries.COPY_PAYMENT, _PAYMENT_TYPES, payments)
    _copy(connection, queries.COPY_ITEMS, _ITEM_TYPES, item_rows())


def _copy(connection: Connection, statement: LiteralString, types: Sequence[str], rows: Iterable[Row]) -> None:
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        copy.set_types(types)
        for row in rows:
            copy.write_row(row)


def _move_sources(connection: Connection, moves: Iterable[tuple[str, Source]]) -> None:
    ordered = sorted(moves, key=lambda move: move[0])
    connection.execute(
        queries.MOVE_SOURCES,
        {
            "order_uids": [uid for uid, _ in ordered],
            "topic_ids": [source.topic_id for _, source in ordered],
            "partitions": [source.partition for _, source in ordered],
            "offsets": [source.offset for _, source in ordered],
            "times": [source.time for _, source in ordered],
        },
    )
