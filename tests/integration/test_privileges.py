"""Who may do what, compared with one written table; and what each may not do, tried."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import sql

from orderlib.postgres.connection import connect
from orderlib.postgres.migrate import bootstrap, migrate
from tests.conftest import Database, role_passwords

SELECT, INSERT, UPDATE, DELETE = "SELECT", "INSERT", "UPDATE", "DELETE"

#: role → table → rights on the whole table. Anything that is not here, nobody has.
TABLE_RIGHTS = {
    "orders_writer": {
        "orders": {SELECT, INSERT, DELETE},
        "delivery": {SELECT, INSERT},
        "payment": {SELECT, INSERT},
        "items": {SELECT, INSERT},
        "consumer_offsets": {SELECT, INSERT},
        "rejects": {SELECT, INSERT},
        "schema_migrations": {SELECT},
    },
    "orders_reader": {
        "orders": {SELECT},
        "delivery": {SELECT},
        "payment": {SELECT},
        "items": {SELECT},
        "consumer_offsets": {SELECT},
        "schema_migrations": {SELECT},
    },
}

#: role → table → right → columns, where a right is only on some.
COLUMN_RIGHTS = {
    "orders_writer": {
        "orders": {UPDATE: {"source_topic_id", "source_partition", "source_offset", "source_time"}},
        "consumer_offsets": {UPDATE: {"next_offset", "updated_at"}},
        "rejects": {UPDATE: {"redriven_at", "redrive_outcome"}},
    },
    "orders_reader": {
        "rejects": {
            SELECT: {
                *("topic_id", "partition", "record_offset", "topic", "record_time"),
                *("code", "rejected_at", "redriven_at", "redrive_outcome"),
            }
        },
    },
}

_TABLE_GRANTS = """
SELECT grantee, table_name, privilege_type FROM information_schema.role_table_grants
WHERE table_schema = 'public' AND grantee <> 'orders_owner'
"""
_COLUMN_GRANTS = """
SELECT grantee, table_name, privilege_type, column_name FROM information_schema.column_privileges
WHERE table_schema = 'public' AND grantee <> 'orders_owner'
"""


def test_the_whole_matrix_of_roles_tables_and_rights_is_the_written_one(database: Database) -> None:
    with psycopg.connect(database.superuser_url) as connection:
        tables = {name for (name,) in connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")}
        found: dict[str, dict[str, set[str]]] = {}
        for role, table, right in connection.execute(_TABLE_GRANTS):
            found.setdefault(role, {}).setdefault(table, set()).add(right)
        columns: dict[str, dict[str, dict[str, set[str]]]] = {}
        for role, table, right, column in connection.execute(_COLUMN_GRANTS):
            if right not in found.get(role, {}).get(table, set()):
                columns.setdefault(role, {}).setdefault(table, {}).setdefault(right, set()).add(column)
        owners = connection.execute("SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'public'").fetchall()
    assert found == TABLE_RIGHTS
    assert columns == COLUMN_RIGHTS
    assert owners == [("orders_owner",)]
    # A table that a later migration adds without grants is in nobody's row, and so fails here.
    granted = {table for rows in (TABLE_RIGHTS, COLUMN_RIGHTS) for row in rows.values() for table in row}
    assert tables == granted


def test_no_role_of_ours_is_more_than_it_must_be(database: Database) -> None:
    with psycopg.connect(database.superuser_url) as connection:
        roles = connection.execute(
            """
            SELECT rolname, rolcanlogin, rolsuper OR rolcreatedb OR rolcreaterole OR rolreplication OR rolbypassrls
            FROM pg_roles WHERE rolname LIKE 'orders%' ORDER BY rolname
            """
        ).fetchall()
        members = connection.execute(
            """
            SELECT roleid::regrole::text, member::regrole::text
            FROM pg_auth_members WHERE roleid::regrole::text LIKE 'orders%'
            """
        ).fetchall()
    assert roles == [
        ("orders_migrator", True, False),
        ("orders_owner", False, False),
        ("orders_reader", True, False),
        ("orders_writer", True, False),
    ]
    assert members == [("orders_owner", "orders_migrator")]


WRITES = [
    "INSERT INTO consumer_offsets VALUES ('g', 't', 0, 'o', 0)",
    "UPDATE orders SET entry = 'x'",
    "DELETE FROM orders",
    "DELETE FROM rejects",
    "TRUNCATE orders CASCADE",
]
DEFINITIONS = [
    "CREATE TABLE mine (n int)",
    "ALTER TABLE orders ADD COLUMN mine int",
    "DROP TABLE items",
    "CREATE ROLE mine",
    "SET ROLE orders_owner",
]


@pytest.mark.parametrize(
    "statement", [*WRITES, *DEFINITIONS, "SELECT value FROM rejects", "SELECT faults FROM rejects"]
)
def test_a_reader_is_refused(module_database: Database, statement: str) -> None:
    with psycopg.connect(module_database.reader_url) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute(statement.encode())


@pytest.mark.parametrize(
    "statement",
    [
        *DEFINITIONS,
        "UPDATE orders SET entry = 'x'",
        "DELETE FROM rejects",
        "DELETE FROM consumer_offsets",
        "TRUNCATE items",
    ],
)
def test_a_writer_is_refused(module_database: Database, statement: str) -> None:
    with psycopg.connect(module_database.writer_url) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute(statement.encode())


def test_nobody_of_ours_may_make_temporary_tables(empty_database: Database) -> None:
    with connect(empty_database.superuser_url, application_name="tests") as connection:
        bootstrap(connection, role_passwords(empty_database))
    for url in (empty_database.writer_url, empty_database.reader_url, empty_database.migrator_url):
        with psycopg.connect(url) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("CREATE TEMPORARY TABLE mine (n int)")


def test_the_migrator_alone_has_no_rights_until_it_becomes_the_owner(database: Database) -> None:
    with psycopg.connect(database.migrator_url) as connection:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("SELECT * FROM orders")
        connection.rollback()
        connection.execute("SET ROLE orders_owner")
        assert connection.execute("SELECT count(*) FROM orders").fetchone() == (0,)


def test_bootstrap_and_migrate_are_harmless_when_done_again(empty_database: Database) -> None:
    for expected in (True, False):
        with connect(empty_database.superuser_url, application_name="tests") as connection:
            bootstrap(connection, role_passwords(empty_database))
        with connect(empty_database.migrator_url, application_name="tests") as connection:
            assert bool(migrate(connection)) is expected


def test_the_reading_of_every_table_is_granted_by_name(database: Database) -> None:
    """Not by default privileges: those belong to the role that creates, and are forgotten with it."""
    with psycopg.connect(database.superuser_url) as connection:
        assert connection.execute(sql.SQL("SELECT count(*) FROM pg_default_acl")).fetchone() == (0,)
