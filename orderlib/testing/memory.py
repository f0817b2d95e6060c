"""Repositories in memory, for threads and for asyncio.

They pass the same contract suite as the repositories on PostgreSQL. Their calls can fail.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from typing import TypeVar, Unpack

from orderlib.errors import DatabaseUnavailable, OrderlibError
from orderlib.models import Order
from orderlib.repository import (
    PAGE_SIZE,
    Filters,
    ListOptions,
    Match,
    Outcome,
    Page,
    Polling,
    PositionState,
    Stats,
    StoredOrder,
)
from orderlib.testing.failures import ANSWER_LOST, WRITES, Failure, Failures, Method
from orderlib.testing.memory_store import MemoryStore

T = TypeVar("T")


def _utc_now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class MemoryOrderRepository:
    """An ``OrderRepository`` in memory. Threads may share it. Calls fail only after ``fail`` or ``lose_answer``.

    ``clock`` returns the time at which an order is stored, as an aware datetime. A call of ``save`` or ``save_many``
    reads it once.
    """

    def __init__(self, clock: Callable[[], dt.datetime] = _utc_now) -> None:
        self._store = MemoryStore(clock)
        self._failures = Failures()

    def fail(
        self,
        *methods: Method,
        call: int | None = None,
        with_: OrderlibError | type[OrderlibError] = DatabaseUnavailable,
    ) -> Failure:
        """Let calls fail and change nothing.

        ``methods`` are the names of the methods whose calls fail; without any, all of them. ``call=3`` lets only the
        third of their calls from now on fail. Without ``call``, every call fails until the failure ends. ``with_`` is
        the error, or one of these classes for an error as the repositories on PostgreSQL raise it:

        - ``DatabaseUnavailable``: the connection was refused.
        - ``TransactionConflict``: a deadlock, after all attempts of the repository.
        - ``RefusedByDatabase``: a violated constraint. ``sqlstate`` is 23514, and ``order_uid`` is None.
        - ``ConfigurationError``: a missing privilege.

        If several failures apply to a call, it raises the error of the first one. Raises ValueError for an unknown
        method or a ``call`` below 1, and TypeError for another class.
        """
        return self._failures.add(methods, with_, call)

    def lose_answer(self, *methods: Method, call: int | None = None) -> Failure:
        """Let calls store their orders and then raise DatabaseUnavailable: the outcome is unknown to the caller.

        It is what happens if the connection is lost during COMMIT. A program should save again, which is safe. The
        arguments are those of ``fail``. Without methods, ``save`` and ``save_many`` fail.
        """
        return self._failures.add(methods or WRITES, ANSWER_LOST, call, takes_effect=True)

    def get(self, order_uid: str) -> Order:
        """See ``OrderRepository.get``."""
        return self._call("get", lambda: self._store.get(order_uid))

    def get_stored(self, order_uid: str) -> StoredOrder:
        """See ``OrderRepository.get_stored``."""
        return self._call("get_stored", lambda: self._store.get_stored(order_uid))

    def get_many(self, order_uids: Iterable[str]) -> dict[str, Order]:
        """See ``OrderRepository.get_many``."""
        return self._call("get_many", lambda: self._store.get_many(order_uids))

    def content_sha256(self, order_uid: str) -> bytes:
        """See ``OrderRepository.content_sha256``."""
        return self._call("content_sha256", lambda: self._store.content_sha256(order_uid))

    def original(self, order_uid: str) -> bytes | None:
        """See ``OrderRepository.original``."""
        return self._call("original", lambda: self._store.original(order_uid))

    def list_orders(self, **options: Unpack[ListOptions]) -> Page:
        """See ``OrderRepository.list_orders``."""
        return self._call("list_orders", lambda: self._store.list_orders(**options))

    def count(self, **filters: Unpack[Filters]) -> int:
        """See ``OrderRepository.count``."""
        return self._call("count", lambda: self._store.count(**filters))

    def find(self, text: str, *, limit: int = PAGE_SIZE) -> tuple[Match, ...]:
        """See ``OrderRepository.find``."""
        return self._call("find", lambda: self._store.find(text, limit))

    def stream(self, **filters: Unpack[Filters]) -> Generator[StoredOrder, None, None]:
        """See ``OrderRepository.stream``."""
        return self._stream(self._store.stream(**filters))

    def _stream(self, stored: Generator[StoredOrder, None, None]) -> Generator[StoredOrder, None, None]:
        self._call("stream", lambda: None)
        yield from stored

    def position_state(self, topic: str, partition: int, offset: int) -> PositionState:
        """Return the state that ``set_position_state`` gave to this record, or UNKNOWN."""
        return self._call("position_state", lambda: self._store.position_state(topic, partition, offset))

    def set_position_state(self, topic: str, partition: int, offset: int, state: PositionState) -> None:
        """Let ``position_state`` and ``wait_until_handled`` return this state."""
        self._store.set_position_state(topic, partition, offset, state)

    def forget(self, order_uid: str) -> None:
        """Erase an order as `admin forget` does: a later ``save`` of it has the outcome FORGOTTEN."""
        self._store.forget(order_uid)

    def wait_until_handled(self, topic: str, partition: int, offset: int, *, timeout_s: float) -> PositionState:
        """See ``OrderRepository.wait_until_handled``."""
        polling = Polling(timeout_s)
        state = self._call("wait_until_handled", lambda: self._store.position_state(topic, partition, offset))
        while not polling.ends_with(state):
            time.sleep(polling.next_pause_s())
            state = self._store.position_state(topic, partition, offset)
        return state

    def stats(self) -> Stats:
        """See ``OrderRepository.stats``."""
        return self._call("stats", self._store.stats)

    def check(self) -> float | None:
        """See ``OrderRepository.check``."""
        return self._call("check", self._store.check)

    def save(self, order: Order, *, original: bytes | None = None) -> Outcome:
        """See ``OrderRepository.save``."""
        return self._call("save", lambda: self._store.save(order, original=original))

    def save_many(self, orders: Iterable[Order]) -> Counter[Outcome]:
        """See ``OrderRepository.save_many``."""
        return self._call("save_many", lambda: self._store.save_many(orders))

    def _call(self, method: Method, call: Callable[[], T]) -> T:
        error = self._failures.before_call(method)
        result = call()
        if error is not None:
            raise error
        return result


class AsyncMemoryOrderRepository:
    """An ``AsyncOrderRepository`` in memory, with the arguments and the failures of ``MemoryOrderRepository``.

    Each call lets other tasks run first. A call that is cancelled then does nothing.
    """

    def __init__(self, clock: Callable[[], dt.datetime] = _utc_now) -> None:
        self._store = MemoryStore(clock)
        self._failures = Failures()

    def fail(
        self,
        *methods: Method,
        call: int | None = None,
        with_: OrderlibError | type[OrderlibError] = DatabaseUnavailable,
    ) -> Failure:
        """See ``MemoryOrderRepository.fail``."""
        return self._failures.add(methods, with_, call)

    def lose_answer(self, *methods: Method, call: int | None = None) -> Failure:
        """See ``MemoryOrderRepository.lose_answer``."""
        return self._failures.add(methods or WRITES, ANSWER_LOST, call, takes_effect=True)

    async def get(self, order_uid: str) -> Order:
        """See ``AsyncOrderRepository.get``."""
        return await self._call("get", lambda: self._store.get(order_uid))

    async def get_stored(self, order_uid: str) -> StoredOrder:
        """See ``AsyncOrderRepository.get_stored``."""
        return await self._call("get_stored", lambda: self._store.get_stored(order_uid))

    async def get_many(self, order_uids: Iterable[str]) -> dict[str, Order]:
        """See ``AsyncOrderRepository.get_many``."""
        return await self._call("get_many", lambda: self._store.get_many(order_uids))

    async def content_sha256(self, order_uid: str) -> bytes:
        """See ``AsyncOrderRepository.content_sha256``."""
        return await self._call("content_sha256", lambda: self._store.content_sha256(order_uid))

    async def original(self, order_uid: str) -> bytes | None:
        """See ``AsyncOrderRepository.original``."""
        return await self._call("original", lambda: self._store.original(order_uid))

    async def list_orders(self, **options: Unpack[ListOptions]) -> Page:
        """See ``AsyncOrderRepository.list_orders``."""
        return await self._call("list_orders", lambda: self._store.list_orders(**options))

    async def count(self, **filters: Unpack[Filters]) -> int:
        """See ``AsyncOrderRepository.count``."""
        return await self._call("count", lambda: self._store.count(**filters))

    async def find(self, text: str, *, limit: int = PAGE_SIZE) -> tuple[Match, ...]:
        """See ``AsyncOrderRepository.find``."""
        return await self._call("find", lambda: self._store.find(text, limit))

    def stream(self, **filters: Unpack[Filters]) -> AsyncGenerator[StoredOrder, None]:
        """See ``AsyncOrderRepository.stream``."""
        return self._stream(self._store.stream(**filters))

    async def _stream(self, stored: Generator[StoredOrder, None, None]) -> AsyncGenerator[StoredOrder, None]:
        await self._call("stream", lambda: None)
        for found in stored:
            yield found

    async def position_state(self, topic: str, partition: int, offset: int) -> PositionState:
        """See ``MemoryOrderRepository.position_state``."""
        return await self._call("position_state", lambda: self._store.position_state(topic, partition, offset))

    def set_position_state(self, topic: str, partition: int, offset: int, state: PositionState) -> None:
        """See ``MemoryOrderRepository.set_position_state``."""
        self._store.set_position_state(topic, partition, offset, state)

    def forget(self, order_uid: str) -> None:
        """See ``MemoryOrderRepository.forget``."""
        self._store.forget(order_uid)

    async def wait_until_handled(self, topic: str, partition: int, offset: int, *, timeout_s: float) -> PositionState:
        """See ``AsyncOrderRepository.wait_until_handled``."""
        polling = Polling(timeout_s)
        state = await self._call("wait_until_handled", lambda: self._store.position_state(topic, partition, offset))
        while not polling.ends_with(state):
            await asyncio.sleep(polling.next_pause_s())
            state = self._store.position_state(topic, partition, offset)
        return state

    async def stats(self) -> Stats:
        """See ``AsyncOrderRepository.stats``."""
        return await self._call("stats", self._store.stats)

    async def check(self) -> float | None:
        """See ``AsyncOrderRepository.check``."""
        return await self._call("check", self._store.check)

    async def save(self, order: Order, *, original: bytes | None = None) -> Outcome:
        """See ``AsyncOrderRepository.save``."""
        return await self._call("save", lambda: self._store.save(order, original=original))

    async def save_many(self, orders: Iterable[Order]) -> Counter[Outcome]:
        """See ``AsyncOrderRepository.save_many``."""
        return await self._call("save_many", lambda: self._store.save_many(orders))

    async def _call(self, method: Method, call: Callable[[], T]) -> T:
        await asyncio.sleep(0)
        error = self._failures.before_call(method)
        result = call()
        if error is not None:
            raise error
        return result
