"""Open connections and set up their sessions, all in the same way."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import LiteralString

import psycopg
from psycopg.abc import ConnDict
from psycopg.adapt import AdaptersMap
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import TupleRow

from orderlib.errors import ConfigurationError, DatabaseUnavailable
from orderlib.postgres import queries
from orderlib.postgres.adapters import ADAPTERS
from orderlib.postgres.errors import LOCK_NOT_AVAILABLE, sqlstates, translate_errors
from orderlib.postgres.hosts import connect_to_any
from orderlib.postgres.poolers import refuse_transaction_pooler
from orderlib.repository import require_type

Connection = psycopg.Connection[TupleRow]


class OwnConnection(Connection):
    """A connection that orderlib opens. Adapters that a program registers globally do not change its results."""

    @property
    def adapters(self) -> AdaptersMap:
        """Return psycopg's own adapters."""
        return ADAPTERS


#: Unless the URL sets them: give up connecting after 5 s, and detect a lost peer within about 15 s.
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

#: A URL in which user name and password contain no special character that must be encoded. An unencoded `@` or `/`
#: would split a password, and the rest of it would be taken for a host or a database, and appear in messages.
_PLAIN_URL = re.compile(r"postgres(?:ql)?://(?:[^@/?]*@)?[^@]*")
_KEY_AND_VALUE = re.compile(r"(\w+)\s*=\s*(?:'(?:\\.|[^'\\])*'|(?:\\.|[^\s\\])*)", re.DOTALL)


def connection_arguments(url: str, application_name: str) -> dict[str, str | int]:
    """Return what psycopg needs to connect, or raise ConfigurationError for an invalid URL.

    That error shows no password, and neither do its cause and its context: libpq's error quotes parts of the URL.
    """
    given = _parse_url(require_type("the database URL", url, str))
    if "\0" in require_type("application_name", application_name, str):
        raise ValueError("application_name must not contain NUL")
    if given is None:
        raise ConfigurationError(f"the database URL is not valid for libpq: {_ENCODE}")
    if "://" in url[:16] and url.startswith("postgres"):
        if not _PLAIN_URL.fullmatch(url):
            raise ConfigurationError(f"the database URL is ambiguous: {_ENCODE}")
    else:
        names = _KEY_AND_VALUE.findall(url)
        if len(names) != len(set(names)):
            raise ConfigurationError(f"the database URL gives an option twice: {_ENCODE}")
    if not re.fullmatch(r"[0-9,]*", str(given.get("port") or "")):
        # It may be a part of a password.
        raise ConfigurationError(f"the database URL has an invalid port number: {_ENCODE}")
    return {
        **_DEFAULTS,
        "application_name": application_name,
        **{k: v for k, v in given.items() if v is not None},
        # Overrides PGCLIENTENCODING: in another encoding, some orders could not be sent.
        "client_encoding": "utf8",
    }


def check_url(name: str, url: str) -> None:
    """Raise ConfigurationError, naming the URL's variable, if the URL is invalid."""
    try:
        connection_arguments(url, application_name="")
    except ConfigurationError as exc:
        raise ConfigurationError(f"{name}: {exc}") from None


def _parse_url(url: str) -> ConnDict | None:
    if "\0" in url:
        # libpq would ignore the rest.
        return None
    with contextlib.suppress(psycopg.Error, UnicodeError):
        return conninfo_to_dict(url)
    return None


def prepare_session(connection: Connection, arguments: Mapping[str, str | int]) -> None:
    """Set everything that the SQL depends on, in one round trip. This overrides role, database, server and environment.

    The session is in autocommit mode afterwards, so each transaction is explicit. Raise ConfigurationError behind a
    pooler that gives each transaction another session.
    """
    connection.autocommit = True
    connection.execute(queries.SET_UP_SESSION)
    refuse_transaction_pooler(connection, arguments)


@contextmanager
def transaction_with_lock_limit(connection: Connection) -> Iterator[None]:
    """Run one transaction in which no statement waits for a lock for longer than 5 s.

    Then raise DatabaseUnavailable, which names the sessions that hold the lock. PostgreSQL ends the session if the
    process is suspended meanwhile, because others may wait for the locks of this transaction.
    """
    try:
        with connection.transaction():
            connection.execute(queries.LIMIT_LOCK_WAIT)
            connection.execute(queries.LIMIT_IDLE_IN_TRANSACTION)
            yield
    except Exception as exc:
        if LOCK_NOT_AVAILABLE not in sqlstates(exc):
            raise
        holders = lock_holders(connection, queries.WRITE_LOCK_HOLDERS)
        raise DatabaseUnavailable(
            f"PostgreSQL: no lock within {queries.LOCK_WAIT_S} s, probably held by {holders}; this transaction was "
            f"rolled back and has changed nothing: try again ({LOCK_NOT_AVAILABLE})"
        ) from exc


def lock_holders(connection: Connection, statement: LiteralString) -> str:
    """Return the sessions that may hold a lock, as text. ``statement`` is one of those that find them."""
    with translate_errors(connection):
        rows = connection.execute(statement).fetchall()
    if not rows:
        return "another session"
    return ", ".join(
        f"pid {pid} (role {role}, application {application or 'unknown'!r})" if pid else "a prepared transaction"
        for pid, role, application in rows
    )


def open_connection(url: str, *, application_name: str) -> Connection:
    """Return a new connection. Raise DatabaseUnavailable or ConfigurationError."""
    arguments = connection_arguments(url, application_name)
    connection = OwnConnection(connect_to_any(arguments))
    try:
        with translate_errors(connection):
            prepare_session(connection, arguments)
    except BaseException:
        connection.close()
        raise
    return connection
