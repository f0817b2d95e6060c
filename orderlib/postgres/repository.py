"""Orders in PostgreSQL, for threads."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from types import TracebackType
from typing import ClassVar, NoReturn, Self, TypeVar, Unpack

from psycopg.abc import PQGen

from orderlib.errors import DatabaseUnavailable
from orderlib.ingestion.records import PreparedOrder, prepare_order
from orderlib.models import Order
from orderlib.postgres.pool import READ_ERRORS, WRITE_ERRORS, Call, Pool, Session, ThreadWaiter
from orderlib.postgres.reads import PageReader, ReadQueries
from orderlib.postgres.rows import pack_rows
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


class OrderRepositoryBase(ABC):
    """The methods of ``OrderRepository``, over steps that a subclass runs."""

    def __reduce__(self) -> NoReturn:
        raise TypeError("a repository cannot be pickled: connect in each process, for example in a pool's initializer")

    #: Whether a later call may succeed after a lost connection.
    _reconnects: ClassVar[bool] = True

    @abstractmethod
    def _read(self, read: Callable[[ReadQueries], PQGen[T]], _timeout_s: float | None = None, /) -> T:
        """Run a read, and translate its errors. ``_timeout_s`` may shorten the limit of the call, if it has one."""

    @abstractmethod
    def _save(self, prepared_orders: list[PreparedOrder]) -> Counter[Outcome]:
        """Store orders, all or none, and translate the errors."""

    @abstractmethod
    def _pages(self, query: ListQuery) -> Generator[Page, None, None]:
        """Yield all pages from one snapshot."""

    def get(self, order_uid: str) -> Order:
        """See ``OrderRepository.get``."""
        return self.get_stored(order_uid).order

    def get_stored(self, order_uid: str) -> StoredOrder:
        """See ``OrderRepository.get_stored``."""
        return self._read(lambda read_queries: read_queries.get_stored(order_uid))

    def get_many(self, order_uids: Iterable[str]) -> dict[str, Order]:
        """See ``OrderRepository.get_many``."""
        wanted = require_uids(order_uids)
        return self._read(lambda read_queries: read_queries.get_many(wanted))

    def content_sha256(self, order_uid: str) -> bytes:
        """See ``OrderRepository.content_sha256``."""
        return self._read(lambda read_queries: read_queries.content_sha256(order_uid))

    def original(self, order_uid: str) -> bytes | None:
        """See ``OrderRepository.original``."""
        return self._read(lambda read_queries: read_queries.original(order_uid))

    def list_orders(self, **options: Unpack[ListOptions]) -> Page:
        """See ``OrderRepository.list_orders``."""
        query = ListQuery(**options)
        return self._read(lambda read_queries: read_queries.list_orders(query))

    def count(self, **filters: Unpack[Filters]) -> int:
        """See ``OrderRepository.count``."""
        query = filter_query(**filters)
        return self._read(lambda read_queries: read_queries.count(query))

    def find(self, text: str, *, limit: int = PAGE_SIZE) -> tuple[Match, ...]:
        """See ``OrderRepository.find``."""
        check_limit(limit)
        return self._read(lambda read_queries: read_queries.find(text, limit))

    def stream(self, **filters: Unpack[Filters]) -> Generator[StoredOrder, None, None]:
        """See ``OrderRepository.stream``."""
        # Not a generator itself, so that it refuses a wrong filter before the iteration.
        return self._stream(filter_query(**filters))

    def _stream(self, query: ListQuery) -> Generator[StoredOrder, None, None]:
        with contextlib.closing(self._pages(query)) as pages:
            for page in pages:
                yield from page.orders

    def position_state(self, topic: str, partition: int, offset: int) -> PositionState:
        """See ``OrderRepository.position_state``."""
        return self._read(lambda read_queries: read_queries.position_state(topic, partition, offset))

    def wait_until_handled(self, topic: str, partition: int, offset: int, *, timeout_s: float) -> PositionState:
        """See ``OrderRepository.wait_until_handled``."""
        polling = Polling(timeout_s)
        while True:
            try:
                state = self._read(
                    lambda read_queries: read_queries.position_state(topic, partition, offset), polling.query_limit_s
                )
                if polling.ends_with(state):
                    return state
            except DatabaseUnavailable:
                if not self._reconnects or not polling.remaining_s:
                    raise
            time.sleep(polling.next_pause_s())

    def stats(self) -> Stats:
        """See ``OrderRepository.stats``."""
        return self._read(ReadQueries.stats)

    def check(self) -> float | None:
        """See ``OrderRepository.check``."""
        return self._read(ReadQueries.check)

    def save(self, order: Order, *, original: bytes | None = None) -> Outcome:
        """See ``OrderRepository.save``."""
        [outcome] = self._save([prepare_order(order, original, pack_rows=pack_rows)])
        return outcome

    def save_many(self, orders: Iterable[Order]) -> Counter[Outcome]:
        """See ``OrderRepository.save_many``."""
        return self._save([PreparedOrder.of(order, pack_rows=pack_rows) for order in require_orders(orders)])


class PostgresOrderRepository(OrderRepositoryBase):
    """An ``OrderRepository`` on PostgreSQL.

    An order is read by one JOIN plus one items query, pipelined in one REPEATABLE READ READ ONLY transaction. Threads
    may share it; a forked process must connect again. Created by ``connect``. Close it, or use it in ``with``.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        try:
            self._pool.give_back(self._session(Call(self._pool)))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close every connection: idle ones at once, one in use at the end of its call. Later calls raise."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _save(self, prepared_orders: list[PreparedOrder]) -> Counter[Outcome]:
        save = Save(prepared_orders)
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

    def _pages(self, query: ListQuery) -> Generator[Page, None, None]:
        call = Call(self._pool)
        while True:
            session = self._session(call)
            reader = PageReader(session.read_queries, query)
            try:
                while (page := session.wait(reader.next_page())) is not None:
                    yield page
                    self._pool.check_process()
                    call = Call(self._pool)
                    session.deadline = call.deadline
            except READ_ERRORS as exc:
                call.check_read_retry(session, exc, begun=reader.begun)
            else:
                return
            finally:
                # An iteration that did not reach its end leaves a transaction open, and the pool closes the session.
                self._pool.give_back(session)

    def _read(self, read: Callable[[ReadQueries], PQGen[T]], timeout_s: float | None = None, /) -> T:
        call = Call(self._pool, timeout_s)
        while True:
            session = self._session(call)
            try:
                return session.wait(read(session.read_queries))
            except READ_ERRORS as exc:
                call.check_read_retry(session, exc)
            finally:
                self._pool.give_back(session)

    def _session(self, call: Call) -> Session:
        """Return a session for a call, or raise the reason why there is none."""
        session = self._pool.take()
        if session is None:
            waiter = ThreadWaiter()
            limit_s = call.connection_wait_s
            try:
                self._pool.enqueue(waiter)
                waiter.wait(limit_s)
            except BaseException:
                self._pool.cancel(waiter)
                raise
            session = self._pool.session_of(waiter, limit_s)
        session.deadline = call.deadline
        return session
