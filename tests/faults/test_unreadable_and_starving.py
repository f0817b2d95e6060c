"""A partition without progress is always reported: an unreadable record, a foreign member, a replaced member."""

from __future__ import annotations

from confluent_kafka import Consumer, Producer

from sandbox import Sandbox
from tests.support.accounting import stored_orders, wait_until_handled
from tests.support.consumer_process import Consuming, consuming
from tests.support.databases import Database
from tests.support.programs import run, succeed
from tests.support.sending import Sender, uids
from tests.support.waiting import wait_for


def send_inflating(sandbox: Sandbox, topic: str) -> None:
    """Send a record of 3 KB that inflates beyond what librdkafka takes."""
    producer = Producer(
        {
            "bootstrap.servers": sandbox.kafka.bootstrap_servers,
            "compression.type": "zstd",
            "message.max.bytes": 200 * 2**20,
        }
    )
    producer.produce(topic, b"\0" * 90 * 2**20, partition=1)
    assert producer.flush(30) == 0


def reason_not_ready(consumer: Consuming) -> str:
    """Return the body of /readyz, or an empty text if the consumer is ready."""
    status, body = consumer.get("/readyz")
    return "" if status == 200 else body


def test_an_unreadable_record_is_named_and_an_operator_can_skip_it_or_raise_the_limit(
    sandbox: Sandbox, environ: dict[str, str], database: Database, sender: Sender
) -> None:
    sender.send_orders(uids("before", 30))
    send_inflating(sandbox, sender.topic)
    sender.send_orders(uids("behind", 30))
    offset = sum(record.partition == 1 for record in sender.manifest[:30])
    named = f"{sender.topic}[1] at offset {offset}"
    with consuming(environ) as consumer:
        wait_for(lambda: named in reason_not_ready(consumer), 20)
        assert consumer.metric('orders_retries_total{cause="UnreadableRecord"}') > 0
        assert consumer.events("kafka_error")
        others = {(r.key or b"").decode() for r in sender.manifest if r.partition != 1}
        wait_for(lambda: others <= stored_orders(database).keys(), 10)
        assert consumer.stop() == 0
    with consuming(environ, "--exit-at-end") as consumer:
        assert consumer.status(within_s=20) == 1
        assert named in consumer.events("stopped")[0]["reason"]
    raised = {**environ, "ORDERS_KAFKA_RECEIVE_MESSAGE_MAX_BYTES": "1000000000"}
    with consuming(raised, "--exit-at-end") as consumer:
        assert consumer.status(within_s=40) == 0
        assert consumer.events("rejected")[0]["code"] == "too_large"
    assert stored_orders(database).keys() == {*uids("before", 30), *uids("behind", 30)}


def test_an_unreadable_record_can_be_skipped_by_one_command(
    sandbox: Sandbox, environ: dict[str, str], database: Database, sender: Sender
) -> None:
    send_inflating(sandbox, sender.topic)
    sender.send_orders(uids("behind", 30))
    with consuming(environ, "--exit-at-end") as consumer:
        assert consumer.status(within_s=20) == 1
    succeed("admin offsets reset --to-offset 1 --partition 1 --execute --yes", environ)
    with consuming(environ, "--exit-at-end") as consumer:
        assert consumer.status(within_s=20) == 0
    assert stored_orders(database).keys() == set(uids("behind", 30))
    unread = run("admin reconcile", environ)
    assert unread.returncode == 1
    [line] = unread.stderr.splitlines()
    assert f"{sender.topic}[1] at offset 0" in line
    raised = {**environ, "ORDERS_KAFKA_RECEIVE_MESSAGE_MAX_BYTES": "1000000000"}
    assert "invalid (too_large), but not stored as a reject" in run("admin reconcile", raised).stdout


def test_partitions_that_a_foreign_member_holds_are_named_with_their_lag(
    sandbox: Sandbox, environ: dict[str, str], sender: Sender
) -> None:
    foreign = Consumer(
        {
            "bootstrap.servers": sandbox.kafka.bootstrap_servers,
            "group.id": environ["ORDERS_CONSUMER_GROUP"],
            "partition.assignment.strategy": "range",
            "auto.offset.reset": "earliest",
        }
    )
    foreign.subscribe([sender.topic])
    try:
        wait_for(lambda: foreign.poll(0.1) is not None or len(foreign.assignment()) == 3, 20)
        sender.send_orders(uids("order", 30))
        with consuming(environ) as consumer:

            def starving() -> bool:
                foreign.poll(0.1)
                return consumer.metric('orders_lag_records{partition="0"}') > 0

            wait_for(starving, 40)
            assert "INCONSISTENT_GROUP_PROTOCOL" in reason_not_ready(consumer)
            assert consumer.stop() == 0
    finally:
        foreign.close()


def test_a_static_member_that_was_replaced_stops_with_the_reason(
    member: dict[str, str], database: Database, sender: Sender
) -> None:
    sender.send_orders(uids("order", 30))
    with consuming(member) as replaced:
        wait_until_handled(sender.manifest, database)
        with consuming(member) as heir:
            assert replaced.status(within_s=20) == 1
            assert "group.instance.id" in replaced.events("stopped")[0]["reason"]
            sender.send_orders(uids("order", 30), version=2)
            wait_until_handled(sender.manifest, database)
            assert heir.stop() == 0
