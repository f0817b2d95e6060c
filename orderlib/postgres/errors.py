"""psycopg's errors as ours, translated once, at the edge."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import psycopg_pool

from orderlib.errors import BrokenSetup, Collision, OrderError, RefusedByDatabase, StoreUnreachable
from orderlib.retry import Fate, fate_of

#: libpq keeps no SQLSTATE of a refused connection, so these English words must tell an outage from a broken set-up.
#: In another language a broken set-up is taken for an outage: it is said and tried again, and nothing is lost.
_OUTAGE_WORDS = (
    "starting up",
    "shutting down",
    "recovery",
    "too many",
    "remaining connection slots",
    "not accept",
)

#: So libpq refuses a URL before it connects: a port that is no number, an unknown sslmode.
_INVALID_URL = re.compile(r"invalid (integer value|port number|\w+ value)")


@contextmanager
def translated_errors() -> Iterator[None]:
    """Raise our error, ``from`` psycopg's, for any that leaves the block."""
    try:
        yield
    except (psycopg.Error, UnicodeEncodeError) as exc:
        raise translate(exc) from exc


def translate(exc: psycopg.Error | UnicodeEncodeError) -> OrderError:
    """Our error for one of psycopg's. Its message names kinds and codes, never data: details may quote a row."""
    if isinstance(exc, UnicodeEncodeError):
        return RefusedByDatabase(None)
    if exc.sqlstate is None:
        return _without_sqlstate(exc)
    summary = exc.diag.message_primary if exc.sqlstate[:2] not in {"22", "23"} else type(exc).__name__
    match fate_of(exc.sqlstate):
        case Fate.SPLIT:
            return RefusedByDatabase(exc.sqlstate)
        case Fate.AGAIN:
            return Collision(f"PostgreSQL: {summary} ({exc.sqlstate})")
        case Fate.OUTAGE:
            return StoreUnreachable(f"PostgreSQL: {summary} ({exc.sqlstate})")
        case Fate.STOP:
            return BrokenSetup(f"PostgreSQL: {summary} ({exc.sqlstate})")


def _without_sqlstate(exc: psycopg.Error) -> OrderError:
    if isinstance(exc, psycopg_pool.PoolTimeout | psycopg_pool.TooManyRequests):
        return StoreUnreachable("PostgreSQL: no connection came free in time")
    if isinstance(exc, psycopg.DataError):
        return RefusedByDatabase(None)
    if isinstance(exc, psycopg_pool.PoolClosed):
        return BrokenSetup("PostgreSQL: the repository is closed")
    if isinstance(exc, psycopg.OperationalError):
        text = str(exc)
        if invalid := _INVALID_URL.search(text):
            # What is invalid may be a part of a password with an unescaped character.
            return BrokenSetup(f"PostgreSQL: the database URL has an {invalid[0]}")
        if "FATAL:" in text and not any(word in text for word in _OUTAGE_WORDS):
            return BrokenSetup(f"PostgreSQL: {text.rpartition('FATAL:')[2].strip().splitlines()[0]}")
        return StoreUnreachable(f"PostgreSQL: {' '.join(text.split())}")
    if isinstance(exc, psycopg.InterfaceError):
        return StoreUnreachable(f"PostgreSQL: {exc}")
    return BrokenSetup(f"PostgreSQL: {type(exc).__name__}: {exc}")
