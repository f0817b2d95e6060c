"""Orders in PostgreSQL, for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable
from types import TracebackType
from typing import ClassVar, NoReturn, Self, TypeVar, Unpack
from weakref import WeakKeyDictionary

import psycopg
from psycopg import waiting
from psycopg.abc import PQGen

from orderlib.errors import DatabaseUnavailable
from orderlib.ingestion.records import PreparedOrder, prepare_order
from orderlib.models import Order
from orderlib.postgres.errors import wait_for_close
from orderlib.postgres.pool import READ_ERRORS, WRITE_ERRORS, Call, Pool, Session
from orderlib.postgres.reads import PageReader, ReadQueries
from orderlib.postgres.rows import pack_rows
from orderlib.postgres.shared_reads import SharedReads
from orderlib.postgres.wire import run_until
from orderlib.postgres.writes import Save
from orderlib.repository import (
    PAGE_SIZE,
    Filters,
    ListOptions,
    ListQuery,
    Match,
    Outcome,
    Page,
    Polling,
    PositionState,
    Stats,
    StoredOrder,
    check_limit,
    filter_query,
    require_orders,
    require_uids,
)

T = TypeVar("T")

#: How often a call that waits for PostgreSQL checks its deadline.
_CHECK_S = 0.1


class AsyncOrderRepositoryBase(ABC):
    """The methods of ``AsyncOrderRepository``, over steps that a subclass runs."""

    def __reduce__(self) -> NoReturn:
        raise TypeError("a repository cannot be pickled: connect in each process, for example in a pool's initializer")

    #: Whether a later call may succeed after a lost connection.
    _reconnects: ClassVar[bool] = True

    @abstractmethod
    async def _read(self, read: Callable[[ReadQueries], PQGen[T]], _timeout_s: float | None = None, /) -> T:
        """Run a read, and translate its errors. ``_timeout_s`` may shorten the limit of the call, if it has one."""

    @abstractmethod
    async def _save(self, prepared_orders: list[PreparedOrder]) -> Counter[Outcome]:
        """Store orders, all or none, and translate the errors."""

    @abstractmethod
    def _pages(self, query: ListQuery) -> AsyncGenerator[Page, None]:
        """Yield all pages from one snapshot."""

    async def get(self, order_uid: str) -> Order:
        """See ``OrderRepository.get``."""
        return (await self.get_stored(order_uid)).order

    async def get_stored(self, order_uid: str) -> StoredOrder:
        """See ``OrderRepository.get_stored``."""
        return await self._read(lambda read_queries: read_queries.get_stored(order_uid))

    async def get_many(self, order_uids: Iterable[str]) -> dict[str, Order]:
        """See ``OrderRepository.get_many``."""
        wanted = require_uids(order_uids)
        return await self._read(lambda read_queries: read_queries.get_many(wanted))

    async def content_sha256(self, order_uid: str) -> bytes:
        """See ``OrderRepository.content_sha256``."""
        return await self._read(lambda read_queries: read_queries.content_sha256(order_uid))

    async def original(self, order_uid: str) -> bytes | None:
        """See ``OrderRepository.original``."""
        return await self._read(lambda read_queries: read_queries.original(order_uid))

    async def list_orders(self, **options: Unpack[ListOptions]) -> Page:
        """See ``OrderRepository.list_orders``."""
        query = ListQuery(**options)
        return await self._read(lambda read_queries: read_queries.list_orders(query))

    async def count(self, **filters: Unpack[Filters]) -> int:
        """See ``OrderRepository.count``."""
        query = filter_query(**filters)
        return await self._read(lambda read_queries: read_queries.count(query))

    async def find(self, text: str, *, limit: int = PAGE_SIZE) -> tuple[Match, ...]:
        """See ``OrderRepository.find``."""
        check_limit(limit)
        return await self._read(lambda read_queries: read_queries.find(text, limit))

    def stream(self, **filters: Unpack[Filters]) -> AsyncGenerator[StoredOrder, None]:
        """See ``OrderRepository.stream``."""
        # Not a generator itself, so that it refuses a wrong filter before the iteration.
        return self._stream(filter_query(**filters))

    async def _stream(self, query: ListQuery) -> AsyncGenerator[StoredOrder, None]:
        async with contextlib.aclosing(self._pages(query)) as pages:
            async for page in pages:
                for stored in page.orders:
                    yield stored

    async def position_state(self, topic: str, partition: int, offset: int) -> PositionState:
        """See ``OrderRepository.position_state``."""
        return await self._read(lambda read_queries: read_queries.position_state(topic, partition, offset))

    async def wait_until_handled(self, topic: str, partition: int, offset: int, *, timeout_s: float) -> PositionState:
        """See ``OrderRepository.wait_until_handled``."""
        polling = Polling(timeout_s)
        while True:
            try:
                state = await self._read(
                    lambda read_queries: read_queries.position_state(topic, partition, offset), polling.query_limit_s
                )
                if polling.ends_with(state):
                    return state
            except DatabaseUnavailable:
                if not self._reconnects or not polling.remaining_s:
                    raise
            await asyncio.sleep(polling.next_pause_s())

    async def stats(self) -> Stats:
        """See ``OrderRepository.stats``."""
        return await self._read(ReadQueries.stats)

    async def check(self) -> float | None:
        """See ``OrderRepository.check``."""
        return await self._read(ReadQueries.check)

    async def save(self, order: Order, *, original: bytes | None = None) -> Outcome:
        """See ``OrderRepository.save``."""
        [outcome] = await self._save([prepare_order(order, original, pack_rows=pack_rows)])
        return outcome

    async def save_many(self, orders: Iterable[Order]) -> Counter[Outcome]:
        """See ``OrderRepository.save_many``."""
        return await self._save([PreparedOrder.of(order, pack_rows=pack_rows) for order in require_orders(orders)])


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


class AsyncPostgresOrderRepository(AsyncOrderRepositoryBase):
    """An ``AsyncOrderRepository`` on PostgreSQL. Created by ``connect_async``.

    It connects when a call needs a connection, at most ``max_connections`` times at once, so it can be created while
    PostgreSQL is unavailable. Each new connection checks the schema, and raises ConfigurationError if that is behind. A
    call raises DatabaseUnavailable after ``connection_timeout_s`` without a connection, and after ``timeout_s`` without
    an answer; then the connection is closed. ``get``, ``get_stored`` and ``content_sha256`` share round trips with
    concurrent calls of the same event loop. A cancelled save is either stored completely or not at all. Close the
    repository, or use it in ``async with``. After that, and in a forked process, calls raise ConfigurationError.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        #: By event loop. A value must not refer to its loop, which would then never be freed.
        self._shared_reads: WeakKeyDictionary[asyncio.AbstractEventLoop, SharedReads] = WeakKeyDictionary()

    async def close(self) -> None:
        """Close every connection: idle ones at once, one in use at the end of its call."""
        self._pool.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def get_stored(self, order_uid: str) -> StoredOrder:
        """See ``OrderRepository.get_stored``. Concurrent calls share round trips."""
        return await self._shared().orders.get(order_uid, Call(self._pool))

    async def content_sha256(self, order_uid: str) -> bytes:
        """See ``OrderRepository.content_sha256``. Concurrent calls share round trips."""
        return await self._shared().digests.get(order_uid, Call(self._pool))

    def _shared(self) -> SharedReads:
        loop = asyncio.get_running_loop()
        if (shared_reads := self._shared_reads.get(loop)) is None:
            shared_reads = self._shared_reads[loop] = SharedReads(self._read_within)
        return shared_reads

    async def _read(self, read: Callable[[ReadQueries], PQGen[T]], timeout_s: float | None = None, /) -> T:
        return await self._read_within(read, Call(self._pool, timeout_s))

    async def _read_within(self, read: Callable[[ReadQueries], PQGen[T]], call: Call) -> T:
        while True:
            session = await self._session(call)
            try:
                return await _run(session, read(session.read_queries), call)
            except READ_ERRORS as exc:
                call.check_read_retry(session, exc)
            finally:
                self._pool.give_back(session)

    async def _save(self, prepared_orders: list[PreparedOrder]) -> Counter[Outcome]:
        save = Save(prepared_orders)
        call = Call(self._pool)
        while True:
            session = await self._session(call)
            try:
                return await _run(session, save.steps(session.wire), call)
            except WRITE_ERRORS as exc:
                wait_s = call.wait_before_retry_s(session, exc, committing=save.committing)
            finally:
                self._pool.give_back(session)
            await asyncio.sleep(wait_s)

    async def _pages(self, query: ListQuery) -> AsyncGenerator[Page, None]:
        call = Call(self._pool)
        while True:
            session = await self._session(call)
            reader = PageReader(session.read_queries, query)
            try:
                while (page := await _run(session, reader.next_page(), call)) is not None:
                    yield page
                    self._pool.check_process()
                    call = Call(self._pool)
            except READ_ERRORS as exc:
                call.check_read_retry(session, exc, begun=reader.begun)
            else:
                return
            finally:
                # An iteration that did not reach its end leaves a transaction open, and the pool closes the session.
                self._pool.give_back(session)

    async def _session(self, call: Call) -> Session:
        """Return a session for a call, or raise the reason why there is none."""
        if (session := self._pool.take()) is not None:
            return session
        waiter = _TaskWaiter()
        limit_s = call.connection_wait_s
        try:
            self._pool.enqueue(waiter)
            await waiter.wait(limit_s)
        except BaseException:
            self._pool.cancel(waiter)
            raise
        return self._pool.session_of(waiter, limit_s)


async def _run(session: Session, steps: PQGen[T], call: Call) -> T:
    """Run steps until the call's deadline. A task that is cancelled leaves the session for the pool to close."""
    check_s = min(_CHECK_S, max(0.0, call.deadline - time.monotonic()))
    try:
        return await waiting.wait_async(run_until(steps, call.deadline), session.pgconn.socket, check_s)
    except psycopg.Error as exc:
        await wait_for_close(session, exc)
        raise
