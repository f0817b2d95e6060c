"""gunicorn, set up for us: its asgi worker, which neither idle nor half-sent nor unread connections can occupy."""

from __future__ import annotations

import asyncio
import gc
import logging
import mmap
import os
import resource
import socket
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import gunicorn  # type: ignore[import-untyped]
from gunicorn.app.base import BaseApplication  # type: ignore[import-untyped]
from gunicorn.asgi.protocol import ASGIProtocol  # type: ignore[import-untyped]
from gunicorn.glogging import Logger  # type: ignore[import-untyped]
from gunicorn.workers import base, gasgi  # type: ignore[import-untyped]

from orderlib.config import Address
from orderlib.errors import BrokenSetup
from services.api.metrics import Metrics

#: A client has so long to send its first request's head; gunicorn's own limit begins with the second.
HEAD_WITHIN_S = 10
#: A client that takes nothing of its answer for so long is gone.
TAKE_WITHIN_S = 30
#: A request ends within 5 s, whatever the database does; so can a stop.
STOP_WITHIN_S = 8
#: Connections that a worker keeps at once, fewer if it may not open so many files. The metrics have their own.
MAX_CONNECTIONS = 4_000
MAX_METRICS_CONNECTIONS = 100
#: Files for everything else: PostgreSQL, listeners, and connections that are accepted and not counted yet, or closing.
OTHER_FILES = 300
#: Clients that may wait to be accepted; the kernel's limit (net.core.somaxconn) is usually the same.
BACKLOG = 4096
#: Connections accepted in one turn of the event loop. A connection is counted two turns after it is accepted, and one
#: that is closed keeps its file for another turn. All of them must fit into OTHER_FILES: without a free file, asyncio
#: accepts nothing for a second.
ACCEPT_AT_ONCE = 20

#: What this module uses of gunicorn without being promised it.
_PRIVATE = {
    gasgi: ("ASGIProtocol",),
    base: ("WorkerTmp",),
    gasgi.ASGIWorker: ("_setup_event_loop", "_shutdown"),
    ASGIProtocol: (
        *("_arm_keepalive_timer", "_cancel_keepalive_timer", "_close_transport", "_is_websocket_upgrade"),
        *("_keepalive_timeout", "_safe_write", "_send_error_response"),
    ),
}


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
        # The timer between two requests; whatever starts one cancels it.
        self._keepalive_handle = self.worker.loop.call_later(HEAD_WITHIN_S, self._keepalive_timeout)
        self.peers: _Connections = self.worker.connections_of(transport)
        self.peers.add(self)

    def pause_writing(self) -> None:
        self._expect_less()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._let_be()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._let_be()
        self.peers.discard(self)
        super().connection_lost(exc)

    def close_if_idle(self) -> None:
        """Close unless an answer is owed."""
        if self._current_request is None and not self._finishing_calls:
            self._keepalive_timeout()

    def waiting_since(self) -> float | None:
        """Return since when we have waited for the client, on the loop's clock; None while an answer is owed."""
        if self._unread is not None:
            return float(self._unread.when()) - TAKE_WITHIN_S
        if self._keepalive_handle is None or self._current_request is not None:
            return None
        return float(self._keepalive_handle.when()) - (HEAD_WITHIN_S if self.req_count <= 1 else self._keepalive)

    def give_up(self) -> None:
        """Close at once, to make room for others; what the client did not take is lost."""
        self._keepalive_timeout()
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _is_websocket_upgrade(self, request: object) -> bool:  # noqa: ARG002 - gunicorn's signature
        """There are no websockets here; a request to upgrade is answered as if it did not ask (RFC 9110, 7.8)."""
        return False

    def _send_error_response(self, status: int, message: str, extra_headers: object = ()) -> None:  # noqa: ARG002
        """Answer a request that is not HTTP as the application answers its errors; the message may quote it."""
        headers, body = self.app.refuse(HTTPStatus(status))
        lines = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            *(f"{name}: {value}" for name, value in headers.items()),
            "Connection: close",
        ]
        self._safe_write("\r\n".join([*lines, "", ""]).encode() + body)

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


class _Connections(set[_Protocol]):
    """The connections of one address."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def add(self, protocol: _Protocol) -> None:
        """Add a connection. At the limit, make room: close those whose client has kept us waiting longest."""
        super().add(protocol)
        if len(self) <= self.limit:
            return
        waiting = [
            (since, id(other), other)
            for other in self
            if other is not protocol and (since := other.waiting_since()) is not None
        ]
        # Several at once: during a flood, every new connection comes here. If all others wait for us, the new one goes.
        for _, _, other in sorted(waiting)[: 1 + self.limit // 50] or [(0.0, 0, protocol)]:
            self.discard(other)
            other.give_up()


class _Heartbeat:
    """When a worker was last alive, as the master sees it; gunicorn's own needs a file that can be in the way."""

    def __init__(self, cfg: object) -> None:  # noqa: ARG002 - gunicorn's signature
        self._memory = mmap.mmap(-1, 8)
        # gunicorn marks its file close-on-exec; it does nothing else with it.
        self._file = os.open(os.devnull, os.O_RDONLY)
        self._time = memoryview(self._memory).cast("d")
        self.notify()

    def notify(self) -> None:
        """Tell that the worker is alive."""
        self._time[0] = time.monotonic()

    def last_update(self) -> float:
        """Return when it last told."""
        return float(self._time[0])

    def fileno(self) -> int:
        """Return the file that gunicorn expects."""
        return self._file

    def close(self) -> None:
        """Free the memory in this process."""
        os.close(self._file)
        self._time.release()
        self._memory.close()


class _EventLoop(asyncio.SelectorEventLoop):
    """asyncio's event loop, which accepts fewer connections at once."""

    async def create_server(self, *args: Any, **options: Any) -> asyncio.Server:
        """Listen; asyncio accepts as many connections in one turn as its backlog says."""
        return await super().create_server(*args, **options, backlog=ACCEPT_AT_ONCE)


class _Worker(gasgi.ASGIWorker):  # type: ignore[misc]
    """gunicorn's asgi worker, speaking our protocol."""

    def init_process(self) -> None:
        gasgi.ASGIProtocol = _Protocol  # gunicorn has no setting for it
        room = max(_raised_file_limit() - OTHER_FILES, MAX_METRICS_CONNECTIONS)
        self._connections = _Connections(min(MAX_CONNECTIONS, room))
        self._metrics_connections = _Connections(MAX_METRICS_CONNECTIONS)
        super().init_process()

    def _setup_event_loop(self) -> None:
        self.loop = _EventLoop()
        asyncio.set_event_loop(self.loop)

    def connections_of(self, transport: asyncio.Transport) -> _Connections:
        """Return the connections of the address that this one came to."""
        is_for_metrics = transport.get_extra_info("sockname")[1] == self.app.metrics_port
        return self._metrics_connections if is_for_metrics else self._connections

    def notify(self) -> None:
        """Tell the master, once a second, that we are alive."""
        super().notify()
        for listener in self.sockets:
            # asyncio listens with a shorter queue. A client that finds it full is delayed by a second.
            listener.sock.listen(BACKLOG)

    async def _shutdown(self) -> None:
        """Finish what was begun; whoever has asked nothing yet is not waited for."""
        for protocol in [*self._connections, *self._metrics_connections]:
            protocol.close_if_idle()
        await super()._shutdown()


def _raised_file_limit() -> int:
    """Raise the soft limit of open files to what we use, as far as the hard one allows; return it."""
    wanted = MAX_CONNECTIONS + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else soft


def _check_gunicorn() -> None:
    """Raise BrokenSetup for a gunicorn that lacks what is used here."""
    missing = [name for owner, names in _PRIVATE.items() for name in names if not hasattr(owner, name)]
    if missing:
        raise BrokenSetup(
            f"gunicorn {gunicorn.__version__} has no {missing[0]}: install the version in requirements/services.txt"
        )


class Server(BaseApplication):  # type: ignore[misc]
    """Serves an ASGI application on sockets that are bound already."""

    def __init__(
        self,
        listener: socket.socket,
        metrics_listener: socket.socket,
        load: Callable[[], Any],
        metrics: Metrics,
        keepalive_s: int,
    ) -> None:
        _check_gunicorn()
        self.metrics_port = metrics_listener.getsockname()[1]
        base.WorkerTmp = _Heartbeat  # gunicorn has no setting for it
        self._binds = [f"fd://{found.detach()}" for found in (listener, metrics_listener)]
        self._load = load
        self._metrics = metrics
        self._keepalive_s = keepalive_s
        super().__init__()

    def load_config(self) -> None:
        """Set what differs from gunicorn's defaults. ``WEB_CONCURRENCY`` is the number of workers (1)."""
        for name, value in {
            "bind": self._binds,
            "worker_class": _Worker,
            "keepalive": self._keepalive_s,
            "graceful_timeout": STOP_WITHIN_S,
            "logger_class": _Log,
            "control_socket_disable": True,
            # The first and the last in the master, the other in the worker.
            "pre_fork": self._pre_fork,
            "post_fork": self._post_fork,
            "child_exit": self._child_exit,
        }.items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        """The application, made in each worker."""
        application = self._load()
        # Each connection is dozens of objects. Python would look through all of them again and again while many clients
        # connect at once, which takes a third of the time that accepting them needs.
        gc.freeze()
        gc.set_threshold(10_000, 20, 20)
        return application

    def _pre_fork(self, arbiter: object, worker: Any) -> None:  # noqa: ARG002 - gunicorn's signature
        worker.metrics_slot = self._metrics.take_slot()

    def _post_fork(self, arbiter: object, worker: Any) -> None:  # noqa: ARG002 - gunicorn's signature
        self._metrics.use_slot(worker.metrics_slot)

    def _child_exit(self, arbiter: object, worker: Any) -> None:  # noqa: ARG002 - gunicorn's signature
        self._metrics.free_slot(worker.metrics_slot)


def listen(variable: str, address: Address) -> socket.socket:
    """Listen on an address; port 0 takes a free one. Raises BrokenSetup naming the variable."""
    host = address.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, address.port), family=family, backlog=BACKLOG)
    except OSError as exc:
        reason = os.strerror(exc.errno) if exc.errno and exc.errno > 0 else exc.strerror
        raise BrokenSetup(f"{variable}: cannot listen on {address}: {reason}") from exc


def bound_address(listener: socket.socket) -> Address:
    """Where a socket really listens."""
    host, port = listener.getsockname()[:2]
    return Address(host=f"[{host}]" if ":" in host else host, port=port)
