"""Three brokers, each record acknowledged by two: one fails, all restart in turns, the quorum is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress

import attrs
import psycopg
import pytest
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, NewTopic, PartitionMetadata

from sandbox import Sandbox, running_sandbox
from sandbox.kafka import KafkaServer
from sandbox.server import SandboxError
from services.kafka import SILENT_LOGGER, Cluster
from services.settings import KafkaSettings
from tests.support.accounting import assert_all_accounted_for, wait_until_handled
from tests.support.consumer_process import consuming
from tests.support.databases import Database, make_database, set_up
from tests.support.programs import succeed
from tests.support.sending import Sender, repeating, uids
from tests.support.waiting import wait_for

pytestmark = pytest.mark.faults

PARTITIONS = 3
WITHIN_S = 120.0
#: Kafka needs up to 9 s to replace a lost broker as leader and controller.
LOST_BROKER_S = 30.0


@pytest.fixture(scope="module")
def three_brokers() -> Iterator[Sandbox]:
    with running_sandbox(brokers=3) as running:
        yield running


@attrs.frozen
class Group:
    """Two consumers with a database."""

    database: Database
    environ: dict[str, str]


@pytest.fixture
def make_group(three_brokers: Sandbox, environ: dict[str, str]) -> Callable[..., Group]:
    def make(topic: str, protocol: str = "classic") -> Group:
        database = make_database(three_brokers)
        set_up(database)
        return Group(
            database,
            {
                **_for_protocol(protocol, environ),
                **database.environ(),
                "ORDERS_KAFKA_BOOTSTRAP_SERVERS": three_brokers.kafka.bootstrap_servers,
                "ORDERS_TOPIC": topic,
                "ORDERS_CONSUMER_GROUP": f"{topic}-{protocol}",
            },
        )

    return make


def _for_protocol(protocol: str, environ: dict[str, str]) -> dict[str, str]:
    if protocol == "classic":
        return environ
    # In the new protocol, the brokers set these times.
    of_classic = ("SESSION_TIMEOUT", "HEARTBEAT")
    others = {name: value for name, value in environ.items() if not any(part in name for part in of_classic)}
    return {**others, "ORDERS_KAFKA_GROUP_PROTOCOL": protocol}


class Topic:
    """A topic on the three brokers, as they report it."""

    def __init__(self, sandbox: Sandbox, name: str) -> None:
        self.name = name
        self.brokers = {node.node_id: node for node in sandbox.brokers}
        self._admin = AdminClient({"bootstrap.servers": sandbox.kafka.bootstrap_servers}, logger=SILENT_LOGGER)

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


@pytest.mark.parametrize("disturb", [kill_each_leader, restart_in_turns, lose_the_quorum])
def test_no_record_is_lost_or_stored_twice(
    disturb: Callable[[Topic], None], three_brokers: Sandbox, make_group: Callable[..., Group]
) -> None:
    """Neither by a group of the classic protocol nor by one of the new protocol (KIP-848)."""
    name = f"orders-{disturb.__name__}"
    groups = [make_group(name, protocol) for protocol in ("classic", "consumer")]
    assert f"{PARTITIONS} partitions" in succeed(f"admin topics --partitions {PARTITIONS}", groups[0].environ)
    sender = Sender(three_brokers.kafka.bootstrap_servers, name)
    sender.flush_within_s = WITHIN_S

    def wait_for_groups() -> None:
        for group in groups:
            wait_until_handled(sender.manifest, group.database, WITHIN_S)

    with ExitStack() as stack:
        consumers = [stack.enter_context(consuming(group.environ)) for group in groups for _ in range(2)]
        sender.send_orders(uids("order", 300))
        wait_for_groups()
        with sending_meanwhile(sender):
            disturb(Topic(three_brokers, name))
        wait_for_groups()
        wait_for(lambda: all(consumer.ready for consumer in consumers), WITHIN_S)
        for group in groups:
            assert_all_accounted_for(sender.manifest, group.database, group.environ)
        for consumer in consumers:
            assert consumer.stop() == 0


def test_a_lost_broker_delays_the_consumer_by_seconds_although_it_does_not_come_back(
    three_brokers: Sandbox, make_group: Callable[..., Group]
) -> None:
    """Also the broker that librdkafka asks for the topic id. Requests that wait for it take little CPU time."""
    name = "orders-lost"
    group = make_group(name)
    succeed(f"admin topics --partitions {PARTITIONS}", group.environ)
    sender = Sender(three_brokers.kafka.bootstrap_servers, name)
    sender.flush_within_s = WITHIN_S
    topic = Topic(three_brokers, name)
    cluster = Cluster(KafkaSettings.from_mapping(group.environ))
    cpu_s = []
    with consuming(group.environ) as consumer:
        for broker in topic.brokers.values():
            sender.send_orders(uids("order", 50))
            wait_until_handled(sender.manifest, group.database, WITHIN_S)
            cluster.describe(name)
            broker.kill()
            began_s = time.process_time()
            cluster.describe(name)
            cpu_s.append(time.process_time() - began_s)
            sender.send_orders(uids("order", 50), version=broker.node_id)
            wait_until_handled(sender.manifest, group.database, LOST_BROKER_S)
            broker.start()
            wait_for(topic.is_in_sync, WITHIN_S)
        assert consumer.stop() == 0
    assert max(cpu_s) < 0.3


def test_a_partition_without_a_leader_stops_no_other_partition(
    three_brokers: Sandbox, make_group: Callable[..., Group]
) -> None:
    """Also not a consumer that starts meanwhile. One that stops at the end waits for that partition."""
    name = "orders-one-replica"
    group = make_group(name)
    admin = AdminClient({"bootstrap.servers": three_brokers.kafka.bootstrap_servers}, logger=SILENT_LOGGER)
    new = NewTopic(name, PARTITIONS, 1, config={"min.insync.replicas": "1"})
    admin.create_topics([new])[name].result(WITHIN_S)
    sender = Sender(three_brokers.kafka.bootstrap_servers, name)
    sender.flush_within_s = WITHIN_S
    sender.send_orders(uids("order", 60))
    with consuming(group.environ) as consumer:
        wait_until_handled(sender.manifest, group.database, WITHIN_S)
        assert consumer.stop() == 0
    sender.send_orders(uids("order", 60), version=2)
    ends = Cluster(KafkaSettings.from_mapping(group.environ)).ends(name, range(PARTITIONS))
    lost = Topic(three_brokers, name).leader(0)
    assert lost is not None
    lost.kill()
    try:
        with consuming(group.environ) as consumer:
            wait_for(lambda: stored_offsets(group.database).items() >= {1: ends[1], 2: ends[2]}.items(), LOST_BROKER_S)
            wait_for(lambda: f"the lag is unknown: {name}[0]" in consumer.get("/readyz")[1], WITHIN_S)
            assert consumer.stop() == 0
        assert stored_offsets(group.database)[0] < ends[0]
        with consuming(group.environ, "--exit-at-end") as consumer:
            wait_for(lambda: bool(consumer.events("waiting_for_server")), WITHIN_S)
            lost.start()
            assert consumer.status(WITHIN_S) == 0
    finally:
        with suppress(SandboxError):  # it runs already
            lost.start()
    assert stored_offsets(group.database) == ends
    assert_all_accounted_for(sender.manifest, group.database, group.environ)


def stored_offsets(database: Database) -> dict[int, int]:
    with psycopg.connect(database.superuser_url) as connection:
        return dict(connection.execute("SELECT partition, next_offset FROM consumer_offsets").fetchall())
