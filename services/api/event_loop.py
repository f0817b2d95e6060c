"""The event loop of a worker: asyncio's, which accepts few connections at once, and can leave work until it is idle."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Sized
from typing import Any

#: Length of the queue of connections to accept; the kernel's limit (net.core.somaxconn) is usually the same.
BACKLOG = 4096
#: Connections accepted in one turn of the event loop. With more, the first worker that wakes up would accept all
#: connections that clients open at the same time, and the other workers none.
ACCEPT_AT_ONCE = 1

Callback = Callable[[], object]


def call_when_idle(callback: Callback) -> None:
    """See ``EventLoop.call_when_idle``. An event loop of another class calls back in its next turn."""
    loop = asyncio.get_running_loop()
    if isinstance(loop, EventLoop):
        loop.call_when_idle(callback)
    else:
        loop.call_soon(callback)


class EventLoop(asyncio.SelectorEventLoop):
    """asyncio's event loop, with these two changes."""

    def __init__(self) -> None:
        #: What to call when idle, in this order.
        self._callbacks: dict[Callback, None] = {}
        super().__init__(_Selector(self._callbacks, self._schedule_callbacks))

    async def create_server(self, *args: Any, **options: Any) -> asyncio.Server:
        """Listen. asyncio accepts up to ``backlog`` connections in one turn, and makes the queue as short."""
        server = await super().create_server(*args, **options, backlog=ACCEPT_AT_ONCE)
        options["sock"].listen(BACKLOG)
        return server

    def call_when_idle(self, callback: Callback) -> None:
        """Call back when the loop would only wait, or is closed. A callback that waits already is called once."""
        self._callbacks[callback] = None

    def close(self) -> None:
        """Call back what waits for an idle loop, and close."""
        callbacks = [*self._callbacks]
        self._callbacks.clear()
        for callback in callbacks:
            callback()
        super().close()

    def _schedule_callbacks(self) -> None:
        for callback in self._callbacks:
            self.call_soon(callback)
        self._callbacks.clear()


class _Selector(selectors.DefaultSelector):
    """A selector that does not wait while callbacks wait for that: it schedules them."""

    def __init__(self, callbacks: Sized, schedule: Callable[[], None]) -> None:
        super().__init__()
        self._callbacks = callbacks
        self._schedule = schedule

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready. asyncio passes 0 if it has something else to do."""
        if timeout == 0 or not self._callbacks:
            return super().select(timeout)
        ready = super().select(0)
        if not ready:
            self._schedule()
        return ready
