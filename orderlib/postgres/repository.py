"""Orders in PostgreSQL, for every reader and for writers that are not the consumer."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self, TypeVar, Unpack

from psycopg.abc import PQGen

from orderlib.ingestion.records import PreparedOrder
from orderlib.models import Order
from orderlib.postgres.pool import READ_ERRORS, WRITE_ERRORS, Call, Pool, Session, ThreadWaiter
from orderlib.postgres.reads import ReadQueries
from orderlib.postgres.rows import pack_rows
from orderlib.postgres.writes import Save
from orderlib.repository import ListOptions, ListQuery, Outcome, Page, Stats, StoredOrder, checked_uids

T = TypeVar("T")


class PostgresOrderRepository:
    """Keeps the promises of ``OrderRepository`` on PostgreSQL.

    An order is read by one JOIN plus one items query, pipelined in one REPEATABLE READ READ ONLY transaction. Threads
    may share it; a process that was forked must connect anew. Made by ``connect``; close it, or use it in ``with``.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @classmethod
    def connect(
        cls, url: str, *, application_name: str = "orderlib", max_connections: int = 4, timeout_s: float = 5.0
    ) -> Self:
        """Connect to a database that ``admin migrate`` has prepared.

        ``url`` is one that libpq takes; the reader's suffices for reads. ``application_name`` is what PostgreSQL shows
        in pg_stat_activity. Every call ends within ``timeout_s`` seconds, with DatabaseUnavailable if it must: this
        one,
        reads, and writes. That includes the wait for a connection while all ``max_connections`` are in use. Saving many
        thousands of orders in one call may need more.
        Raises DatabaseUnavailable, or ConfigurationError for a wrong URL, password, database or schema.
        """
        repository = cls(
            Pool(url, application_name=application_name, max_connections=max_connections, timeout_s=timeout_s)
        )
        try:
            call = Call(repository._pool)
            repository._pool.give_back(repository._session(call))
        except BaseException:
            repository.close()
            raise
        return repository

    def close(self) -> None:
        """Close every connection: idle ones at once, one in use at the end of its call. Later calls raise."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get(self, order_uid: str) -> Order:
        """See ``OrderRepository.get``."""
        return self._read(lambda read_queries: read_queries.get(order_uid))

    def get_stored(self, order_uid: str) -> StoredOrder:
        """See ``OrderRepository.get_stored``."""
        return self._read(lambda read_queries: read_queries.get_stored(order_uid))

    def get_many(self, order_uids: Iterable[str]) -> dict[str, Order]:
        """See ``OrderRepository.get_many``."""
        wanted = checked_uids(order_uids)
        return self._read(lambda read_queries: read_queries.get_many(wanted))

    def content_sha256(self, order_uid: str) -> bytes:
        """See ``OrderRepository.content_sha256``."""
        return self._read(lambda read_queries: read_queries.content_sha256(order_uid))

    def list_orders(self, **options: Unpack[ListOptions]) -> Page:
        """See ``OrderRepository.list_orders``."""
        query = ListQuery(**options)
        return self._read(lambda read_queries: read_queries.list_orders(query))

    def status(self) -> Stats:
        """See ``OrderRepository.status``."""
        return self._read(ReadQueries.status)

    def save(self, order: Order) -> Outcome:
        """See ``OrderRepository.save``."""
        [outcome] = self.save_many([order])
        return outcome

    def save_many(self, orders: Iterable[Order]) -> Counter[Outcome]:
        """See ``OrderRepository.save_many``."""
        save = Save([PreparedOrder.of(order, pack_rows=pack_rows) for order in orders])
        call = Call(self._pool)
        while True:
            session = self._session(call)
            try:
                return session.wait(save.steps(session.wire))
            except WRITE_ERRORS as exc:
                wait_s = call.wait_before_retry_s(session, exc, committing=save.committing)
            finally:
                self._pool.give_back(session)
            time.sleep(wait_s)

    def _read(self, read: Callable[[ReadQueries], PQGen[T]]) -> T:
        call = Call(self._pool)
        while True:
            session = self._session(call)
            try:
                return session.wait(read(session.read_queries))
            except READ_ERRORS as exc:
                if not call.may_repeat_read(session, exc):
                    raise call.read_error(session, exc) from exc
            finally:
                self._pool.give_back(session)

    def _session(self, call: Call) -> Session:
        """Take a session for a call, or raise why there is none."""
        session = self._pool.take()
        if session is None:
            waiter = ThreadWaiter()
            try:
                self._pool.enqueue(waiter)
                waiter.wait(call.connection_wait_s)
            except BaseException:
                self._pool.leave(waiter)
                raise
            session = self._pool.taken(waiter)
        session.deadline = call.deadline
        return session
