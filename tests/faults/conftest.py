"""What the fault tests share: a consumer's environment, and a sender to the same topic."""

from __future__ import annotations

import secrets

import pytest

from sandbox import Sandbox
from tests.support.sending import Sender


@pytest.fixture
def environ(environ: dict[str, str]) -> dict[str, str]:
    """As for any test, with a group of its own, and a dead member noticed as soon as Kafka allows."""
    return {
        **environ,
        "ORDERS_CONSUMER_GROUP": f"consumers-{secrets.token_hex(6)}",
        "ORDERS_KAFKA_SESSION_TIMEOUT_MS": "6000",
        "ORDERS_KAFKA_HEARTBEAT_INTERVAL_MS": "500",
    }


@pytest.fixture
def member(environ: dict[str, str]) -> dict[str, str]:
    """For a consumer that its successor replaces in the group at once, however it ended."""
    return {**environ, "ORDERS_KAFKA_GROUP_INSTANCE_ID": "member"}


@pytest.fixture
def sender(sandbox: Sandbox, topic: str) -> Sender:
    """A sender to the test's topic."""
    return Sender(sandbox.kafka.bootstrap_servers, topic)
