"""The programs on databases that are set up differently from those of the other tests."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from sandbox import PostgresServer
from tests.support.api_process import serving
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
