"""A database belongs to one consumer group, and PostgreSQL enforces it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

import orderlib
from orderlib import ConfigurationError, DatabaseUnavailable
from orderlib.ingestion.records import TopicPartition
from orderlib.postgres import migrate, queries
from orderlib.postgres.consumer_store import ConsumerStore
from orderlib.postgres.operations import set_consumer_group
from orderlib.postgres.schema import migrations
from tests.integration.test_migrations import connected
from tests.support.databases import Database, bootstrap

TOPIC_IDS = {"orders": "topic"}
PARTITIONS = [TopicPartition("orders", number) for number in range(3)]

#: How the release before begins partitions, without having claimed its group.
INSERT_OF_PREVIOUS_RELEASE = """
INSERT INTO consumer_offsets (consumer_group, topic_id, partition, topic, next_offset)
SELECT %(group)s, 'topic', n.partition, 'orders', n.next_offset
FROM unnest(%(partitions)s::int[], %(next_offsets)s::bigint[]) AS n (partition, next_offset)
ON CONFLICT DO NOTHING
"""


def store_of(database: Database, group: str) -> ConsumerStore:
    return ConsumerStore(database.writer_url, group, lambda: 0.0)


def test_one_of_the_groups_that_start_at_once_claims_the_database_and_the_others_fail_with_its_name(
    database: Database,
) -> None:
    groups = [f"group-{number}" for number in range(6)]
    barrier = threading.Barrier(len(groups))

    def start(group: str) -> str | None:
        barrier.wait()
        one = store_of(database, group)
        try:
            one.claim_database()
            one.start_partitions(TOPIC_IDS, {PARTITIONS[0]: 0})
        except ConfigurationError as refusal:
            return str(refusal)
        finally:
            one.close()
        return None

    with ThreadPoolExecutor(len(groups)) as threads:
        refusals = dict(zip(groups, threads.map(start, groups), strict=True))
    [accepted] = [group for group, refusal in refusals.items() if refusal is None]
    for refused in set(groups) - {accepted}:
        assert f"belongs to consumer group {accepted!r}, not {refused!r}" in str(refusals[refused])
    again = store_of(database, accepted)
    again.claim_database()
    again.close()


def test_postgresql_itself_refuses_a_second_group(database: Database) -> None:
    values = {"partitions": [0, 1], "next_offsets": [0, 0]}
    with connected(database.writer_url) as writer:
        writer.execute(INSERT_OF_PREVIOUS_RELEASE, {"group": "first", **values})
        writer.execute(INSERT_OF_PREVIOUS_RELEASE, {"group": "first", **values, "partitions": [2, 3]})
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            writer.execute(INSERT_OF_PREVIOUS_RELEASE, {"group": "second", **values})
        with pytest.raises(psycopg.errors.UniqueViolation):
            writer.execute("INSERT INTO consumer_groups (consumer_group) VALUES ('second')")
        with pytest.raises(psycopg.errors.CheckViolation):
            writer.execute("INSERT INTO consumer_groups VALUES (false, 'second')")
    second = store_of(database, "second")
    with pytest.raises(ConfigurationError, match=r"'first', not 'second'.*offsets set-group"):
        second.claim_database()
    second.close()


def test_a_database_with_offsets_of_two_groups_is_repaired_by_migrate(
    empty_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    bootstrap(empty_database)
    with monkeypatch.context() as previous_release:
        two = dict(list(migrations().items())[:2])
        previous_release.setattr(migrate, "migrations", lambda: two)
        orderlib.migrate(empty_database.migrator_url)
    with connected(empty_database.superuser_url) as superuser:
        superuser.execute(
            """
            INSERT INTO consumer_offsets (consumer_group, topic_id, partition, topic, next_offset, updated_at) VALUES
                ('older', 'topic', 0, 'orders', 90, '2026-01-01Z'), ('older', 'topic', 1, 'orders', 50, '2026-01-01Z'),
                ('third', 'topic', 1, 'orders', 40, '2026-01-01Z'), ('newer', 'topic', 0, 'orders', 70, '2026-01-02Z')
            """
        )
    messages: list[str] = []
    orderlib.migrate(empty_database.migrator_url, on_message=messages.append)
    [warning] = messages
    assert "kept 'newer', removed 'older', 'third'" in warning
    newer, older = store_of(empty_database, "newer"), store_of(empty_database, "older")
    newer.claim_database()
    # Its own offset where it has one; elsewhere the lowest of the others: no record is skipped.
    assert newer.next_offsets(TOPIC_IDS, PARTITIONS) == {PARTITIONS[0]: 70, PARTITIONS[1]: 40}
    with pytest.raises(ConfigurationError, match="'newer', not 'older'"):
        older.claim_database()
    newer.close()
    older.close()


def test_the_group_can_be_renamed_with_its_offsets(database: Database) -> None:
    first, second = store_of(database, "first"), store_of(database, "second")
    first.claim_database()
    first.start_partitions(TOPIC_IDS, {PARTITIONS[0]: 5, PARTITIONS[1]: 7})
    with connected(database.migrator_url) as migrator:
        set_consumer_group(migrator, "second")
    second.claim_database()
    assert second.next_offsets(TOPIC_IDS, PARTITIONS) == {PARTITIONS[0]: 5, PARTITIONS[1]: 7}
    with pytest.raises(ConfigurationError, match="'second', not 'first'"):
        first.claim_database()
    with pytest.raises(ConfigurationError, match="'second', not 'first'"):
        first.start_partitions(TOPIC_IDS, {PARTITIONS[2]: 0})
    first.close()
    second.close()


def test_a_group_can_claim_a_database_before_any_consumer_started(database: Database) -> None:
    with connected(database.migrator_url) as migrator:
        set_consumer_group(migrator, "group")
    one = store_of(database, "group")
    one.claim_database()
    one.close()


def test_a_frozen_rename_of_the_group_delays_new_partitions_no_longer_than_a_wait_for_a_lock(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "LIMIT_LOCK_WAIT", "SET LOCAL lock_timeout = '100ms'")
    one = store_of(database, "mine")
    one.claim_database()
    with psycopg.connect(database.superuser_url) as operator:
        assert operator.execute("SELECT FROM consumer_groups FOR UPDATE").rowcount == 1
        with pytest.raises(DatabaseUnavailable, match="55P03"):
            one.start_partitions(TOPIC_IDS, {PARTITIONS[0]: 0})
    assert one.start_partitions(TOPIC_IDS, {PARTITIONS[0]: 7}) == {PARTITIONS[0]: 7}
    one.close()
