"""Which schema has the tables, and whether it is as new as this program needs."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import resources
from typing import LiteralString

from psycopg import sql
from psycopg.rows import TupleRow

from orderlib.errors import ConfigurationError
from orderlib.postgres import queries
from orderlib.postgres.connections import Connection
from orderlib.postgres.errors import translate_errors

_FILE = re.compile(r"(\d{4})_\w+\.sql")


def migrations() -> dict[int, str]:
    """Return the file names of the migrations by number, in order."""
    files = (entry.name for entry in resources.files("orderlib.postgres").joinpath("migrations").iterdir())
    return dict(sorted((int(found[1]), found[0]) for found in map(_FILE.fullmatch, files) if found))


LATEST_MIGRATION = max(migrations())

#: The oldest major version of PostgreSQL. It lets a role grant memberships with options (SET, INHERIT).
OLDEST_POSTGRESQL = 16


def check_schema(connection: Connection) -> None:
    """Raise ConfigurationError, with the remedy, if the schema is missing or older than this program needs."""
    with translate_errors(connection):
        location = one_row(connection, queries.SCHEMA_LOCATION)
        number = one_row(connection, queries.SCHEMA_NUMBER)[0] if location[0] else None
    require_schema(location, number)


def require_schema(location: TupleRow, number: int | None) -> None:
    """Do the check of ``check_schema`` on a row of SCHEMA_LOCATION and the number of SCHEMA_NUMBER."""
    found, role, search_path, other_schema, is_usable, foreign_schema = location
    if not found and other_schema:
        raise tables_elsewhere_error(role, search_path, other_schema, is_usable=is_usable)
    if foreign_schema:
        raise _foreign_table_error(foreign_schema)
    number = number or 0
    if number < LATEST_MIGRATION:
        raise ConfigurationError(
            f"the schema is at migration {number}, but this program needs migration {LATEST_MIGRATION}: "
            "run `python -m orderlib migrate`"
        )


def tables_elsewhere_error(role: str, search_path: str, schema: str, *, is_usable: bool) -> ConfigurationError:
    """Return the error, with the remedy, for tables in a schema that the session does not find."""
    if not is_usable:
        return ConfigurationError(
            f"the tables are in schema {schema}, but role {role} lacks USAGE on it: run `python -m orderlib bootstrap`"
        )
    return ConfigurationError(
        f"the tables are in schema {schema}, but the search_path of role {role} is {search_path}: "
        f"run ALTER ROLE {quote_identifier(role)} SET search_path = {quote_identifier(schema)}, "
        "or set it in the URL's options"
    )


def _foreign_table_error(schema: str) -> ConfigurationError:
    """Return the error, with the remedy, for a table of another program in the schema that would get the tables."""
    return ConfigurationError(
        f"the table schema_migrations in schema {schema} belongs to another program: create a schema for the tables of "
        "orderlib, add options=-csearch_path%3DNAME to each URL, and run `python -m orderlib bootstrap` and "
        "`python -m orderlib migrate`"
    )


def schema_to_set_up(connection: Connection, on_message: Callable[[str], None]) -> str:
    """Return the schema of the search_path that has the tables, or the one that gets them.

    If the search_path names none with tables, and the URL chooses none, return another one that has tables.
    ``on_message`` receives a message about tables in another schema than the one that the URL chooses.
    """
    found, _, _, other_schema, _, _ = one_row(connection, queries.SCHEMA_LOCATION)
    [chosen] = one_row(connection, queries.CHOSEN_SCHEMA)
    if other_schema and not found and not chosen:
        return str(other_schema)
    schema = table_schema(connection)
    if chosen and schema != chosen:
        on_message(
            f"the tables are in schema {schema}, which the search_path names after {chosen}: "
            f"for other tables in {chosen}, use a search_path without {schema}"
        )
    return schema


def table_schema(connection: Connection) -> str:
    """Return the schema of the search_path that has the tables, or its first one, which gets them.

    Raises ConfigurationError if no schema of the search_path exists, or if another program has a table
    ``schema_migrations`` there.
    """
    schema, foreign_schema = one_row(connection, queries.TABLE_SCHEMA)
    if foreign_schema:
        raise _foreign_table_error(foreign_schema)
    if schema is None:
        raise ConfigurationError(
            "the search_path names no existing schema that this role may use: create one, or change the search_path"
        )
    return str(schema)


def require_usable_database(connection: Connection) -> None:
    """Raise ConfigurationError if the server is too old, or if the database has another encoding than UTF8."""
    major_version = connection.info.server_version // 10_000
    if major_version < OLDEST_POSTGRESQL:
        raise ConfigurationError(
            f"PostgreSQL {major_version} is too old: orderlib needs version {OLDEST_POSTGRESQL} or newer"
        )
    [encoding] = one_row(connection, queries.DATABASE_ENCODING)
    if encoding != "UTF8":
        raise ConfigurationError(f"the encoding of the database is {encoding}, but orderlib needs UTF8")


def quote_identifier(name: str) -> str:
    """Return an identifier as SQL."""
    return sql.Identifier(name).as_string()


def one_row(connection: Connection, statement: LiteralString) -> TupleRow:
    """Run a statement that returns one row."""
    row = connection.execute(statement).fetchone()
    assert row is not None
    return row
