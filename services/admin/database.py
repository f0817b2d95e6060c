"""How the commands connect to PostgreSQL."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from orderlib.commands import APPLICATION_NAME
from orderlib.postgres.connections import Connection, open_connection
from orderlib.postgres.grants import expect_role, is_superuser
from orderlib.postgres.privileges import URL_VARIABLES
from orderlib.postgres.schema import check_schema
from services.settings import database_url


@contextmanager
def open_database(environ: Mapping[str, str], url_name: str) -> Iterator[Connection]:
    """Connect to a database, and raise ConfigurationError if its schema is missing or too old for this program.

    ``url_name`` is the variable with the URL of one of the roles. Warn of a superuser.
    """
    with open_connection(database_url(environ, url_name), application_name=APPLICATION_NAME) as connection:
        warn_of_superuser(connection, url_name)
        with expect_role(connection, _role_of(url_name)):
            check_schema(connection)
            yield connection


def warn_of_superuser(connection: Connection, url_name: str) -> None:
    """Print a warning if the URL in this variable logs in as a superuser."""
    if is_superuser(connection):
        print(f"warning: {url_name} logs in as a superuser, but {_role_of(url_name)} is enough", file=sys.stderr)


def _role_of(url_name: str) -> str:
    return next(role for role, variable in URL_VARIABLES.items() if variable == url_name)
