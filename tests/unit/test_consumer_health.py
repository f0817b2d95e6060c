"""The responses of the consumer's health server, with a clock that the test sets."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import attrs
import psutil
import pytest
from prometheus_client import generate_latest
from structlog.testing import capture_logs

from orderlib.errors import ConfigurationError
from services.consumer import health
from services.consumer.health import LIVE_WITHIN_S, Health, HealthServer, never_fatal
from services.consumer.metrics import ConsumerMetrics
from services.settings import Address
from tests.support.api_process import get_page
from tests.support.waiting import wait_for


@attrs.define
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@attrs.define
class Probe:
    """A health server, its health, and a client."""

    health: Health
    clock: Clock
    address: Address

    def get(self, path: str) -> tuple[int, str]:
        return get_page(str(self.address), path)


@pytest.fixture
def probe() -> Iterator[Probe]:
    clock = Clock()
    health = Health(clock)
    with HealthServer(Address(host="127.0.0.1", port=0), health, ConsumerMetrics()) as server:
        yield Probe(health, clock, server.address)


def test_metrics_export_no_time_of_their_creation(probe: Probe) -> None:
    status, text = probe.get("/metrics")
    assert status == 200
    assert "orders_records_total" in text
    assert "_created" not in text


def test_a_consumer_that_starts_is_live_and_not_ready(probe: Probe) -> None:
    assert probe.get("/livez") == (200, "ok\n")
    assert probe.get("/readyz") == (503, "starting\n")


def test_a_consumer_in_an_outage_is_live_and_not_ready_with_a_reason(probe: Probe) -> None:
    probe.health.not_ready_reason = "PostgreSQL: gone"
    assert probe.get("/livez")[0] == 200
    assert probe.get("/readyz") == (503, "PostgreSQL: gone\n")


def test_a_loop_that_does_not_turn_for_thirty_seconds_is_neither_live_nor_ready(probe: Probe) -> None:
    probe.health.not_ready_reason = None
    probe.clock.now_s = LIVE_WITHIN_S - 0.1
    assert probe.get("/livez")[0] == probe.get("/readyz")[0] == 200
    probe.clock.now_s = LIVE_WITHIN_S
    assert probe.get("/livez") == probe.get("/readyz") == (503, "the main loop has not run for 30 s\n")
    probe.health.heartbeat()
    assert probe.get("/livez")[0] == probe.get("/readyz")[0] == 200


def test_a_flood_of_slow_connections_takes_few_file_descriptors_and_delays_no_probe(
    probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that only newer connections close the older ones.
    monkeypatch.setattr(health, "CONNECTION_S", 600.0)
    this_process = psutil.Process()
    before = this_process.num_fds()
    host, port = probe.address.host, probe.address.port
    with ExitStack() as stack:
        flood = [stack.enter_context(socket.create_connection((host, port))) for _ in range(300)]
        for client in flood:
            with suppress(OSError):
                client.sendall(b"GET /livez HTTP/1.1\r\nX-Slow: ")
        assert probe.get("/livez") == (200, "ok\n")
        # The client's end of each connection is in this process, too.
        wait_for(lambda: this_process.num_fds() - before - len(flood) < 50, 20)
        began_s = this_process.cpu_times().user
        assert probe.get("/metrics")[0] == 200
        assert this_process.cpu_times().user - began_s < 1


def test_a_connection_is_closed_after_a_few_seconds_even_if_its_client_is_sending(probe: Probe) -> None:
    with socket.create_connection((probe.address.host, probe.address.port), timeout=15) as slow:
        # One header that never ends: too many of them would close the connection, too.
        slow.sendall(b"GET /livez HTTP/1.1\r\nX: ")

        def is_closed() -> bool:
            try:
                slow.sendall(b"y")
            except OSError:
                return True
            return False

        wait_for(is_closed, 10)


def test_it_listens_on_an_ipv6_address() -> None:
    health = Health(Clock())
    with HealthServer(Address(host="[::1]", port=0), health, ConsumerMetrics()) as server:
        assert str(server.address).startswith("[::1]:")
        assert Probe(health, Clock(), server.address).get("/livez")[0] == 200


def test_it_does_not_look_up_its_own_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object) -> str:
        raise AssertionError("looked up a name")

    monkeypatch.setattr(socket, "getfqdn", slow)
    with HealthServer(Address(host="0.0.0.0", port=0), Health(Clock()), ConsumerMetrics()):  # noqa: S104 - only there its name was looked up
        pass


def test_a_record_from_the_future_counts_as_0_seconds_and_the_sum_never_decreases() -> None:
    metrics = ConsumerMetrics()
    metrics.end_to_end.observe([-3e9, 2.0, -1.0])
    text = generate_latest(metrics.registry).decode()
    assert "orders_end_to_end_seconds_sum 2.0" in text
    assert "orders_end_to_end_seconds_count 3.0" in text
    assert 'orders_end_to_end_seconds_bucket{le="0.01"} 2.0' in text


def test_a_failure_of_monitoring_stops_nothing_and_is_logged_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(health, "_failure_logged_s", {})
    monkeypatch.setattr(time, "monotonic", clock)
    with capture_logs() as logged:
        for clock.now_s in (1.0, 1.1, 60.9, 61.0):
            for what in ("metrics", "lag"):
                with never_fatal(what):
                    int("a secret")
    assert [line["event"] for line in logged] == ["monitoring_failed"] * 4
    assert [line["what"] for line in logged] == ["metrics", "lag"] * 2
    assert "a secret" not in str(logged)


@pytest.mark.parametrize("host", ["a..b", "a" * 70, "no-such-host.invalid"])
def test_an_address_that_cannot_be_listened_on_is_named(host: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^ORDERS_METRICS_BIND: cannot listen on {host}:0: ."):
        HealthServer(Address(host=host, port=0), Health(Clock()), ConsumerMetrics())
