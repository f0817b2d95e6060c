"""Real servers, started once and only if a test needs them, and a new database and topic for each test."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import attrs
import hypothesis
import psycopg
import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from sandbox import Sandbox, running_sandbox
from tests.support import CITUS, ROOT, SHARED_SANDBOX, fork_server
from tests.support.citus import DIFFERENCES, LEFT_OUT, Coordinator
from tests.support.databases import TABLES, Database, delete_rows, drop_database, make_database, make_template

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
_END_SESSIONS = """
SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
#: A database with tables of this size in total is dropped: deleted rows are still there.
_LARGE_BYTES = 4 * 1024 * 1024

#: A fault test is ended after this time: some need a minute of CPU time, or start three brokers one after another.
FAULT_TIMEOUT_S = 600

# On a busy machine, slow examples must not fail a test.
hypothesis.settings.register_profile(
    "suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give a fault test more time. On Citus, run only the tests of its database, and expect what differs there."""
    for item in items:
        if item.get_closest_marker("faults") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(FAULT_TIMEOUT_S))
    if CITUS not in os.environ:
        return
    databases = {"database", "empty_database", "module_database", "_template"}
    selected = []
    for item in items:
        if databases.isdisjoint(getattr(item, "fixturenames", ())) or item.nodeid.startswith(tuple(LEFT_OUT)):
            continue
        selected.append(item)
        for beginning, reason in DIFFERENCES.items():
            if item.nodeid.startswith(beginning):
                item.add_marker(pytest.mark.xfail(reason=reason))
    config.hook.pytest_deselected(items=[item for item in items if item not in selected])
    items[:] = selected


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


@pytest.fixture(scope="session")
def _template(sandbox: Sandbox) -> str:
    return make_template(sandbox)


@pytest.fixture
def empty_database(sandbox: Sandbox) -> Iterator[Database]:
    """An empty database for the test, without tables."""
    database = make_database(sandbox)
    yield database
    drop_database(sandbox, database)


@attrs.frozen
class _Reusable:
    """A migrated database without rows."""

    database: Database
    #: A superuser's session, which stays open: a new one takes more CPU time than deleting the rows.
    session: psycopg.Connection
    definition: object


@pytest.fixture(scope="session")
def _unused_databases() -> Iterator[list[_Reusable]]:
    """Databases that earlier tests left as they were."""
    unused: list[_Reusable] = []
    yield unused
    for reusable in unused:
        reusable.session.close()


@pytest.fixture
def database(sandbox: Sandbox, _template: str, _unused_databases: list[_Reusable]) -> Iterator[Database]:
    """A migrated database for the test, without orders: one of an earlier test if that has left it unchanged."""
    if _unused_databases:
        reusable = _unused_databases.pop()
    else:
        database = make_database(sandbox, _template)
        session = psycopg.connect(database.superuser_url, autocommit=True)
        reusable = _Reusable(database, session, session.execute(_DEFINITION).fetchall())
    yield reusable.database
    if _empty(reusable):
        _unused_databases.append(reusable)
    else:
        reusable.session.close()
        drop_database(sandbox, reusable.database)


def _empty(reusable: _Reusable) -> bool:
    """Delete all rows, which is ten times faster than a new database. Return False if that does not make it as new."""
    try:
        reusable.session.execute(_END_SESSIONS)
        if reusable.session.execute(_DEFINITION).fetchall() != reusable.definition:
            return False
        if sum(size for _, size in reusable.session.execute(TABLES)) > _LARGE_BYTES:
            return False
        delete_rows(reusable.session)
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
    fork_server.prepare()
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
