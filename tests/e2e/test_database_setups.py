"""The programs on databases that are set up differently from those of the other tests."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from sandbox import PostgresServer
from tests.support.api_process import serving
from tests.support.consumer_process import consuming
from tests.support.databases import Database
from tests.support.programs import run, running, succeed
from tests.support.waiting import wait_for


@pytest.fixture
def managed(environ: dict[str, str]) -> Iterator[dict[str, str]]:
    """Settings for a server without a usable superuser: ORDERS_BOOTSTRAP_URL is that of a CREATEROLE owner."""
    password = secrets.token_hex(8)
    with PostgresServer() as server:
        with psycopg.connect(server.superuser_url, autocommit=True) as superuser:
            superuser.execute(f"CREATE ROLE manager LOGIN CREATEROLE PASSWORD '{password}'".encode())
            superuser.execute("ALTER DATABASE orders OWNER TO manager")
        yield {
            **environ,
            "ORDERS_BOOTSTRAP_URL": server.url("manager", password),
            "ORDERS_MIGRATOR_URL": server.url("orders_migrator", password),
            "ORDERS_DATABASE_URL": server.url("orders_writer", password),
            "ORDERS_READER_URL": server.url("orders_reader", password),
        }


def test_every_program_works_without_a_superuser(managed: dict[str, str], tmp_path: Path) -> None:
    assert "needs an administrator: " in succeed("admin bootstrap", managed)
    succeed("admin migrate", managed)
    succeed("sender --count 50 --bad-rate 0.1", managed)
    with running("consumer", managed, tmp_path / "consumer.log") as consumer, serving(managed) as api:
        wait_for(lambda: b"order_uid" in api.get("/orders?limit=1").body)
        assert api.get("/readyz").status == 200
        wait_for(lambda: run("admin reconcile", managed).returncode == 0, 60)
        consumer.terminate()
        assert consumer.wait(15) == 0
    # Setting up again corrects nothing and breaks nothing.
    assert "corrected" not in succeed("admin bootstrap", managed)
    assert "corrected" not in succeed("admin migrate", managed)


@pytest.mark.parametrize(
    ("program", "role"),
    [
        ("consumer", "orders_writer"),
        ("api", "orders_reader"),
        ("admin get some-order", "orders_reader"),
        ("admin state some-order", "orders_reader"),
        ("admin lag", "orders_reader"),
        ("admin offsets show", "orders_reader"),
        ("admin reconcile", "orders_reader"),
        ("admin rejects list", "orders_writer"),
        ("admin rejects summary", "orders_reader"),
        ("admin rejects redrive --all", "orders_writer"),
        ("admin rejects purge --older-than 1d --yes", "orders_migrator"),
        ("admin forget some-order --yes", "orders_migrator"),
        ("admin offsets reset --to-earliest", "orders_migrator"),
        ("admin offsets set-group other", "orders_migrator"),
        ("admin migrate", "orders_migrator"),
    ],
)
def test_a_search_path_without_the_tables_is_named(
    environ: dict[str, str], database: Database, program: str, role: str
) -> None:
    """ "Run migrate" would be wrong advice: the tables exist."""
    name = conninfo_to_dict(database.superuser_url)["dbname"]
    with psycopg.connect(database.superuser_url, autocommit=True) as superuser:
        superuser.execute(f"CREATE SCHEMA other; ALTER DATABASE {name} SET search_path = other".encode())
        superuser.execute("GRANT USAGE ON SCHEMA other TO PUBLIC")
    done = run(program, environ)
    assert done.returncode == 2, done.stderr
    assert f"the tables are in schema public, but the search_path of role {role} is other" in done.stderr
    assert "Traceback" not in done.stderr
    assert "admin migrate" not in done.stderr


@pytest.mark.parametrize(
    ("program", "variable", "wrong", "expected"),
    [
        ("consumer", "ORDERS_DATABASE_URL", "orders_reader", "orders_writer"),
        ("consumer", "ORDERS_DATABASE_URL", "orders_migrator", "orders_writer"),
        ("api", "ORDERS_READER_URL", "orders_migrator", "orders_reader"),
        ("admin lag", "ORDERS_READER_URL", "orders_migrator", "orders_reader"),
        ("admin reconcile", "ORDERS_READER_URL", "orders_migrator", "orders_reader"),
        ("admin rejects redrive --all", "ORDERS_DATABASE_URL", "orders_reader", "orders_writer"),
        ("admin backfill", "ORDERS_DATABASE_URL", "orders_migrator", "orders_writer"),
        ("admin forget some-order --yes", "ORDERS_MIGRATOR_URL", "orders_writer", "orders_migrator"),
        ("admin migrate", "ORDERS_MIGRATOR_URL", "orders_reader", "orders_migrator"),
    ],
)
def test_a_url_of_the_wrong_role_is_named_with_the_role_that_is_needed(
    environ: dict[str, str], database: Database, program: str, variable: str, wrong: str, expected: str
) -> None:
    """ "Run migrate" would be wrong advice: the privileges are correct."""
    urls = (database.migrator_url, database.writer_url, database.reader_url)
    [url] = [url for url in urls if conninfo_to_dict(url)["user"] == wrong]
    done = run(program, {**environ, variable: url})
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        f"error: the database URL logs in as {wrong}, but must log in as {expected} (correct {variable})"
    )
    assert "run `" not in done.stderr


@pytest.mark.parametrize("program", ["admin lag", "admin rejects list", "admin migrate", "admin forget x --yes"])
def test_a_command_warns_of_a_superuser(environ: dict[str, str], database: Database, program: str) -> None:
    roles = ("MIGRATOR", "DATABASE", "READER")
    done = run(program, {**environ, **{f"ORDERS_{role}_URL": database.superuser_url for role in roles}})
    assert done.returncode == 0
    [warning] = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert re.match("warning: .* logs in as a superuser", warning)


def test_consumer_and_api_log_once_that_they_are_connected_as_a_superuser(
    environ: dict[str, str], database: Database
) -> None:
    environ |= {"ORDERS_DATABASE_URL": database.superuser_url, "ORDERS_READER_URL": database.superuser_url}
    with consuming(environ) as consumer, serving(environ) as api:
        assert api.get("/readyz").status == 200
        wait_for(lambda: consumer.ready)
        for variable, events in (("DATABASE", consumer.events), ("READER", api.events)):
            [event] = events("connected_as_superuser")
            assert event["variable"] == f"ORDERS_{variable}_URL"


def test_no_program_warns_of_a_superuser_if_the_roles_are_right(environ: dict[str, str]) -> None:
    with consuming(environ) as consumer, serving(environ) as api:
        wait_for(lambda: consumer.ready)
        assert not consumer.events("connected_as_superuser") + api.events("connected_as_superuser")
    assert run("admin lag", environ).stderr == ""
