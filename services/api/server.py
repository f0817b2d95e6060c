"""gunicorn with limits on idle connections, incomplete requests, what is sent at once, and unread responses.

DESIGN.md lists the private parts of gunicorn that this module uses, and what would replace each.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import mmap
import os
import re
import resource
import socket
import time
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

# gunicorn ships no types: mypy takes the five imports, and the four classes below that inherit from them, for Any.
import gunicorn  # type: ignore[import-untyped]
from gunicorn.app.base import BaseApplication  # type: ignore[import-untyped]
from gunicorn.asgi import protocol  # type: ignore[import-untyped]
from gunicorn.glogging import Logger  # type: ignore[import-untyped]
from gunicorn.workers import base, gasgi  # type: ignore[import-untyped]

from orderlib.errors import ConfigurationError
from services.api.event_loop import BACKLOG, EventLoop
from services.api.metrics import ApiMetrics
from services.settings import Address

#: Time limit for the head of a connection's first request. gunicorn's own limit begins with the second request.
REQUEST_HEAD_TIMEOUT_S = 10
#: A connection is closed if the client reads nothing of a response for this time.
SEND_TIMEOUT_S = 30
#: Time limit for the last requests when the server stops. Each request ends within 5 s, or within 7 s if the client
#: waits for a record.
GRACEFUL_TIMEOUT_S = 8
#: Connections of a worker at the same time; fewer if its limit of open files is lower. Metrics have a separate limit.
MAX_CONNECTIONS = 4_000
MAX_METRICS_CONNECTIONS = 100
#: Files for everything else: PostgreSQL, listeners, and connections that are not counted yet or are closing.
OTHER_FILES = 300

#: Bytes that are read from a connection at once, and how many of a body or of further requests are kept meanwhile. A
#: larger body ends the connection, because no route reads it.
MAX_READ_BYTES = 16_384

#: The longest request line: gunicorn's greatest value. Two filters of 255 characters of any kind fit, too.
MAX_REQUEST_LINE_BYTES = 8_190

#: Added to every response: security headers, and Vary. gunicorn checks and formats what an application sets again for
#: each response, which would be a tenth of the CPU time of a read.
CONSTANT_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept, Authorization",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_CONSTANT_LINES = "".join(f"{name}: {value}\r\n" for name, value in CONSTANT_HEADERS.items())

#: Headers of the usual characters, and the empty line after them.
_USUAL_HEADERS = re.compile(rb"(?:[0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n)*\r\n")

#: The private parts of gunicorn that this module uses.
_PRIVATE = {
    gasgi: ("ASGIProtocol",),
    protocol: ("_CACHED_SERVER_HEADER", "ParseError", "PythonProtocol"),
    protocol.PythonProtocol: (
        *("_buffer", "_finalize_headers", "_header_count", "_headers_list", "_limit_request_field_size"),
        *("_limit_request_fields", "_parse_headers", "_scan_from", "remaining"),
    ),
    protocol.CallbackRequest: ("version",),
    base: ("WorkerTmp",),
    gasgi.ASGIWorker: ("_setup_event_loop", "_shutdown"),
    protocol.ASGIProtocol: (
        *("_arm_keepalive_timer", "_cancel_keepalive_timer", "_is_websocket_upgrade"),
        *("_handle_http_request", "_keepalive_timeout", "_resume_reading", "_safe_write", "_send_error_response"),
        *("_serve_http_request", "_will_close"),
    ),
}


class _Log(Logger):  # type: ignore[misc]
    """Send gunicorn's messages to the program's log. The application logs the requests."""

    #: gunicorn asks for each request, and would read six settings.
    access_log_enabled = False

    def setup(self, cfg: object) -> None:  # noqa: ARG002 - gunicorn's signature
        self.error_log.propagate = True
        self.error_log.setLevel(logging.WARNING)


class _Parser(protocol.PythonProtocol):  # type: ignore[misc]
    """gunicorn's parser, which reads the usual headers in one step.

    gunicorn reads them line by line and looks at each character, which is a third of the CPU time of a small response
    to a browser. Any other head, and the rules about several headers, are left to gunicorn.
    """

    __slots__ = ()

    def _parse_headers(self) -> bool:
        # A number other than 0: the headers arrive in parts.
        found = _USUAL_HEADERS.match(self._buffer) if self._scan_from == 0 else None
        if found is None or found.end() > self._limit_request_field_size:
            return bool(super()._parse_headers())
        *lines, _, _ = bytes(found[0]).split(b"\r\n")
        if self._header_count + len(lines) > self._limit_request_fields:
            return bool(super()._parse_headers())
        for line in lines:
            name, _, value = line.partition(b":")
            self._headers_list.append((name.lower(), value.strip(b" \t")))
        del self._buffer[: found.end()]
        self._finalize_headers()
        return True

    def _finalize_headers(self) -> None:
        try:
            super()._finalize_headers()
        except ValueError as exc:
            # Python converts at most 4,300 digits to an integer.
            raise protocol.ParseError("Content-Length is too long") from exc


class _Protocol(protocol.ASGIProtocol):  # type: ignore[misc]
    """gunicorn's HTTP connection with the limits that it lacks."""

    _send_timer: asyncio.TimerHandle | None = None
    _request_timer: asyncio.TimerHandle | None = None
    #: Since when, and until when, the server waits for the next request, on the loop's clock.
    _waits_since = _waits_until = math.inf

    def connection_made(self, transport: Any) -> None:
        # What is read at once is parsed at once, while others wait. asyncio's and gunicorn's own limit is 256 KiB.
        transport.max_size = self._max_buffer_size = MAX_READ_BYTES
        super().connection_made(transport)
        self._wait_for_request(REQUEST_HEAD_TIMEOUT_S)
        self.peers: _Connections = self.worker.connections_of(transport)
        self.peers.add(self)

    def pause_writing(self) -> None:
        self._check_sending()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stop_send_timer()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_send_timer()
        if self._request_timer is not None:
            self._request_timer.cancel()
        self.peers.discard(self)
        super().connection_lost(exc)

    def close_if_idle(self) -> None:
        """Close the connection unless a request is being answered."""
        if self._current_request is None:
            self._keepalive_timeout()

    def waiting_since(self) -> float | None:
        """Return since when the server has waited for the client, on the loop's clock.

        Return None while a request is being answered.
        """
        if self._send_timer is not None:
            return float(self._send_timer.when()) - SEND_TIMEOUT_S
        return None if self._waits_since == math.inf or self._current_request is not None else self._waits_since

    def close_now(self) -> None:
        """Close at once, so that others can connect. Data that the client has not read is lost."""
        self._keepalive_timeout()
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _arm_keepalive_timer(self) -> None:
        """Wait for the next request. gunicorn would start and cancel a timer for each."""
        if self._reading_paused:
            # A part of its head has arrived, and the rest must, too.
            super()._resume_reading()
        self._wait_for_request(self._keepalive)

    def _cancel_keepalive_timer(self) -> None:
        self._waits_since = self._waits_until = math.inf

    def _wait_for_request(self, limit_s: float) -> None:
        self._waits_since = self.worker.loop.time()
        self._waits_until = self._waits_since + limit_s
        if self._request_timer is None or self._request_timer.when() > self._waits_until:
            self._check_request()

    def _check_request(self) -> None:
        """Close the connection if its time has passed without a request; else check again when it will have passed."""
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None
        if self._current_request is not None:
            # It arrived in this turn of the loop. The wait after it starts another timer.
            return
        if self._waits_until <= self.worker.loop.time():
            self._keepalive_timeout()
        elif self._waits_until < math.inf:
            self._request_timer = self.worker.loop.call_at(self._waits_until, self._check_request)

    async def _serve_http_request(self, request: object, sockname: object, peername: object) -> Any:
        """Answer in the task of the connection.

        gunicorn would start another task for each request, because an application may continue after its answer. This
        one does not. If the client has sent further requests already, other connections have their turn first.
        """
        keepalive = await self._handle_http_request(request, sockname, peername)
        if self._callback_parser.remaining():
            await asyncio.sleep(0)
        return keepalive

    def _resume_reading(self) -> None:
        """Read on, but not while many requests wait that the client has sent already: gunicorn would keep them all."""
        if self._reading_paused and len(self._callback_parser.remaining()) <= self._max_buffer_size:
            super()._resume_reading()

    def _will_close(self, request: Any, response_requires_close: bool) -> bool:
        """Announce also that the connection ends because the body of the request has not arrived.

        A client of HTTP/1.0 may read until the end of the connection, unless it is told that the connection stays open
        (RFC 9112, C.2.2). gunicorn would not tell it, so the connection ends.
        """
        receiver = self._body_receiver
        lacks_body = receiver is not None and not receiver._complete  # noqa: SLF001 - DESIGN.md lists it
        return lacks_body or super()._will_close(request, response_requires_close) or request.version < (1, 1)

    def _is_websocket_upgrade(self, request: object) -> bool:  # noqa: ARG002 - gunicorn's signature
        """Ignore the upgrade: the server has no websockets and may answer as plain HTTP (RFC 9110, 7.8)."""
        return False

    def _send_error_response(self, status: int, message: str, extra_headers: object = ()) -> None:  # noqa: ARG002 - gunicorn's signature
        """Answer invalid HTTP with a problem document, without the message: it may quote the request.

        gunicorn also calls this for a client that has gone, because then the application's response was not sent.
        """
        if self.transport.is_closing():
            return
        headers, body = self.app.refuse(HTTPStatus(status))
        lines = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            f"Date: {formatdate(usegmt=True)}",
            *(f"{name}: {value}" for name, value in headers.items()),
            "Connection: close",
        ]
        head = "".join(f"{line}\r\n" for line in lines) + _CONSTANT_LINES + "\r\n"
        self._safe_write(head.encode() + body)

    def _check_sending(self, before: int | None = None) -> None:
        """Abort if the client has read nothing since the last check; else check again later."""
        unsent = self.transport.get_write_buffer_size()
        if before is not None and unsent >= before:
            self.transport.abort()
        else:
            self._send_timer = self.worker.loop.call_later(SEND_TIMEOUT_S, self._check_sending, unsent)

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None


class _Connections(set[_Protocol]):
    """The open connections of one address."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def add(self, protocol: _Protocol) -> None:
        """Add a connection. Above the limit, close those that have waited longest for their client."""
        super().add(protocol)
        if len(self) <= self.limit:
            return
        waiting = [
            (since, id(other), other)
            for other in self
            if other is not protocol and (since := other.waiting_since()) is not None
        ]
        # Close several at once: during a flood, this runs for every new connection. If the server owes a response on
        # each of the others, close the new one.
        for _, _, other in sorted(waiting)[: 1 + self.limit // 50] or [(0.0, 0, protocol)]:
            self.discard(other)
            other.close_now()


class _Heartbeat:
    """When a worker last showed that it is alive, in shared memory. gunicorn's own needs a file on a disk."""

    def __init__(self, cfg: object) -> None:  # noqa: ARG002 - gunicorn's signature
        self._memory = mmap.mmap(-1, 8)
        # gunicorn sets close-on-exec on this file and does nothing else with it.
        self._file = os.open(os.devnull, os.O_RDONLY)
        self._time = memoryview(self._memory).cast("d")
        self.notify()

    def notify(self) -> None:
        """Record that the worker is alive."""
        self._time[0] = time.monotonic()

    def last_update(self) -> float:
        """Return the time of the last ``notify``."""
        return float(self._time[0])

    def fileno(self) -> int:
        """Return the file that gunicorn expects."""
        return self._file

    def close(self) -> None:
        """Free the memory in this process."""
        os.close(self._file)
        self._time.release()
        self._memory.close()


class _Worker(gasgi.ASGIWorker):  # type: ignore[misc]
    """gunicorn's asgi worker with ``_Protocol``."""

    def init_process(self) -> None:
        # gunicorn has no setting for these three. The last is what it adds to every response: the name of the server.
        gasgi.ASGIProtocol = _Protocol
        protocol.PythonProtocol = _Parser
        protocol._CACHED_SERVER_HEADER = _CONSTANT_LINES.encode()  # noqa: SLF001 - see above
        files = max(_raise_file_limit() - OTHER_FILES, MAX_METRICS_CONNECTIONS)
        self._connections = _Connections(min(MAX_CONNECTIONS, files))
        self._metrics_connections = _Connections(MAX_METRICS_CONNECTIONS)
        super().init_process()

    def _setup_event_loop(self) -> None:
        self.loop = EventLoop()
        asyncio.set_event_loop(self.loop)

    def connections_of(self, transport: asyncio.Transport) -> _Connections:
        """Return the connections of the address that this connection came to."""
        is_for_metrics = transport.get_extra_info("sockname")[1] == self.app.metrics_port
        return self._metrics_connections if is_for_metrics else self._connections

    async def _shutdown(self) -> None:
        """Close the idle connections, and let gunicorn finish the requests that have begun."""
        for connection in [*self._connections, *self._metrics_connections]:
            connection.close_if_idle()
        await super()._shutdown()


def _raise_file_limit() -> int:
    """Raise the soft limit of open files as far as needed and as the hard limit allows. Return the new limit."""
    wanted = MAX_CONNECTIONS + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else soft


def _check_gunicorn() -> None:
    """Raise ConfigurationError if gunicorn lacks a part that this module uses."""
    missing = [name for owner, names in _PRIVATE.items() for name in names if not hasattr(owner, name)]
    if missing:
        raise ConfigurationError(
            f"gunicorn {gunicorn.__version__} has no {missing[0]}: install the version in requirements/services.txt"
        )


class Server(BaseApplication):  # type: ignore[misc]
    """Serve an ASGI application on two sockets that are bound already."""

    def __init__(
        self,
        listener: socket.socket,
        metrics_listener: socket.socket,
        load: Callable[[], Any],
        metrics: ApiMetrics,
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
        """Set what differs from gunicorn's defaults. gunicorn itself reads ``WEB_CONCURRENCY``."""
        for name, value in {
            "bind": self._binds,
            "worker_class": _Worker,
            "keepalive": self._keepalive_s,
            "limit_request_line": MAX_REQUEST_LINE_BYTES,
            "graceful_timeout": GRACEFUL_TIMEOUT_S,
            "logger_class": _Log,
            "control_socket_disable": True,
            # post_fork runs in the worker, the other two in the master.
            "pre_fork": self._pre_fork,
            "post_fork": self._post_fork,
            "child_exit": self._child_exit,
        }.items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        """Return a new application. Each worker calls this once."""
        application = self._load()
        # Each connection is dozens of objects. While many clients connect, Python would scan all of them repeatedly,
        # which takes a third of the time needed to accept them.
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
    """Listen on an address; port 0 takes a free port. Raises ConfigurationError that names the variable."""
    host = address.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, address.port), family=family, backlog=BACKLOG)
    except OSError as exc:
        reason = os.strerror(exc.errno) if exc.errno and exc.errno > 0 else exc.strerror
        raise ConfigurationError(f"{variable}: cannot listen on {address}: {reason}") from exc


def bound_address(listener: socket.socket) -> Address:
    """Return the address that a socket listens on, with its real port."""
    host, port = listener.getsockname()[:2]
    return Address(host=f"[{host}]" if ":" in host else host, port=port)
