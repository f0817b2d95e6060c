"""Asyncio in tests: repositories with synchronous methods for the contract suite, and calls that are cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from orderlib import AsyncOrderRepository, OrderRepository
from orderlib.repository import StoredOrder

T = TypeVar("T")

#: Runs a coroutine in an event loop, from any thread, and returns its result.
Run = Callable[[Coroutine[Any, Any, Any]], Any]


@contextmanager
def event_loop() -> Iterator[Run]:
    """Run an event loop in a separate thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class _OverAsyncio:
    def __init__(self, repository: AsyncOrderRepository, run: Run) -> None:
        self._repository = repository
        self._run = run

    def stream(self, **filters: Any) -> Generator[StoredOrder, None, None]:
        return self._stream(self._repository.stream(**filters))

    def _stream(self, stored: AsyncGenerator[StoredOrder, None]) -> Generator[StoredOrder, None, None]:
        try:
            while (found := self._run(_next(stored))) is not None:
                yield found
        finally:
            self._run(stored.aclose())

    def __getattr__(self, name: str) -> Callable[..., object]:
        method = getattr(self._repository, name)
        return lambda *args, **options: self._run(method(*args, **options))


async def _next(stored: AsyncGenerator[StoredOrder, None]) -> StoredOrder | None:
    return await anext(stored, None)


def over_asyncio(repository: AsyncOrderRepository, run: Run) -> OrderRepository:
    """Return the repository with methods that run in the event loop until they end."""
    return cast("OrderRepository", _OverAsyncio(repository, run))


async def cancelled_after(rounds: int, call: Awaitable[object]) -> bool:
    """Let the event loop run this many turns, then cancel the call. Return whether it was cancelled."""
    task = asyncio.ensure_future(call)
    for _ in range(rounds):
        await asyncio.sleep(0)
        if task.done():
            break
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return True
    return False
