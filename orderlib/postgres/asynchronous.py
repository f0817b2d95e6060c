"""Orders in PostgreSQL for asyncio: the reads alone, each within a bounded time."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self, TypeVar, Unpack

from psycopg import waiting
from psycopg.abc import PQGen

from orderlib.arguments import checked_uids
from orderlib.errors import OrderNotFound
from orderlib.models import Order
from orderlib.postgres.migrate import require_schema
from orderlib.postgres.pool import READ_ERRORS, Call, Pool, Session, bounded
from orderlib.postgres.reading import Reading
from orderlib.repository import PAGE_SIZE, Cursor, Filters, Page, Status

T = TypeVar("T")


class _TaskWaiter:
    """A task that waits for a session."""

    def __init__(self) -> None:
        self.session: Session | None = None
        self.failure: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._woken = self._loop.create_future()

    def wake(self) -> None:
        """See ``Waiter.wake``."""
        if threading.get_ident() == self._thread:
            self._resolve()
        else:
            self._loop.call_soon_threadsafe(self._resolve)

    async def wait(self, timeout_s: float) -> None:
        """Return when woken, or after this long."""
        timer = self._loop.call_later(timeout_s, self._resolve)
        try:
            await self._woken
        finally:
            timer.cancel()

    def _resolve(self) -> None:
        if not self._woken.done():
            self._woken.set_result(None)


class AsyncPostgresOrderReader:
    """Keeps the promises of ``AsyncOrderReader`` on PostgreSQL.

    ``url`` is one that libpq takes; the reader's suffices. It connects when it must and no earlier, at most
    ``max_connections`` times at once, so it can be made while PostgreSQL is away; each new connection checks the
    schema, and raises BrokenSetup if that is behind. A read raises StoreUnreachable after ``connection_timeout_s``
    without a connection, and ``timeout_s`` after its begin without an answer; then the connection is closed. Close the
    reader, or use it in ``async with``. After that, and in a forked process, reads raise BrokenSetup.
    """

    def __init__(
        self,
        url: str,
        *,
        application_name: str = "orderlib",
        max_connections: int = 8,
        timeout_s: float = 5.0,
        connection_timeout_s: float = 1.5,
    ) -> None:
        self._pool = Pool(
            url,
            application_name=application_name,
            max_connections=max_connections,
            timeout_s=timeout_s,
            connection_timeout_s=connection_timeout_s,
        )

    async def close(self) -> None:
        """Close every connection: idle ones at once, one in use at the end of its read."""
        self._pool.close()

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

    async def newest(self, *, limit: int = PAGE_SIZE, after: Cursor | None = None, **filters: Unpack[Filters]) -> Page:
        """See ``OrderRepository.newest``."""
        return await self._read(lambda reading: reading.newest(limit, after, **filters))

    async def newer_than(self, before: Cursor, *, limit: int = PAGE_SIZE, **filters: Unpack[Filters]) -> Page:
        """See ``OrderRepository.newer_than``."""
        return await self._read(lambda reading: reading.newer_than(before, limit, **filters))

    async def status(self) -> Status:
        """See ``OrderRepository.status``."""
        return await self._read(Reading.status)

    async def check(self) -> float | None:
        """See ``AsyncOrderReader.check``."""
        location, number, delay_s = await self._read(Reading.check)
        require_schema(location, number)
        with contextlib.suppress(OrderNotFound):
            # No order has this uid; but all tables are asked for it.
            await self.get(".")
        return delay_s

    async def _read(self, read: Callable[[Reading], PQGen[T]]) -> T:
        call = Call(self._pool)
        while True:
            session = await self._session(call)
            try:
                steps = bounded(read(session.reading), call.deadline)
                remaining_s = max(0.0, call.deadline - time.monotonic())
                return await waiting.wait_async(steps, session.pgconn.socket, remaining_s)
            except READ_ERRORS as exc:
                if not call.may_repeat_read(session, exc):
                    raise call.read_error(session, exc) from exc
            finally:
                self._pool.give_back(session)

    async def _session(self, call: Call) -> Session:
        """Take a session for a call, or raise why there is none."""
        if (session := self._pool.take()) is not None:
            return session
        waiter = _TaskWaiter()
        try:
            self._pool.enqueue(waiter)
            await waiter.wait(call.connection_wait_s)
        except BaseException:
            self._pool.leave(waiter)
            raise
        return self._pool.taken(waiter)
