"""Orders in a transaction of the caller's own psycopg connection."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from typing import Any, ClassVar, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg.rows import tuple_row

from orderlib.errors import ConfigurationError, DatabaseUnavailable
from orderlib.ingestion.records import PreparedOrder
from orderlib.postgres import queries
from orderlib.postgres.async_repository import AsyncOrderRepositoryBase
from orderlib.postgres.errors import READ_ONLY, sqlstates, translate_errors, wait_for_close
from orderlib.postgres.pool import check_process
from orderlib.postgres.reads import PageReader, ReadQueries
from orderlib.postgres.repository import OrderRepositoryBase
from orderlib.postgres.wire import Wire
from orderlib.postgres.writes import roll_back_to_savepoint, store_all
from orderlib.repository import (
    AsyncOrderRepository,
    ListQuery,
    OrderRepository,
    Outcome,
    Page,
    PositionState,
    require_type,
)

T = TypeVar("T")


def using(connection: psycopg.Connection[Any]) -> OrderRepository:
    """Return a repository that works inside a transaction of this connection.

    Orders and the caller's own rows are stored together or not at all. Each call works in a savepoint: after an error
    the transaction is as it was before the call, and may go on. A call never commits, rolls back the transaction or
    retries, and leaves no setting and no prepared statement behind. After a deadlock or a serialization failure it
    raises TransactionConflict; roll back then, and repeat the transaction. Calls have no time limit of their own: set
    a ``statement_timeout``. ``stream`` needs REPEATABLE READ or SERIALIZABLE, and ``wait_until_handled`` needs READ
    COMMITTED: in other transactions they raise ConfigurationError. ``stream`` also raises it if the transaction ends
    before the iteration; what the same transaction saves during the iteration may be in it. After a lost connection
    every call raises DatabaseUnavailable: connect again, and repeat the transaction.

    psycopg begins a transaction before the first statement. In autocommit mode, open one with
    ``connection.transaction()``. Calls raise ConfigurationError without it, inside ``connection.pipeline()``, in a
    transaction that has failed or, for a write, is read-only, after a fork, and if ``client_encoding`` is not UTF8.
    """
    return CallerOrderRepository(require_type("connection", connection, psycopg.Connection))


def using_async(connection: psycopg.AsyncConnection[Any]) -> AsyncOrderRepository:
    """Return the same as ``using`` for asyncio.

    A task that is cancelled during a call leaves the transaction as it was before the call, or with the call completed.
    """
    return AsyncCallerOrderRepository(require_type("connection", connection, psycopg.AsyncConnection))


class CallerOrderRepository(OrderRepositoryBase):
    """An ``OrderRepository`` inside a transaction of the caller's connection. See ``using``."""

    _reconnects: ClassVar[bool] = False

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        self._process = os.getpid()
        self._wire = Wire(connection.pgconn, keeps_statements=False)
        self._read_queries = ReadQueries(self._wire, in_transaction=True)

    def _read(self, read: Callable[[ReadQueries], PQGen[T]], _timeout_s: float | None = None, /) -> T:
        return self._run(read(self._read_queries))

    def _save(self, prepared_orders: list[PreparedOrder]) -> Counter[Outcome]:
        return self._run(store_all(self._wire, prepared_orders))

    def wait_until_handled(self, topic: str, partition: int, offset: int, *, timeout_s: float) -> PositionState:
        """See ``OrderRepository.wait_until_handled``."""
        self._run(_require_new_snapshots(self._wire))
        return super().wait_until_handled(topic, partition, offset, timeout_s=timeout_s)

    def _pages(self, query: ListQuery) -> Generator[Page, None, None]:
        reader = _TransactionPageReader(self._read_queries, query, self._wire)
        while (page := self._run(reader.next_page())) is not None:
            yield page

    def _run(self, steps: PQGen[T]) -> T:
        check_process(self._process)
        connection = self._connection
        with _translate_errors(connection):
            while True:
                with connection.lock:
                    if not _must_begin(connection):
                        return connection.wait(_in_savepoint(self._wire, steps))
                # With rows of its own: those of the connection may need a column. Never prepared: calls leave nothing.
                connection.cursor(row_factory=tuple_row).execute(queries.EMPTY_SELECT, prepare=False)


class AsyncCallerOrderRepository(AsyncOrderRepositoryBase):
    """An ``AsyncOrderRepository`` inside a transaction of the caller's connection. See ``using_async``."""

    _reconnects: ClassVar[bool] = False

    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        self._connection = connection
        self._process = os.getpid()
        self._wire = Wire(connection.pgconn, keeps_statements=False)
        self._read_queries = ReadQueries(self._wire, in_transaction=True)

    async def _read(self, read: Callable[[ReadQueries], PQGen[T]], _timeout_s: float | None = None, /) -> T:
        return await self._run(read(self._read_queries))

    async def _save(self, prepared_orders: list[PreparedOrder]) -> Counter[Outcome]:
        return await self._run(store_all(self._wire, prepared_orders))

    async def wait_until_handled(self, topic: str, partition: int, offset: int, *, timeout_s: float) -> PositionState:
        """See ``OrderRepository.wait_until_handled``."""
        await self._run(_require_new_snapshots(self._wire))
        return await super().wait_until_handled(topic, partition, offset, timeout_s=timeout_s)

    async def _pages(self, query: ListQuery) -> AsyncGenerator[Page, None]:
        reader = _TransactionPageReader(self._read_queries, query, self._wire)
        while (page := await self._run(reader.next_page())) is not None:
            yield page

    async def _run(self, steps: PQGen[T]) -> T:
        check_process(self._process)
        connection = self._connection
        with _translate_errors(connection):
            try:
                while True:
                    async with connection.lock:
                        if not _must_begin(connection):
                            return await connection.wait(_in_savepoint(self._wire, steps))
                    await connection.cursor(row_factory=tuple_row).execute(queries.EMPTY_SELECT, prepare=False)
            except psycopg.Error as exc:
                await wait_for_close(connection, exc)
                raise


def _must_begin(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> bool:
    """Return whether psycopg has yet to begin a transaction, as it does before the first statement."""
    if connection.broken:
        raise DatabaseUnavailable("PostgreSQL: the connection was lost: connect again, and repeat the transaction")
    if connection.closed:
        raise ConfigurationError("the connection is closed")
    pgconn = connection.pgconn
    if pgconn.pipeline_status != PipelineStatus.OFF:
        raise ConfigurationError("using() does not work inside connection.pipeline()")
    if connection.info.encoding != "utf-8":
        raise ConfigurationError("using() needs a connection whose client_encoding is UTF8")
    if pgconn.transaction_status == TransactionStatus.INERROR:
        raise ConfigurationError("the transaction has failed: roll back, or to a savepoint, before the next call")
    is_idle = pgconn.transaction_status == TransactionStatus.IDLE
    if is_idle and connection.autocommit:
        raise ConfigurationError("using() needs a transaction: open one with connection.transaction()")
    return is_idle


@contextlib.contextmanager
def _translate_errors(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> Iterator[None]:
    """Translate errors. A read-only transaction is an outage only if that may end: on a standby, or by default."""
    try:
        with translate_errors(connection):
            yield
    except DatabaseUnavailable as exc:
        pgconn = connection.pgconn
        settings = (b"in_hot_standby", b"default_transaction_read_only")
        if READ_ONLY in sqlstates(exc) and all(pgconn.parameter_status(name) == b"off" for name in settings):
            raise ConfigurationError("the transaction is read-only") from exc.__cause__
        raise


def _in_savepoint(wire: Wire, steps: PQGen[T]) -> PQGen[T]:
    """Run steps so that an error leaves the transaction as it was before them."""
    yield from wire.pipeline((queries.SAVEPOINT, ()))
    try:
        result = yield from steps
    except Exception:
        yield from roll_back_to_savepoint(wire)
        raise
    yield from wire.pipeline((queries.RELEASE_SAVEPOINT, ()))
    return result


class _TransactionPageReader(PageReader):
    """The same as ``PageReader``, in one transaction of a caller, which has one snapshot."""

    def __init__(self, read_queries: ReadQueries, query: ListQuery, wire: Wire) -> None:
        super().__init__(read_queries, query)
        self._wire = wire
        self._transaction: object = None

    def next_page(self) -> PQGen[Page | None]:
        """Return the next page, or raise ConfigurationError if it would be from another snapshot."""
        [[(has_new_snapshots,)], [(transaction,)]] = yield from self._wire.pipeline(
            (queries.HAS_NEW_SNAPSHOTS, ()), (queries.TRANSACTION_TIME, ())
        )
        if self._transaction not in {None, transaction}:
            raise ConfigurationError("the transaction ended during stream(): end it after the iteration")
        if has_new_snapshots:
            raise ConfigurationError("stream() in a caller's transaction needs ISOLATION LEVEL REPEATABLE READ")
        self._transaction = transaction
        return (yield from super().next_page())


def _require_new_snapshots(wire: Wire) -> PQGen[None]:
    """Raise ConfigurationError if the transaction never sees what others commit."""
    [[(has_new_snapshots,)]] = yield from wire.pipeline((queries.HAS_NEW_SNAPSHOTS, ()))
    if not has_new_snapshots:
        raise ConfigurationError("wait_until_handled() in a caller's transaction needs ISOLATION LEVEL READ COMMITTED")
