"""Run the consumer as a process, and read its log, metrics and health."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs

from tests.support.api_process import get_page
from tests.support.databases import Database
from tests.support.fork_server import Process, start
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_for

#: A consumer must stop within this time.
STOPS_WITHIN_S = 10.0


@attrs.define
class Consuming:
    """A running ``services.consumer``."""

    process: Process
    stderr: Path

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return the log events so far, or those of one name."""
        # The last line may be half-written.
        lines = self.stderr.read_text().rpartition("\n")[0].splitlines()
        events = [json.loads(line) for line in lines if line.startswith("{")]
        return [event for event in events if name in (None, event["event"])]

    def get(self, path: str) -> tuple[int, str]:
        """Return status and body of a page of its health server."""
        return get_page(self.events("started")[0]["metrics"], path)

    @property
    def live(self) -> bool:
        return self.get("/livez")[0] == 200

    @property
    def ready(self) -> bool:
        return self.get("/readyz")[0] == 200

    def metric(self, sample: str) -> float:
        """Return the value of a sample of ``/metrics``, named as there with its labels; 0 if there is none."""
        found = re.search(rf"^{re.escape(sample)} (\S+)$", self.get("/metrics")[1], re.MULTILINE)
        return float(found[1]) if found else 0.0

    def freeze(self) -> None:
        """Suspend it with SIGSTOP, as an overloaded machine would."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        self.process.kill()
        self.process.wait()

    def status(self, within_s: float) -> int:
        """Wait until it ends by itself, and return its exit status."""
        return self.process.wait(within_s)

    def stop(self) -> int:
        """Send SIGTERM repeatedly, and return the exit status. Fail if it does not stop within ``STOPS_WITHIN_S``."""
        began_s = time.monotonic()
        while self.process.poll() is None and time.monotonic() - began_s < STOPS_WITHIN_S:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.5)
        assert self.process.poll() is not None, f"still running {STOPS_WITHIN_S:g} s after SIGTERM"
        return self.process.wait()


@contextmanager
def consuming(environ: Mapping[str, str], *arguments: str) -> Iterator[Consuming]:
    """Run ``python -m services.consumer`` until the block ends. Yield it once it has logged ``started``."""
    with tempfile.TemporaryDirectory() as folder:
        stderr = Path(folder) / "stderr"
        with stderr.open("wb") as log:
            process = start(["consumer", *arguments], environ, stderr=log.fileno())
        consumer = Consuming(process, stderr)
        try:
            wait_for(lambda: process.poll() is not None or bool(consumer.events("started")), 20)
            assert consumer.events("started"), stderr.read_text()
            yield consumer
        except BaseException:
            sys.stderr.write(stderr.read_text())
            raise
        finally:
            if process.poll() is None:
                consumer.kill()


@contextmanager
def consuming_through_proxy(environ: Mapping[str, str], database: Database) -> Iterator[tuple[TcpProxy, Consuming]]:
    """Run the consumer with a proxy between it and PostgreSQL. Yield both."""
    with (
        TcpProxy(database.writer_url) as proxy,
        consuming({**environ, "ORDERS_DATABASE_URL": proxy.url}) as consumer,
    ):
        yield proxy, consumer
