"""Orders in PostgreSQL, for every reader and for writers that are not the consumer."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from random import Random
from types import TracebackType
from typing import Self, TypeVar

from psycopg.abc import PQGen
from psycopg_pool import ConnectionPool

from orderlib.errors import Collision, RefusedByDatabase
from orderlib.ingest import Arrival
from orderlib.models import Order
from orderlib.postgres.connection import PooledConnection, connect, make_pool
from orderlib.postgres.errors import translated_errors
from orderlib.postgres.migrate import check_schema
from orderlib.postgres.reading import Reading
from orderlib.postgres.writing import store
from orderlib.repository import PAGE_SIZE, Cursor, Outcome, Page, Status
from orderlib.retry import Backoff

T = TypeVar("T")

#: Two transactions that meet again and again are no accident.
_COLLISIONS = 20


class PostgresOrderRepository:
    """Keeps the promises of ``OrderRepository`` on PostgreSQL.

    An order is read by one JOIN plus one items query, pipelined in one REPEATABLE READ READ ONLY transaction. Threads
    may share it; a process that was forked must connect anew. Made by ``connect``; close it, or use it in ``with``.
    """

    def __init__(self, pool: ConnectionPool[PooledConnection]) -> None:
        self._pool = pool
        self._rng = Random()  # noqa: S311 - spreads tries, keeps no secret

    @classmethod
    def connect(
        cls, url: str, *, application_name: str = "orderlib", max_connections: int = 4, timeout_s: float = 5.0
    ) -> Self:
        """Connect to a database that ``admin migrate`` has prepared.

        ``url`` is one that libpq takes; the reader's suffices for reads. ``application_name`` is what PostgreSQL shows
        in pg_stat_activity. A call that finds all ``max_connections`` in use waits ``timeout_s`` seconds for one, then
        raises StoreUnreachable.
        Raises StoreUnreachable, or BrokenSetup for a wrong URL, password, database or schema.
        """
        pool = make_pool(url, application_name=application_name, max_size=max_connections, timeout_s=timeout_s)
        repository = cls(pool)
        # A connection of its own first: a pool would only say that it waited in vain, not why.
        with connect(url, application_name=application_name) as connection:
            check_schema(connection)
        pool.open()
        return repository

    def close(self) -> None:
        """Close every connection."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get(self, order_uid: str) -> Order:
        """See ``OrderRepository.get``."""
        return self._read(lambda reading: reading.get(order_uid))

    def get_many(self, order_uids: Iterable[str]) -> dict[str, Order]:
        """See ``OrderRepository.get_many``."""
        return self._read(lambda reading: reading.get_many(order_uids))

    def content_sha256(self, order_uid: str) -> bytes:
        """See ``OrderRepository.content_sha256``."""
        return self._read(lambda reading: reading.content_sha256(order_uid))

    def newest(
        self,
        *,
        limit: int = PAGE_SIZE,
        after: Cursor | None = None,
        customer_id: str | None = None,
        track_number: str | None = None,
    ) -> Page:
        """See ``OrderRepository.newest``."""
        return self._read(lambda reading: reading.newest(limit, after, customer_id, track_number))

    def newer_than(
        self,
        before: Cursor,
        *,
        limit: int = PAGE_SIZE,
        customer_id: str | None = None,
        track_number: str | None = None,
    ) -> Page:
        """See ``OrderRepository.newer_than``."""
        return self._read(lambda reading: reading.newer_than(before, limit, customer_id, track_number))

    def status(self) -> Status:
        """See ``OrderRepository.status``."""
        return self._read(Reading.status)

    def save(self, order: Order) -> Outcome:
        """See ``OrderRepository.save``."""
        [outcome] = self.save_many([order])
        return outcome

    def save_many(self, orders: Iterable[Order]) -> Counter[Outcome]:
        """See ``OrderRepository.save_many``."""
        arrivals = [Arrival.of(order) for order in orders]
        backoff = Backoff(self._rng, first_s=0.01, most_s=0.5)
        for last_try in [False] * _COLLISIONS + [True]:
            try:
                with self._connection() as connection, connection.transaction():
                    outcomes = store(connection, arrivals) if arrivals else []
                    return Counter(_accepted(outcome) for outcome in outcomes)
            except Collision:
                if last_try:
                    raise
                time.sleep(backoff.next_wait_s())
        raise AssertionError("the last try returns or raises")

    @contextlib.contextmanager
    def _connection(self) -> Iterator[PooledConnection]:
        with translated_errors(), self._pool.connection() as connection:
            yield connection

    def _read(self, read: Callable[[Reading], PQGen[T]]) -> T:
        with self._connection() as connection:
            return connection.wait(read(connection.reading))


def _accepted(outcome: Outcome | RefusedByDatabase) -> Outcome:
    if isinstance(outcome, RefusedByDatabase):
        raise outcome
    return outcome
