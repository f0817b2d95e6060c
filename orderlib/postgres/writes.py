"""The only write path of orders: binary COPY directly into the tables.

Consumer, redrive, repositories and callers' transactions share it. It runs inside a transaction that its caller began.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import psycopg
from psycopg.abc import PQGen

from orderlib.errors import RefusedByDatabase, TransactionConflict
from orderlib.ingestion.records import PreparedOrder, StoredVersion, WritePlan, plan_writes
from orderlib.postgres import queries
from orderlib.postgres.connections import Connection
from orderlib.postgres.errors import translate
from orderlib.postgres.rows import COPY_HEADER, COPY_TRAILER, Row, original_row, pack_version
from orderlib.postgres.wire import Copy, Statement, Wire
from orderlib.repository import Outcome, RecordPosition

#: Plans the writes of prepared orders from the stored versions and the forgotten order_uids.
Rule = Callable[[Sequence[PreparedOrder], Mapping[str, StoredVersion], Collection[str]], WritePlan]

#: The key of a row exists already: another writer may have stored the order since its version was read. Citus reports
#: every violation inside a COPY as an internal error.
_KEY_EXISTS = {psycopg.errors.UniqueViolation.sqlstate, psycopg.errors.InternalError_.sqlstate}


def store_orders(
    wire: Wire, prepared_orders: Sequence[PreparedOrder], rule: Rule = plan_writes
) -> PQGen[list[Outcome | RefusedByDatabase]]:
    """Store orders inside the caller's transaction; return the result of each, in their order.

    An order that PostgreSQL refuses does not affect its neighbours: bisection finds it, each half in a savepoint.
    Raises any other error of the library, or psycopg's LockNotAvailable and QueryCanceled. The transaction is then as
    it was before the call, unless the connection was lost.
    """
    seen: dict[str, StoredVersion] = {}
    try:
        return list((yield from _store_in_savepoint(wire, prepared_orders, rule, seen)))
    except (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled):
        raise
    except (psycopg.Error, UnicodeEncodeError) as exc:
        error = translate(exc, wire)
        if not isinstance(error, RefusedByDatabase):
            raise error from exc
        if error.sqlstate in _KEY_EXISTS and (yield from _has_changed(wire, prepared_orders, seen)):
            raise TransactionConflict("another writer stored one of these orders") from exc
    if len(prepared_orders) == 1:
        return [RefusedByDatabase(error.sqlstate, prepared_orders[0].order_uid)]
    middle = len(prepared_orders) // 2
    first = yield from store_orders(wire, prepared_orders[:middle], rule)
    return first + (yield from store_orders(wire, prepared_orders[middle:], rule))


def store(
    connection: Connection, prepared_orders: Sequence[PreparedOrder], rule: Rule = plan_writes
) -> list[Outcome | RefusedByDatabase]:
    """Run ``store_orders`` over a psycopg connection that is in a transaction."""
    return connection.wait(store_orders(Wire(connection.pgconn, keeps_statements=False), prepared_orders, rule))


class Save:
    """Store orders in a transaction of their own, all or nothing."""

    def __init__(self, prepared_orders: Sequence[PreparedOrder]) -> None:
        self._prepared_orders = prepared_orders
        #: Whether COMMIT was sent. Without an answer to it the outcome is unknown.
        self.committing = False

    def steps(self, wire: Wire) -> PQGen[Counter[Outcome]]:
        """Return how many orders had each outcome. Raises RefusedByDatabase naming the order at fault."""
        self.committing = False
        yield from wire.pipeline((queries.BEGIN_WRITE, ()))
        try:
            outcomes = yield from accepted(wire, self._prepared_orders)
        except Exception:
            with contextlib.suppress(psycopg.Error):
                yield from wire.pipeline((queries.ROLLBACK, ()))
            raise
        self.committing = True
        yield from wire.pipeline((queries.COMMIT, ()))
        return outcomes


def accepted(wire: Wire, prepared_orders: Sequence[PreparedOrder]) -> PQGen[Counter[Outcome]]:
    """Store all orders or none inside the caller's transaction, and count their outcomes.

    Raises RefusedByDatabase naming the first order at fault; the caller rolls back then.
    """
    if not prepared_orders:
        return Counter()
    outcomes: Counter[Outcome] = Counter()
    for result in (yield from store_orders(wire, prepared_orders)):
        if isinstance(result, RefusedByDatabase):
            raise result
        outcomes[result] += 1
    return outcomes


def _has_changed(
    wire: Wire, prepared_orders: Sequence[PreparedOrder], seen: Mapping[str, StoredVersion]
) -> PQGen[bool]:
    """Return whether another writer stored one of the orders since ``seen`` was read.

    If so, the existing key is a conflict and not a bad row. A transaction with one snapshot cannot see it: assume it.
    """
    [[(isolation,)]] = yield from wire.pipeline((queries.ISOLATION, ()))
    if isolation not in {"read committed", "read uncommitted"}:
        return True
    [rows] = yield from wire.pipeline((queries.STORED_STATES, [_uids(prepared_orders)]))
    return versions_of(rows) != seen


def _store_in_savepoint(
    wire: Wire, prepared_orders: Sequence[PreparedOrder], rule: Rule, seen: dict[str, StoredVersion]
) -> PQGen[Sequence[Outcome]]:
    """Store the orders. ``seen`` receives the versions that were stored before."""
    try:
        return (yield from _store(wire, prepared_orders, rule, seen))
    except Exception:
        with contextlib.suppress(psycopg.Error):
            yield from wire.pipeline((queries.ROLLBACK_TO_SAVEPOINT, ()), (queries.RELEASE_SAVEPOINT, ()))
        raise


def _store(
    wire: Wire, prepared_orders: Sequence[PreparedOrder], rule: Rule, seen: dict[str, StoredVersion]
) -> PQGen[Sequence[Outcome]]:
    uids = _uids(prepared_orders)
    _, [(seqscan,)], _, _, forgotten, rows, [(now,)] = yield from wire.pipeline(
        (queries.SAVEPOINT, ()),
        (queries.SEQSCAN, ()),
        (queries.DISABLE_SEQSCAN, ()),
        # A statement before the next one, whose snapshot then has every forget that is not after this transaction.
        (queries.HOLD_OFF_FORGET, ()),
        (queries.FORGOTTEN_ORDERS, [uids]),
        (queries.STORED_STATES, [uids]),
        (queries.CLOCK, ()),
    )
    assert isinstance(now, dt.datetime)
    stored = versions_of(rows)
    seen.update(stored)
    plan = rule(prepared_orders, stored, {str(uid) for (uid,) in forgotten})
    statements: list[Statement] = []
    replaced = [write.order_uid for write in plan.writes if write.order_uid in stored]
    if replaced:
        statements.append((queries.DELETE_ORDERS, [_text_array(replaced)]))
    if plan.moves:
        statements.append(_moves(plan.moves.values()))
    end = (queries.RESTORE_SEQSCAN[str(seqscan)], queries.RELEASE_SAVEPOINT)
    if not plan.writes:
        statements += [(statement, ()) for statement in end]
    if statements:
        yield from wire.pipeline(*statements)
    if plan.writes:
        yield from wire.copy_in(_copies(plan, stored, now), *end)
    return plan.outcomes


def versions_of(rows: Iterable[Row]) -> dict[str, StoredVersion]:
    """Return the versions in rows of STORED_STATES, by order_uid."""
    stored = {}
    for order_uid, sha256, topic_id, partition, offset, first_stored_at, number in rows:
        source = RecordPosition(topic_id=topic_id, partition=partition, offset=offset) if topic_id else None
        stored[order_uid] = StoredVersion(
            content_sha256=sha256, source=source, first_stored_at=first_stored_at, number=number
        )
    return stored


def _uids(prepared_orders: Iterable[PreparedOrder]) -> str:
    return _text_array({prepared_order.order_uid for prepared_order in prepared_orders})


def _text_array(order_uids: Iterable[str]) -> str:
    """Return order_uids as PostgreSQL writes an array: none contains a character that needs an escape."""
    return '{"' + '","'.join(order_uids) + '"}'


def _copies(plan: WritePlan, stored: Mapping[str, StoredVersion], now: dt.datetime) -> list[Copy]:
    """Return the COPY of each table for which the plan has rows."""

    def order_row(write: PreparedOrder, number: int) -> bytes:
        version, has_original = stored.get(write.order_uid), write.original is not None
        if version is None or version.first_stored_at is None:
            if number == 1 and not has_original:
                return write.rows.order + first
            return write.rows.order + pack_version(now, now, number, has_original)
        first_stored_at = version.first_stored_at
        return write.rows.order + pack_version(first_stored_at, max(now, first_stored_at), number, has_original)

    first = pack_version(now, now, 1, False)
    # Sorted, so that two writers lock the same orders in the same sequence and cannot deadlock.
    numbered = sorted(zip(plan.writes, plan.numbers, strict=True), key=lambda pair: pair[0].order_uid)
    writes = [write for write, _ in numbered]
    originals = [(write.order_uid, write.original) for write in writes if write.original is not None]
    rows: list[Copy] = [
        (queries.COPY_ORDERS, itertools.starmap(order_row, numbered)),
        (queries.COPY_DELIVERY, (write.rows.delivery for write in writes)),
        (queries.COPY_PAYMENT, (write.rows.payment for write in writes)),
        (queries.COPY_ITEMS, (write.rows.items for write in writes)),
    ]
    if originals:
        original_rows = itertools.starmap(original_row, originals)
        rows.append((queries.COPY_ORIGINALS, itertools.chain.from_iterable(original_rows)))
    return [(statement, itertools.chain([COPY_HEADER], parts, [COPY_TRAILER])) for statement, parts in rows]


def _moves(moves: Iterable[PreparedOrder]) -> Statement:
    ordered = [
        (move.order_uid, move.source, move.time)
        for move in sorted(moves, key=lambda move: move.order_uid)
        if move.source
    ]
    return (
        queries.MOVE_SOURCES,
        [
            [uid for uid, _, _ in ordered],
            [source.topic_id for _, source, _ in ordered],
            [source.partition for _, source, _ in ordered],
            [source.offset for _, source, _ in ordered],
            [time for _, _, time in ordered],
        ],
    )
