"""Orders in PostgreSQL for asyncio: the reads alone, each within a bounded time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from types import TracebackType
from typing import Self, TypeVar

import psycopg
from psycopg import sql, waiting
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus
from psycopg.rows import TupleRow

from orderlib import queries
from orderlib.errors import OrderNotFound, StoreUnreachable
from orderlib.models import Order
from orderlib.postgres.connection import connection_arguments
from orderlib.postgres.errors import translated_errors
from orderlib.postgres.handshake import AsyncConnection
from orderlib.postgres.migrate import require_schema
from orderlib.postgres.reading import Reading
from orderlib.repository import PAGE_SIZE, Cursor, Page, Status, checked_uids

T = TypeVar("T")

#: An order is read in a millisecond. Whoever has no connection by then, or no answer, is better told so.
CONNECTION_WITHIN_S = 1.5
ANSWER_WITHIN_S = 3.0
#: PostgreSQL gives up first, so that no query outlives the one who asked: behind a lock they would fill the server.
STATEMENT_TIMEOUT_MS = 2500

#: How a connection reports that it is no more: without a word, or with the server's last one.
_DIED = {None, "57P01", "57P02", "57P05"}


class _Session:
    """A connection and the reads over it."""

    def __init__(self, connection: psycopg.AsyncConnection[TupleRow]) -> None:
        self._pgconn = connection.pgconn
        self._connection = connection
        self._reading = Reading(connection)
        #: Whether it was in use before. It may have died since, which says nothing about the server now.
        self.has_rested = False

    @property
    def is_idle(self) -> bool:
        """Whether the next read may begin."""
        return self._pgconn.transaction_status == TransactionStatus.IDLE

    async def drive(self, read: Callable[[Reading], PQGen[T]]) -> T:
        """What the read gives, or StoreUnreachable; then the connection is closed."""
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                return await waiting.wait_async(read(self._reading), self._pgconn.socket, ANSWER_WITHIN_S)
        except TimeoutError as exc:
            raise StoreUnreachable(f"PostgreSQL: no answer within {ANSWER_WITHIN_S} s") from exc

    async def close(self) -> None:
        await self._connection.close()


class AsyncPostgresOrderReader:
    """Keeps the promises of ``AsyncOrderReader`` on PostgreSQL, for one event loop.

    ``url`` is one that libpq takes; the reader's suffices. It connects when it must and no earlier, at most
    ``max_connections`` times at once, so it can be made while PostgreSQL is away; each new connection looks at the
    schema, and raises BrokenSetup if that is behind. A read raises StoreUnreachable after 1.5 s without a connection,
    and after another 3 s without an answer; then the connection is given up, not waited for. Close it, or use it in
    ``async with``.

    Not psycopg_pool: that says it waited in vain, not why, and comes back from an outage in waits that grow to minutes.
    """

    def __init__(self, url: str, *, application_name: str = "orderlib", max_connections: int = 8) -> None:
        self._arguments = connection_arguments(url, application_name)
        #: The most recently used last, so that the others may rest.
        self._idle: list[_Session] = []
        self._free = asyncio.Semaphore(max_connections)

    async def close(self) -> None:
        """Close every connection that is not in use."""
        while self._idle:
            await self._idle.pop().close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def get(self, order_uid: str) -> Order:
        """See ``OrderRepository.get``."""
        return await self._read(lambda reading: reading.get(order_uid))

    async def get_many(self, order_uids: Iterable[str]) -> dict[str, Order]:
        """See ``OrderRepository.get_many``."""
        wanted = checked_uids(order_uids)
        return await self._read(lambda reading: reading.get_many(wanted))

    async def content_sha256(self, order_uid: str) -> bytes:
        """See ``OrderRepository.content_sha256``."""
        return await self._read(lambda reading: reading.content_sha256(order_uid))

    async def newest(
        self,
        *,
        limit: int = PAGE_SIZE,
        after: Cursor | None = None,
        customer_id: str | None = None,
        track_number: str | None = None,
    ) -> Page:
        """See ``OrderRepository.newest``."""
        return await self._read(lambda reading: reading.newest(limit, after, customer_id, track_number))

    async def newer_than(
        self,
        before: Cursor,
        *,
        limit: int = PAGE_SIZE,
        customer_id: str | None = None,
        track_number: str | None = None,
    ) -> Page:
        """See ``OrderRepository.newer_than``."""
        return await self._read(lambda reading: reading.newer_than(before, limit, customer_id, track_number))

    async def status(self) -> Status:
        """See ``OrderRepository.status``."""
        return await self._read(Reading.status)

    async def check(self) -> None:
        """See ``AsyncOrderReader.check``."""
        require_schema(*await self._read(Reading.schema))
        with contextlib.suppress(OrderNotFound):
            # No order has this uid; but all tables are asked for it.
            await self.get(".")

    async def _read(self, read: Callable[[Reading], PQGen[T]]) -> T:
        with translated_errors():
            while True:
                async with self._session() as session:
                    has_rested, session.has_rested = session.has_rested, True
                    try:
                        return await session.drive(read)
                    except psycopg.OperationalError as exc:
                        if not has_rested or exc.sqlstate not in _DIED:
                            raise
                # It died while it rested, as the others did then: ask again over a new one.
                await self.close()

    @contextlib.asynccontextmanager
    async def _session(self) -> AsyncIterator[_Session]:
        try:
            async with asyncio.timeout(CONNECTION_WITHIN_S):
                session = await self._taken()
        except TimeoutError as exc:
            raise StoreUnreachable(f"PostgreSQL: no connection within {CONNECTION_WITHIN_S} s") from exc
        try:
            yield session
        finally:
            if session.is_idle:
                self._idle.append(session)
            else:
                await session.close()
            self._free.release()

    async def _taken(self) -> _Session:
        await self._free.acquire()
        try:
            return self._idle.pop() if self._idle else await self._connected()
        except BaseException:
            self._free.release()
            raise

    async def _connected(self) -> _Session:
        connection = await AsyncConnection.connect(**self._arguments, autocommit=True)  # type: ignore[arg-type]
        session = _Session(connection)
        try:
            await connection.execute(queries.SET_UP_SESSION)
            await connection.execute(sql.SQL(queries.SET_STATEMENT_TIMEOUT).format(STATEMENT_TIMEOUT_MS))
            require_schema(*await session.drive(Reading.schema))
        except BaseException:
            await session.close()
            raise
        return session
