"""Every read of orders, as generators that a thread, an event loop or a caller's connection runs.

A read sees one snapshot. BEGIN, the statements and COMMIT are sent in one packet.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Iterable
from typing import Any, LiteralString

import attrs
from psycopg.abc import PQGen

from orderlib.contract import fits_postgres
from orderlib.errors import REJECT_CODES, Fault, OrderNotFound, TransactionConflict
from orderlib.models import Order
from orderlib.postgres import queries
from orderlib.postgres.reject_list import RejectPage, RejectPosition, RejectQuery, RejectSummary
from orderlib.postgres.rows import JOINED_WIDTH, Row, order_from_rows, orders_from_rows
from orderlib.postgres.schema import SchemaLocation, require_schema
from orderlib.postgres.wire import Statement, Wire
from orderlib.repository import (
    COUNT_LIMIT,
    FILTERS,
    MAX_PAGE_ITEMS,
    STORED_RECENTLY,
    STREAM_SIZE,
    Direction,
    ListQuery,
    Match,
    OrderSummary,
    Outcome,
    Page,
    PositionState,
    RecordPosition,
    RecordState,
    Stats,
    StoredOrder,
    fitting_orders,
    is_position,
    require_type,
)
from orderlib.search import SearchField, SearchText

_BEGIN: Statement = (queries.BEGIN_READ, ())
_COMMIT: Statement = (queries.COMMIT, ())

#: How many items ``PageReader`` expects on a page at most.
_WANTED_ITEMS = MAX_PAGE_ITEMS * 4 // 5

#: How often an order may change while a read in a caller's transaction reads it.
_ATTEMPTS = 10


class ReadQueries:
    """The reads over one connection, one at a time.

    Each method returns a generator for psycopg's ``wait`` functions. It raises psycopg's errors; the caller translates
    them. ``in_transaction``: the connection is in a caller's transaction, which the reads neither begin nor end.
    """

    def __init__(self, wire: Wire, *, in_transaction: bool = False) -> None:
        self._wire = wire
        self._in_transaction = in_transaction

    def get_stored(self, order_uid: str) -> PQGen[StoredOrder]:
        """See ``OrderRepository.get_stored``."""
        if not fits_postgres(require_type("order_uid", order_uid, str)):
            raise OrderNotFound(order_uid)
        joined, items = yield from self._orders(
            (queries.GET_ORDER, [order_uid]), (queries.GET_ITEMS, [order_uid]), [order_uid]
        )
        if not joined:
            raise OrderNotFound(order_uid)
        return _stored_order(order_from_rows(joined[0], items), joined[0])

    def get_many(self, order_uids: Iterable[str]) -> PQGen[dict[str, Order]]:
        """See ``OrderRepository.get_many``. The caller has checked the order_uids."""
        wanted = [uid for uid in order_uids if fits_postgres(uid)]
        array = queries.array_of(wanted)
        joined, items = yield from self._orders(
            (queries.GET_ORDERS, [array]), (queries.GET_ITEMS_OF_ORDERS, [array]), wanted
        )
        found = {order.order_uid: order for order in orders_from_rows(joined, items)}
        return {order.order_uid: order for uid in wanted if (order := found.get(uid)) is not None}

    def get_many_stored(self, order_uids: list[str], max_items: int) -> PQGen[dict[str, StoredOrder | None]]:
        """Return those of these orders that exist, by order_uid; ``None`` for an order with more than ``max_items``."""
        array = queries.array_of(order_uids)
        joined, items = yield from self._orders(
            (queries.GET_ORDERS, [array]), (queries.GET_FIRST_ITEMS_OF_ORDERS, [array, max_items + 1]), order_uids
        )
        orders = zip(joined, orders_from_rows(joined, items), strict=True)
        return {
            order.order_uid: _stored_order(order, row) if len(order.items) <= max_items else None
            for row, order in orders
        }

    def content_sha256(self, order_uid: str) -> PQGen[bytes]:
        """See ``OrderRepository.content_sha256``."""
        return self._value(queries.GET_CONTENT_SHA256, order_uid)

    def many_content_sha256(self, order_uids: list[str]) -> PQGen[dict[str, bytes | None]]:
        """Return the digests of those of these orders that exist, by order_uid."""
        [rows] = yield from self._wire.pipeline((queries.GET_CONTENT_SHA256_OF_ORDERS, [queries.array_of(order_uids)]))
        return dict(rows)

    def original(self, order_uid: str) -> PQGen[bytes | None]:
        """See ``OrderRepository.original``."""
        return self._value(queries.GET_ORIGINAL, order_uid)

    def _value(self, statement: LiteralString, order_uid: str) -> PQGen[Any]:
        """Return what a statement selects for an order. Raises OrderNotFound."""
        if not fits_postgres(require_type("order_uid", order_uid, str)):
            raise OrderNotFound(order_uid)
        [rows] = yield from self._wire.pipeline((statement, [order_uid]))
        if not rows:
            raise OrderNotFound(order_uid)
        [(value,)] = rows
        return value

    def list_orders(self, query: ListQuery) -> PQGen[Page]:
        """See ``OrderRepository.list_orders``."""
        return self.page(query, query.limit, begin=True, end=True)

    def page(self, query: ListQuery, limit: int, *, begin: bool = False, end: bool = False) -> PQGen[Page]:
        """Return a page of at most ``limit`` orders. Several pages between ``begin`` and ``end`` see one snapshot."""
        filters = _list_filters(query)
        if filters is None:
            return Page(orders=(), next_cursor=None)
        cursor = query.cursor
        statement = queries.list_orders(query.direction, filters, cursor=cursor is not None)
        position: list[object] = [cursor.first_stored_at, cursor.order_uid] if cursor else []
        # One more than the page, to know whether there is a next page.
        select: Statement = (statement, [limit + 1, *position, *filters.values()])
        has_too_many_items = False
        for _ in range(_ATTEMPTS):
            joined = (yield from self._pipeline(select, begin=begin))[0]
            shown = joined[:limit]
            if has_too_many_items:
                shown = yield from self._fitting(shown)
            uids = [row[0] for row in shown]
            of_page: Statement = (queries.GET_ITEMS_OF_PAGE, [queries.array_of(uids), MAX_PAGE_ITEMS])
            items, *versions = yield from self._pipeline(of_page, *self._versions(uids), end=end)
            if len(items) == MAX_PAGE_ITEMS:
                # Begin again if COMMIT was sent with the items.
                has_too_many_items, begin = True, begin and end
            elif self._is_one_snapshot(shown, versions):
                break
        else:
            raise _conflict_error()
        stored = list(map(_stored_order, orders_from_rows(shown, items), shown))
        next_cursor = stored[-1].cursor if len(joined) > len(shown) else None
        if query.direction is Direction.NEWER:
            stored.reverse()
        return Page(orders=tuple(stored), next_cursor=next_cursor)

    def _fitting(self, joined: list[Row]) -> PQGen[list[Row]]:
        """Return the first of these orders, as many as fit on a page."""
        [rows] = yield from self._pipeline((queries.COUNT_ITEMS, [queries.array_of([row[0] for row in joined])]))
        numbers: dict[str, int] = dict(rows)
        # In a caller's transaction, an order may have been deleted since. Its version will show that.
        return joined[: fitting_orders(numbers.get(row[0], 0) for row in joined)]

    def count(self, query: ListQuery) -> PQGen[int]:
        """See ``OrderRepository.count``."""
        filters = _list_filters(query)
        if filters is None:
            return 0
        [[(count,)]] = yield from self._wire.pipeline((queries.count_orders(filters), [COUNT_LIMIT, *filters.values()]))
        assert isinstance(count, int)
        return count

    def find(self, text: str, limit: int) -> PQGen[tuple[Match, ...]]:
        """See ``OrderRepository.find``. The caller has checked the limit."""
        search = SearchText.parse(require_type("text", text, str))
        if search is None:
            return ()
        parameters = {
            SearchField.ORDER_UID: search.order_uid,
            SearchField.TRACK_NUMBER: search.text,
            SearchField.CUSTOMER_ID: search.text,
            SearchField.PHONE: search.phone,
            SearchField.EMAIL: search.email,
            SearchField.RID: search.text,
        }
        used = {field: value for field, value in parameters.items() if value is not None}
        statements: list[Statement] = [(queries.FIND[field], [value, limit]) for field, value in used.items()]
        if search.order_uid is not None:
            # No order_uid has a character as high as ``~``.
            bounds = [search.order_uid, search.order_uid + "~", limit]
            statements += [(statement, bounds) for statement in queries.FIND_ORDER_UIDS]
        found = yield from self._pipeline(*statements, begin=True)
        unsorted_by_uid = {row for rows in found[len(used) :] for row in rows}
        by_uid = sorted(unsorted_by_uid, key=lambda row: (row[0].lower(), row[0]))
        times: dict[str, dt.datetime] = {}
        fields: dict[str, list[SearchField]] = {}
        for field, rows in zip(used, found, strict=False):
            for order_uid, time in rows:
                times[order_uid] = time
                fields.setdefault(order_uid, []).append(field)
        uids = sorted(times, key=lambda uid: (times[uid], uid), reverse=True)[:limit]
        if not uids:
            uids = [row[0] for row in by_uid[:limit]]
            fields = {uid: [SearchField.ORDER_UID_PREFIX] for uid in uids}
        [rows] = yield from self._pipeline((queries.GET_SUMMARIES, [queries.array_of(uids)]), end=True)
        summaries = {row[0]: _order_summary(row) for row in rows}
        return tuple(Match(order=summaries[uid], fields=tuple(fields[uid])) for uid in uids if uid in summaries)

    def position_state(self, topic: str, partition: int, offset: int) -> PQGen[PositionState]:
        """See ``OrderRepository.position_state``."""
        if not is_position(topic, partition, offset):
            return PositionState(state=RecordState.UNKNOWN)
        [rows] = yield from self._wire.pipeline((queries.POSITION_STATE, [topic, partition, offset]))
        if not rows:
            return PositionState(state=RecordState.UNKNOWN)
        [(is_handled, code, faults, redrive_outcome)] = rows
        if not is_handled:
            return PositionState(state=RecordState.WAITING)
        if code is None or redrive_outcome not in {None, Outcome.REJECTED}:
            return PositionState(state=RecordState.HANDLED)
        return PositionState(
            state=RecordState.REJECTED,
            code=code,
            **_faults(faults),
        )

    def list_rejects(self, query: RejectQuery) -> PQGen[RejectPage]:
        """Return a page of the list of rejects."""
        filters = _reject_filters(query)
        cursor = query.cursor
        statement = queries.list_rejects(filters, cursor=cursor is not None, oldest_first=query.oldest_first)
        after = [cursor.rejected_at, cursor.topic_id, cursor.partition, cursor.offset] if cursor else []
        # One more than the page, to know whether there is a next page.
        [rows] = yield from self._wire.pipeline((statement, [*filters.values(), *after, query.limit + 1]))
        rejects = tuple(map(_reject_summary, rows[: query.limit]))
        return RejectPage(
            rejects=rejects, next_cursor=rejects[-1].cursor if rejects and len(rows) > query.limit else None
        )

    def count_rejects(self, query: RejectQuery) -> PQGen[int]:
        """Return how many rejects match the filters of a query."""
        filters = _reject_filters(query)
        statement = queries.count_rejects(filters)
        [[(count,)]] = yield from self._wire.pipeline((statement, list(filters.values())))
        assert isinstance(count, int)
        return count

    def count_rejects_by_path(self, query: RejectQuery) -> PQGen[list[Row]]:
        """Return the number of rejects that match the filters, by code and path of the first fault."""
        filters = _reject_filters(query)
        [rows] = yield from self._wire.pipeline((queries.count_rejects_by_path(filters), list(filters.values())))
        return rows

    def next_offsets(self, topic_id: str) -> PQGen[dict[int, int]]:
        """See ``ConsumerProgressRepository.next_offsets``."""
        [rows] = yield from self._wire.pipeline((queries.NEXT_OFFSETS_OF_TOPIC, [topic_id]))
        return dict(rows)

    def rejected_records(
        self, topic_id: str, partition: int, first_offset: int, last_offset: int, limit: int
    ) -> PQGen[list[Row]]:
        """See ``ConsumerProgressRepository.rejected_records``."""
        parameters = [topic_id, partition, first_offset, last_offset, limit]
        [rows] = yield from self._wire.pipeline((queries.REJECTED_RECORDS, parameters))
        return rows

    def end(self) -> PQGen[None]:
        """End the snapshot of ``page``. A caller's transaction goes on."""
        if not self._in_transaction:
            yield from self._pipeline(_COMMIT)

    def stats(self) -> PQGen[Stats]:
        """See ``OrderRepository.stats``."""
        [(asked_at, newest_at)], [(recent,)], rejects, [(delay_s,)] = yield from self._pipeline(
            (queries.NEWEST_ORDER_TIME, ()),
            (queries.COUNT_STORED_RECENTLY, [COUNT_LIMIT, STORED_RECENTLY]),
            (queries.COUNT_REJECTS, [COUNT_LIMIT, list(REJECT_CODES)]),
            (queries.REPLICATION_DELAY, ()),
            begin=True,
            end=True,
        )
        return Stats(
            asked_at=asked_at,
            newest_first_stored_at=newest_at,
            stored_recently=recent,
            rejects_by_code=dict(rejects),
            replication_delay_s=delay_s,
        )

    def check(self) -> PQGen[float | None]:
        """Check the schema and the privileges. Return the replication delay of a standby, in seconds."""
        delay_s: float | None
        number: int | None = None
        [location_row], [(delay_s,)] = yield from self._wire.pipeline(
            (queries.SCHEMA_LOCATION, ()), (queries.REPLICATION_DELAY, ())
        )
        location = SchemaLocation(*location_row)
        if location.found:
            [[(number,)]] = yield from self._wire.pipeline((queries.SCHEMA_NUMBER, ()))
        require_schema(location, number)
        # No order has this uid, but the query needs the privilege to read every table.
        with contextlib.suppress(OrderNotFound):
            yield from self.get_stored(".")
        return delay_s

    def _orders(self, joined: Statement, items: Statement, order_uids: list[str]) -> PQGen[tuple[list[Row], list[Row]]]:
        """Return the rows of both statements from one snapshot."""
        for _ in range(_ATTEMPTS):
            orders, of_items, *versions = yield from self._pipeline(
                joined, items, *self._versions(order_uids), begin=True, end=True
            )
            if self._is_one_snapshot(orders, versions):
                return orders, of_items
        raise _conflict_error()

    def _versions(self, order_uids: list[str]) -> list[Statement]:
        """Return a query of the versions for a caller's transaction, where each statement may have its own snapshot."""
        return [(queries.GET_VERSIONS, [queries.array_of(order_uids)])] if self._in_transaction else []

    def _is_one_snapshot(self, joined: list[Row], versions: list[list[Row]]) -> bool:
        """Return whether no order was replaced between the first statement and the last."""
        if not self._in_transaction:
            return True
        return {(row[0], *row[JOINED_WIDTH : JOINED_WIDTH + 2]) for row in joined} == set(versions[0])

    def _pipeline(self, *statements: Statement, begin: bool = False, end: bool = False) -> PQGen[list[list[Row]]]:
        """Execute statements in one round trip, with BEGIN before and COMMIT after them if wanted."""
        if self._in_transaction:
            return (yield from self._wire.pipeline(*statements))
        before, after = (_BEGIN,) * begin, (_COMMIT,) * end
        rows = yield from self._wire.pipeline(*before, *statements, *after)
        return rows[len(before) : len(before) + len(statements)]


class PageReader:
    """All pages of a query from one snapshot, in sequence, each with so few orders that their items fit."""

    def __init__(self, read_queries: ReadQueries, query: ListQuery) -> None:
        self._read_queries = read_queries
        self._query = query
        self._limit = STREAM_SIZE
        #: Whether a page was returned.
        self.begun = False
        self._ended = False

    def next_page(self) -> PQGen[Page | None]:
        """Return the next page. After the last one, end the snapshot and return ``None``."""
        if self._ended:
            yield from self._read_queries.end()
            return None
        page = yield from self._read_queries.page(self._query, self._limit, begin=not self.begun)
        self.begun, self._ended = True, page.next_cursor is None
        self._query = attrs.evolve(self._query, cursor=page.next_cursor)
        items = sum(len(stored.order.items) for stored in page.orders)
        # A page with too many items costs more queries, so leave a margin.
        self._limit = max(1, min(STREAM_SIZE, len(page.orders) * _WANTED_ITEMS // max(1, items)))
        return page


def _conflict_error() -> TransactionConflict:
    return TransactionConflict("other writers keep replacing these orders")


def _list_filters(query: ListQuery) -> dict[str, object] | None:
    """Return the filters that are used, or ``None`` if no order can match a text."""
    used = {name: value for name in FILTERS if (value := getattr(query, name)) is not None}
    return used if all(fits_postgres(value) for value in used.values() if isinstance(value, str)) else None


def _faults(faults: dict[str, Any]) -> dict[str, Any]:
    return {"faults": tuple(Fault(**fault) for fault in faults["first"]), "total_faults": faults["total"]}


def _reject_filters(query: RejectQuery) -> dict[str, object]:
    filters = {
        "code": query.code,
        "key": query.key,
        "without_order_uid": query.without_order_uid or None,
        "since": query.since,
        "until": query.until,
        "not_redriven": query.not_redriven or None,
        "is_open": query.is_open or None,
    }
    return {name: value for name, value in filters.items() if value is not None}


def _order_summary(row: Row) -> OrderSummary:
    order_uid, customer_id, track_number, items, amount, currency, first_stored_at = row
    return OrderSummary(
        order_uid=order_uid,
        customer_id=customer_id,
        track_number=track_number,
        items=items,
        amount=amount,
        currency=currency,
        first_stored_at=first_stored_at,
    )


def _reject_summary(row: Row) -> RejectSummary:
    topic, partition, offset, topic_id, record_time, code, faults, rejected_at, redriven_at, redrive_outcome = row
    return RejectSummary(
        position=RejectPosition(topic=topic, partition=partition, offset=offset),
        topic_id=topic_id,
        record_time=record_time,
        code=code,
        **_faults(faults),
        rejected_at=rejected_at,
        redriven_at=redriven_at,
        redrive_outcome=redrive_outcome,
    )


def _stored_order(order: Order, joined: Row) -> StoredOrder:
    stored_at, sha256, first_stored_at, version, topic_id, partition, offset, has_original = joined[JOINED_WIDTH:]
    return StoredOrder(
        order=order,
        first_stored_at=first_stored_at,
        stored_at=stored_at,
        content_sha256=sha256,
        version=version,
        has_original=has_original,
        position=RecordPosition(topic_id=topic_id, partition=partition, offset=offset) if topic_id else None,
    )
