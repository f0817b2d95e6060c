"""Fixtures of the fault tests: the environment of a consumer, and a sender to its topic."""

from __future__ import annotations

import secrets

import pytest

from sandbox import Sandbox
from tests.support.sending import Sender


@pytest.fixture
def environ(environ: dict[str, str]) -> dict[str, str]:
    """Like everywhere, with another group, and with the shortest session timeout that Kafka allows."""
    return {
        **environ,
        "ORDERS_CONSUMER_GROUP": f"consumers-{secrets.token_hex(6)}",
        "ORDERS_KAFKA_SESSION_TIMEOUT_MS": "6000",
        "ORDERS_KAFKA_HEARTBEAT_INTERVAL_MS": "500",
    }


@pytest.fixture
def member(environ: dict[str, str]) -> dict[str, str]:
    """Return the environment of a static member: the next one replaces it at once, even if it was killed."""
    return {**environ, "ORDERS_KAFKA_GROUP_INSTANCE_ID": "member"}


@pytest.fixture
def sender(sandbox: Sandbox, topic: str) -> Sender:
    """Return a sender to the topic of the test."""
    return Sender(sandbox.kafka.bootstrap_servers, topic)
