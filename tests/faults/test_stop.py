"""A stop takes at most 10 s and exits with 0 in any situation. The next consumer finishes the work.

Stops while a server is unavailable are in test_outages.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from tests.support.accounting import assert_all_accounted_for, wait_until_handled
from tests.support.consumer_process import STOPS_WITHIN_S, consuming
from tests.support.databases import Database
from tests.support.fork_server import start
from tests.support.locking import FENCE, TABLE, locked
from tests.support.sending import Sender, uids
from tests.support.tcp_proxy import Moment, TcpProxy
from tests.support.waiting import wait_for


def assert_another_continues(environ: dict[str, str], database: Database, sender: Sender) -> None:
    with consuming(environ) as successor:
        wait_until_handled(sender.manifest, database)
        assert_all_accounted_for(sender.manifest, database, environ)
        assert successor.stop() == 0


def test_a_half_open_connection_does_not_delay_a_stop(
    member: dict[str, str], database: Database, sender: Sender
) -> None:
    with TcpProxy(database.writer_url) as proxy:
        with consuming({**member, "ORDERS_DATABASE_URL": proxy.url}) as consumer:
            proxy.set_trap(Moment.COMMITTED)
            sender.send_orders(uids("order", 100))
            assert proxy.trapped.wait(30)
            assert consumer.stop() == 0
        proxy.drop()
        assert_another_continues(member, database, sender)


@pytest.mark.faults
@pytest.mark.parametrize("statement", [pytest.param(TABLE, id="of-a-table"), pytest.param(FENCE, id="of-the-fence")])
def test_a_wait_for_a_lock_does_not_delay_a_stop(
    statement: str, member: dict[str, str], database: Database, sender: Sender
) -> None:
    sender.send_orders(uids("order", 100))
    with consuming(member) as consumer:
        wait_until_handled(sender.manifest, database)
        with locked(database, statement):
            sender.send_orders(uids("order", 100), version=2)
            wait_for(lambda: not consumer.ready, 10)
            assert consumer.stop() == 0
    assert_another_continues(member, database, sender)


@pytest.mark.faults
def test_a_server_that_stops_responding_at_the_start_does_not_delay_a_stop(
    environ: dict[str, str], database: Database
) -> None:
    with TcpProxy(database.writer_url) as proxy:
        proxy.set_trap(Moment.READY)
        with consuming({**environ, "ORDERS_DATABASE_URL": proxy.url}) as consumer:
            assert proxy.trapped.wait(30)
            assert consumer.live
            assert not consumer.ready
            assert consumer.stop() == 0


def test_a_log_that_nobody_reads_delays_neither_records_nor_a_stop(
    member: dict[str, str], database: Database, sender: Sender
) -> None:
    reading, writing = os.pipe()
    consumer = start(["consumer"], {**member, "ORDERS_BREAKER_FRACTION": "0"}, stderr=writing)
    try:
        for _ in range(1000):
            sender.send_bad(b"{")
        wait_until_handled(sender.manifest, database)
        assert_all_accounted_for(sender.manifest, database, member)
        consumer.terminate()
        assert consumer.wait(STOPS_WITHIN_S) == 0
    finally:
        consumer.kill()
        os.close(reading)
        os.close(writing)


@contextmanager
def frozen_backends(database: Database) -> Iterator[None]:
    """Freeze the backends of the consumer. Only root may do that."""
    with psycopg.connect(database.superuser_url) as connection:
        rows = connection.execute("SELECT pid FROM pg_stat_activity WHERE usename = 'orders_writer'").fetchall()
    try:
        for (pid,) in rows:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for (pid,) in rows:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.faults
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may stop another user's process")
def test_a_frozen_backend_does_not_delay_a_stop(member: dict[str, str], database: Database, sender: Sender) -> None:
    sender.send_orders(uids("order", 100))
    with consuming(member) as consumer:
        wait_until_handled(sender.manifest, database)
        with frozen_backends(database):
            sender.send_orders(uids("order", 100), version=2)
            wait_for(lambda: not consumer.ready, 10)
            assert consumer.live
            assert consumer.stop() == 0
    assert_another_continues(member, database, sender)


@pytest.mark.faults
def test_load_and_a_rebalance_do_not_delay_a_stop(environ: dict[str, str], database: Database, sender: Sender) -> None:
    for version in range(1, 6):
        sender.send_orders(uids("order", 2000), version)
    with consuming(environ) as first, consuming(environ) as second:
        wait_for(lambda: bool(first.events("partitions_assigned")), 10)
        with consuming(environ) as third:
            assert third.stop() == 0
            assert first.stop() == 0
        wait_until_handled(sender.manifest, database)
        assert_all_accounted_for(sender.manifest, database, environ)
        assert second.stop() == 0
