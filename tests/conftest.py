"""Real servers, started once and only if a test needs them, and a new database and topic for each test."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import attrs
import hypothesis
import psycopg
import pytest
from confluent_kafka.admin import AdminClient, NewTopic
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from orderlib.postgres.citus import distribute
from orderlib.postgres.connections import open_connection
from orderlib.postgres.migrate import apply_migrations
from orderlib.postgres.roles import create_roles
from sandbox import Sandbox, running_sandbox
from tests.support.citus import SHARDS, Coordinator

ROOT = Path(__file__).parent.parent

#: Numbers that differ if anything in the database was created, altered, dropped, granted or set.
_DEFINITION = " UNION ALL ".join(
    f"SELECT count(*), max(xmin::text::bigint) FROM {catalog}"
    for catalog in (
        *(
            "pg_attrdef",
            "pg_attribute",
            "pg_class",
            "pg_constraint",
            "pg_default_acl",
            "pg_description",
            "pg_extension",
        ),
        *(
            "pg_index",
            "pg_inherits",
            "pg_largeobject_metadata",
            "pg_namespace",
            "pg_policy",
            "pg_proc",
            "pg_publication",
        ),
        *("pg_rewrite", "pg_statistic_ext", "pg_trigger", "pg_type", "schema_migrations"),
        "pg_database WHERE datname = current_database()",
        "pg_db_role_setting WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())",
    )
).encode()
_TABLES = """
SELECT oid::regclass::text, pg_total_relation_size(oid) FROM pg_class
WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND relname <> 'schema_migrations'
"""
_END_SESSIONS = """
SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
#: A database with tables of this size in total is dropped: deleted rows are still there.
_LARGE_BYTES = 4 * 1024 * 1024

#: The sandbox's settings as JSON, for a run of tests inside a test.
SHARED_SANDBOX = "TESTS_SANDBOX"

#: The folder of a PostgreSQL with Citus, to run the tests there.
CITUS = "TESTS_CITUS"

# On a busy machine, slow examples must not fail a test.
hypothesis.settings.register_profile(
    "suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _hide_callers_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the settings of the caller's environment from the tests."""
    for name in list(os.environ):
        if name.startswith("ORDERS_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    """PostgreSQL and Kafka, for all tests of the run. A run inside a test has the servers of that test."""
    if SHARED_SANDBOX in os.environ:
        yield cast(Sandbox, SimpleNamespace(environ=json.loads(os.environ[SHARED_SANDBOX])))
        return
    citus = os.environ.get(CITUS)
    with running_sandbox(postgres=Coordinator(Path(citus)) if citus else None) as running:
        # A commit survives a crash of PostgreSQL without fsync, too; only a power failure needs it.
        with psycopg.connect(running.environ["ORDERS_BOOTSTRAP_URL"], autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET fsync = off")
            connection.execute("SELECT pg_reload_conf()")
        yield running


@pytest.fixture(scope="session")
def own_sandbox() -> Iterator[Sandbox]:
    """Servers that a test may stop. It must start them again."""
    with running_sandbox() as running:
        yield running


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
    for name, _ in superuser.execute(_TABLES).fetchall():
        superuser.execute(f"DELETE FROM {name}")
    superuser.execute("RESET session_replication_role")


def set_up(database: Database) -> None:
    """Create the roles and the tables."""
    with open_connection(database.superuser_url, application_name="tests") as connection:
        create_roles(connection, role_passwords(database))
    with open_connection(database.migrator_url, application_name="tests") as connection:
        apply_migrations(connection)


@pytest.fixture(scope="session")
def _template(sandbox: Sandbox) -> str:
    if CITUS in os.environ:
        # Citus cannot copy a database: each is set up by itself.
        return "migrated"
    database = make_database(sandbox)
    set_up(database)
    return str(conninfo_to_dict(database.superuser_url)["dbname"])


@pytest.fixture
def empty_database(sandbox: Sandbox) -> Iterator[Database]:
    """An empty database for the test, without tables."""
    database = make_database(sandbox)
    yield database
    drop_database(sandbox, database)


@pytest.fixture(scope="session")
def _unused_databases() -> list[tuple[Database, object]]:
    """Migrated databases without rows that earlier tests left, with their definitions."""
    return []


@pytest.fixture
def database(sandbox: Sandbox, _template: str, _unused_databases: list[tuple[Database, object]]) -> Iterator[Database]:
    """A migrated database for the test, without orders: one of an earlier test if that has left it unchanged."""
    if _unused_databases:
        database, definition = _unused_databases.pop()
    else:
        database = make_database(sandbox, _template)
        with psycopg.connect(database.superuser_url) as superuser:
            definition = superuser.execute(_DEFINITION).fetchall()
    yield database
    if _empty(database, definition):
        _unused_databases.append((database, definition))
    else:
        drop_database(sandbox, database)


def _empty(database: Database, definition: object) -> bool:
    """Delete all rows, which is ten times faster than a new database. Return False if that does not make it as new."""
    try:
        with psycopg.connect(database.superuser_url, autocommit=True) as superuser:
            superuser.execute(_END_SESSIONS)
            if superuser.execute(_DEFINITION).fetchall() != definition:
                return False
            if sum(size for _, size in superuser.execute(_TABLES)) > _LARGE_BYTES:
                return False
            delete_rows(superuser)
    except psycopg.Error:
        return False
    return True


@pytest.fixture(scope="module")
def module_database(sandbox: Sandbox, _template: str) -> Iterator[Database]:
    """A migrated database for all tests of a module, which see each other's orders."""
    database = make_database(sandbox, _template)
    yield database
    drop_database(sandbox, database)


@pytest.fixture
def make_topic(sandbox: Sandbox) -> Iterator[Callable[..., str]]:
    """A function that creates topics. They are deleted after the test."""
    admin = AdminClient({"bootstrap.servers": sandbox.environ["ORDERS_KAFKA_BOOTSTRAP_SERVERS"]})
    created: list[str] = []

    def make(partitions: int = 3, **config: str) -> str:
        name = f"orders-{secrets.token_hex(6)}"
        topic = NewTopic(
            name,
            num_partitions=partitions,
            config={"max.message.bytes": "16777216", **{k.replace("_", "."): v for k, v in config.items()}},
        )
        admin.create_topics([topic])[name].result(30)
        created.append(name)
        return name

    yield make
    if created:
        for future in admin.delete_topics(created).values():
            future.exception(30)


@pytest.fixture
def topic(make_topic: Callable[..., str]) -> str:
    """A topic for the test, with three partitions."""
    return make_topic()


@pytest.fixture
def environ(sandbox: Sandbox, database: Database, topic: str) -> dict[str, str]:
    """The environment of a program that uses this test's database and topic, and listens on free ports."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("ORDERS_")},
        **database.environ(),
        "ORDERS_KAFKA_BOOTSTRAP_SERVERS": sandbox.environ["ORDERS_KAFKA_BOOTSTRAP_SERVERS"],
        "ORDERS_TOPIC": topic,
        # The minimum that the broker allows, so that it detects a killed consumer sooner.
        "ORDERS_KAFKA_SESSION_TIMEOUT_MS": "6000",
        "ORDERS_METRICS_BIND": "127.0.0.1:0",
        "ORDERS_API_BIND": "127.0.0.1:0",
        "ORDERS_API_AUTH": "off",
        "PYTHONPATH": str(ROOT),
    }
