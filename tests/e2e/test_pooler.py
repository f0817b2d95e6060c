"""Every program works through PgBouncer in session mode, and refuses to start behind it in transaction mode."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

import orderlib
from orderlib.testing import SAMPLE
from tests.support.accounting import wait_until_handled
from tests.support.api_process import serving
from tests.support.consumer_process import consuming
from tests.support.databases import Database
from tests.support.pgbouncer import pgbouncer
from tests.support.programs import run, succeed
from tests.support.sending import Sender, uids

#: Every way to use the database, with the settings of its environment only.
PROGRAMS = [
    "consumer",
    "api",
    "admin bootstrap",
    "admin migrate",
    "admin lag",
    "admin offsets show",
    "admin offsets reset --to-earliest",
    "admin offsets set-group other",
    "admin rejects list",
    "admin rejects redrive --all",
    "admin rejects purge --older-than 1d",
    "admin get order-1",
    "admin original order-1",
    "admin forget order-1 --yes",
    "admin forgotten",
    "admin export",
    "admin drift",
    "admin reconcile",
]


def test_session_mode_serves_every_program(environ: dict[str, str], empty_database: Database, topic: str) -> None:
    with pgbouncer(empty_database) as urls:
        through = {**environ, **urls}
        for command in ("bootstrap", "migrate"):
            succeed(f"admin {command}", through)
        sender = Sender(environ["ORDERS_KAFKA_BOOTSTRAP_SERVERS"], topic)
        sender.send_orders(uids("order", 300))
        sender.send_bad(b"{")
        with consuming(through) as consumer, serving(through) as api:
            wait_until_handled(sender.manifest, empty_database)
            assert api.get("/orders/order-7").status == 200
            assert consumer.stop() == 0
        for command in ("rejects list", "reconcile", "forget order-7 --yes", "export"):
            succeed(f"admin {command}", through)
        with orderlib.connect(urls["ORDERS_DATABASE_URL"]) as repository:
            repository.save(orderlib.decode_order(SAMPLE))


def test_a_session_pooler_without_a_free_session_is_accepted(module_database: Database) -> None:
    with (
        pgbouncer(module_database, default_pool_size="1") as urls,
        orderlib.connect(urls["ORDERS_READER_URL"], max_connections=1) as repository,
    ):
        assert repository.get_many(["order-1"]) == {}


def test_a_role_in_transaction_mode_is_refused_although_another_one_has_session_mode(module_database: Database) -> None:
    with pgbouncer(module_database, transaction_role="orders_writer") as urls:
        with orderlib.connect(urls["ORDERS_READER_URL"]) as repository:
            assert repository.get_many(["order-1"]) == {}
        with pytest.raises(orderlib.ConfigurationError, match="transaction pooler"):
            orderlib.connect(urls["ORDERS_DATABASE_URL"])


def test_no_program_starts_behind_a_transaction_pooler(environ: dict[str, str], database: Database) -> None:
    with pgbouncer(database, pool_mode="transaction") as urls, ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda program: run(program, {**environ, **urls}), PROGRAMS))
    for program, done in zip(PROGRAMS, results, strict=True):
        assert (done.returncode, done.stdout) == (2, ""), program
        assert "transaction pooler" in done.stderr.splitlines()[-1], program
        assert "Traceback" not in done.stderr, program
