"""Which schema has the tables, and whether it is as new as this program needs."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import resources
from typing import LiteralString, NamedTuple

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


class SchemaLocation(NamedTuple):
    """Where the tables are, as a session sees it: a row of SCHEMA_LOCATION."""

    #: Whether the session finds the tables.
    found: bool
    #: The role to correct if it does not, and its search_path.
    role: str
    search_path: str
    #: Another schema that has the tables, and whether the role may use it. ``None`` if there is none.
    other_schema: str | None
    is_usable: bool | None
    #: The schema in which another program has a table ``schema_migrations``.
    foreign_schema: str | None
    #: The schema of the tables that the session finds, and a table of another one that hides one of them.
    schema: str | None
    hiding_table: str | None


def schema_location(connection: Connection) -> SchemaLocation:
    """Return where the tables are, as this session sees it."""
    return SchemaLocation(*one_row(connection, queries.SCHEMA_LOCATION))


def check_schema(connection: Connection) -> None:
    """Raise ConfigurationError, with the remedy, if the schema is missing or older than this program needs."""
    with translate_errors(connection):
        location = schema_location(connection)
        number = one_row(connection, queries.SCHEMA_NUMBER)[0] if location.found else None
    require_schema(location, number)


def require_schema(location: SchemaLocation, number: int | None) -> None:
    """Do the check of ``check_schema`` on a location and the number of SCHEMA_NUMBER."""
    if not location.found and location.other_schema:
        raise tables_elsewhere_error(location)
    if location.foreign_schema:
        raise _foreign_table_error(location.foreign_schema)
    number = number or 0
    if number < LATEST_MIGRATION:
        raise ConfigurationError(
            f"the schema is at migration {number}, but this program needs migration {LATEST_MIGRATION}: "
            "run `python -m orderlib migrate`"
        )
    if location.hiding_table:
        raise ConfigurationError(
            f"the table {location.hiding_table} hides that of orderlib in schema {location.schema}: the search_path of "
            f"role {location.role} is {location.search_path}; name {location.schema} first, for example in the URL's "
            "options"
        )


def tables_elsewhere_error(location: SchemaLocation) -> ConfigurationError:
    """Return the error, with the remedy, for tables in ``other_schema`` that the session does not find."""
    role, schema = location.role, location.other_schema
    assert schema is not None
    if not location.is_usable:
        return ConfigurationError(
            f"the tables are in schema {schema}, but role {role} lacks USAGE on it: run `python -m orderlib bootstrap`"
        )
    return ConfigurationError(
        f"the tables are in schema {schema}, but the search_path of role {role} is {location.search_path}: "
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
    location = schema_location(connection)
    [chosen] = one_row(connection, queries.CHOSEN_SCHEMA)
    if location.other_schema and not location.found and not chosen:
        return location.other_schema
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
