"""Orders in PostgreSQL, for every reader and for writers that are not the consumer."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from random import Random
from types import TracebackType
from typing import Self, TypeVar, Unpack

import psycopg
from psycopg.abc import PQGen

from orderlib.arguments import checked_uids
from orderlib.errors import Collision, OrderError, RefusedByDatabase
from orderlib.ingest import Arrival
from orderlib.models import Order
from orderlib.postgres.pool import READ_ERRORS, Call, Pool, Session, ThreadWaiter
from orderlib.postgres.reading import Reading
from orderlib.postgres.writing import store
from orderlib.repository import PAGE_SIZE, Cursor, Filters, Outcome, Page, Status
from orderlib.retry import Backoff

T = TypeVar("T")

#: Two transactions that meet again and again are no accident.
_COLLISIONS = 20


class PostgresOrderRepository:
    """Keeps the promises of ``OrderRepository`` on PostgreSQL.

    An order is read by one JOIN plus one items query, pipelined in one REPEATABLE READ READ ONLY transaction. Threads
    may share it; a process that was forked must connect anew. Made by ``connect``; close it, or use it in ``with``.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._rng = Random()  # noqa: S311 - spreads tries, keeps no secret

    @classmethod
    def connect(
        cls, url: str, *, application_name: str = "orderlib", max_connections: int = 4, timeout_s: float = 5.0
    ) -> Self:
        """Connect to a database that ``admin migrate`` has prepared.

        ``url`` is one that libpq takes; the reader's suffices for reads. ``application_name`` is what PostgreSQL shows
        in pg_stat_activity. Every call ends within ``timeout_s`` seconds, with StoreUnreachable if it must: this one,
        reads, and writes. That includes the wait for a connection while all ``max_connections`` are in use. Saving many
        thousands of orders in one call may need more.
        Raises StoreUnreachable, or BrokenSetup for a wrong URL, password, database or schema.
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
        return self._read(lambda reading: reading.get(order_uid))

    def get_many(self, order_uids: Iterable[str]) -> dict[str, Order]:
        """See ``OrderRepository.get_many``."""
        wanted = checked_uids(order_uids)
        return self._read(lambda reading: reading.get_many(wanted))

    def content_sha256(self, order_uid: str) -> bytes:
        """See ``OrderRepository.content_sha256``."""
        return self._read(lambda reading: reading.content_sha256(order_uid))

    def newest(self, *, limit: int = PAGE_SIZE, after: Cursor | None = None, **filters: Unpack[Filters]) -> Page:
        """See ``OrderRepository.newest``."""
        return self._read(lambda reading: reading.newest(limit, after, **filters))

    def newer_than(self, before: Cursor, *, limit: int = PAGE_SIZE, **filters: Unpack[Filters]) -> Page:
        """See ``OrderRepository.newer_than``."""
        return self._read(lambda reading: reading.newer_than(before, limit, **filters))

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
        call = Call(self._pool)
        backoff = Backoff(self._rng, first_s=0.01, most_s=0.5)
        collisions = 0
        while True:
            try:
                return self._store(call, arrivals)
            except Collision:
                collisions += 1
                wait_s = backoff.next_wait_s()
                if collisions > _COLLISIONS or time.monotonic() + wait_s >= call.deadline:
                    raise
                time.sleep(wait_s)

    def _store(self, call: Call, arrivals: list[Arrival]) -> Counter[Outcome]:
        """Store the orders in one transaction, again if the connection was lost while idle."""
        while True:
            session = self._session(call)
            handled = sys.exception()
            committing = False
            try:
                with session.transaction():
                    outcomes = store(session, arrivals) if arrivals else []
                    counted = Counter(_accepted(outcome) for outcome in outcomes)
                    committing = True
            except (psycopg.Error, OrderError) as exc:
                if (interrupt := _hidden_interrupt(exc, handled)) is not None:
                    session.abort()
                    raise interrupt from None
                # After COMMIT was sent, another writer may have replaced what it stored.
                if not call.may_repeat(session, exc) or committing:
                    error = call.write_error(session, exc, committing=committing)
                    raise error from (exc.__cause__ if error is exc else exc)
            except BaseException:
                # What psycopg knows about the transaction may be wrong after an interrupt.
                session.abort()
                raise
            else:
                return counted
            finally:
                self._pool.give_back(session)

    def _read(self, read: Callable[[Reading], PQGen[T]]) -> T:
        call = Call(self._pool)
        while True:
            session = self._session(call)
            try:
                return session.wait(read(session.reading))
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


def _hidden_interrupt(exc: BaseException, handled: BaseException | None) -> BaseException | None:
    """Return the interrupt that psycopg replaced by an error, because it came between two steps of a transaction.

    What the caller was handling already does not count.
    """
    context: BaseException | None = exc
    while context is not None and context is not handled:
        if not isinstance(context, Exception):
            return context
        context = context.__context__
    return None


def _accepted(outcome: Outcome | RefusedByDatabase) -> Outcome:
    if isinstance(outcome, RefusedByDatabase):
        raise outcome
    return outcome
