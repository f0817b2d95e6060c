"""Connections, all set up in the same way."""

from __future__ import annotations

import re

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import TupleRow

from orderlib.errors import ConfigurationError
from orderlib.postgres import queries
from orderlib.postgres.errors import translated_errors
from orderlib.postgres.hosts import connect_to_any

Connection = psycopg.Connection[TupleRow]


#: Unless the URL says otherwise: give up connecting after 5 s, notice a peer that is gone within about 15 s.
_DEFAULTS: dict[str, str | int] = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}


_ENCODE = (
    "in a user name or a password, write @ as %40, : as %3A, / as %2F, ? as %3F, # as %23, % as %25 and a space as %20 "
    "(in the form key=value, put the value in single quotes)"
)

#: A URL without a special character in user name or password that would have to be encoded. Where an unencoded `@` or
#: `/` cuts a password in two, its end would be taken for a host or a database, and shown.
_PLAIN_URL = re.compile(r"postgres(?:ql)?://(?:[^@/?]*@)?[^@]*")
_KEY_AND_VALUE = re.compile(r"(\w+)\s*=\s*(?:'(?:\\.|[^'\\])*'|(?:\\.|[^\s\\])*)", re.DOTALL)


def connection_arguments(url: str, application_name: str) -> dict[str, str | int]:
    """What psycopg needs to connect. Raises ConfigurationError for a URL that is none; it quotes no password."""
    try:
        given = conninfo_to_dict(url)
    except (psycopg.Error, UnicodeEncodeError):
        raise ConfigurationError(f"the database URL is not one that PostgreSQL's libpq takes: {_ENCODE}") from None
    if "://" in url[:16] and url.startswith("postgres"):
        if not _PLAIN_URL.fullmatch(url):
            raise ConfigurationError(f"the database URL can be read in two ways: {_ENCODE}")
    else:
        names = _KEY_AND_VALUE.findall(url)
        if len(names) != len(set(names)):
            raise ConfigurationError(f"the database URL gives an option twice: {_ENCODE}")
    return {
        **_DEFAULTS,
        "application_name": application_name,
        **{k: v for k, v in given.items() if v is not None},
        # Whatever PGCLIENTENCODING says: in any other, some orders could not be sent.
        "client_encoding": "utf8",
    }


def prepare_session(connection: Connection) -> None:
    """Set everything that our SQL depends on, in one round trip, whatever role, database, server or environment say.

    The session is in autocommit mode afterwards, so that transactions begin where they are written.
    """
    connection.autocommit = True
    connection.execute(queries.SET_UP_SESSION)


def connect(url: str, *, application_name: str) -> Connection:
    """One connection. Raises DatabaseUnavailable or ConfigurationError."""
    arguments = connection_arguments(url, application_name)
    with translated_errors():
        connection = psycopg.Connection(connect_to_any(arguments))
    try:
        with translated_errors(connection):
            prepare_session(connection)
    except BaseException:
        connection.close()
        raise
    return connection
