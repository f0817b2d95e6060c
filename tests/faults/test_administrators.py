"""Administrators and poolers end sessions: the consumer waits, `reconcile` works, the API responds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from sandbox import Sandbox
from tests.support.accounting import assert_all_accounted_for, wait_until_handled
from tests.support.api_process import serving
from tests.support.consumer_process import consuming
from tests.support.databases import Database, make_database, set_up
from tests.support.pgbouncer import pgbouncer
from tests.support.programs import run, succeed
from tests.support.sending import Sender, uids
from tests.support.waiting import wait_for


def name_of(database: Database) -> str:
    return str(conninfo_to_dict(database.superuser_url)["dbname"])


@contextmanager
def administrator(database: Database) -> Iterator[psycopg.Connection]:
    """A superuser's connection that does not depend on the database."""
    with psycopg.connect(database.superuser_url, dbname="postgres", autocommit=True) as connection:
        yield connection


def test_repeatedly_terminated_sessions_do_not_stop_the_consumer(
    environ: dict[str, str], database: Database, sender: Sender
) -> None:
    with consuming(environ) as consumer, administrator(database) as connection:
        deadline = time.monotonic() + 4
        version = 0
        while time.monotonic() < deadline:
            version += 1
            sender.send_orders(uids("order", 50), version)
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()",
                [name_of(database)],
            )
        wait_until_handled(sender.manifest, database)
        assert_all_accounted_for(sender.manifest, database, environ)
        assert consumer.stop() == 0


@pytest.mark.parametrize(
    ("close", "reopen", "code"),
    [
        ("ALTER DATABASE {} ALLOW_CONNECTIONS false", "ALTER DATABASE {} ALLOW_CONNECTIONS true", "55000"),
        pytest.param(
            "ALTER DATABASE {} CONNECTION LIMIT 0",
            "ALTER DATABASE {} CONNECTION LIMIT -1",
            "53300",
            marks=pytest.mark.faults,
        ),
    ],
)
def test_a_database_that_accepts_no_connections_for_a_while_is_an_outage(
    close: str, reopen: str, code: str, environ: dict[str, str], database: Database, sender: Sender
) -> None:
    sender.send_orders(uids("order", 10))
    with consuming(environ) as consumer, serving(environ) as api, administrator(database) as connection:
        wait_until_handled(sender.manifest, database)
        name = name_of(database)
        connection.execute(close.format(name).encode())
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        sender.send_orders(uids("order", 10), version=2)
        wait_for(lambda: any(code in str(event) for event in consumer.events("retrying")), 15)
        answer = api.get("/orders/order-1")
        assert answer.status == 503
        assert b"set up" not in answer.body
        assert api.get("/readyz").status == 503
        connection.execute(reopen.format(name).encode())
        wait_until_handled(sender.manifest, database)
        wait_for(lambda: api.get("/readyz").status == 200, 10)
        assert consumer.stop() == 0
    # Also if it is closed when they start.
    with administrator(database) as connection:
        connection.execute(close.format(name).encode())
        with consuming(environ) as consumer, serving(environ) as api:
            wait_for(lambda: code in consumer.stderr.read_text(), 15)
            assert api.get("/readyz").status == 503
            connection.execute(reopen.format(name).encode())
            wait_for(lambda: consumer.ready, 30)
            assert consumer.stop() == 0


def test_time_limits_set_by_an_administrator_end_sessions_but_no_program(
    environ: dict[str, str], database: Database, sender: Sender
) -> None:
    with administrator(database) as connection:
        for setting in ("idle_session_timeout", "idle_in_transaction_session_timeout", "transaction_timeout"):
            connection.execute(f"ALTER DATABASE {name_of(database)} SET {setting} = '700ms'")
    sender.send_orders(uids("order", 3000))
    with consuming(environ) as consumer, serving(environ) as api:
        wait_until_handled(sender.manifest, database)
        for version in (2, 3):
            wait_for(lambda: not sessions(database, "orderlib-consumer"), 10)
            wait_for(lambda: not sessions(database, "orderlib-api"), 10)
            assert api.get("/orders").status == 200
            sender.send_orders(uids("order", 10), version)
            wait_until_handled(sender.manifest, database)
        # A lost idle session is replaced silently.
        assert not consumer.events("retrying")
        assert consumer.stop() == 0
    succeed("admin reconcile", environ)


def sessions(database: Database, application_name: str) -> int:
    with psycopg.connect(database.superuser_url) as connection:
        [(number,)] = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = %s",
            [application_name],
        )
        return int(number)


def test_a_url_without_a_required_password_is_a_configuration_error(
    environ: dict[str, str], database: Database
) -> None:
    without = make_conninfo(database.writer_url, password="")
    for program in ("consumer", "api", "admin lag"):
        url = {"ORDERS_DATABASE_URL": without, "ORDERS_READER_URL": make_conninfo(without, user="orders_reader")}
        done = run(program, {**environ, **url})
        assert done.returncode == 2, done.stderr
        assert "the server asks for a password" in done.stderr


def test_restarts_of_postgresql_behind_pgbouncer_are_outages(own_sandbox: Sandbox) -> None:
    database = make_database(own_sandbox)
    set_up(database)
    with pgbouncer(database) as urls:
        environ = {
            **database.environ(),
            **urls,
            "ORDERS_KAFKA_BOOTSTRAP_SERVERS": own_sandbox.kafka.bootstrap_servers,
            "ORDERS_METRICS_BIND": "127.0.0.1:0",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        succeed("admin topics", environ)
        sender = Sender(own_sandbox.kafka.bootstrap_servers, "orders")
        with consuming(environ) as consumer:
            for version in (1, 2, 3):
                sender.send_orders(uids("order", 700), version)
                own_sandbox.postgres.stop("fast")
                sender.send_orders(uids("order", 300), version)
                own_sandbox.postgres.start()
                wait_until_handled(sender.manifest, database, within_s=60)
            assert_all_accounted_for(sender.manifest, database, environ)
            assert consumer.stop() == 0


def test_the_connection_limit_of_pgbouncer_is_an_outage(
    environ: dict[str, str], database: Database, sender: Sender
) -> None:
    with pgbouncer(database, max_client_conn="1") as urls:
        through = {**environ, **urls}
        with (
            psycopg.connect(urls["ORDERS_DATABASE_URL"]) as holder,
            consuming(through) as consumer,
            serving(through) as api,
        ):
            wait_for(lambda: "no more connections allowed" in consumer.stderr.read_text(), 15)
            answer = api.get("/readyz")
            assert answer.status == 503
            assert b"set up" not in answer.body
            holder.close()
            sender.send_orders(uids("order", 10))
            wait_until_handled(sender.manifest, database)
            assert consumer.stop() == 0
