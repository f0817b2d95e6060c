"""Concurrent reads of single orders, or of their digests, share round trips.

A read is sent at once if none is in flight. Reads that begin meanwhile are sent together after it: in one
transaction, whose snapshot is taken after all of them have begun.
"""

from __future__ import annotations

import asyncio
import copy
import functools
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, Protocol, TypeVar

import attrs
from psycopg.abc import PQGen

from orderlib.contract import fits_postgres
from orderlib.errors import DatabaseUnavailable, OrderNotFound
from orderlib.postgres.errors import sqlstates
from orderlib.postgres.pool import Call
from orderlib.postgres.reads import ReadQueries
from orderlib.repository import require_type

T = TypeVar("T")

#: SQLSTATEs of an outage that may concern one order only: an error of the disk, too little memory for a result.
_OF_ONE_ORDER = ("58", "53200")

#: The longest wait for the read in flight. A read from memory is shorter: a longer one waits for the disk, where others
#: can wait at the same time, or gets no answer.
_MAX_WAIT_S = 0.005
#: Turns of the event loop between two shared reads, if fewer calls wait than are enough. Meanwhile clients get their
#: results and send their next requests. So the next read answers more of them, which saves more than PostgreSQL loses
#: while it is idle.
_TURNS_BETWEEN = 4
_ENOUGH_WAITERS = 16
#: How many orders a shared read returns at most, and how many items of each.
_MAX_ORDERS = 64
_MAX_ITEMS = 100


class _Read(Protocol):
    """Run a read before the deadline of a call, and translate its errors."""

    def __call__(self, read: Callable[[ReadQueries], PQGen[T]], call: Call, /) -> Coroutine[Any, Any, T]: ...


@attrs.define(eq=False)
class _Waiter(Generic[T]):
    """A call that waits for a shared read."""

    order_uid: str
    call: Call
    #: What is found, by order_uid; ``None`` for an order that must be read alone.
    found: asyncio.Future[dict[str, T | None]]


class SharedReads:
    """The reads of single orders, and of their digests, in one event loop."""

    def __init__(self, read: _Read) -> None:
        self.orders = _CoalescedRead(
            read, ReadQueries.get_stored, lambda reads, order_uids: reads.get_many_stored(order_uids, _MAX_ITEMS)
        )
        self.digests = _CoalescedRead(read, ReadQueries.content_sha256, ReadQueries.many_content_sha256)


class _CoalescedRead(Generic[T]):
    """One kind of read. ``one`` reads one order, or raises OrderNotFound.

    ``many`` returns what it has read of several orders, by order_uid, without those that do not exist. ``None`` means
    that this order must be read with ``one``.
    """

    def __init__(
        self,
        read: _Read,
        one: Callable[[ReadQueries, str], PQGen[T]],
        many: Callable[[ReadQueries, list[str]], PQGen[dict[str, T | None]]],
    ) -> None:
        self._read = read
        self._one = one
        self._many = many
        self._in_flight = 0
        self._waiters: list[_Waiter[T]] = []
        self._timer: asyncio.TimerHandle | None = None
        #: The event loop itself has only weak references to tasks.
        self._tasks: set[asyncio.Task[dict[str, T | None]]] = set()

    async def get(self, order_uid: str, call: Call) -> T:
        """Return what is read of an order. Raises OrderNotFound.

        If a shared read fails because of an outage, all its calls raise that. After an error that one order may have
        caused, each call reads its own order again.
        """
        if not fits_postgres(require_type("order_uid", order_uid, str)):
            raise OrderNotFound(order_uid)
        if not self._in_flight:
            self._in_flight += 1
            try:
                return await self._get_alone(order_uid, call)
            finally:
                self._end_read()
        loop = asyncio.get_running_loop()
        waiter: _Waiter[T] = _Waiter(order_uid, call, loop.create_future())
        self._waiters.append(waiter)
        if self._timer is None:
            self._timer = loop.call_later(_MAX_WAIT_S, self._send_all)
        found = await waiter.found
        if (value := found.get(order_uid)) is not None:
            return value
        if order_uid in found:
            return await self._get_alone(order_uid, call)
        raise OrderNotFound(order_uid)

    def _get_alone(self, order_uid: str, call: Call) -> Coroutine[Any, Any, T]:
        return self._read(lambda read_queries: self._one(read_queries, order_uid), call)

    def _end_read(self) -> None:
        self._in_flight -= 1
        if not self._in_flight:
            self._send()

    def _end_read_after(self, turns: int) -> None:
        if turns:
            asyncio.get_running_loop().call_soon(self._end_read_after, turns - 1)
        else:
            self._end_read()

    def _send_all(self) -> None:
        while self._waiters:
            self._send()

    def _send(self) -> None:
        """Read the orders of the calls that have waited longest."""
        group, self._waiters = self._waiters[:_MAX_ORDERS], self._waiters[_MAX_ORDERS:]
        if not self._waiters and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        # Not those that were cancelled while they waited.
        group = [waiter for waiter in group if not waiter.found.done()]
        if not group:
            return
        self._in_flight += 1
        order_uids = list({waiter.order_uid for waiter in group})
        # The first call has the earliest deadline.
        read = self._read(lambda read_queries: self._many(read_queries, order_uids), group[0].call)
        task = asyncio.get_running_loop().create_task(read)
        self._tasks.add(task)
        task.add_done_callback(functools.partial(self._on_result, group))

    def _on_result(self, group: Sequence[_Waiter[T]], task: asyncio.Task[dict[str, T | None]]) -> None:
        """Pass the result of a read to its calls."""
        self._tasks.discard(task)
        self._end_read_after(_TURNS_BETWEEN if len(self._waiters) < _ENOUGH_WAITERS else 0)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        for waiter in group:
            if waiter.found.done():
                continue
            match error:
                case None:
                    waiter.found.set_result(task.result())
                case asyncio.CancelledError():
                    waiter.found.cancel()
                case DatabaseUnavailable() if not _may_concern_one_order(error):
                    # A copy for each call, because each raise adds a traceback.
                    outage = copy.copy(error)
                    outage.__cause__ = error.__cause__
                    waiter.found.set_exception(outage)
                case _:
                    # One order may be the cause. Each call reads its own, and raises its own error.
                    waiter.found.set_result({waiter.order_uid: None})


def _may_concern_one_order(error: BaseException) -> bool:
    return any(sqlstate.startswith(_OF_ONE_ORDER) for sqlstate in sqlstates(error))
