"""Run transactions that change roles or tables, although other sessions may hold locks that they need."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import psycopg

from orderlib.errors import DatabaseUnavailable
from orderlib.postgres import queries
from orderlib.postgres.connections import Connection, lock_holders
from orderlib.postgres.errors import translate, translate_errors

#: How long `bootstrap`, and each migration of `migrate`, waits for a lock before it fails.
LOCK_WITHIN_S = 60.0
_BETWEEN_TRIES_S = 0.5

T = TypeVar("T")


def ignore_message(_text: str) -> None:
    """Do nothing with a message."""


def run_ddl(
    connection: Connection,
    work: Callable[[], T],
    conflicts: tuple[type[psycopg.Error], ...],
    on_message: Callable[[str], None],
) -> T:
    """Do the work in a transaction. Retry if it waits too long for a lock or conflicts with another session.

    ``conflicts`` are the errors of the work that a concurrent call of it causes. ``on_message`` receives the sessions
    that hold a lock. Raises DatabaseUnavailable, naming them, if there is no lock within a minute.
    """
    deadline_s = time.monotonic() + LOCK_WITHIN_S
    reported = ""
    while True:
        try:
            with translate_errors(connection), connection.transaction():
                try:
                    connection.execute(queries.LIMIT_DDL_LOCK_WAIT)
                    connection.execute(queries.LIMIT_IDLE_IN_TRANSACTION)
                    return work()
                except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected) as exc:
                    raise _Conflict(exc) from exc
                except conflicts as exc:
                    raise _Conflict(exc) from exc
        except _Conflict as conflict:
            is_late = time.monotonic() > deadline_s
            if isinstance(conflict.error, psycopg.errors.LockNotAvailable):
                holders = lock_holders(connection, queries.LOCK_HOLDERS)
                if is_late:
                    raise DatabaseUnavailable(
                        f"PostgreSQL: no lock within {LOCK_WITHIN_S:.0f} s, held by {holders}; this step was rolled "
                        "back, and earlier steps stay applied: run the command again"
                    ) from conflict.error
                if holders != reported:
                    on_message(f"waiting for a lock that is held by {holders}")
                    reported = holders
            elif is_late:
                raise translate(conflict.error) from conflict.error
        time.sleep(_BETWEEN_TRIES_S)


class _Conflict(Exception):
    """A conflict with another session. The transaction was rolled back and may be retried."""

    def __init__(self, error: psycopg.Error) -> None:
        super().__init__(str(error))
        self.error = error
