"""Translate psycopg's errors into the library's, once, where psycopg is called.

No message quotes a row, or a part of a URL that may belong to a password.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import select
from collections.abc import Iterator
from typing import Protocol

import psycopg
from psycopg import waiting
from psycopg.abc import PQGen
from psycopg.pq import ConnStatus
from psycopg.pq.abc import PGconn
from psycopg.waiting import Wait

from orderlib.errors import (
    ConfigurationError,
    DatabaseUnavailable,
    OrderlibError,
    RefusedByDatabase,
    TransactionConflict,
)
from orderlib.ingestion.retry import ErrorAction, classify_refusal, classify_sqlstate, is_standard

_NO_PASSWORD = "the server asks for a password, and the database URL has none"  # noqa: S105  the text of an error

#: Configuration errors of a connection that libpq itself reports, before or without an answer of the server. libpq's
#: messages are in English unless the process selected another language. Then such an error counts as an outage, which
#: is logged and retried, and nothing is lost.
_LIBPQ_CONFIGURATION_ERRORS = {
    r"invalid (integer value|port number|\w+ value|connection option)": "the database URL has an {}",
    r"bad value for \w+": "the database URL has a {}",
    r"could not match \d+ (port numbers|host names|hostaddr values)": "the database URL has lists of different lengths",
    r"(definition of service|service file) .* not found|syntax error in service file|nested service specifications": (
        "the service (PGSERVICE, or service= in the database URL) is not defined, or its file cannot be read"
    ),
    # TLS
    r"server does not support SSL": "sslmode requires TLS, and the server does not offer it",
    r"certificate verify failed": "the server's TLS certificate could not be verified (sslrootcert, or it has expired)",
    r"server certificate for .* (does|do) not match host name": "the server's TLS certificate is for another host name",
    r"server's certificate .* host name": "the server's TLS certificate names no host",
    r"root certificate file": "the file of sslrootcert does not exist or cannot be read",
    r"(could not (read|load|open)|invalid) .*certificate": "a file of sslcert or sslrootcert cannot be read",
    r"private key file": "the file of sslkey is missing, cannot be read, or may be read by other users",
    r"alert (unknown ca|bad certificate|certificate (required|expired|unknown|revoked))": "the server refused sslcert",
    r"alert handshake failure": "client and server have no TLS version, cipher or certificate in common",
    r"sslmode value|weak sslmode": "sslmode does not fit the other TLS settings",
    r"(could not get home directory|SSL support|sslmode .* compiled)": "libpq cannot use TLS as configured",
    # Authentication
    r"no password supplied": _NO_PASSWORD,
    r"channel binding": "channel_binding cannot be satisfied by this server",
    r"authentication method requirement": "the server's authentication method is not one of require_auth",
    r"(SASL|SCRAM|GSSAPI|SSPI|authentication method) .*not supported": "the authentication method is not supported",
    # PgBouncer has one SQLSTATE for most of its errors, and English messages only.
    r"(?<=08P01: )(no such (user|database)|((SASL|password|TLS|peer) )?auth\w* failed|unsupported startup parameter|"
    r"bouncer config error|not allowed)": "PgBouncer: {}",
}
_LIBPQ_PATTERNS = [(re.compile(pattern), text) for pattern, text in _LIBPQ_CONFIGURATION_ERRORS.items()]

#: Texts for refused connections that are configuration errors, by SQLSTATE.
_REFUSAL_TEXTS = {
    "28P01": "password authentication failed, or there is no such role",
    "28000": "the server does not let this role log in from here with this method (pg_hba.conf)",
    "3D000": "the database does not exist",
    "42501": "the role may not connect to this database",
    "22023": "an option of the session has an invalid value (PGOPTIONS, PGDATESTYLE, PGTZ or the URL's options)",
    "42704": "an option of the session does not exist (PGOPTIONS or the URL's options)",
}

#: The causes of a connection that failed without an SQLSTATE, as libpq and the system write them. A message contains
#: one of these instead of libpq's complete text, which quotes the URL. A host name that cannot be resolved is an
#: outage: Docker and Kubernetes remove the name of a stopped service.
_CAUSES = (
    *sorted({os.strerror(number) for number in errno.errorcode}, key=len, reverse=True),
    "timeout expired",
    "server closed the connection unexpectedly",
    "SSL connection has been closed unexpectedly",
    "received invalid response to SSL negotiation",
    "expected authentication request from server",
    "session is read-only",
    "session is not read-only",
    "server is in hot standby mode",
    "server is not in hot standby mode",
    # PgBouncer's
    "no more connections allowed",
    "server login has been failing",
    "server login failed",
    "query_wait_timeout",
    "client_login_timeout",
    "cannot connect to server",
    "database is disabled",
    "database does not allow connections",
    "server conn crashed",
    "shutting down",
)

_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,252})|[0-9A-Fa-f:.]{2,45}|/[A-Za-z0-9_./-]{0,107}")
_UNKNOWN_HOST = re.compile(r"""(?:could not translate host name|failed to resolve host) ['"]([^'"]*)['"]""")


class HasPGconn(Protocol):
    """A user of a libpq connection: a psycopg connection or a ``Wire``."""

    @property
    def pgconn(self) -> PGconn:
        """Return the libpq connection."""
        ...


#: Citus reports every error of a worker inside a COPY, or while a transaction ends, as an internal error. Only the text
#: tells which one: it is that of the worker, or of libpq in the coordinator. Everything else is a refused row.
_INTERNAL = "XX000"
_WORKER_CONFLICT = re.compile("deadlock detected|could not serialize access")
_WORKER_OUTAGE = re.compile(
    "terminating connection|server closed the connection|failure on connection|connection (not open|.*lost|.*failed)|"
    "could not (receive|send) data|the database system is|no connection to the server|lost synchronization|"
    "canceling statement due to|No space left on device|out of (shared )?memory|too many (clients|connections)|"
    "in a read-only transaction"
)

#: A write on a read-only server: it became a standby, or the URL allows one.
READ_ONLY = "25006"
#: A wait for a lock that took too long.
LOCK_NOT_AVAILABLE = "55P03"
_IDLE_IN_TRANSACTION = "25P03"

#: An error without an SQLSTATE may be due to the close of the connection, which may arrive this much later.
_CLOSE_ARRIVES_WITHIN_S = 0.2
_MAX_READS = 8


def is_lost(connection: HasPGconn, exc: BaseException | None = None) -> bool:
    """Return whether the connection is lost: closed, broken, or ended by the server.

    Read what the server has sent since, because libpq notices the end of a connection only when it reads. For an idle
    connection that takes one system call. In an event loop it never waits: call ``wait_for_close`` first.
    """
    if _is_fatal(exc):
        return True
    wait_ms = int(_CLOSE_ARRIVES_WITHIN_S * 1000) if _may_be_closing(exc) and not _in_event_loop() else 0
    pgconn = connection.pgconn
    poll = select.poll()
    try:
        poll.register(pgconn.socket, select.POLLIN)
        for _ in range(_MAX_READS):
            if pgconn.status != ConnStatus.OK or not poll.poll(wait_ms):
                break
            pgconn.consume_input()
    except psycopg.Error:
        return True
    return pgconn.status != ConnStatus.OK


async def wait_for_close(connection: HasPGconn, exc: psycopg.Error) -> None:
    """Wait as long as ``is_lost`` does outside of an event loop, while other tasks run."""
    if _may_be_closing(exc):
        with contextlib.suppress(psycopg.Error):
            await waiting.wait_async(_read_once(), connection.pgconn.socket, _CLOSE_ARRIVES_WITHIN_S)


def _read_once() -> PQGen[None]:
    yield Wait.R


def _may_be_closing(exc: BaseException | None) -> bool:
    return isinstance(exc, psycopg.Error) and exc.sqlstate is None


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _is_fatal(exc: BaseException | None) -> bool:
    """Return whether the server ended the session with this error. libpq may not have detected it yet."""
    return isinstance(exc, psycopg.Error) and exc.diag.severity_nonlocalized in {"FATAL", "PANIC"}


def sqlstates(error: BaseException | None) -> Iterator[str]:
    """Yield the SQLSTATEs of an error and of its causes."""
    while error is not None:
        if isinstance(error, psycopg.Error) and error.sqlstate:
            yield error.sqlstate
        error = error.__cause__


@contextlib.contextmanager
def translate_errors(connection: HasPGconn | None = None) -> Iterator[None]:
    """Raise the library's error, ``from`` psycopg's, for an error of the block.

    Pass the connection that the block uses. If it was lost, an error of any class is an outage: psycopg then
    takes the server's last message for the answer to another request.
    """
    try:
        yield
    except OrderlibError:
        raise
    except Exception as exc:
        if not isinstance(exc, psycopg.Error | UnicodeEncodeError) and (connection is None or not is_lost(connection)):
            raise
        raise translate(exc, connection) from exc


def translate(exc: Exception, connection: HasPGconn | None = None, *, writing: bool = True) -> OrderlibError:
    """Return the library's error for psycopg's. The message has classes and codes, never data: details may quote a row.

    Only a write can have a refused row or a conflict. The same error of a read is a configuration error, or an outage
    if a standby cancelled it.
    """
    if connection is not None and is_lost(connection, exc):
        return DatabaseUnavailable(f"PostgreSQL: the connection was lost{_reason(exc)}")
    if isinstance(exc, UnicodeEncodeError):
        return RefusedByDatabase(None)
    if not isinstance(exc, psycopg.Error):
        return ConfigurationError(f"PostgreSQL: {type(exc).__name__}")
    if exc.pgconn is not None:
        return _failed_connection(exc, exc.pgconn)
    if exc.sqlstate is None:
        return _without_sqlstate(exc)
    if _is_fatal(exc):
        return DatabaseUnavailable(f"PostgreSQL: the connection was lost{_reason(exc)}")
    if exc.sqlstate == _INTERNAL and (error := _of_worker(_message(exc), writing=writing)):
        return error
    summary = type(exc).__name__ if _may_quote_data(exc.sqlstate) else _message(exc) or _readable_name(exc)
    match classify_sqlstate(exc.sqlstate):
        case ErrorAction.BISECT if writing:
            return RefusedByDatabase(exc.sqlstate)
        case ErrorAction.RETRY if writing:
            return TransactionConflict(f"PostgreSQL: {summary} ({exc.sqlstate})")
        case ErrorAction.OUTAGE | ErrorAction.RETRY:
            return DatabaseUnavailable(f"PostgreSQL: {summary} ({exc.sqlstate})")
        case ErrorAction.STOP | ErrorAction.BISECT:
            return ConfigurationError(f"PostgreSQL: {summary} ({exc.sqlstate})")


def _of_worker(message: str, *, writing: bool) -> OrderlibError | None:
    """Return the error of a worker of Citus, or ``None`` if it may be a refused row."""
    if _WORKER_CONFLICT.search(message) and writing:
        return TransactionConflict(f"Citus: {message} ({_INTERNAL})")
    if _WORKER_CONFLICT.search(message) or _WORKER_OUTAGE.search(message):
        return DatabaseUnavailable(f"Citus: a worker failed: {message} ({_INTERNAL})")
    return None


def _reason(exc: Exception) -> str:
    """Return the server's last message, if there is one, as the end of a sentence."""
    if isinstance(exc, psycopg.Error) and exc.sqlstate == _IDLE_IN_TRANSACTION:
        return (
            ": the program was suspended or idle in a transaction for longer than "
            f"idle_in_transaction_session_timeout; the transaction was rolled back: try again ({_IDLE_IN_TRANSACTION})"
        )
    if isinstance(exc, psycopg.Error) and exc.sqlstate and not _may_quote_data(exc.sqlstate):
        return f": {_message(exc) or _readable_name(exc)} ({exc.sqlstate})"
    return ""


def _may_quote_data(sqlstate: str) -> bool:
    """Return whether the message may have data of a row: PostgreSQL's own, or that of a trigger (P0, or any code)."""
    return sqlstate[:2] in {"22", "23", "P0"} or not is_standard(sqlstate)


def _message(exc: psycopg.Error) -> str:
    """Return the server's message as one line. Citus passes on messages of libpq, which have several."""
    return " ".join((exc.diag.message_primary or "").split())


def _readable_name(exc: psycopg.Error) -> str:
    """Return the class name of an error as separate lower-case words."""
    return re.sub(r"(?<!^)(?=[A-Z])", " ", type(exc).__name__.rstrip("_")).lower()


def _without_sqlstate(exc: psycopg.Error) -> OrderlibError:
    if isinstance(exc, psycopg.DataError):
        return RefusedByDatabase(None)
    if isinstance(exc, psycopg.OperationalError | psycopg.InterfaceError) or str(exc).startswith("bad value for"):
        return _from_message(str(exc))
    return ConfigurationError(f"PostgreSQL: {type(exc).__name__}: {exc}")


def _failed_connection(exc: psycopg.Error, pgconn: PGconn) -> OrderlibError:
    """Return the library's error for a connection that was not established.

    Known configuration errors stop a program; everything else is an outage. A server that
    restarts, is overloaded or is being maintained refuses connections in many ways, and no list is complete.
    """
    at = address(pgconn.host.decode("utf-8", "replace"), pgconn.port.decode("utf-8", "replace"))
    if exc.sqlstate is None or exc.sqlstate == "08P01":
        if exc.sqlstate is None and pgconn.needs_password:
            return ConfigurationError(f"PostgreSQL{at}: {_NO_PASSWORD}")
        return _from_message(str(exc), at, f" ({exc.sqlstate})" if exc.sqlstate else "")
    if exc.sqlstate == "3D000" and _HOST.fullmatch(database := pgconn.db.decode("utf-8", "replace")):
        return ConfigurationError(f'PostgreSQL{at}: database "{database}" does not exist (3D000)')
    text = f"PostgreSQL{at}: {_REFUSAL_TEXTS.get(exc.sqlstate) or _readable_name(exc)} ({exc.sqlstate})"
    return ConfigurationError(text) if classify_refusal(exc.sqlstate) is ErrorAction.STOP else DatabaseUnavailable(text)


def address(host: str, port: str) -> str:
    """Return an address for a message, as `` at host:port``. It is empty for a text that may be part of a password."""
    if not _HOST.fullmatch(host) or not re.fullmatch("[0-9]{1,5}", port):
        return ""
    return f" at [{host}]:{port}" if ":" in host else f" at {host}:{port}"


def _from_message(text: str, at: str = "", code: str = "") -> OrderlibError:
    for pattern, description in _LIBPQ_PATTERNS:
        if found := pattern.search(text):
            # The message contains no text of the URL: it may be a part of a password with an unescaped character.
            return ConfigurationError(f"PostgreSQL{at}: {description.format(found[0])}{code}")
    cause = next((cause for cause in _CAUSES if cause in text), "the connection failed")
    if (unknown := _UNKNOWN_HOST.search(text)) and _HOST.fullmatch(unknown[1]):
        cause = f"the host name {unknown[1]} cannot be resolved"
    return DatabaseUnavailable(f"PostgreSQL{at}: {cause}{code}")
