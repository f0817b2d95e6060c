"""The topic is recreated, emptied, rewound, full of gaps or full of unusual records."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import psutil
import psycopg
import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic

from sandbox import Sandbox
from services.kafka import Cluster
from services.settings import KafkaSettings
from tests.support.accounting import (
    assert_all_accounted_for,
    next_offsets,
    stored_orders,
    stored_rejects,
    wait_until_handled,
)
from tests.support.consumer_process import Consuming, consuming, consuming_through_proxy
from tests.support.databases import Database
from tests.support.raw_produce import produce
from tests.support.sending import Sender, order, uids
from tests.support.waiting import wait_for


@pytest.fixture
def admin(sandbox: Sandbox) -> AdminClient:
    return AdminClient({"bootstrap.servers": sandbox.kafka.bootstrap_servers})


def delete_topic(admin: AdminClient, topic: str) -> None:
    admin.delete_topics([topic])[topic].result(30)


def make_topic_again(admin: AdminClient, topic: str) -> None:
    def is_made() -> bool:
        return admin.create_topics([NewTopic(topic, num_partitions=3)])[topic].exception(30) is None

    wait_for(is_made, 20)


def recreate_topic_behind(consumer: Consuming, sandbox: Sandbox, admin: AdminClient, topic: str) -> Sender:
    """Freeze the consumer, delete the topic and create it again. Return a sender to the new topic."""
    consumer.freeze()
    delete_topic(admin, topic)
    make_topic_again(admin, topic)
    return Sender(sandbox.kafka.bootstrap_servers, topic)


@pytest.mark.parametrize("new_records", [0, pytest.param(500, marks=pytest.mark.faults)])
def test_a_recreated_topic_stops_the_consumer_and_is_then_read_from_its_earliest_record(
    new_records: int, sandbox: Sandbox, environ: dict[str, str], database: Database, sender: Sender, admin: AdminClient
) -> None:
    """With more new records than the old topic had, a consumer could continue at its old offset and not notice."""
    sender.send_orders(uids("old", 50))
    with consuming(environ) as consumer:
        wait_until_handled(sender.manifest, database)
        heir = recreate_topic_behind(consumer, sandbox, admin, sender.topic)
        heir.send_orders(uids("new", new_records))
        consumer.thaw()
        heir.send_orders(uids("newer", 100))
        assert consumer.status(within_s=30) == 1
        assert consumer.events("stopped")
        assert stored_orders(database).keys() == set(uids("old", 50))
    with consuming(environ) as successor:
        wait_for(lambda: len(stored_orders(database)) == 150 + new_records, 20)
        with psycopg.connect(database.superuser_url) as connection:
            connection.execute("DELETE FROM orders WHERE order_uid LIKE 'old-%'")
        assert_all_accounted_for(heir.manifest, database, environ)
        assert successor.stop() == 0


def test_a_recreated_topic_with_the_same_log_end_stops_an_idle_consumer(
    sandbox: Sandbox, environ: dict[str, str], database: Database, sender: Sender, admin: AdminClient
) -> None:
    """There is nothing to fetch and no offset is out of range, although no record of the new topic was handled."""
    sender.send_orders(uids("order", 50))
    with consuming(environ) as consumer:
        wait_until_handled(sender.manifest, database)
        heir = recreate_topic_behind(consumer, sandbox, admin, sender.topic)
        heir.send_orders(uids("order", 50), version=2)
        consumer.thaw()
        assert consumer.status(within_s=30) == 1
        assert "recreated" in consumer.events("stopped")[0]["reason"]
    with consuming(environ) as successor:
        wait_for(lambda: {row["track_number"] for row in stored_orders(database).values()} == {"TRACK2"}, 20)
        assert_all_accounted_for(heir.manifest, database, environ)
        assert successor.stop() == 0


@pytest.mark.faults
def test_a_deleted_topic_stops_the_consumer(
    environ: dict[str, str], database: Database, sender: Sender, admin: AdminClient
) -> None:
    sender.send_orders(uids("order", 50))
    with consuming(environ) as consumer:
        wait_until_handled(sender.manifest, database)
        delete_topic(admin, sender.topic)
        assert consumer.status(within_s=30) == 1
        # The check of the topic or the next fetch finds it first.
        reason = consumer.events("stopped")[0]["reason"]
        assert f"Kafka has no topic {sender.topic!r}" in reason or "Unknown topic" in reason
    assert stored_orders(database).keys() == set(uids("order", 50))


@pytest.mark.faults
def test_a_partition_added_to_the_topic_is_read_from_its_beginning(
    sandbox: Sandbox, environ: dict[str, str], database: Database, sender: Sender, admin: AdminClient
) -> None:
    sender.send_orders(uids("order", 50))
    with consuming(environ) as consumer:
        wait_until_handled(sender.manifest, database)
        admin.create_partitions([NewPartitions(sender.topic, 4)])[sender.topic].result(30)
        late = Sender(sandbox.kafka.bootstrap_servers, sender.topic)
        late.send_good(order("late"), key=b"late", partition=3)
        wait_until_handled(late.manifest, database)
        assert_all_accounted_for([*sender.manifest, *late.manifest], database, environ)
        assert consumer.stop() == 0


@pytest.mark.parametrize(
    "while_running",
    [pytest.param(False, id="between-two-runs", marks=pytest.mark.faults), pytest.param(True, id="while-running")],
)
def test_the_consumer_follows_rewound_offsets_and_overwrites_nothing_newer(
    *, while_running: bool, member: dict[str, str], database: Database, sender: Sender
) -> None:
    def rewind() -> None:
        with psycopg.connect(database.superuser_url) as connection:
            connection.execute("UPDATE consumer_offsets SET next_offset = 0")
            connection.execute("DELETE FROM orders WHERE order_uid = 'order-1'")

    for version in (1, 2, 3):
        sender.send_orders(uids("order", 300), version)
    sender.send_bad(b"{")
    with consuming(member) as consumer:
        wait_until_handled(sender.manifest, database)
        if while_running:
            rewind()
            # The fence notices with the next record of each partition.
            sender.send_orders(uids("later", 30))
            wait_until_handled(sender.manifest, database)
            assert len(consumer.events("stored_offset_changed")) == 3
        assert consumer.stop() == 0
    if not while_running:
        rewind()
        with consuming(member) as successor:
            wait_until_handled(sender.manifest, database)
            assert successor.stop() == 0
    assert_all_accounted_for(sender.manifest, database, member)


@pytest.mark.faults
def test_the_consumer_follows_offsets_rewound_in_an_outage(
    environ: dict[str, str], database: Database, sender: Sender
) -> None:
    """Fetching is paused when the fence is lost. librdkafka must continue from the offset of the seek."""
    sender.send_orders(uids("order", 300))
    with consuming_through_proxy(environ, database) as (proxy, consumer):
        wait_until_handled(sender.manifest, database)
        proxy.freeze()
        sender.send_orders(uids("order", 100), version=2)
        wait_for(lambda: bool(consumer.events("retrying")), 10)
        with psycopg.connect(database.superuser_url) as connection:
            connection.execute("UPDATE consumer_offsets SET next_offset = 5")
            connection.execute("DELETE FROM orders WHERE source_offset >= 5")
        proxy.drop()
        wait_until_handled(sender.manifest, database)
        assert consumer.events("stored_offset_changed")
        assert_all_accounted_for(sender.manifest, database, environ)
        assert consumer.stop() == 0


def test_records_that_kafka_deleted_before_they_were_stored_stop_the_consumer(
    member: dict[str, str], database: Database, sender: Sender, admin: AdminClient
) -> None:
    sender.send_orders(uids("order", 50))
    with consuming(member) as consumer:
        wait_until_handled(sender.manifest, database)
        assert consumer.stop() == 0
    stood = next_offsets(database)
    sender.send_orders(uids("lost", 100))
    beyond = [TopicPartition(sender.topic, partition, offset + 10) for partition, offset in stood.items()]
    for dropped in admin.delete_records(beyond).values():
        dropped.result(30)
    with consuming(member) as successor:
        assert successor.status(within_s=20) == 1
        assert "no longer holds" in successor.events("stopped")[0]["reason"]
    assert next_offsets(database) == stood
    assert len(stored_orders(database)) == 50


@pytest.mark.faults
def test_a_group_without_offsets_begins_at_the_earliest_record(
    environ: dict[str, str], database: Database, sender: Sender, admin: AdminClient
) -> None:
    sender.send_orders(uids("gone", 90))
    ends: dict[int, int] = {}
    for record in sender.manifest:
        ends[record.partition] = max(ends.get(record.partition, 0), record.offset + 1)
    sender.manifest.clear()
    for dropped in admin.delete_records([TopicPartition(sender.topic, *end) for end in ends.items()]).values():
        dropped.result(30)
    sender.send_orders(uids("order", 30))
    with consuming(environ, "--exit-at-end") as consumer:
        assert consumer.status(within_s=20) == 0
    assert_all_accounted_for(sender.manifest, database, environ)


def test_gaps_left_by_transactions_are_passed_even_at_the_end(
    sandbox: Sandbox, environ: dict[str, str], database: Database, sender: Sender
) -> None:
    transactional = Sender(sandbox.kafka.bootstrap_servers, sender.topic, transactional_id=f"sender-{sender.topic}")
    transactional.producer.init_transactions(30)
    for version in (1, 2, 3):
        transactional.producer.begin_transaction()
        transactional.send_orders(uids("order", 60), version)
        transactional.producer.commit_transaction(30)
        kept = list(transactional.manifest)
        transactional.producer.begin_transaction()
        transactional.send_orders(uids("order", 60), version=9)
        transactional.producer.abort_transaction(30)
        transactional.manifest[:] = kept
    # Half of the six transactions were aborted, and each ends with a marker in each of three partitions. Kafka confirms
    # the end of a transaction before it has written the markers.
    end = 6 * 60 + 6 * 3
    cluster = Cluster(KafkaSettings.from_mapping(environ))
    wait_for(lambda: sum(cluster.ends(sender.topic, range(3)).values()) == end, 10)
    with consuming(environ, "--exit-at-end") as consumer:
        assert consumer.status(within_s=20) == 0
    assert_all_accounted_for(transactional.manifest, database, environ)
    assert sum(next_offsets(database).values()) == end


@pytest.mark.faults
def test_records_after_an_open_transaction_wait_for_its_end_and_are_stored(
    sandbox: Sandbox, environ: dict[str, str], database: Database, sender: Sender
) -> None:
    transactional = Sender(sandbox.kafka.bootstrap_servers, sender.topic, transactional_id=f"sender-{sender.topic}")
    transactional.producer.init_transactions(30)
    sender.send_orders(uids("before", 30))
    transactional.producer.begin_transaction()
    transactional.send_orders(uids("inside", 30))
    sender.send_orders(uids("behind", 30))
    with consuming(environ, "--exit-at-end") as consumer:
        assert consumer.status(within_s=20) == 0
    assert stored_orders(database).keys() == set(uids("before", 30))
    transactional.producer.commit_transaction(30)
    manifest = [*sender.manifest, *transactional.manifest]
    with consuming(environ):
        # Kafka confirms the commit before each partition has its end: --exit-at-end could see an earlier log end.
        wait_until_handled(manifest, database)
    assert_all_accounted_for(manifest, database, environ)


@pytest.mark.faults
def test_the_gaps_of_a_compacted_topic_are_passed(
    make_topic: Callable[..., str], sandbox: Sandbox, environ: dict[str, str], database: Database
) -> None:
    topic = make_topic(
        1,
        cleanup_policy="compact",
        segment_ms="100",
        min_cleanable_dirty_ratio="0.01",
        max_compaction_lag_ms="100",
        delete_retention_ms="0",
    )
    sender = Sender(sandbox.kafka.bootstrap_servers, topic)
    for version in (1, 2, 3):
        sender.send_orders(uids("order", 50), version)
        time.sleep(0.2)  # the next record opens a new segment, by the age of this one
    sender.send_orders(["last"])
    sent_bytes = sum(len(record.value or b"") for record in sender.manifest)

    def kept_bytes() -> int:
        logs = sandbox.kafka.folder.glob(f"data/{topic}-0/*.log")
        return sum(path.stat().st_size for path in logs)

    wait_for(lambda: kept_bytes() < 0.7 * sent_bytes, 60)
    with consuming({**environ, "ORDERS_TOPIC": topic}) as consumer:
        wait_until_handled(sender.manifest, database)
        assert consumer.metric("orders_batch_records_sum") < len(sender.manifest)
        assert consumer.stop() == 0
    assert_all_accounted_for(sender.manifest, database, {**environ, "ORDERS_TOPIC": topic})


def test_unkeyed_oversized_and_hostile_records_block_no_other_record(
    environ: dict[str, str], database: Database, sender: Sender
) -> None:
    sender.send_orders(uids("order", 20))
    sender.send_good(order("unkeyed"), key=None, partition=1)
    sender.send_bad(b"", key=None)
    sender.send_bad(None, key=b"")
    sender.send_bad(
        b"\xff\xfe", key=b"\x00\xff", headers=[("a", b"\xff"), ("b", None), ("a", b""), ("", b"x"), ("a", b"\xff")]
    )
    sender.send_bad(b"[" * 2000, headers=[("h" * 3000, b"v" * 100_000)] * 3)
    sender.send_bad(b'"' + b"x" * (8 * 1024 * 1024) + b'"')
    sender.send_bad(order("bad").replace(b'"locale"', b'"l"'))
    sender.send_orders(uids("order", 20), version=2)
    with consuming(environ, "--exit-at-end") as consumer:
        assert consumer.status(within_s=20) == 0
    assert_all_accounted_for(sender.manifest, database, environ)


def test_header_names_that_are_not_text_block_neither_a_valid_nor_an_invalid_record(
    sandbox: Sandbox, environ: dict[str, str], database: Database, sender: Sender
) -> None:
    sender.send_good(order("first"), key=None, partition=0)
    produce(sandbox.kafka.bootstrap_servers, sender.topic, 0, order("good"), [b"plain", b"\xff\xfe", b""])
    produce(sandbox.kafka.bootstrap_servers, sender.topic, 0, b"{", [b"plain", b"\xff\xfe"])
    produce(sandbox.kafka.bootstrap_servers, sender.topic, 0, b"{", [b"nul\0byte"])
    # Python calls a method in another way once it has called it often.
    many = uids("one-of-many", 100)
    for order_uid in many:
        produce(sandbox.kafka.bootstrap_servers, sender.topic, 0, order(order_uid), [b"\xff\xfe"])
    sender.send_orders(["behind"])
    with consuming(environ, "--exit-at-end") as consumer:
        assert consumer.status(within_s=20) == 0
    assert stored_orders(database).keys() == {"first", "good", "behind", *many}
    assert stored_rejects(database).keys() == {(0, 2), (0, 3)}
    assert stored_rejects(database)[0, 2] == (None, b"{", None)
    with psycopg.connect(database.superuser_url) as connection:
        [(faults,)] = connection.execute("SELECT faults FROM rejects WHERE record_offset = 2").fetchall()
    assert faults["total"] == 2
    assert faults["first"][1]["path"] == "headers"


@pytest.mark.parametrize(
    ("count", "headers"),
    [
        pytest.param(200, [("h", bytes(700 * 1024))], id="large headers"),
        pytest.param(30, [("h", b"v")] * 99_000, id="many headers", marks=pytest.mark.faults),
    ],
)
def test_rejects_with_large_headers_are_stored_completely_in_little_memory(
    count: int,
    headers: list[tuple[str, str | bytes | None]],
    sandbox: Sandbox,
    environ: dict[str, str],
    database: Database,
    topic: str,
) -> None:
    sender = Sender(sandbox.kafka.bootstrap_servers, topic, compression_type="gzip")
    for number in range(count):
        sender.send_bad(b"%d" % number, headers=headers)
    sender.send_orders(["behind"])
    peak_bytes = 0
    with consuming(environ, "--exit-at-end") as consumer:
        this = psutil.Process(consumer.process.pid)

        def has_ended() -> bool:
            nonlocal peak_bytes
            with suppress(psutil.Error):
                peak_bytes = max(peak_bytes, this.memory_info().rss)
            return consumer.process.poll() is not None

        wait_for(has_ended, 60)
        assert consumer.process.returncode == 0
    assert peak_bytes < 400 * 2**20
    assert stored_orders(database).keys() == {"behind"}
    with psycopg.connect(database.superuser_url) as connection:
        [(kept, least)] = connection.execute(
            "SELECT count(*), min(json_array_length(headers)) FROM rejects WHERE length(headers::text) > 900000"
        ).fetchall()
    assert (kept, least) == (count, len(headers))


def test_records_that_take_long_to_decode_delay_neither_health_nor_a_signal(
    sandbox: Sandbox, environ: dict[str, str], database: Database, topic: str
) -> None:
    sender = Sender(sandbox.kafka.bootstrap_servers, topic, compression_type="gzip", message_max_bytes=200_000_000)
    chains = b"[" + (b"[" * 97 + b"]" * 97 + b",") * 42_000 + rb'"\ud800"]'
    for number in range(3):
        value = order(f"slow-{number}").replace(b'"order_uid"', b'"later": ' + chains + b', "order_uid"', 1)
        assert len(value) < 8 * 2**20
        sender.send_good(value, key=b"slow", partition=0)
    with consuming(environ) as consumer:
        wait_for(lambda: bool(consumer.events("partitions_assigned")), 20)
        assert consumer.live
        began_s = time.monotonic()
        assert consumer.stop() == 0
        assert time.monotonic() - began_s < 10
    with consuming(environ, "--exit-at-end") as consumer:
        assert consumer.status(within_s=60) == 0
    assert stored_orders(database).keys() == set(uids("slow", 3))
