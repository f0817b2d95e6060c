"""PostgreSQL or Kafka is unavailable: at the start or under load. These tests have their own servers."""

from __future__ import annotations

import os
import secrets
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from sandbox import Sandbox
from sandbox.kafka import KafkaServer
from services.kafka import SILENT_LOGGER
from tests.support import ROOT
from tests.support.accounting import assert_all_accounted_for, wait_until_handled
from tests.support.consumer_process import consuming
from tests.support.databases import Database, make_database, set_up
from tests.support.sending import Sender, uids
from tests.support.waiting import wait_for

#: The age in seconds of the consumer's oldest open transaction.
OLDEST_TRANSACTION = """
SELECT coalesce(max(extract(epoch FROM clock_timestamp() - xact_start)), 0) FROM pg_stat_activity
WHERE application_name = 'orderlib-consumer' AND datname = current_database()
"""


@pytest.fixture
def database(own_sandbox: Sandbox) -> Database:
    """A migrated database. It ends with its server."""
    database = make_database(own_sandbox)
    set_up(database)
    return database


def make_topic(sandbox: Sandbox, partitions: int) -> str:
    name = f"orders-{secrets.token_hex(6)}"
    admin = AdminClient({"bootstrap.servers": sandbox.kafka.bootstrap_servers}, logger=SILENT_LOGGER)
    admin.create_topics([NewTopic(name, num_partitions=partitions)])[name].result(30)
    return name


@pytest.fixture
def topic(own_sandbox: Sandbox) -> str:
    return make_topic(own_sandbox, partitions=3)


@pytest.fixture
def sender(own_sandbox: Sandbox, topic: str) -> Sender:
    return Sender(own_sandbox.kafka.bootstrap_servers, topic)


@pytest.fixture
def environ(own_sandbox: Sandbox, database: Database, topic: str) -> dict[str, str]:
    return {
        **database.environ(),
        "ORDERS_KAFKA_BOOTSTRAP_SERVERS": own_sandbox.kafka.bootstrap_servers,
        "ORDERS_TOPIC": topic,
        "ORDERS_CONSUMER_GROUP": topic,
        "ORDERS_METRICS_BIND": "127.0.0.1:0",
        "PYTHONPATH": str(ROOT),
    }


def test_a_crash_of_postgresql_under_load_is_an_outage(
    own_sandbox: Sandbox, environ: dict[str, str], database: Database, sender: Sender
) -> None:
    with consuming(environ) as consumer:
        sender.send_orders(uids("order", 500))
        for version in (2, 3):
            sender.send_orders(uids("order", 1500), version)
            own_sandbox.postgres.stop("immediate")
            sender.send_orders(uids("order", 500), version)
            sender.send_bad(b"{")
            wait_for(lambda: not consumer.ready, 10)
            assert consumer.live
            own_sandbox.postgres.start()
        wait_until_handled(sender.manifest, database)
        assert_all_accounted_for(sender.manifest, database, environ)
        wait_for(lambda: consumer.ready, 20)
        assert consumer.stop() == 0


@pytest.mark.faults
def test_a_crash_of_kafka_under_load_is_an_outage(
    own_sandbox: Sandbox, environ: dict[str, str], database: Database, sender: Sender
) -> None:
    with consuming(environ) as consumer:
        sender.send_orders(uids("order", 3000))
        own_sandbox.kafka.kill()
        wait_for(lambda: not consumer.ready, 10)
        assert consumer.live
        own_sandbox.kafka.start()
        sender.send_orders(uids("order", 500), version=2)
        sender.send_bad(b"{")
        wait_until_handled(sender.manifest, database)
        assert_all_accounted_for(sender.manifest, database, environ)
        assert consumer.stop() == 0


@contextmanager
def frozen(server: KafkaServer) -> Iterator[None]:
    """Freeze the process of the server. Its connections stay open."""
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


def test_a_frozen_kafka_keeps_no_transaction_open(
    own_sandbox: Sandbox, environ: dict[str, str], database: Database, sender: Sender
) -> None:
    """More records than one batch are fetched before the freeze, so a transaction waits for Kafka."""
    sender.send_orders(uids("order", 8000))
    longest_s = 0.0
    with consuming(environ) as consumer, psycopg.connect(database.superuser_url, autocommit=True) as observer:

        def count(query: str) -> float:
            row = observer.execute(query).fetchone()
            assert row is not None
            return float(row[0])

        def has_retried() -> bool:
            nonlocal longest_s
            longest_s = max(longest_s, count(OLDEST_TRANSACTION))
            return consumer.metric('orders_retries_total{cause="BrokerUnavailable"}') >= 2

        wait_for(lambda: count("SELECT count(*) FROM orders") > 0, 20)
        with frozen(own_sandbox.kafka):
            wait_for(has_retried, 40)
            assert consumer.live
            assert "Kafka" in consumer.get("/readyz")[1]
        assert 1 < longest_s < 3
        wait_until_handled(sender.manifest, database)
        assert_all_accounted_for(sender.manifest, database, environ)
        wait_for(lambda: consumer.ready, 10)
        assert consumer.stop() == 0


@pytest.mark.faults
def test_idle_consumers_are_ready_again_after_a_crash_of_kafka(own_sandbox: Sandbox, environ: dict[str, str]) -> None:
    """One has read everything, the other has no partition: neither gets a record that shows that Kafka is back."""
    environ = {**environ, "ORDERS_TOPIC": make_topic(own_sandbox, partitions=1)}
    with consuming(environ) as owner, consuming(environ) as spare:
        wait_for(lambda: owner.ready and spare.ready, 10)
        own_sandbox.kafka.kill()
        wait_for(lambda: not owner.ready and not spare.ready, 10)
        own_sandbox.kafka.start()
        wait_for(lambda: owner.ready and spare.ready, 30)
        assert owner.stop() == 0
        assert spare.stop() == 0


@pytest.mark.parametrize("server", ["PostgreSQL", pytest.param("Kafka", marks=pytest.mark.faults)])
def test_a_server_that_is_unavailable_at_the_start_is_named_once_and_waited_for(
    server: str, own_sandbox: Sandbox, environ: dict[str, str], database: Database, sender: Sender
) -> None:
    sender.send_orders(uids("order", 50))
    away = own_sandbox.postgres if server == "PostgreSQL" else own_sandbox.kafka
    away.stop()
    try:
        with consuming(environ) as consumer:
            wait_for(lambda: bool(consumer.events("waiting_for_server")), 15)
            assert consumer.live
            assert not consumer.ready
            away.start()
            wait_until_handled(sender.manifest, database)
            assert [event["server"] for event in consumer.events("waiting_for_server")] == [server]
            assert_all_accounted_for(sender.manifest, database, environ)
            wait_for(lambda: consumer.ready, 20)
            assert consumer.stop() == 0
    finally:
        if not is_listening(own_sandbox, server):
            away.start()


def is_listening(sandbox: Sandbox, server: str) -> bool:
    with socket.socket() as probe:
        return (
            probe.connect_ex(("127.0.0.1", sandbox.postgres.port if server == "PostgreSQL" else sandbox.kafka.port))
            == 0
        )


@pytest.mark.faults
@pytest.mark.parametrize("server", ["PostgreSQL", "Kafka"])
@pytest.mark.parametrize("when", ["at-the-start", "later"])
def test_a_consumer_that_waits_for_a_server_can_be_stopped(
    server: str, when: str, own_sandbox: Sandbox, environ: dict[str, str], database: Database, sender: Sender
) -> None:
    away = own_sandbox.postgres if server == "PostgreSQL" else own_sandbox.kafka
    sender.send_orders(uids("order", 300))
    try:
        if when == "at-the-start":
            away.stop()
            with consuming(environ) as consumer:
                assert consumer.stop() == 0
        else:
            with consuming(environ) as consumer:
                wait_until_handled(sender.manifest, database)
                if server == "PostgreSQL":
                    sender.send_orders(uids("order", 300), version=2)
                away.stop()
                wait_for(lambda: not consumer.ready, 10)
                assert consumer.stop() == 0
    finally:
        away.start()
