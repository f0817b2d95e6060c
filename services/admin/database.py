"""How the commands connect to PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from orderlib.commands import APPLICATION_NAME
from orderlib.postgres.connections import Connection, open_connection
from orderlib.postgres.schema import check_schema
from services.settings import database_url


@contextmanager
def open_database(environ: Mapping[str, str], url_name: str) -> Iterator[Connection]:
    """Connect to a database, and raise ConfigurationError if its schema is missing or too old for this program."""
    with open_connection(database_url(environ, url_name), application_name=APPLICATION_NAME) as connection:
        check_schema(connection)
        yield connection
