"""Metrics and health over HTTP, served by a separate thread."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from socketserver import TCPServer, ThreadingMixIn
from types import TracebackType
from typing import Any, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import make_wsgi_app

from orderlib.errors import ConfigurationError
from services.consumer.metrics import ConsumerMetrics
from services.program import event
from services.settings import Address

#: The health server serves at most this number of connections at a time, and closes each after this time.
MAX_CONNECTIONS = 32
CONNECTION_S = 5.0

#: If the main loop has not run for this time, the consumer is not live.
LIVE_WITHIN_S = 30.0
_HANGS = f"the main loop has not run for {LIVE_WITHIN_S:g} s"

#: A failure of monitoring that repeats is logged this often.
MONITORING_LOGGED_S = 60.0


class Health:
    """Whether the consumer is live (its loop turns) and ready (it can store records).

    The runner sets it, and the threads of the health server read it.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._heartbeat_at_s = clock()
        #: Why the consumer cannot store records now; ``None`` if it can.
        self.not_ready_reason: str | None = "starting"

    def heartbeat(self) -> None:
        """Record that the loop has turned."""
        self._heartbeat_at_s = self._clock()

    @property
    def live(self) -> bool:
        """Return whether the loop turned recently."""
        return self._clock() - self._heartbeat_at_s < LIVE_WITHIN_S


#: When a failure of each kind of monitoring was last logged.
_failure_logged_s: dict[str, float] = {}


@contextmanager
def never_fatal(what: str) -> Iterator[None]:
    """Log an exception of the block and continue: metrics and health must never stop the consumer.

    Some blocks run many times a second, so each kind of monitoring logs its failures at most once a minute.
    """
    try:
        yield
    except Exception as exc:  # noqa: BLE001  monitoring must never stop the consumer
        now_s = time.monotonic()
        if now_s - _failure_logged_s.get(what, -MONITORING_LOGGED_S) < MONITORING_LOGGED_S:
            return
        _failure_logged_s[what] = now_s
        event("monitoring_failed", logging.WARNING, what=what, error=type(exc).__name__)


class HealthServer:
    """A context manager that serves ``/metrics``, ``/livez`` and ``/readyz``.

    The constructor raises ConfigurationError if it cannot listen on the address.
    """

    def __init__(self, bind: Address, health: Health, metrics: ConsumerMetrics) -> None:
        self._health = health
        self._metrics: WSGIApplication = make_wsgi_app(metrics.registry)
        try:
            self._server = _Server(bind)
        except OSError as exc:
            raise ConfigurationError(f"ORDERS_METRICS_BIND: cannot listen on {bind}: {exc.strerror}") from exc
        except UnicodeError as exc:
            raise ConfigurationError(
                f"ORDERS_METRICS_BIND: cannot listen on {bind}: no host can have this name"
            ) from exc
        self._server.set_app(self._respond)
        self.address = Address(host=bind.host, port=self._server.server_port)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _respond(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        match environ["PATH_INFO"]:
            case "/metrics":
                return self._metrics(environ, start_response)
            case "/livez":
                problem = None if self._health.live else _HANGS
            case "/readyz":
                problem = self._health.not_ready_reason if self._health.live else _HANGS
            case _:
                start_response("404 Not Found", [("Content-Type", "text/plain")])
                return [b"/metrics, /livez, /readyz\n"]
        start_response(
            "503 Service Unavailable" if problem else "200 OK", [("Content-Type", "text/plain; charset=utf-8")]
        )
        return [f"{problem or 'ok'}\n".encode()]


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
        """Log nothing: probes come every few seconds."""


class _Server(ThreadingMixIn, WSGIServer):
    """Serves each connection in a thread. Closes a connection after a few seconds, or if there are too many newer ones.

    Therefore slow connections cannot use up the file descriptors that PostgreSQL and Kafka need, and a probe that sends
    its request at once gets a response.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, bind: Address) -> None:
        host = bind.host.strip("[]")
        self.address_family = socket.getaddrinfo(host, bind.port, type=socket.SOCK_STREAM)[0][0]
        #: The open connections, the oldest first, with the time at which to close each.
        self._open: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        super().__init__((host, bind.port), _Quiet)

    def server_bind(self) -> None:
        """Bind without HTTPServer's look-up of the host name, which may wait for a slow resolver."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "orderlib", self.socket.getsockname()[1]
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection."""
        try:
            return super().get_request()
        except OSError:
            # Without a free file descriptor the connection stays pending, and the selector reports it again at once.
            time.sleep(0.1)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread. Close the oldest connection if there are too many."""
        with self._lock:
            self._open[request] = time.monotonic() + CONNECTION_S
            excess = list(self._open)[:-MAX_CONNECTIONS]
        for connection in excess:
            self._shut_down(connection)
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Close the connections that are open for too long. The base class calls this several times a second."""
        now_s = time.monotonic()
        with self._lock:
            expired = [connection for connection, until_s in self._open.items() if until_s <= now_s]
        for connection in expired:
            self._shut_down(connection)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection after its response."""
        with self._lock:
            self._open.pop(request, None)
            super().shutdown_request(request)

    def _shut_down(self, connection: socket.socket) -> None:
        """Shut a connection down. Its thread, which waits for it, then closes it."""
        with self._lock, suppress(OSError):
            if self._open.pop(connection, None) is not None:
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log nothing: a client that leaves early is no event."""
