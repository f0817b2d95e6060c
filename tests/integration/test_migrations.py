"""Roles and schema: made once, however often and from wherever it is asked for."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import orderlib
from orderlib import ConfigurationError, DatabaseUnavailable
from orderlib.postgres import schema
from orderlib.postgres.connections import Connection, open_connection
from orderlib.postgres.grants import check_privileges
from orderlib.postgres.privileges import READER, WRITER
from orderlib.postgres.schema import LATEST_MIGRATION, check_schema
from sandbox import Sandbox
from tests.support.databases import Database, bootstrap, drop_database, of_database, role_passwords

T = TypeVar("T")

FILES = sorted(path.name for path in (Path(orderlib.__file__).parent / "postgres" / "migrations").glob("*.sql"))


@contextmanager
def connected(url: str) -> Iterator[Connection]:
    with open_connection(url, application_name="tests") as connection:
        yield connection


def at_once(work: Callable[[], T], times: int) -> list[T]:
    """Do the same work in several threads at once. Return the results."""
    with ThreadPoolExecutor(times) as threads:
        return [result.result() for result in [threads.submit(work) for _ in range(times)]]


def test_migrations_are_numbered_from_one_without_gaps() -> None:
    assert [name[:5] for name in FILES] == [f"{number:04}_" for number in range(1, LATEST_MIGRATION + 1)]


def test_migrate_applies_every_migration_once_and_reports_it(empty_database: Database) -> None:
    bootstrap(empty_database)
    applied: list[str] = []
    for expected in (FILES, []):
        assert orderlib.migrate(empty_database.migrator_url, on_applied=applied.append) == expected
        assert applied == FILES
    with connected(empty_database.reader_url) as reader:
        check_schema(reader)
        recorded = reader.execute("SELECT number, name FROM schema_migrations ORDER BY number").fetchall()
    assert recorded == list(enumerate(FILES, start=1))


def test_concurrent_migrations_are_applied_once(empty_database: Database) -> None:
    bootstrap(empty_database)
    applied = at_once(lambda: orderlib.migrate(empty_database.migrator_url), 4)
    assert sorted(itertools.chain(*applied)) == FILES
    with connected(empty_database.reader_url) as reader:
        check_schema(reader)


def test_repeated_and_concurrent_bootstraps_succeed(empty_database: Database) -> None:
    at_once(lambda: bootstrap(empty_database), 3)
    assert orderlib.migrate(empty_database.migrator_url) == FILES
    bootstrap(empty_database)
    with connected(empty_database.writer_url) as writer, connected(empty_database.reader_url) as reader:
        check_privileges(writer, WRITER)
        check_privileges(reader, READER)


def test_tables_belong_to_the_owner_who_cannot_log_in(database: Database) -> None:
    with connected(database.superuser_url) as superuser:
        owners = superuser.execute("SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'public'").fetchall()
        assert owners == [("orders_owner",)]
        assert superuser.execute("SELECT rolcanlogin FROM pg_roles WHERE rolname = 'orders_owner'").fetchone() == (
            False,
        )


def test_a_migration_that_fails_leaves_nothing_behind(empty_database: Database) -> None:
    bootstrap(empty_database)
    with connected(empty_database.superuser_url) as superuser:
        # In the way of the first migration's last table.
        superuser.execute("CREATE TABLE items ()")
        with pytest.raises(ConfigurationError, match="42P07"):
            orderlib.migrate(empty_database.migrator_url)
        left = superuser.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        # The table of migrations stays, empty: it is what concurrent migrations lock.
        assert sorted(left) == [("items",), ("schema_migrations",)]
        assert superuser.execute("SELECT * FROM schema_migrations").fetchall() == []
        superuser.execute("DROP TABLE items")
    assert orderlib.migrate(empty_database.migrator_url) == FILES


def test_only_the_migrator_can_migrate(empty_database: Database) -> None:
    bootstrap(empty_database)
    for url in (empty_database.writer_url, empty_database.reader_url):
        with pytest.raises(ConfigurationError, match="42501"):
            orderlib.migrate(url)


def test_a_database_without_a_schema_is_a_configuration_error_that_names_the_command(empty_database: Database) -> None:
    with (
        connected(empty_database.superuser_url) as superuser,
        pytest.raises(ConfigurationError, match=r"schema is at migration 0, .*python -m orderlib migrate"),
    ):
        check_schema(superuser)


def test_a_revoked_privilege_is_named(database: Database) -> None:
    with connected(database.superuser_url) as superuser:
        superuser.execute("REVOKE INSERT ON items FROM orders_writer")
    with (
        connected(database.writer_url) as writer,
        pytest.raises(ConfigurationError, match=r"orders_writer .*INSERT on items.*python -m orderlib migrate"),
    ):
        check_privileges(writer, WRITER)


@pytest.fixture(params=["SQL_ASCII", "LATIN1"])
def foreign_database(sandbox: Sandbox, request: pytest.FixtureRequest) -> Iterator[Database]:
    """A database that cannot store some texts."""
    name = f"test_{request.param.lower()}"
    with psycopg.connect(sandbox.environ["ORDERS_BOOTSTRAP_URL"], autocommit=True) as superuser:
        superuser.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING {} LOCALE 'C'").format(
                sql.Identifier(name), sql.Literal(request.param)
            )
        )
    database = of_database(sandbox.environ, name)
    yield database
    drop_database(sandbox, database)


@pytest.mark.usefixtures("_template")
def test_a_database_in_another_encoding_is_refused(foreign_database: Database) -> None:
    with connected(foreign_database.superuser_url) as superuser:
        encoding = str(conninfo_to_dict(foreign_database.superuser_url)["dbname"]).removeprefix("test_").upper()
        for refused in (orderlib.bootstrap, orderlib.migrate):
            with pytest.raises(
                ConfigurationError, match=f"encoding of the database is {encoding}, but orderlib needs UTF8"
            ):
                refused(foreign_database.superuser_url)
        assert superuser.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone() == (0,)


def test_a_server_that_is_too_old_is_refused(empty_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "OLDEST_POSTGRESQL", 99)
    for refused in (orderlib.bootstrap, orderlib.migrate):
        with pytest.raises(ConfigurationError, match=r"PostgreSQL \d\d is too old: orderlib needs version 99 or newer"):
            refused(empty_database.superuser_url)


def test_no_password_is_stored_or_shown_as_plain_text(empty_database: Database) -> None:
    bootstrap(empty_database)
    passwords = role_passwords(empty_database)
    with connected(empty_database.superuser_url) as superuser:
        kept = dict(superuser.execute("SELECT rolname, rolpassword FROM pg_authid").fetchall())
    assert all(kept[role].startswith("SCRAM-SHA-256$") for role in passwords)
    url = make_conninfo(empty_database.migrator_url, user="nobody")
    with pytest.raises((ConfigurationError, DatabaseUnavailable)) as refusal, connected(url):
        pass
    assert not any(password in str(refusal.value) for password in passwords.values())


@pytest.mark.parametrize("name", FILES)
def test_a_migration_is_one_transaction_and_explains_each_index(name: str) -> None:
    script = (Path(orderlib.__file__).parent / "postgres" / "migrations" / name).read_text(encoding="utf-8")
    assert not re.search(
        r"^\s*(BEGIN|COMMIT|ROLLBACK|VACUUM)\b[^\n]*;|CONCURRENTLY", script, re.MULTILINE | re.IGNORECASE
    )
    lines = script.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("CREATE INDEX"):
            assert lines[number - 1].startswith(("--", "CREATE INDEX")), line
