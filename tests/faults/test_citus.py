"""Workers of Citus fail under load. Run by ``make test-citus``."""

from __future__ import annotations

import os
import time
from random import Random

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from sandbox import Sandbox
from tests.support import CITUS
from tests.support.accounting import assert_all_accounted_for, wait_until_handled
from tests.support.citus import Coordinator
from tests.support.consumer_process import consuming
from tests.support.databases import Database
from tests.support.programs import run, succeed
from tests.support.sending import Sender, uids

pytestmark = pytest.mark.skipif(CITUS not in os.environ, reason="no Citus: make test-citus CITUS=FOLDER")


@pytest.fixture
def coordinator(sandbox: Sandbox) -> Coordinator:
    assert isinstance(sandbox.postgres, Coordinator)
    return sandbox.postgres


@pytest.mark.parametrize("seed", range(3))
def test_a_lost_worker_is_an_outage(
    seed: int, coordinator: Coordinator, environ: dict[str, str], database: Database, sender: Sender
) -> None:
    """Its sessions end at any step of a batch, and it restarts."""
    rng = Random(seed)
    name = conninfo_to_dict(database.superuser_url)["dbname"]
    with consuming(environ) as consumer:
        for version in range(1, 25):
            sender.send_orders(uids("order", 200), version)
            worker = rng.choice(coordinator.workers)
            time.sleep(rng.uniform(0, 0.2))
            if version % 8 == 0:
                worker.stop("immediate")
                time.sleep(rng.uniform(0, 1))
                worker.start()
                continue
            with psycopg.connect(worker.superuser_url, dbname="postgres", autocommit=True) as connection:
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND usename = %s",
                    [name, "orders_writer"],
                )
        wait_until_handled(sender.manifest, database, 60)
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
    # Nobody can log in as the owner from outside.
    with psycopg.connect(empty_database.superuser_url) as connection:
        assert connection.execute("SELECT rolcanlogin FROM pg_roles WHERE rolname = 'orders_owner'").fetchall() == [
            (False,)
        ]
