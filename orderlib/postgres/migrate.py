"""``migrate``: numbered SQL files create the tables, as the owner."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from importlib import resources

import psycopg

from orderlib.postgres import queries
from orderlib.postgres.connections import Connection, open_connection
from orderlib.postgres.ddl import ignore_message, run_ddl
from orderlib.postgres.grants import correct_grants, expect_role, grant_statement, is_superuser
from orderlib.postgres.privileges import MIGRATOR, PRIVILEGES
from orderlib.postgres.schema import (
    migrations,
    one_row,
    require_usable_database,
    schema_location,
    table_schema,
    tables_elsewhere_error,
)


def migrate(
    url: str,
    *,
    application_name: str = "orderlib",
    on_applied: Callable[[str], None] | None = None,
    on_message: Callable[[str], None] | None = None,
) -> list[str]:
    """Create the tables, or bring them up to date. Return the names of the migrations that were applied now.

    ``url`` belongs to orders_migrator; ``bootstrap`` creates that role. The tables are in the schema of the search_path
    that has them already, or else in the first one. To choose another, create it, and add
    ``options=-csearch_path%3DNAME`` to each URL, also to that of ``bootstrap``. Then one database can have several sets
    of tables, each with its own orders. The search_path of each set must not name the schema of another set.

    Each migration is applied once, in its own transaction. ``on_applied`` receives its name after that. Also restores
    the privileges on the tables. Idempotent, and safe to run concurrently: ``on_message`` receives the holder of each
    lock that this waits for, warnings of migrations, corrected privileges, and that a superuser is not needed.

    Raises ConfigurationError for a role that may not do this, a server older than PostgreSQL 16, a database that is not
    UTF8, or a schema in which another program has a table ``schema_migrations``; and DatabaseUnavailable if there is no
    connection, or no lock within a minute. The failed migration is rolled back; those before it stay applied. Orders
    are never changed.
    """
    tell = on_message or ignore_message

    def on_notice(diagnostic: psycopg.errors.Diagnostic) -> None:
        if diagnostic.severity_nonlocalized == "WARNING":
            tell(str(diagnostic.message_primary))

    # If two calls create the same table, one fails on the catalog's unique index. It retries and finds the table.
    # If two calls grant privileges on one table, one fails with an internal error: "tuple concurrently updated".
    conflicts = (
        psycopg.errors.UniqueViolation,
        psycopg.errors.DuplicateTable,
        psycopg.errors.DuplicateObject,  # the table's row type
        psycopg.errors.InternalError_,
    )
    applied: list[str] = []
    with open_connection(url, application_name=application_name) as connection, expect_role(connection, MIGRATOR):
        connection.add_notice_handler(on_notice)
        if is_superuser(connection):
            tell(f"warning: the database URL logs in as a superuser; {MIGRATOR} is enough")
        run_ddl(connection, lambda: _prepare(connection), conflicts, tell)
        for number, name in migrations().items():
            if run_ddl(connection, functools.partial(_apply, connection, number, name), (), tell):
                applied.append(name)
                if on_applied:
                    on_applied(name)
        for statement in run_ddl(connection, lambda: _restore_grants(connection), conflicts, tell):
            tell(f"corrected: {statement}")
    return applied


def _prepare(connection: Connection) -> None:
    """Create the table of migrations, unless the schema has one.

    If another schema has one, the search_path may be wrong: refuse, unless the URL chooses this schema.
    """
    connection.execute(queries.BECOME_OWNER)
    require_usable_database(connection)
    location = schema_location(connection)
    if location.found:
        return
    [chosen] = one_row(connection, queries.CHOSEN_SCHEMA)
    if location.other_schema and not chosen:
        raise tables_elsewhere_error(location)
    connection.execute(queries.USE_SCHEMA, {"schema": table_schema(connection)})
    connection.execute(queries.SCHEMA_MIGRATIONS)
    connection.execute(queries.LOCK_SCHEMA)
    for role, privileges in PRIVILEGES["schema_migrations"].items():
        connection.execute(grant_statement(queries.GRANT, "schema_migrations", role, privileges))


def _apply(connection: Connection, number: int, name: str) -> bool:
    """Apply a migration unless it is applied already. Return whether this call applied it."""
    connection.execute(queries.BECOME_OWNER)
    connection.execute(queries.USE_SCHEMA, {"schema": table_schema(connection)})
    if connection.execute(queries.IS_APPLIED, {"number": number}).fetchone():
        return False
    connection.execute(queries.LOCK_SCHEMA)
    if connection.execute(queries.IS_APPLIED, {"number": number}).fetchone():
        return False
    connection.execute(queries.LIFT_TIME_LIMITS)
    connection.execute(queries.LIMIT_IDLE_IN_TRANSACTION)
    script = resources.files("orderlib.postgres").joinpath("migrations", name).read_text(encoding="utf-8")
    for statement in _statements(script):
        # Binary results use the extended protocol, which refuses a text with several statements, as Citus does.
        connection.execute(statement.encode(), binary=True)
    connection.execute(queries.RECORD_MIGRATION, {"number": number, "name": name})
    return True


def _statements(script: str) -> Iterator[str]:
    """Yield the statements of a migration. Each ends with a semicolon at the end of a line, but not inside ``$$``."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if line.rstrip().endswith(";") and statement.count("$$") % 2 == 0:
            yield statement
            statement = ""
    if statement.strip():
        yield statement


def _restore_grants(connection: Connection) -> list[str]:
    connection.execute(queries.BECOME_OWNER)
    connection.execute(queries.USE_SCHEMA, {"schema": table_schema(connection)})
    return correct_grants(connection)
