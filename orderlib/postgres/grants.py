"""Compare the privileges that PostgreSQL has granted with those that the roles need, and correct them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import LiteralString

from psycopg import sql

from orderlib.errors import ConfigurationError
from orderlib.postgres import queries
from orderlib.postgres.connections import Connection
from orderlib.postgres.errors import sqlstates, translate_errors
from orderlib.postgres.privileges import MIGRATOR, PRIVILEGES, ROLES, URL_VARIABLES, table_privileges
from orderlib.postgres.schema import LATEST_MIGRATION, one_row

_INSUFFICIENT_PRIVILEGE = "42501"


@contextmanager
def expect_role(connection: Connection, expected: str) -> Iterator[None]:
    """Use a session that should be that of one of the roles. If a configuration error is due to another one, say so."""
    try:
        yield
    except ConfigurationError as exc:
        role = connection.info.user
        if role not in ROLES or role == expected:
            raise
        text = f"the database URL logs in as {role}, but must log in as {expected} (correct {URL_VARIABLES[expected]})"
        if _INSUFFICIENT_PRIVILEGE in sqlstates(exc):
            text += f": {exc}"
        raise ConfigurationError(text) from exc


def is_superuser(connection: Connection) -> bool:
    """Return whether the session's role is a superuser, as the server has reported it."""
    return connection.info.parameter_status("is_superuser") == "on"


def check_privileges(connection: Connection, expected: str) -> None:
    """Raise ConfigurationError naming the first table privilege that the session lacks, and the role ``expected`` has.

    If it is the session of another one of the roles, name that instead.
    """
    privileges = table_privileges(expected)
    wanted = {"tables": [table for table, _ in privileges], "privileges": [privilege for _, privilege in privileges]}
    with expect_role(connection, expected):
        with translate_errors(connection):
            missing = connection.execute(queries.MISSING_PRIVILEGES, wanted).fetchone()
        if missing:
            role, table, privilege = missing
            raise ConfigurationError(f"role {role} lacks {privilege} on {table}: run `python -m orderlib migrate`")


def correct_grants(connection: Connection) -> list[str]:
    """As the owner, change the privileges on its tables to those in PRIVILEGES. Return the statements.

    Does not change those of the login roles if the last migration is not this release's: other releases have others.
    """
    connection.execute(queries.LOCK_SCHEMA)
    rows = connection.execute(queries.TABLE_GRANTS).fetchall()
    grants = {(table, role): (set(privileges), is_grantable) for table, role, privileges, is_grantable in rows}
    tables = {table for (table,) in connection.execute(queries.TABLES_OF_OWNER).fetchall()}
    [number] = one_row(connection, queries.SCHEMA_NUMBER)
    wanted: dict[tuple[str, str | None], tuple[LiteralString, ...]] = {}
    if number == LATEST_MIGRATION:
        wanted = {
            (table, role): privileges
            for table in PRIVILEGES.keys() & tables
            for role, privileges in {MIGRATOR: (), **PRIVILEGES[table]}.items()
        }
    corrected: list[str] = []
    for table, role in sorted(grants.keys() | wanted.keys(), key=str):
        privileges = wanted.get((table, role), ())
        found, is_grantable = grants.get((table, role), (set(), False))
        if (found == _single_privileges(privileges) and not is_grantable) or (
            role in ROLES and (table, role) not in wanted
        ):
            continue
        for statement in ([queries.REVOKE_ALL] if found else []) + ([queries.GRANT] if privileges else []):
            composed = grant_statement(statement, table, role, privileges)
            connection.execute(composed)
            corrected.append(composed.as_string(connection))
    return corrected


def grant_statement(
    statement: LiteralString, table: str, role: str | None, privileges: Iterable[LiteralString]
) -> sql.Composed:
    """Return queries.GRANT or queries.REVOKE_ALL for a table and a role. Without a role it is for PUBLIC."""
    return sql.SQL(statement).format(
        table=sql.Identifier(table),
        role=sql.Identifier(role) if role else sql.SQL("PUBLIC"),
        privileges=sql.SQL(", ").join(map(sql.SQL, privileges)),
    )


def _single_privileges(privileges: Iterable[str]) -> set[str]:
    """Return single privileges: ``UPDATE a`` and ``UPDATE b`` for ``UPDATE (a, b)``."""
    single = set()
    for text in privileges:
        privilege, _, columns = text.rstrip(")").partition(" (")
        single |= {f"{privilege} {column}".strip() for column in columns.split(", ")}
    return single
