"""The only write path of orders: binary COPY directly into the tables.

Consumer, redrive, repositories and callers' transactions share it. It runs inside a transaction that its caller began.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from typing import TypeVar

import psycopg
from psycopg.abc import PQGen

from orderlib.contract import datetime_class
from orderlib.errors import RefusedByDatabase, TransactionConflict
from orderlib.ingestion.records import OrderChange, PreparedOrder, StoredVersion, Tombstone, WritePlan, plan_writes
from orderlib.ingestion.retry import Conflicts
from orderlib.postgres import queries
from orderlib.postgres.connections import Connection, transaction_with_lock_limit
from orderlib.postgres.errors import translate, translate_errors
from orderlib.postgres.rows import COPY_HEADER, COPY_TRAILER, Row, original_row, pack_store_columns
from orderlib.postgres.wire import Copy, Statement, Wire
from orderlib.repository import Outcome, RecordPosition

T = TypeVar("T")

#: Plans what to write from the changes, the stored versions and the forgotten order_uids.
Planner = Callable[[Sequence[OrderChange], Mapping[str, StoredVersion], Collection[str]], WritePlan]

#: The key of a row exists already: another writer may have stored the order since its version was read. Citus reports
#: every violation inside a COPY as an internal error.
_KEY_EXISTS = {psycopg.errors.UniqueViolation.sqlstate, psycopg.errors.InternalError_.sqlstate}


def store_orders(
    wire: Wire, changes: Sequence[OrderChange], planner: Planner = plan_writes
) -> PQGen[list[Outcome | RefusedByDatabase]]:
    """Store or erase orders inside the caller's transaction; return the result of each change, in their order.

    An order that PostgreSQL refuses does not affect its neighbours: bisection finds it, each half in a savepoint.
    Raises any other error of the library, or psycopg's LockNotAvailable and QueryCanceled. The transaction is then as
    it was before the call, unless the connection was lost.
    """
    seen: dict[str, StoredVersion] = {}
    try:
        return list((yield from _store_in_savepoint(wire, changes, planner, seen)))
    except (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled):
        raise
    except (psycopg.Error, UnicodeEncodeError) as exc:
        error = translate(exc, wire)
        if not isinstance(error, RefusedByDatabase):
            raise error from exc
        if error.sqlstate in _KEY_EXISTS and (yield from _has_changed(wire, changes, seen)):
            raise TransactionConflict("another writer stored one of these orders") from exc
    if len(changes) == 1:
        return [RefusedByDatabase(error.sqlstate, changes[0].order_uid)]
    middle = len(changes) // 2
    first = yield from store_orders(wire, changes[:middle], planner)
    return first + (yield from store_orders(wire, changes[middle:], planner))


def store(
    connection: Connection, changes: Sequence[OrderChange], planner: Planner = plan_writes
) -> list[Outcome | RefusedByDatabase]:
    """Run ``store_orders`` over a psycopg connection that is in a transaction."""
    return connection.wait(store_orders(Wire(connection.pgconn, keeps_statements=False), changes, planner))


def run_transaction(connection: Connection, work: Callable[[], T]) -> T:
    """Run work in a transaction, again after each conflict with other writers, and translate the errors.

    Raises TransactionConflict after too many conflicts, and DatabaseUnavailable after a wait of 5 s for a lock, which
    a frozen consumer may hold.
    """
    conflicts = Conflicts()
    while True:
        try:
            with translate_errors(connection), transaction_with_lock_limit(connection):
                return work()
        except TransactionConflict:
            wait_s = conflicts.next_wait_s()
            if wait_s is None:
                raise
        time.sleep(wait_s)


class Save:
    """Store orders in a transaction of their own, all or nothing."""

    def __init__(self, prepared_orders: Sequence[PreparedOrder]) -> None:
        self._prepared_orders = prepared_orders
        #: Whether COMMIT was sent. Without an answer to it the outcome is unknown.
        self.committing = False

    def steps(self, wire: Wire) -> PQGen[Counter[Outcome]]:
        """Return how many orders had each outcome. Raises RefusedByDatabase naming the refused order."""
        self.committing = False
        yield from wire.pipeline((queries.BEGIN_WRITE, ()))
        try:
            outcomes = yield from store_all(wire, self._prepared_orders)
        except Exception:
            with contextlib.suppress(psycopg.Error):
                yield from wire.pipeline((queries.ROLLBACK, ()))
            raise
        self.committing = True
        yield from wire.pipeline((queries.COMMIT, ()))
        return outcomes


def store_all(wire: Wire, prepared_orders: Sequence[PreparedOrder]) -> PQGen[Counter[Outcome]]:
    """Store all orders or none inside the caller's transaction, and count their outcomes.

    Raises RefusedByDatabase naming the first refused order; the caller rolls back then.
    """
    if not prepared_orders:
        return Counter()
    outcomes: Counter[Outcome] = Counter()
    for result in (yield from store_orders(wire, prepared_orders)):
        if isinstance(result, RefusedByDatabase):
            raise result
        outcomes[result] += 1
    return outcomes


def _has_changed(wire: Wire, changes: Sequence[OrderChange], seen: Mapping[str, StoredVersion]) -> PQGen[bool]:
    """Return whether another writer stored one of the orders since ``seen`` was read.

    If so, the existing key is a conflict and not a bad row. A transaction with one snapshot cannot see it: assume it.
    """
    [[(has_new_snapshots,)]] = yield from wire.pipeline((queries.HAS_NEW_SNAPSHOTS, ()))
    if not has_new_snapshots:
        return True
    uids = _uids(changes)
    rows, erased = yield from wire.pipeline((queries.STORED_VERSIONS, [uids]), (queries.ERASED_VERSIONS, [uids]))
    return {**_erased_versions(erased), **versions_of(rows)} != seen


def _store_in_savepoint(
    wire: Wire, changes: Sequence[OrderChange], planner: Planner, seen: dict[str, StoredVersion]
) -> PQGen[Sequence[Outcome]]:
    """Store the orders. ``seen`` receives the versions that were stored before."""
    try:
        return (yield from _store(wire, changes, planner, seen))
    except Exception:
        yield from roll_back_to_savepoint(wire)
        raise


def roll_back_to_savepoint(wire: Wire) -> PQGen[None]:
    """Leave the transaction as it was at the savepoint. Do nothing if the connection was lost."""
    with contextlib.suppress(psycopg.Error):
        yield from wire.pipeline((queries.ROLLBACK_TO_SAVEPOINT, ()), (queries.RELEASE_SAVEPOINT, ()))


def _store(
    wire: Wire, changes: Sequence[OrderChange], planner: Planner, seen: dict[str, StoredVersion]
) -> PQGen[Sequence[Outcome]]:
    uids = _uids(changes)
    _, [(seqscan, is_read_only)], _, _, digests, rows, erased_rows, [(now,)] = yield from wire.pipeline(
        (queries.SAVEPOINT, ()),
        (queries.SETTINGS_OF_WRITE, ()),
        (queries.DISABLE_SEQSCAN, ()),
        # Take the lock in its own statement, so that the snapshot of the next one includes every committed forget.
        (queries.FORGET_LOCK_SHARED, ()),
        (queries.FORGOTTEN_ORDERS, [uids]),
        (queries.STORED_VERSIONS, [uids]),
        (queries.ERASED_VERSIONS, [uids]),
        (queries.CLOCK, ()),
    )
    assert isinstance(now, datetime_class())
    stored, erased = versions_of(rows), _erased_versions(erased_rows)
    seen.update({**erased, **stored})
    plan = planner(changes, seen, _find_forgotten(changes, {digest for (digest,) in digests}) if digests else ())
    written = [change.order_uid for change in plan.writes]
    tombstones = [change for change in (*plan.writes, *plan.moves.values()) if isinstance(change, Tombstone)]
    moves = [change for change in plan.moves.values() if isinstance(change, PreparedOrder)]
    statements: list[Statement] = []
    if replaced := [uid for uid in written if uid in stored]:
        statements.append((queries.DELETE_ORDERS, [queries.array_of(replaced)]))
    if moves:
        statements.append(_moves(moves))
    if superseded := [uid for uid in (*written, *plan.moves) if uid in erased]:
        statements.append((queries.DELETE_ERASED, [queries.array_of(superseded)]))
    if tombstones:
        statements.append(_insert_erased(tombstones))
    copies = _copies(plan, now)
    if copies and is_read_only:
        raise psycopg.errors.ReadOnlySqlTransaction("cannot execute COPY FROM in a read-only transaction")
    end = (queries.RESTORE_SEQSCAN[str(seqscan)], queries.RELEASE_SAVEPOINT)
    if not copies:
        statements += [(statement, ()) for statement in end]
    if statements:
        yield from wire.pipeline(*statements)
    if copies:
        yield from wire.copy_in(copies, *end)
    return plan.outcomes


def within_bytes(rows: list[Row], max_bytes: int) -> list[Row]:
    """Return the first rows, up to this size of values but at least one. The last column is the size of its value."""
    total_bytes = 0
    for index, (*_, size_bytes) in enumerate(rows):
        total_bytes += size_bytes
        if index and total_bytes > max_bytes:
            return rows[:index]
    return rows


def versions_of(rows: Iterable[Row]) -> dict[str, StoredVersion]:
    """Return the versions in rows of STORED_VERSIONS, by order_uid."""
    stored = {}
    for order_uid, sha256, topic_id, partition, offset, first_stored_at, number in rows:
        position = RecordPosition(topic_id=topic_id, partition=partition, offset=offset) if topic_id else None
        stored[order_uid] = StoredVersion(
            content_sha256=sha256, position=position, first_stored_at=first_stored_at, version_number=number
        )
    return stored


def _erased_versions(rows: Iterable[Row]) -> dict[str, StoredVersion]:
    return {
        order_uid: StoredVersion(
            content_sha256=None,
            position=RecordPosition(topic_id=topic_id, partition=partition, offset=offset),
            first_stored_at=None,
            version_number=0,
        )
        for order_uid, topic_id, partition, offset in rows
    }


def _find_forgotten(changes: Iterable[OrderChange], digests: Container[object]) -> set[str]:
    """Return the order_uids with these digests."""
    uids = {change.order_uid for change in changes}
    return {uid for uid in uids if hashlib.sha256(uid.encode()).digest() in digests}


def _uids(changes: Iterable[OrderChange]) -> str:
    return queries.array_of({change.order_uid for change in changes})


def _copies(plan: WritePlan, now: dt.datetime) -> list[Copy]:
    """Return the COPY of each table for which the plan has rows."""
    # Packed once: nearly every order of a batch is new.
    columns_of_new_order = pack_store_columns(now, now, 1, False)

    def order_row(write: PreparedOrder, version: int, first_stored_at: dt.datetime | None) -> bytes:
        if first_stored_at is None and version == 1 and write.original is None:
            return write.rows.order + columns_of_new_order
        first = first_stored_at or now
        return write.rows.order + pack_store_columns(first, max(now, first), version, write.original is not None)

    orders = [
        (write, version, first_stored_at)
        for write, version, first_stored_at in zip(plan.writes, plan.version_numbers, plan.first_stored, strict=True)
        if isinstance(write, PreparedOrder)
    ]
    if not orders:
        return []
    # Sorted, so that two writers lock the same orders in the same sequence and cannot deadlock.
    orders.sort(key=lambda order: order[0].order_uid)
    writes = [write for write, _, _ in orders]
    originals = [(write.order_uid, write.original) for write in writes if write.original is not None]
    rows: list[Copy] = [
        (queries.COPY_ORDERS, itertools.starmap(order_row, orders)),
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
        (move.order_uid, move.position, move.time)
        for move in sorted(moves, key=lambda move: move.order_uid)
        if move.position
    ]
    return (
        queries.MOVE_POSITIONS,
        [
            [uid for uid, _, _ in ordered],
            [position.topic_id for _, position, _ in ordered],
            [position.partition for _, position, _ in ordered],
            [position.offset for _, position, _ in ordered],
            [time for _, _, time in ordered],
        ],
    )


def _insert_erased(tombstones: Iterable[Tombstone]) -> Statement:
    ordered = sorted(tombstones, key=lambda tombstone: tombstone.order_uid)
    return (
        queries.INSERT_ERASED,
        [
            [tombstone.order_uid for tombstone in ordered],
            [tombstone.position.topic_id for tombstone in ordered],
            [tombstone.position.partition for tombstone in ordered],
            [tombstone.position.offset for tombstone in ordered],
        ],
    )
