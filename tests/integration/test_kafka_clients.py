"""A client of librdkafka that has forgotten every broker is replaced, because it would never find one again.

One answer of Kafka that names no broker may have this effect. The tests begin with clients that never knew a broker.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient

from orderlib import BrokerUnavailable
from orderlib.ingestion.records import Record, TopicPartition
from sandbox import Sandbox
from services import kafka
from services.consumer import kafka_consumer
from services.consumer.kafka_consumer import KafkaConsumer
from services.kafka import SILENT_LOGGER, Cluster
from services.settings import ConsumerSettings, KafkaSettings
from tests.support.sending import Sender, uids

NOWHERE: dict[str, Any] = {"bootstrap.servers": "127.0.0.1:1"}


def test_a_request_replaces_a_client_that_finds_no_broker_and_is_sent_again(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], topic: str
) -> None:
    monkeypatch.setattr(kafka, "_PERSISTS_S", 0.2)
    monkeypatch.setattr(kafka, "_NEW_CLIENT_S", 5.0)
    cluster = Cluster(KafkaSettings.from_mapping(environ))
    forgetful = cluster.admin = AdminClient(NOWHERE, logger=SILENT_LOGGER)
    began_s = time.monotonic()
    assert cluster.describe(topic).partitions == {0, 1, 2}
    assert cluster.admin is not forgetful
    assert time.monotonic() - began_s < kafka.REQUEST_TIMEOUT_S


def test_a_client_is_kept_while_no_broker_answers_a_new_one_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka, "_PERSISTS_S", 0.2)
    cluster = Cluster(KafkaSettings.from_mapping({"ORDERS_KAFKA_BOOTSTRAP_SERVERS": NOWHERE["bootstrap.servers"]}))
    kept = cluster.admin
    with pytest.raises(BrokerUnavailable):
        cluster.request_topic("orders", 3)()
    assert cluster.admin is kept


class Listener:
    """Starts every assigned partition at its beginning."""

    def __init__(self, client: KafkaConsumer) -> None:
        self._client = client
        self.revoked: list[set[TopicPartition]] = []

    def on_partitions_assigned(self, partitions: Iterable[TopicPartition]) -> None:
        self._client.assign(dict.fromkeys(partitions, 0))

    def on_partitions_revoked(self, partitions: Iterable[TopicPartition]) -> None:
        self.revoked.append(set(partitions))


def test_the_consumer_replaces_a_client_without_brokers_and_joins_again(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], topic: str, sandbox: Sandbox
) -> None:
    logged: list[str] = []
    monkeypatch.setattr(kafka_consumer, "event", lambda name, *_, **__: logged.append(name))
    monkeypatch.setattr(kafka_consumer, "_REPORT_MS", 500)
    Sender(sandbox.kafka.bootstrap_servers, topic).send_orders(uids("order", 20))
    client = KafkaConsumer(ConsumerSettings.from_mapping(environ))
    without_brokers = {name: value for name, value in client._properties.items() if name != "bootstrap.servers"}
    with monkeypatch.context() as context:
        context.setattr(client, "_properties", without_brokers)
        client._consumer = client._new_consumer()
    listener = Listener(client)
    client.join(listener)
    # As if the group had assigned it before.
    client._owned.add(TopicPartition(topic, 0))
    found: list[Record] = []
    deadline_s = time.monotonic() + 60
    while len(found) < 20:
        assert time.monotonic() < deadline_s
        found += (item for item in client.fetch({topic: "id"}, 100, 0.1) if isinstance(item, Record))
    assert listener.revoked == [{TopicPartition(topic, 0)}]
    assert logged == ["kafka_client_replaced"]
    assert client.close(10)
    # Leaving the group is an event of the present client.
    assert listener.revoked[1:] == [{TopicPartition(topic, number) for number in range(3)}]


def test_a_client_that_has_lost_every_connection_still_knows_its_brokers(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]
) -> None:
    monkeypatch.setattr(kafka_consumer, "_REPORT_MS", 100)
    client = KafkaConsumer(ConsumerSettings.from_mapping({**environ, "ORDERS_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"}))
    reports: list[str] = []
    on_statistics = client._on_statistics

    def count(report: str) -> None:
        reports.append(report)
        on_statistics(report)

    monkeypatch.setattr(client, "_on_statistics", count)
    client._consumer = kept = client._new_consumer()
    client.join(Listener(client))
    deadline_s = time.monotonic() + 30
    while len(reports) < 5:
        assert time.monotonic() < deadline_s
        client.fetch({}, 100, 0.1)
    assert client._consumer is kept
    assert client.close(10)
