"""Three brokers, each record acknowledged by two: one fails, all restart in turns, the quorum is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import pytest
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, PartitionMetadata

from sandbox import Sandbox, running_sandbox
from sandbox.kafka import KafkaServer
from services.kafka import SILENT
from tests.support.accounting import assert_all_accounted_for, wait_until_handled
from tests.support.consumer_process import consuming
from tests.support.databases import Database, make_database, set_up
from tests.support.programs import succeed
from tests.support.sending import Sender, repeating, uids
from tests.support.waiting import wait_for

pytestmark = pytest.mark.faults

PARTITIONS = 3
WITHIN_S = 120.0


@pytest.fixture(scope="module")
def three_brokers() -> Iterator[Sandbox]:
    with running_sandbox(brokers=3) as running:
        yield running


@pytest.fixture
def own_database(three_brokers: Sandbox) -> Database:
    database = make_database(three_brokers)
    set_up(database)
    return database


class Topic:
    """A topic on the three brokers, as they report it."""

    def __init__(self, sandbox: Sandbox, name: str) -> None:
        self.name = name
        self.brokers = {node.node_id: node for node in sandbox.brokers}
        self._admin = AdminClient({"bootstrap.servers": sandbox.kafka.bootstrap_servers}, logger=SILENT)

    def _partitions(self) -> Mapping[int, PartitionMetadata]:
        """Return what a broker knows of the partitions; nothing if none answers."""
        try:
            return self._admin.list_topics(self.name, timeout=5).topics[self.name].partitions
        except KafkaException:
            return {}

    def leader(self, partition: int) -> KafkaServer | None:
        found = self._partitions()
        return self.brokers.get(found[partition].leader) if found else None

    def is_in_sync(self) -> bool:
        found = self._partitions().values()
        return bool(found) and all(len(one.isrs) == len(self.brokers) and one.leader > 0 for one in found)


def kill_each_leader(topic: Topic) -> None:
    for partition in range(PARTITIONS):
        leader = topic.leader(partition)
        assert leader is not None
        leader.kill()
        wait_for(lambda: topic.leader(partition) not in {leader, None}, WITHIN_S)  # noqa: B023 - called at once
        leader.start()
        wait_for(topic.is_in_sync, WITHIN_S)


def restart_in_turns(topic: Topic) -> None:
    for broker in topic.brokers.values():
        broker.stop()
        broker.start()
        wait_for(topic.is_in_sync, WITHIN_S)


def lose_the_quorum(topic: Topic) -> None:
    """One broker alone elects no controller and acknowledges no record."""
    first, second, _ = topic.brokers.values()
    first.kill()
    second.kill()
    time.sleep(5)
    with ThreadPoolExecutor() as threads:
        # Each is ready only when both have started.
        list(threads.map(KafkaServer.start, (first, second)))
    wait_for(topic.is_in_sync, WITHIN_S)


def sending_meanwhile(sender: Sender) -> AbstractContextManager[None]:
    """Send orders and bad records until the end of the block. Then everything is acknowledged."""

    def send(count: int) -> None:
        sender.send_orders(uids("order", 50), 1 + count)
        sender.send_bad(b"{")

    return repeating(send, WITHIN_S)


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
@pytest.mark.parametrize("disturb", [kill_each_leader, restart_in_turns, lose_the_quorum])
def test_no_record_is_lost_or_stored_twice(
    disturb: Callable[[Topic], None],
    protocol: str,
    three_brokers: Sandbox,
    own_database: Database,
    environ: dict[str, str],
) -> None:
    name = f"orders-{disturb.__name__}-{protocol}"
    environ = {
        **environ,
        **own_database.environ(),
        "ORDERS_KAFKA_BOOTSTRAP_SERVERS": three_brokers.kafka.bootstrap_servers,
        "ORDERS_TOPIC": name,
        "ORDERS_CONSUMER_GROUP": name,
    }
    if protocol == "consumer":
        environ = {variable: value for variable, value in environ.items() if "SESSION_TIMEOUT" not in variable}
        environ = {variable: value for variable, value in environ.items() if "HEARTBEAT" not in variable}
        environ["ORDERS_KAFKA_GROUP_PROTOCOL"] = protocol
    assert f"{PARTITIONS} partitions" in succeed(f"admin topics --partitions {PARTITIONS}", environ)
    sender = Sender(three_brokers.kafka.bootstrap_servers, name)
    sender.flush_within_s = WITHIN_S
    with consuming(environ) as consumer, consuming(environ) as other:
        sender.send_orders(uids("order", 300))
        wait_until_handled(sender.manifest, own_database, WITHIN_S)
        with sending_meanwhile(sender):
            disturb(Topic(three_brokers, name))
        wait_until_handled(sender.manifest, own_database, WITHIN_S)
        wait_for(lambda: consumer.ready and other.ready, WITHIN_S)
        assert_all_accounted_for(sender.manifest, own_database, environ)
        assert consumer.stop() == 0
        assert other.stop() == 0


def test_a_lost_broker_delays_the_consumer_by_seconds_although_it_does_not_come_back(
    three_brokers: Sandbox, own_database: Database, environ: dict[str, str]
) -> None:
    """Also the broker that librdkafka asks for the topic id."""
    name = "orders-lost"
    environ = {
        **environ,
        **own_database.environ(),
        "ORDERS_KAFKA_BOOTSTRAP_SERVERS": three_brokers.kafka.bootstrap_servers,
        "ORDERS_TOPIC": name,
    }
    succeed(f"admin topics --partitions {PARTITIONS}", environ)
    sender = Sender(three_brokers.kafka.bootstrap_servers, name)
    sender.flush_within_s = WITHIN_S
    topic = Topic(three_brokers, name)
    with consuming(environ) as consumer:
        for broker in topic.brokers.values():
            sender.send_orders(uids("order", 50))
            wait_until_handled(sender.manifest, own_database, WITHIN_S)
            broker.kill()
            sender.send_orders(uids("order", 50), version=broker.node_id)
            wait_until_handled(sender.manifest, own_database, 20)
            broker.start()
            wait_for(topic.is_in_sync, WITHIN_S)
        assert consumer.stop() == 0
