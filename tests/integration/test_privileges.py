"""Who may do what, compared with the one table in docs/run-in-production.md; and what that does not grant, tried."""

from __future__ import annotations

import itertools
import re

import psycopg
import pytest
from psycopg import sql

from orderlib import migrate
from orderlib.postgres.privileges import OWNER, PRIVILEGES
from tests.support import ROOT
from tests.support.databases import Database, bootstrap

DOCUMENT = (ROOT / "docs" / "run-in-production.md").read_text(encoding="utf-8")

#: (table, role) → privileges on the table, and "PRIVILEGE column" for privileges on single columns.
Matrix = dict[tuple[str, str], set[str]]


def written_matrix() -> Matrix:
    """The privileges in the document's table of roles; "owns" for the owner."""
    header, rows = re.findall(r"^(\| table \|.*)\n\|[-|]+\n((?:\|.*\n)+)", DOCUMENT, re.MULTILINE)[0]
    _, *roles = cells(header)
    matrix: Matrix = {}
    for line in rows.splitlines():
        table, *texts = cells(line)
        for role, text in zip(roles, texts, strict=True):
            matrix[table, role] = set() if text == "—" else set(privileges(text))
    return matrix


def cells(line: str) -> list[str]:
    return [cell.strip(" `") for cell in line.strip("|").split("|")]


def privileges(text: str) -> list[str]:
    """``SELECT, UPDATE (a, b)`` as SELECT, UPDATE a, UPDATE b."""
    found = re.findall(r"(\w+)(?: \(([^)]*)\))?(?:, |$)", text)
    return [f"{privilege} {column}".strip() for privilege, columns in found for column in columns.split(", ")]


def granted_matrix(connection: psycopg.Connection) -> Matrix:
    """All privileges that PostgreSQL has granted on tables, views and sequences."""
    roles = {role for _, role in written_matrix()}
    owners = connection.execute(
        """
        SELECT relname, pg_get_userbyid(relowner) FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND relkind NOT IN ('i', 'I', 't', 'c')
            AND NOT starts_with(relname, 'citus_')
        """
    ).fetchall()
    matrix: Matrix = {(table, role): set() for (table, _), role in itertools.product(owners, roles)}
    for table, owner in owners:
        matrix[table, owner] = {"owns"}
    grants = connection.execute(
        """
        SELECT relname, coalesce(grantee_role.rolname, 'public'), concat_ws(' ', privilege_type, attname)
        FROM (
            SELECT oid, relname, relowner, relnamespace, NULL AS attname, relacl AS acl FROM pg_class
            UNION ALL
            SELECT c.oid, relname, relowner, relnamespace, attname, attacl
            FROM pg_class c JOIN pg_attribute ON attrelid = c.oid
        ) granting, aclexplode(acl) LEFT JOIN pg_roles grantee_role ON grantee_role.oid = grantee
        WHERE relnamespace = 'public'::regnamespace AND grantee <> relowner AND NOT starts_with(relname, 'citus_')
        """
    )
    for table, role, privilege in grants:
        matrix.setdefault((table, role), set()).add(privilege)
    return matrix


def test_the_privileges_of_all_roles_on_all_tables_are_the_listed_ones(database: Database) -> None:
    with psycopg.connect(database.superuser_url) as connection:
        assert granted_matrix(connection) == written_matrix()


def test_the_privileges_that_migrate_restores_are_the_listed_ones() -> None:
    restored = {
        (table, role): set().union(*(privileges(text) for text in texts))
        for table, roles in PRIVILEGES.items()
        for role, texts in roles.items()
    }
    for (table, role), written in written_matrix().items():
        assert restored.get((table, role), {"owns"} if role == OWNER else set()) == written, (table, role)
    assert {table for table, _ in restored} == {table for table, _ in written_matrix()}


def test_migrate_restores_every_privilege_that_was_revoked_or_added(database: Database) -> None:
    with psycopg.connect(database.superuser_url, autocommit=True) as superuser:
        for table in PRIVILEGES:
            superuser.execute(f"REVOKE ALL ON {table} FROM orders_writer".encode())
            superuser.execute(f"GRANT ALL ON {table} TO orders_reader, orders_migrator, PUBLIC".encode())
        migrate(database.migrator_url)
        assert granted_matrix(superuser) == written_matrix()


def test_the_list_of_privileges_has_every_role_and_every_table() -> None:
    written = written_matrix()
    assert {role for _, role in written} == {"orders_owner", "orders_migrator", "orders_writer", "orders_reader"}
    for table in {table for table, _ in written}:
        assert written[table, "orders_owner"] == {"owns"}
        assert written[table, "orders_writer"] | written[table, "orders_reader"], table


@pytest.mark.parametrize(
    "change",
    [
        "CREATE TABLE of_a_later_migration (n int)",
        "CREATE VIEW of_a_later_migration AS SELECT * FROM delivery",
        "GRANT MAINTAIN ON items TO orders_writer",
        "GRANT SELECT (value) ON rejects TO orders_reader",
        "GRANT SELECT ON items TO PUBLIC",
        "REVOKE SELECT ON items FROM orders_reader",
        "ALTER TABLE items OWNER TO orders_migrator",
    ],
)
def test_every_object_and_privilege_of_a_later_migration_must_be_listed(database: Database, change: str) -> None:
    with psycopg.connect(database.superuser_url) as connection:
        if "OWNER" not in change:
            connection.execute("SET ROLE orders_owner")
        connection.execute(change.encode())
        assert granted_matrix(connection) != written_matrix()


#: A statement that needs each privilege, on a table or on one column.
USES = {
    "SELECT": "SELECT {columns} FROM {table}",
    "INSERT": "INSERT INTO {table} ({columns}) SELECT {nulls} WHERE false",
    "UPDATE": "UPDATE {table} SET ({columns}) = ROW({nulls}) WHERE false",
    "DELETE": "DELETE FROM {table} WHERE false",
    "TRUNCATE": "TRUNCATE {table}",
}


@pytest.mark.parametrize("role", ["orders_migrator", "orders_writer", "orders_reader"])
def test_a_role_has_the_listed_privileges_and_no_others(module_database: Database, role: str) -> None:
    url = {
        "orders_migrator": module_database.migrator_url,
        "orders_writer": module_database.writer_url,
        "orders_reader": module_database.reader_url,
    }[role]
    with psycopg.connect(module_database.superuser_url) as superuser:
        columns: dict[str, list[str]] = dict(
            superuser.execute(
                """
                SELECT table_name, array_agg(column_name::text)
                FROM information_schema.columns WHERE table_schema = 'public' GROUP BY 1
                """
            ).fetchall()
        )
    with psycopg.connect(url) as connection:
        for (table, grantee), written in written_matrix().items():
            if grantee != role:
                continue
            for privilege, column in itertools.product(USES, columns[table]):
                expected = bool({privilege, f"{privilege} {column}"} & written)
                assert may(connection, USES[privilege], table, column) is expected, f"{privilege} {column} on {table}"


def may(connection: psycopg.Connection, use: str, table: str, column: str) -> bool:
    """Try it, and take it back."""
    names = {"table": sql.Identifier(table), "columns": sql.Identifier(column), "nulls": sql.SQL("NULL")}
    try:
        with connection.transaction(force_rollback=True):
            connection.execute(sql.SQL(use).format(**names))
    except psycopg.errors.InsufficientPrivilege:
        return False
    except (psycopg.errors.FeatureNotSupported, psycopg.errors.WrongObjectType):
        # A view with computed columns takes no rows from any role.
        return False
    except psycopg.errors.NullValueNotAllowed:
        # Citus: the role has the privilege, but a row needs an order_uid.
        return True
    return True


def test_no_role_has_an_attribute_that_it_does_not_need(database: Database) -> None:
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


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE mine (n int)",
        "ALTER TABLE orders ADD COLUMN mine int",
        "DROP TABLE items",
        "CREATE INDEX ON orders (entry)",
        "CREATE FUNCTION mine() RETURNS int RETURN 1",
        "CREATE ROLE mine",
        "ALTER ROLE orders_reader SUPERUSER",
        "SET ROLE orders_owner",
        "SET ROLE orders_migrator",
        "SET SESSION AUTHORIZATION orders_owner",
    ],
)
def test_reader_and_writer_create_nothing_and_set_no_other_role(module_database: Database, statement: str) -> None:
    for url in (module_database.reader_url, module_database.writer_url):
        with psycopg.connect(url) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(statement.encode())


def test_no_role_may_create_temporary_tables(empty_database: Database) -> None:
    bootstrap(empty_database)
    for url in (empty_database.writer_url, empty_database.reader_url, empty_database.migrator_url):
        with psycopg.connect(url) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("CREATE TEMPORARY TABLE mine (n int)")


def test_the_migrator_alone_has_no_privileges_until_it_becomes_the_owner(database: Database) -> None:
    with psycopg.connect(database.migrator_url) as connection:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("SELECT * FROM orders")
        connection.rollback()
        connection.execute("SET ROLE orders_owner")
        assert connection.execute("SELECT count(*) FROM orders").fetchone() == (0,)


def test_repeated_bootstrap_and_migrate_change_no_privilege(empty_database: Database) -> None:
    for expected in (True, False):
        bootstrap(empty_database)
        assert bool(migrate(empty_database.migrator_url)) is expected


def test_select_on_every_table_is_granted_by_name(database: Database) -> None:
    """Not by default privileges: those belong to the role that creates, and are forgotten with it."""
    with psycopg.connect(database.superuser_url) as connection:
        assert connection.execute(sql.SQL("SELECT count(*) FROM pg_default_acl")).fetchone() == (0,)
