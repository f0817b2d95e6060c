"""The schema: roles made once by a superuser, tables made by numbered SQL files as the owner."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import LiteralString

import psycopg
from psycopg import sql
from psycopg.rows import TupleRow

from orderlib import queries
from orderlib.errors import BrokenSetup
from orderlib.postgres.connection import Connection, connection_arguments
from orderlib.postgres.errors import translated_errors

OWNER = "orders_owner"
MIGRATOR = "orders_migrator"
WRITER = "orders_writer"
READER = "orders_reader"

#: What each program cannot do without: (table, right).
WRITER_RIGHTS = tuple(
    (table, right)
    for table, rights in {
        "orders": ("SELECT", "INSERT", "DELETE"),
        "delivery": ("INSERT",),
        "payment": ("INSERT",),
        "items": ("INSERT",),
        "consumer_offsets": ("SELECT", "INSERT"),
        "rejects": ("INSERT",),
    }.items()
    for right in rights
)
READER_RIGHTS = tuple((table, "SELECT") for table in ("orders", "delivery", "payment", "items"))

_FILE = re.compile(r"(\d{4})_\w+\.sql")


def _migrations() -> dict[int, str]:
    """The file names of the migrations by number, in order."""
    files = (entry.name for entry in resources.files("orderlib").joinpath("migrations").iterdir())
    return dict(sorted((int(found[1]), found[0]) for found in map(_FILE.fullmatch, files) if found))


LATEST_MIGRATION = max(_migrations())


def bootstrap(connection: Connection, passwords: Mapping[str, str]) -> None:
    """Make the four roles and give them this database, as a superuser; again is harmless, at once from two places too.

    ``passwords`` of the three login roles, by name, replace the ones they had. Raises BrokenSetup unless the database
    is UTF8: in any other encoding some orders could not be kept.
    """
    with translated_errors(connection), connection.transaction():
        connection.execute(queries.LOCK_SCHEMA)
        encoding, database = _one_row(connection, queries.DATABASE)
        if encoding != "UTF8":
            raise BrokenSetup(f"the database's encoding is {encoding}, orders need UTF8")
        for statement in queries.BOOTSTRAP:
            connection.execute(statement)
        for role, password in passwords.items():
            verifier = connection.pgconn.encrypt_password(password.encode(), role.encode(), b"scram-sha-256")
            connection.execute(
                sql.SQL("ALTER ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(role), sql.Literal(verifier.decode()))
            )
        name = sql.Identifier(str(database))
        connection.execute(sql.SQL("REVOKE TEMPORARY ON DATABASE {} FROM PUBLIC").format(name))
        connection.execute(
            sql.SQL("GRANT CONNECT ON DATABASE {} TO orders_migrator, orders_writer, orders_reader").format(name)
        )


def role_of(variable: str, url: str) -> tuple[str, str]:
    """The role in a URL and its password. Raises BrokenSetup naming the variable where one is missing."""
    arguments = connection_arguments(url, application_name="")
    role, password = arguments.get("user"), arguments.get("password")
    if role not in {MIGRATOR, WRITER, READER}:
        raise BrokenSetup(f"{variable} must log in as one of {MIGRATOR}, {WRITER}, {READER}")
    if not password:
        raise BrokenSetup(f"{variable} has no password for {role}")
    return str(role), str(password)


def migrate(connection: Connection, on_applied: Callable[[str], None] = lambda _: None) -> int:
    """Apply the migrations that are missing, each in its own transaction as the owner; how many there were.

    Twice, or from two machines at once, is harmless: an advisory lock lets one go first.
    """
    applied = 0
    for number, name in _migrations().items():
        with translated_errors(connection), connection.transaction():
            connection.execute(queries.LOCK_SCHEMA)
            connection.execute(queries.BECOME_OWNER)
            encoding, _ = _one_row(connection, queries.DATABASE)
            if encoding != "UTF8":
                raise BrokenSetup(f"the database's encoding is {encoding}, orders need UTF8")
            for statement in queries.SCHEMA_MIGRATIONS:
                connection.execute(statement)
            if connection.execute(queries.IS_APPLIED, {"number": number}).fetchone():
                continue
            connection.execute(queries.LIFT_TIME_LIMITS)
            script = resources.files("orderlib").joinpath("migrations", name).read_text(encoding="utf-8")
            connection.execute(script)
            connection.execute(queries.RECORD_MIGRATION, {"number": number, "name": name})
        on_applied(name)
        applied += 1
    return applied


def check_schema(connection: Connection) -> None:
    """Raise BrokenSetup, naming the command, if the schema is older than this program. A newer one is fine."""
    number = 0
    with translated_errors(connection), contextlib.suppress(psycopg.errors.UndefinedTable):
        [number] = _one_row(connection, queries.SCHEMA_NUMBER)
    require_schema(number or 0)


def require_schema(number: int) -> None:
    """Raise BrokenSetup, naming the command, for the number of a schema that is older than this program."""
    if number < LATEST_MIGRATION:
        raise BrokenSetup(
            f"the database's schema is at {number}, this program needs {LATEST_MIGRATION}: "
            "run `python -m services.admin migrate`"
        )


def check_rights(connection: Connection, rights: Sequence[tuple[str, str]]) -> None:
    """Raise BrokenSetup naming the first of these (table, right) that the session's role lacks."""
    wanted = {"tables": [table for table, _ in rights], "rights": [right for _, right in rights]}
    with translated_errors(connection):
        missing = connection.execute(queries.MISSING_RIGHTS, wanted).fetchone()
    if missing:
        role, table, right = missing
        raise BrokenSetup(f"the role {role} may not {right} on {table}: run `python -m services.admin migrate`")


def _one_row(connection: Connection, statement: LiteralString) -> TupleRow:
    row = connection.execute(statement).fetchone()
    assert row is not None
    return row
