"""The connection to PostgreSQL is lost, stalls or is half open: the consumer recovers and duplicates nothing."""

from __future__ import annotations

import threading

import psycopg
import pytest

from tests.support.accounting import assert_all_accounted_for, next_offsets, stored_orders, wait_until_handled
from tests.support.consumer_process import consuming, consuming_through_proxy
from tests.support.databases import Database
from tests.support.locking import FENCE, TABLE, locked
from tests.support.sending import Sender, uids
from tests.support.tcp_proxy import Moment
from tests.support.waiting import wait_for


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(Moment.BEGIN, id="at-its-begin", marks=pytest.mark.faults),
        pytest.param(Moment.COPY, id="in-a-copy", marks=pytest.mark.faults),
        pytest.param(Moment.COMMIT, id="before-commit", marks=pytest.mark.faults),
        pytest.param(Moment.COMMITTED, id="between-commit-and-its-answer"),
    ],
)
def test_a_connection_lost_in_a_batch_neither_loses_nor_duplicates_a_record(
    moment: Moment, environ: dict[str, str], database: Database, sender: Sender
) -> None:
    sender.send_orders(uids("order", 300))
    with consuming_through_proxy(environ, database) as (proxy, consumer):
        wait_until_handled(sender.manifest, database)
        proxy.set_trap(moment)
        sender.send_orders(uids("order", 500), version=2)
        sender.send_bad(b"{")
        assert proxy.trapped.wait(30)
        proxy.drop()
        sender.send_orders(uids("order", 100), version=3)
        wait_until_handled(sender.manifest, database)
        assert_all_accounted_for(sender.manifest, database, environ)
        assert consumer.metric('orders_retries_total{cause="DatabaseUnavailable"}') >= 1
        wait_for(lambda: consumer.ready, 20)
        assert consumer.stop() == 0


@pytest.mark.faults
def test_a_batch_whose_commit_response_was_lost_is_not_written_again(
    environ: dict[str, str], database: Database, sender: Sender
) -> None:
    sender.send_orders(uids("order", 10))
    with consuming_through_proxy(environ, database) as (proxy, consumer):
        wait_until_handled(sender.manifest, database)
        proxy.set_trap(Moment.COMMITTED)
        sender.send_orders(uids("order", 500), version=2)
        assert proxy.trapped.wait(30)
        committed = versions(database)
        proxy.drop()
        sender.send_orders(uids("other", 10))
        wait_until_handled(sender.manifest, database)
        assert committed.items() <= versions(database).items()
        assert consumer.stop() == 0


def versions(database: Database) -> dict[str, tuple[object, ...]]:
    """Return what differs between two writes of the same content, for the orders of version 2."""
    with psycopg.connect(database.superuser_url) as connection:
        rows = connection.execute(
            "SELECT order_uid, xmin::text, source_offset, stored_at FROM orders WHERE track_number = 'TRACK2'"
        )
        return {row[0]: row[1:] for row in rows}


def test_a_database_that_does_not_respond_is_an_outage(
    environ: dict[str, str], database: Database, sender: Sender
) -> None:
    with consuming_through_proxy(environ, database) as (proxy, consumer):
        sender.send_orders(uids("order", 10))
        wait_until_handled(sender.manifest, database)
        wait_for(lambda: consumer.ready, 20)
        proxy.freeze()
        sender.send_orders(uids("order", 10), version=2)
        wait_for(lambda: not consumer.ready, 10)
        assert consumer.live
        proxy.thaw()
        wait_until_handled(sender.manifest, database)
        wait_for(lambda: consumer.ready, 20)
        assert_all_accounted_for(sender.manifest, database, environ)
        assert consumer.stop() == 0


@pytest.mark.faults
def test_a_consumer_whose_backends_are_terminated_repeatedly_continues(
    environ: dict[str, str], database: Database, sender: Sender
) -> None:
    done = threading.Event()

    def terminate() -> None:
        with psycopg.connect(database.superuser_url, autocommit=True) as connection:
            while not done.wait(0.15):
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND usename = 'orders_writer'"
                )

    with consuming(environ) as consumer:
        terminator = threading.Thread(target=terminate)
        terminator.start()
        try:
            for version in range(1, 30):
                sender.send_orders(uids("order", 300), version)
        finally:
            done.set()
            terminator.join()
        wait_until_handled(sender.manifest, database)
        assert consumer.metric('orders_retries_total{cause="DatabaseUnavailable"}') >= 1
        assert_all_accounted_for(sender.manifest, database, environ)
        assert consumer.stop() == 0


def test_the_consumer_waits_for_a_locked_table_and_does_not_terminate_the_holder(
    environ: dict[str, str], database: Database, sender: Sender
) -> None:
    with consuming(environ) as consumer:
        sender.send_orders(uids("order", 10))
        wait_until_handled(sender.manifest, database)
        with locked(database, TABLE) as stranger:
            sender.send_orders(uids("order", 10), version=2)
            wait_for(lambda: not consumer.ready, 10)
            assert consumer.live
            assert stranger.execute("SELECT 1").fetchone() == (1,)
        wait_until_handled(sender.manifest, database)
        wait_for(lambda: consumer.ready, 20)
        assert_all_accounted_for(sender.manifest, database, environ)
        assert consumer.stop() == 0


@pytest.mark.faults
def test_the_consumer_waits_for_a_foreign_lock_on_the_fence_and_does_not_terminate_the_holder(
    environ: dict[str, str], database: Database, sender: Sender
) -> None:
    with consuming(environ) as consumer:
        sender.send_orders(uids("order", 10))
        wait_until_handled(sender.manifest, database)
        with locked(database, FENCE) as stranger:
            sender.send_orders(uids("order", 10), version=2)
            wait_for(lambda: consumer.metric('orders_retries_total{cause="DatabaseUnavailable"}') >= 1, 10)
            assert consumer.live
            assert not consumer.ready
            assert stranger.execute("SELECT 1").fetchone() == (1,)
        wait_until_handled(sender.manifest, database)
        assert_all_accounted_for(sender.manifest, database, environ)
        assert consumer.stop() == 0


@pytest.mark.faults
def test_the_backend_of_a_frozen_consumer_that_locks_an_order_is_terminated(
    environ: dict[str, str], database: Database, sender: Sender
) -> None:
    """The records of an order may be in two partitions, and each partition has its own fence."""
    with consuming(environ) as consumer:
        sender.send_orders(["shared"])
        wait_until_handled(sender.manifest, database)
        with psycopg.connect(database.writer_url, application_name="orderlib-consumer") as frozen:
            # A consumer has moved its offsets before. On Citus, DELETE alone is a transaction of the workers only.
            frozen.execute("SELECT pg_current_xact_id()")
            frozen.execute("DELETE FROM orders")
            sender.send_orders(["shared"], version=2)
            wait_until_handled(sender.manifest, database)
            assert "frozen consumer" in consumer.events("transaction_conflict")[0]["reason"]
            with pytest.raises(psycopg.OperationalError):
                frozen.execute("SELECT 1")
        assert_all_accounted_for(sender.manifest, database, environ)
        assert consumer.stop() == 0


@pytest.mark.parametrize(
    "privilege",
    ["INSERT ON items", pytest.param("UPDATE (next_offset) ON consumer_offsets", marks=pytest.mark.faults)],
)
def test_a_revoked_privilege_stops_the_consumer_and_rejects_nothing(
    privilege: str, member: dict[str, str], database: Database, sender: Sender
) -> None:
    sender.send_orders(uids("order", 10))
    with psycopg.connect(database.superuser_url, autocommit=True) as superuser:
        with consuming(member) as consumer:
            wait_until_handled(sender.manifest, database)
            before = next_offsets(database)
            superuser.execute(f"REVOKE {privilege} FROM orders_writer")
            sender.send_orders(uids("late", 10))
            assert consumer.status(within_s=15) == 1
            [stopped] = consumer.events("stopped")
            assert "permission denied" in stopped["reason"]
        assert next_offsets(database) == before
        assert stored_orders(database).keys() == set(uids("order", 10))
        superuser.execute(f"GRANT {privilege} TO orders_writer")
    with consuming(member) as successor:
        wait_until_handled(sender.manifest, database)
        assert_all_accounted_for(sender.manifest, database, member)
        assert successor.stop() == 0
