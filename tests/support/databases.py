"""Databases of the sandbox, with the roles and the tables."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

import attrs
import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from orderlib.postgres.citus import distribute
from orderlib.postgres.connections import open_connection
from orderlib.postgres.migrate import apply_migrations
from orderlib.postgres.roles import create_roles
from sandbox import Sandbox
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
        """The URLs as settings."""
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


def role_passwords(database: Database) -> dict[str, str]:
    """Return the passwords in the URLs, by role."""
    urls = map(conninfo_to_dict, (database.migrator_url, database.writer_url, database.reader_url))
    return {str(url["user"]): str(url["password"]) for url in urls}


def make_database(sandbox: Sandbox, template: str = "template1") -> Database:
    """Create a database in the sandbox."""
    name = f"test_{secrets.token_hex(6)}"
    if isinstance(coordinator := getattr(sandbox, "postgres", None), Coordinator):
        database = of_database(sandbox.environ, name)
        coordinator.add_database(name)
        if template != "template1":
            set_up(database)
            coordinator.set_passwords(name, role_passwords(database))
            distribute(database.superuser_url, shards=SHARDS, application_name="tests")
        return database
    with psycopg.connect(sandbox.environ["ORDERS_BOOTSTRAP_URL"], autocommit=True) as connection:
        # Without fsync, copying files is ten times faster than logging each page.
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
    return of_database(sandbox.environ, name)


def drop_database(sandbox: Sandbox, database: Database) -> None:
    """Drop a database, even if clients are still connected."""
    name = str(conninfo_to_dict(database.superuser_url)["dbname"])
    if isinstance(coordinator := getattr(sandbox, "postgres", None), Coordinator):
        coordinator.drop_database(name)
        return
    with psycopg.connect(sandbox.environ["ORDERS_BOOTSTRAP_URL"], autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def delete_rows(superuser: psycopg.Connection) -> None:
    """Delete every order, reject and offset. TRUNCATE of all tables takes fifty times longer."""
    superuser.execute("SET session_replication_role = replica")
    for name, _ in superuser.execute(TABLES).fetchall():
        superuser.execute(f"DELETE FROM {name}")
    superuser.execute("RESET session_replication_role")


def set_up(database: Database) -> None:
    """Create the roles and the tables."""
    with open_connection(database.superuser_url, application_name="tests") as connection:
        create_roles(connection, role_passwords(database))
    with open_connection(database.migrator_url, application_name="tests") as connection:
        apply_migrations(connection)
