"""Workers of Citus fail under load. Run by ``make test-citus``."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from contextlib import ExitStack
from random import Random

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from sandbox import PostgresServer, Sandbox
from tests.support import CITUS
from tests.support.accounting import assert_all_accounted_for, wait_until_handled
from tests.support.citus import Coordinator
from tests.support.consumer_process import consuming
from tests.support.databases import Database
from tests.support.programs import run, succeed
from tests.support.sending import Sender, repeating, uids
from tests.support.waiting import wait_for

pytestmark = pytest.mark.skipif(CITUS not in os.environ, reason="no Citus: make test-citus CITUS=FOLDER")


@pytest.fixture
def coordinator(sandbox: Sandbox) -> Coordinator:
    assert isinstance(sandbox.postgres, Coordinator)
    return sandbox.postgres


@pytest.mark.parametrize("seed", range(10))
def test_a_lost_worker_is_an_outage(
    seed: int, coordinator: Coordinator, environ: dict[str, str], database: Database, sender: Sender
) -> None:
    """It is lost at any step of a batch: some of its sessions end, all end at once, or the server restarts."""
    rng = Random(seed)
    name = str(conninfo_to_dict(database.superuser_url)["dbname"])
    with consuming(environ) as consumer:
        sender.send_orders(uids("order", 200))
        wait_until_handled(sender.manifest, database)
        with repeating(lambda count: sender.send_orders(rng.sample(uids("order", 300), 100), count + 1), 30):
            for _ in range(4):
                lose(rng.choice(coordinator.workers), name, rng)
                time.sleep(rng.uniform(0, 0.3))
        wait_until_handled(sender.manifest, database, 90)
        # What was committed while a worker was lost becomes visible there when Citus has recovered it.
        wait_for(lambda: in_doubt(coordinator, name) == 0, 30)
        assert consumer.metric('orders_retries_total{cause="DatabaseUnavailable"}') >= 1
        assert_all_accounted_for(sender.manifest, database, environ)
        assert consumer.stop() == 0


def lose(worker: PostgresServer, name: str, rng: Random) -> None:
    """Lose the worker, if possible while it runs one kind of statement of a batch."""
    step = rng.choice(["COPY", "SAVEPOINT", "RELEASE", "INSERT", "PREPARE TRANSACTION", "COMMIT"])
    how = rng.choice(["terminate", "kill", "restart"])

    def connect() -> psycopg.Connection | None:
        # It may still recover from the last time.
        with contextlib.suppress(psycopg.OperationalError):
            return psycopg.connect(worker.superuser_url, dbname="postgres", autocommit=True)
        return None

    with wait_for(connect, 30) as connection:

        def sessions(query: str) -> list[int]:
            return [pid for (pid,) in connection.execute(SESSIONS, [name, query])]

        deadline = time.monotonic() + 3
        while not (at_step := sessions(f"{step}%")) and time.monotonic() < deadline:
            time.sleep(0.001)
        print(f"{how} worker {worker.port} at {step if at_step else 'any step'}")
        found = at_step or sessions("%")
        if how == "terminate":
            connection.execute("SELECT pg_terminate_backend(pid) FROM unnest(%s::int[]) AS s (pid)", [found])
        elif how == "kill" and found:
            # PostgreSQL then ends every session, and recovers as after a crash.
            os.kill(found[0], signal.SIGKILL)
    if how == "restart":
        worker.stop("immediate")
        time.sleep(rng.uniform(0, 1))
        worker.start()


#: The sessions of consumers on a worker that are in a transaction, by the beginning of their last statement.
SESSIONS = """
SELECT pid FROM pg_stat_activity WHERE datname = %s AND usename = 'orders_writer' AND state <> 'idle' AND query LIKE %s
"""


def in_doubt(coordinator: Coordinator, name: str) -> int:
    """Return how many transactions of a database are prepared on workers, and neither committed nor rolled back."""
    count = 0
    for worker in coordinator.workers:
        with psycopg.connect(worker.superuser_url, dbname=name) as connection:
            [(prepared,)] = connection.execute("SELECT count(*) FROM pg_prepared_xacts WHERE database = %s", [name])
            count += prepared
    return count


def test_a_wait_for_a_lock_on_a_worker_ends_as_on_one_server(
    coordinator: Coordinator, environ: dict[str, str], database: Database, sender: Sender
) -> None:
    name = str(conninfo_to_dict(database.superuser_url)["dbname"])
    with consuming(environ) as consumer:
        sender.send_orders(uids("order", 10))
        wait_until_handled(sender.manifest, database)
        with ExitStack() as lockers:
            for worker in coordinator.workers:
                locker = lockers.enter_context(psycopg.connect(worker.superuser_url, dbname=name))
                # Citus hides and protects the shards.
                locker.execute("SET citus.override_table_visibility = off")
                locker.execute("SET citus.enable_manual_changes_to_shards = on")
                shards = locker.execute("SELECT relname FROM pg_class WHERE relname ~ '^orders_[0-9]+$'").fetchall()
                assert shards
                for (shard,) in shards:
                    locker.execute(f"LOCK TABLE {shard}")
            sender.send_orders(uids("order", 10), version=2)
            begin = time.monotonic()
            wait_for(lambda: consumer.metric('orders_retries_total{cause="DatabaseUnavailable"}') >= 1, 15)
            assert time.monotonic() - begin > 4
            assert consumer.live
        wait_until_handled(sender.manifest, database)
        assert_all_accounted_for(sender.manifest, database, environ)
        assert consumer.stop() == 0


def test_distribute_is_idempotent_and_moves_the_rows_that_are_there(
    coordinator: Coordinator, empty_database: Database, environ: dict[str, str]
) -> None:
    environ = {**environ, **empty_database.environ()}
    name = str(conninfo_to_dict(empty_database.superuser_url)["dbname"])
    succeed("admin bootstrap", environ)
    for role, variable in (("orders_migrator", "MIGRATOR"), ("orders_writer", "DATABASE"), ("orders_reader", "READER")):
        coordinator.set_passwords(name, {role: str(conninfo_to_dict(environ[f"ORDERS_{variable}_URL"])["password"])})
    succeed("admin migrate", environ)
    Sender(environ["ORDERS_KAFKA_BOOTSTRAP_SERVERS"], environ["ORDERS_TOPIC"]).send_orders(uids("order", 100))
    succeed("consumer --exit-at-end", environ)
    assert succeed("admin distribute --shards 4", environ).count("distributed public.") == 6
    assert "distributed public." not in succeed("admin distribute", environ)
    with psycopg.connect(empty_database.superuser_url) as connection:
        # Nothing is left on the coordinator, which `forget` would not reach.
        connection.execute("SET citus.enable_ddl_propagation = off")
        for table in ("orders", "delivery", "payment", "items", "order_originals", "erased"):
            [(size,)] = connection.execute("SELECT pg_relation_size(%s::regclass)", [table])
            assert size == 0, table
    assert "order-7" in succeed("admin get order-7", environ)
    succeed("admin reconcile", environ)
    succeed("admin forget order-7 --yes", environ)
    assert run("admin get order-7", environ).returncode == 1
    succeed("admin migrate", environ)
    # A client cannot log in as the owner.
    with psycopg.connect(empty_database.superuser_url) as connection:
        assert connection.execute("SELECT rolcanlogin FROM pg_roles WHERE rolname = 'orders_owner'").fetchall() == [
            (False,)
        ]
