"""Run the API as a process, and send it HTTP requests."""

from __future__ import annotations

import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import psutil

from tests.support import ROOT
from tests.support.fork_server import Process, start
from tests.support.waiting import wait_for

#: The first part of a request; the client then sends nothing more.
HALF_A_REQUEST = b"GET /orders/x HTTP/1.1\r\nHost: localhost\r\nX-Half: "


def get_page(address: str, path: str) -> tuple[int, str]:
    """Return status and body of a page."""
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


@attrs.frozen
class Answer:
    """An HTTP response."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes
    seconds: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.body.decode()


@attrs.define
class Service:
    """A running ``services.api``."""

    process: Process
    _stderr: Path
    address: str = ""
    metrics_address: str = ""

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return the log events so far, or those of one name."""
        # The last line may be half-written.
        lines = self._stderr.read_text().rpartition("\n")[0].splitlines()
        events = [json.loads(line) for line in lines]
        return [event for event in events if name in (None, event["event"])]

    def line_of(self, answer: Answer) -> dict[str, Any]:
        """Return the event of an answered request, which is logged just after the answer."""

        def lines() -> list[dict[str, Any]]:
            return [event for event in self.events("request") if event["request_id"] == answer.headers["X-Request-Id"]]

        [line] = wait_for(lines, 5)
        return line

    def get(
        self,
        path: str,
        headers: Mapping[str, str] | None = None,
        *,
        method: str = "GET",
        address: str | None = None,
        timeout_s: float = 20,
    ) -> Answer:
        """Send a request on a new connection."""
        connection = http.client.HTTPConnection(address or self.address, timeout=timeout_s)
        begin = time.monotonic()
        try:
            connection.request(method, path, headers=dict(headers or {}))
            response = connection.getresponse()
            body = response.read()
            return Answer(response.status, response.headers, body, time.monotonic() - begin)
        finally:
            connection.close()

    def raw(self, sent: bytes, address: str | None = None) -> Answer:
        """Send these bytes on a new connection, and return the response."""
        host, _, port = (address or self.address).rpartition(":")
        begin = time.monotonic()
        with socket.create_connection((host, int(port)), timeout=20) as client:
            client.sendall(sent)
            response = http.client.HTTPResponse(client, method=sent.partition(b" ")[0].decode("latin-1"))
            response.begin()
            body = response.read()
            return Answer(response.status, response.headers, body, time.monotonic() - begin)

    def page(self, path: str) -> Answer:
        """Send a request as a browser does."""
        return self.get(path, {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"})

    def workers(self) -> list[int]:
        """Return the ids of the worker processes."""
        return [child.pid for child in psutil.Process(self.process.pid).children()]

    def connections(self) -> int:
        """Return the number of connections to the API's address."""
        return sum(
            found.status == psutil.CONN_ESTABLISHED and found.laddr.port == self.port
            for worker in self.workers()
            for found in psutil.Process(worker).net_connections("tcp")
        )

    def accepts(self) -> bool:
        """Return whether the API accepts a new connection."""
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Stop the API with a signal. Return its exit status."""
        self.process.send_signal(number)
        return self.process.wait(15)


@contextmanager
def serving(environ: Mapping[str, str], checkout: Path = ROOT) -> Iterator[Service]:
    """Run ``python -m services.api`` of this project until the block ends, and yield it once it listens."""
    with tempfile.TemporaryDirectory() as folder:
        stderr = Path(folder) / "stderr"
        with stderr.open("wb") as log:
            process = start(["api"], environ, stderr=log.fileno(), checkout=checkout)
        service = Service(process, stderr)
        try:
            wait_for(lambda: process.poll() is not None or bool(service.events("listening")), 20)
            assert process.poll() is None, stderr.read_text()
            [listening] = service.events("listening")
            service.address, service.metrics_address = listening["address"], listening["metrics"]
            yield service
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def settings_for(reader_url: str, **more: str) -> dict[str, str]:
    """Return an environment for the API: this database, free ports, no tokens unless given."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("ORDERS_", "WEB_CONCURRENCY"))},
        "ORDERS_READER_URL": reader_url,
        "ORDERS_API_BIND": "127.0.0.1:0",
        "ORDERS_METRICS_BIND": "127.0.0.1:0",
        "PYTHONPATH": str(ROOT),
        **({} if "ORDERS_API_TOKENS" in more else {"ORDERS_API_AUTH": "off"}),
        **more,
    }


@contextmanager
def clients(api: Service, number: int, sent: bytes, *, answered: bool = False) -> Iterator[list[socket.socket]]:
    """Connect a number of clients and send the same bytes from each. Wait for the answers if ``answered``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2 * number:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(2 * number, hard), hard))
    with ExitStack() as stack:
        made = [stack.enter_context(socket.create_connection(("127.0.0.1", api.port))) for _ in range(number)]
        for client in made:
            with suppress(ConnectionError):
                client.sendall(sent)
        for client in made if answered else ():
            client.settimeout(20)
            answer = client.recv(1 << 20)
            assert answer.startswith(b"HTTP/1.1 200"), answer
        yield made
