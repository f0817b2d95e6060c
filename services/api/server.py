"""gunicorn, set up for us: its asgi worker, which neither idle nor half-sent nor unread connections can occupy."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from typing import Any

from gunicorn.app.base import BaseApplication  # type: ignore[import-untyped]
from gunicorn.asgi.protocol import ASGIProtocol  # type: ignore[import-untyped]
from gunicorn.glogging import Logger  # type: ignore[import-untyped]
from gunicorn.workers import gasgi  # type: ignore[import-untyped]

from orderlib.config import Address
from orderlib.errors import BrokenSetup

#: A client has so long to send its first request's head; gunicorn's own limit begins with the second.
HEAD_WITHIN_S = 10
#: A client that takes nothing of its answer for so long is gone.
TAKE_WITHIN_S = 30
#: A request ends within 5 s, whatever the database does; so can a stop.
STOP_WITHIN_S = 8
#: More connections than this at once are closed at once: each is memory, and file handles end.
MAX_CONNECTIONS = 900


class _Log(Logger):  # type: ignore[misc]
    """gunicorn's own messages go where the program's go. It writes no access log: the application does."""

    def setup(self, cfg: object) -> None:  # noqa: ARG002 - gunicorn's signature
        self.error_log.propagate = True
        self.error_log.setLevel(logging.WARNING)


class _Protocol(ASGIProtocol):  # type: ignore[misc]
    """gunicorn's HTTP connection with the bounds it lacks."""

    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.worker.protocols.add(self)
        if self.worker.nr_conns > self.worker.worker_connections:
            transport.abort()
        # The timer between two requests; whatever starts one cancels it.
        self._keepalive_handle = self.worker.loop.call_later(HEAD_WITHIN_S, self._keepalive_timeout)

    def pause_writing(self) -> None:
        self._expect_less()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._let_be()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._let_be()
        self.worker.protocols.discard(self)
        super().connection_lost(exc)

    def close_if_idle(self) -> None:
        """Close unless an answer is owed."""
        if self._current_request is None and not self._finishing_calls:
            self._keepalive_timeout()

    def _expect_less(self, before: int | None = None) -> None:
        """Give up on a client that took nothing since the last look; look again at one that did."""
        waiting = self.transport.get_write_buffer_size()
        if before is not None and waiting >= before:
            self.transport.abort()
        else:
            self._unread = self.worker.loop.call_later(TAKE_WITHIN_S, self._expect_less, waiting)

    def _let_be(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


class _Worker(gasgi.ASGIWorker):  # type: ignore[misc]
    """gunicorn's asgi worker, speaking our protocol."""

    def init_process(self) -> None:
        self.protocols: set[_Protocol] = set()
        gasgi.ASGIProtocol = _Protocol  # gunicorn has no setting for it
        super().init_process()

    async def _shutdown(self) -> None:
        """Finish what was begun; whoever has asked nothing yet is not waited for."""
        for protocol in list(self.protocols):
            protocol.close_if_idle()
        await super()._shutdown()


class Server(BaseApplication):  # type: ignore[misc]
    """Serves an ASGI application on sockets that are bound already."""

    def __init__(self, listeners: list[socket.socket], load: Callable[[], Any], on_exit: Callable[[], object]) -> None:
        self._binds = [f"fd://{listener.detach()}" for listener in listeners]
        self._load = load
        self._on_exit = on_exit
        super().__init__()

    def load_config(self) -> None:
        """Set what differs from gunicorn's defaults. ``WEB_CONCURRENCY`` is the number of workers (1)."""
        for name, value in {
            "bind": self._binds,
            "worker_class": _Worker,
            "worker_connections": MAX_CONNECTIONS,
            "asgi_loop": "asyncio",
            "graceful_timeout": STOP_WITHIN_S,
            "logger_class": _Log,
            "control_socket_disable": True,
            # Of the master alone; a worker, being its fork, would run its `finally` and `with` blocks as well.
            "on_exit": lambda _arbiter: self._on_exit(),
        }.items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        """The application, made in each worker."""
        return self._load()


def listen(variable: str, address: Address) -> socket.socket:
    """Listen on an address; port 0 takes a free one. Raises BrokenSetup naming the variable."""
    host = address.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, address.port), family=family, backlog=1024)
    except OSError as exc:
        reason = os.strerror(exc.errno) if exc.errno and exc.errno > 0 else exc.strerror
        raise BrokenSetup(f"{variable}: cannot listen on {address}: {reason}") from exc


def bound_address(listener: socket.socket) -> Address:
    """Where a socket really listens."""
    host, port = listener.getsockname()[:2]
    return Address(host=f"[{host}]" if ":" in host else host, port=port)
