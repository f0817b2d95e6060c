"""Databases of the sandbox, with the roles and the tables."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import attrs
import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import orderlib
from orderlib.postgres.citus import distribute
from sandbox import PostgresServer, Sandbox
from tests.support import CITUS
from tests.support.citus import SHARDS, Coordinator

#: The tables with rows of orderlib, and their sizes.
TABLES = """
SELECT oid::regclass::text, pg_total_relation_size(oid) FROM pg_class
WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND relname <> 'schema_migrations'
"""


@attrs.frozen(kw_only=True)
class Database:
    """A database for one test, with the URL of each role."""

    superuser_url: str
    migrator_url: str
    writer_url: str
    reader_url: str

    def environ(self) -> dict[str, str]:
        """Return the URLs as environment variables."""
        return {
            "ORDERS_BOOTSTRAP_URL": self.superuser_url,
            "ORDERS_MIGRATOR_URL": self.migrator_url,
            "ORDERS_DATABASE_URL": self.writer_url,
            "ORDERS_READER_URL": self.reader_url,
        }


def of_database(environ: Mapping[str, str], name: str) -> Database:
    """Return the sandbox's URLs for another of its databases."""

    def url(variable: str) -> str:
        return make_conninfo(environ[variable], dbname=name)

    return Database(
        superuser_url=url("ORDERS_BOOTSTRAP_URL"),
        migrator_url=url("ORDERS_MIGRATOR_URL"),
        writer_url=url("ORDERS_DATABASE_URL"),
        reader_url=url("ORDERS_READER_URL"),
    )


def on_server(server: PostgresServer, administrator_url: str | None = None) -> Database:
    """Return the URLs of a server's own database. The superuser's may be replaced by another administrator's."""

    def url(role: str) -> str:
        return server.url(role, f"password-of-{role}")

    return Database(
        superuser_url=administrator_url or server.superuser_url,
        migrator_url=url("orders_migrator"),
        writer_url=url("orders_writer"),
        reader_url=url("orders_reader"),
    )


def role_passwords(database: Database) -> dict[str, str]:
    """Return the passwords in the URLs, by role."""
    urls = map(conninfo_to_dict, (database.migrator_url, database.writer_url, database.reader_url))
    return {str(url["user"]): str(url["password"]) for url in urls}


def make_database(sandbox: Sandbox, template: str | None = None) -> Database:
    """Create a database in the sandbox: a copy of a template, or an empty one."""
    name = f"test_{secrets.token_hex(6)}"
    if coordinator := coordinator_of(sandbox):
        coordinator.add_database(name, template)
        return of_database(sandbox.environ, name)
    with psycopg.connect(sandbox.environ["ORDERS_BOOTSTRAP_URL"], autocommit=True) as connection:
        # Without fsync, copying files is ten times faster than logging each page.
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template or 'template1'} STRATEGY file_copy")
    return of_database(sandbox.environ, name)


def make_template(sandbox: Sandbox) -> str:
    """Create a migrated database that others are copies of. Return its name."""
    database = make_database(sandbox)
    name = str(conninfo_to_dict(database.superuser_url)["dbname"])
    set_up(database)
    if coordinator := coordinator_of(sandbox):
        coordinator.set_passwords(name, role_passwords(database))
        distribute(database.superuser_url, shards=SHARDS, application_name="tests")
        coordinator.make_template(name)
    return name


def coordinator_of(sandbox: Sandbox) -> Coordinator | None:
    """Return the sandbox's PostgreSQL if it is Citus."""
    # A run inside a test has only the URLs of its sandbox.
    coordinator = getattr(sandbox, "postgres", None)
    return coordinator if isinstance(coordinator, Coordinator) else None


def drop_database(sandbox: Sandbox, database: Database) -> None:
    """Drop a database, even if clients are still connected."""
    name = str(conninfo_to_dict(database.superuser_url)["dbname"])
    if coordinator := coordinator_of(sandbox):
        coordinator.drop_database(name)
        return
    with psycopg.connect(sandbox.environ["ORDERS_BOOTSTRAP_URL"], autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def delete_rows(superuser: psycopg.Connection) -> None:
    """Delete every order, reject and offset. TRUNCATE of all tables takes fifty times longer."""
    with superuser.transaction():
        # SET LOCAL reaches the workers of Citus, too.
        superuser.execute("SET LOCAL citus.propagate_set_commands = 'local'")
        superuser.execute("SET LOCAL session_replication_role = replica")
        for name, _ in superuser.execute(TABLES).fetchall():
            superuser.execute(f"DELETE FROM {name}")


@contextmanager
def without_foreign_keys(database: Database) -> Iterator[psycopg.Connection]:
    """Yield a superuser's session that does not check foreign keys."""
    _change_sessions_of_workers(database, "SET session_replication_role = replica")
    try:
        with psycopg.connect(database.superuser_url, autocommit=True) as connection:
            connection.execute("SET session_replication_role = replica")
            yield connection
    finally:
        _change_sessions_of_workers(database, "RESET session_replication_role")


def _change_sessions_of_workers(database: Database, change: str) -> None:
    """With Citus, change what new sessions of the superuser on workers start with."""
    if CITUS in os.environ:
        with psycopg.connect(database.superuser_url, autocommit=True) as connection:
            # Citus would repeat the change of each worker on all nodes, and they would wait for each other: a deadlock.
            command = f"""DO $do$ BEGIN
                SET LOCAL citus.enable_alter_role_set_propagation = off;
                ALTER ROLE postgres {change};
            END $do$"""
            for succeeded, result in connection.execute(
                "SELECT success, result FROM run_command_on_workers(%s)", [command]
            ).fetchall():
                assert succeeded, result


def set_up(database: Database) -> None:
    """Create the roles and the tables."""
    bootstrap(database)
    orderlib.migrate(database.migrator_url)


def bootstrap(database: Database) -> orderlib.BootstrapResult:
    """Create the roles."""
    passwords = role_passwords(database)
    return orderlib.bootstrap(
        database.superuser_url,
        migrator_password=passwords["orders_migrator"],
        writer_password=passwords["orders_writer"],
        reader_password=passwords["orders_reader"],
    )
