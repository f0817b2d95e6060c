"""What the consumer's health server answers, by a clock that the test turns."""

from __future__ import annotations

import http.client
from collections.abc import Iterator

import attrs
import pytest

from orderlib.config import Address
from services.consumer.health import LOOP_S, Health, HealthServer, Metrics


@attrs.define
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


@attrs.define
class Probe:
    """A server with its health, and whoever asks it."""

    health: Health
    clock: Clock
    address: Address

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(str(self.address), timeout=5)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()


@pytest.fixture
def probe() -> Iterator[Probe]:
    clock = Clock()
    health = Health(clock)
    with HealthServer(Address(host="127.0.0.1", port=0), health, Metrics()) as server:
        yield Probe(health, clock, server.address)


def test_a_consumer_that_starts_is_live_and_not_ready(probe: Probe) -> None:
    assert probe.get("/livez") == (200, "ok\n")
    assert probe.get("/readyz") == (503, "starting\n")


def test_a_consumer_in_an_outage_is_live_and_tells_why_it_is_not_ready(probe: Probe) -> None:
    probe.health.not_ready = "PostgreSQL: gone"
    assert probe.get("/livez")[0] == 200
    assert probe.get("/readyz") == (503, "PostgreSQL: gone\n")


def test_a_loop_that_does_not_turn_for_thirty_seconds_is_neither_live_nor_ready(probe: Probe) -> None:
    probe.health.not_ready = None
    probe.clock.now_s = LOOP_S - 0.1
    assert probe.get("/livez")[0] == probe.get("/readyz")[0] == 200
    probe.clock.now_s = LOOP_S
    assert probe.get("/livez") == probe.get("/readyz") == (503, "the loop has not turned for 30 s\n")
    probe.health.turn()
    assert probe.get("/livez")[0] == probe.get("/readyz")[0] == 200
