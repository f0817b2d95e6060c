"""The connections of one repository: one policy for threads and for asyncio.

A call takes a session, uses it, and gives it back. It gets an idle session at once, the most recently used one first.
Otherwise it waits for the first session that is given back or newly connected. Background threads connect. So no call
waits longer than its limit, and a connection that takes longer serves a later call.
"""

from __future__ import annotations

import _thread
import contextlib
import copy
import os
import threading
import time
from collections import deque
from collections.abc import Container, Iterator
from random import Random
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

import psycopg
from psycopg import sql, waiting
from psycopg.abc import PQGen
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg.pq.abc import PGconn

from orderlib.errors import ConfigurationError, DatabaseUnavailable, OrderlibError, TransactionConflict
from orderlib.ingestion.retry import Backoff
from orderlib.postgres import queries
from orderlib.postgres.connections import Connection, connection_arguments, prepare_session
from orderlib.postgres.errors import is_lost, translate, translated_errors
from orderlib.postgres.hosts import connect_to_any
from orderlib.postgres.migrate import check_schema
from orderlib.postgres.reads import ReadQueries
from orderlib.postgres.wire import Wire

T = TypeVar("T")

#: Threads of one pool that connect at the same time.
_MAX_OPENERS = 2
#: PostgreSQL itself ends a statement after this part of ``timeout_s``, so that no statement outlives its caller.
_STATEMENT_SHARE = 0.9
#: About eleven days: PostgreSQL counts the milliseconds of a timeout in 32 bits.
_MAX_TIMEOUT_S = 1_000_000.0
#: The limit for the set-up of a new session. No call waits for it.
_SET_UP_WITHIN_S = 5.0

#: A read that ended with one of these is tried again once: a conflict with recovery on a standby or a deadlock (class
#: 40), a cancelled statement, a prepared statement that was deallocated (26000) or whose result type changed (0A000).
_REPEATABLE = {"57014", "26000", "0A000"}
_REPEATABLE_CLASS = "40"
#: A write on a server that accepts none.
_READ_ONLY = "25006"


class DeadlineExceeded(OrderlibError):
    """The deadline of a call passed while it waited for PostgreSQL. No caller of a repository sees it."""


#: After so many conflicts in one call, other writers are probably in the way for good.
_MAX_CONFLICTS = 20
#: Spreads the retries of several writers.
_RNG = Random()  # noqa: S311  no secret

#: What a read raises that has to be translated or may be repaired.
READ_ERRORS = (psycopg.Error, UnicodeEncodeError, DeadlineExceeded)
#: The same for a write, which has translated some errors already.
WRITE_ERRORS = (psycopg.Error, OrderlibError)


def bounded(steps: PQGen[T], deadline: float) -> PQGen[T]:
    """Run a generator for psycopg's ``wait`` functions until the deadline, then raise DeadlineExceeded."""
    try:
        wait = next(steps)
        while True:
            ready = yield wait
            if time.monotonic() >= deadline:
                raise DeadlineExceeded("PostgreSQL: no answer in time")
            wait = steps.send(ready)
    except StopIteration as done:
        result: T = done.value
        return result


class Session(Connection):
    """A connection of a pool, with the reads over it. Every operation on it ends at its deadline."""

    def __init__(self, pgconn: PGconn) -> None:
        super().__init__(pgconn)
        self.wire = Wire(pgconn)
        self.read_queries = ReadQueries(self.wire)
        #: When the call that uses it must end, by the monotonic clock.
        self.deadline = 0.0
        #: Whether it was connected before the call that uses it. It may have been lost since then, which says nothing
        #: about the server now.
        self.reused = False

    def __del__(self, _warn: Any = None, /) -> None:
        """Do nothing. ``pgconn`` closes itself, and only in the process that opened it."""

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """Run a generator until the deadline. Close the connection then, and on an interrupt."""
        remaining = self.deadline - time.monotonic()
        if timeout is not None:
            remaining = min(remaining, timeout)
        steps = bounded(gen, time.monotonic() + remaining)
        try:
            return waiting.wait(steps, self.pgconn.socket, max(0.0, min(interval, remaining)))
        except BaseException as exc:
            if isinstance(exc, DeadlineExceeded) or not isinstance(exc, Exception):
                self.abort()
            raise

    def abort(self) -> None:
        """Close the connection without regard to psycopg's state. An open transaction is rolled back."""
        self.pgconn.finish()

    @property
    def is_usable(self) -> bool:
        """Whether another call may begin: nothing is in progress, and the connection is not known to be lost."""
        pgconn = self.pgconn
        return pgconn.transaction_status == TransactionStatus.IDLE and pgconn.pipeline_status == PipelineStatus.OFF

    def is_lost(self, error: BaseException | None) -> bool:
        """Whether the connection was lost, whatever error came last."""
        while error is not None:
            if is_lost(self, error):
                return True
            error = error.__cause__
        return False


class Waiter(Protocol):
    """A call that waits for a session. The pool sets ``session`` or ``failure`` and then calls ``wake``."""

    session: Session | None
    failure: Exception | None

    def wake(self) -> None:
        """Let the call go on. Raise RuntimeError if its event loop is closed."""
        ...


class ThreadWaiter:
    """A thread that waits for a session."""

    def __init__(self) -> None:
        self.session: Session | None = None
        self.failure: Exception | None = None
        # Not an Event: an interrupt inside its wait can raise RuntimeError instead.
        self._woken = threading.Lock()
        self._woken.acquire()

    def wake(self) -> None:
        """See ``Waiter.wake``."""
        self._woken.release()

    def wait(self, timeout_s: float) -> None:
        """Return when woken, or after this long."""
        self._woken.acquire(timeout=timeout_s)


class Pool:
    """At most ``max_connections`` sessions with one database, for the process that made it.

    A call ends within ``timeout_s``; at most ``connection_timeout_s`` of that passes without a connection. Any number
    of threads may share a pool, and it belongs to no event loop.
    """

    def __init__(
        self,
        url: str,
        *,
        application_name: str,
        max_connections: int,
        timeout_s: float,
        connection_timeout_s: float | None = None,
    ) -> None:
        for name, value in (("timeout_s", timeout_s), ("connection_timeout_s", connection_timeout_s or 0.0)):
            if type(value) not in {int, float}:
                raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
        if type(max_connections) is not int:
            raise TypeError(f"max_connections must be an int, not {type(max_connections).__name__}")
        if max_connections < 1:
            raise ValueError(f"max_connections must be at least 1, not {max_connections}")
        if not 0 < timeout_s <= _MAX_TIMEOUT_S:
            raise ValueError(f"timeout_s must be positive and at most {_MAX_TIMEOUT_S:.0f}, not {timeout_s}")
        self._arguments = connection_arguments(url, application_name)
        self._max_connections = max_connections
        self.timeout_s = timeout_s
        self.connection_timeout_s = timeout_s if connection_timeout_s is None else min(timeout_s, connection_timeout_s)
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        #: The most recently used one last. While calls wait, it is empty.
        self._idle: list[Session] = []
        self._waiters: deque[Waiter] = deque()
        #: Idle or in use. Weak references, so that a session that an interrupt lost does not count.
        self._sessions: WeakSet[Session] = WeakSet()
        #: One key for each thread that connects.
        self._openers: set[object] = set()

    def take(self) -> Session | None:
        """Return an idle session, or ``None`` if the call must wait for one. Raise ConfigurationError if closed."""
        self._check_open()
        with self._lock:
            if not self._idle:
                return None
            session = self._idle.pop()
        # Also one that no call has used yet: it may have been lost since it was connected.
        session.reused = True
        return session

    def enqueue(self, waiter: Waiter) -> None:
        """Serve the waiter as soon as there is a session for it. Connect if there may be more connections."""
        self._check_open()
        with self._lock:
            self._waiters.append(waiter)
            self._serve()
            self._connect_more()

    def taken(self, waiter: Waiter) -> Session:
        """Return the session of a waiter that waited long enough, or raise why it has none."""
        with self._lock:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
        if waiter.failure is not None:
            # Its own copy: each raise adds a traceback.
            raise copy.copy(waiter.failure) from waiter.failure.__cause__
        if waiter.session is None:
            raise DatabaseUnavailable(f"PostgreSQL: no connection within {self.connection_timeout_s:g} s")
        return waiter.session

    def leave(self, waiter: Waiter) -> None:
        """Forget a waiter that was interrupted, and take back the session that it was given meanwhile."""
        with contextlib.suppress(OrderlibError):
            self.give_back(self.taken(waiter))

    def give_back(self, session: Session) -> None:
        """Let another call use the session, or close it if it is not usable."""
        if os.getpid() != self._process:
            # It is the parent's. PostgreSQL would end it if this process closed it.
            return
        session.reused = True
        usable = session.is_usable
        with self._lock:
            if usable and not self._closed:
                self._idle.append(session)
                if self._waiters:
                    self._serve()
                return
            self._sessions.discard(session)
            self._connect_more()
        session.close()

    def drop_idle(self) -> None:
        """Close the idle sessions: one was lost while idle, so the others probably were too."""
        with self._lock:
            idle, self._idle = self._idle, []
            self._sessions.difference_update(idle)
        for session in idle:
            session.close()

    def close(self) -> None:
        """Close every session: idle ones at once, those in use when they are given back. Later calls raise."""
        self._closed = True
        if os.getpid() == self._process:
            with self._lock:
                self._fail_waiters(_closed_error())
            self.drop_idle()

    def _check_open(self) -> None:
        if os.getpid() != self._process:
            raise ConfigurationError("the repository belongs to another process: connect again after a fork")
        if self._closed:
            raise _closed_error()

    def _serve(self) -> None:
        """Give idle sessions to the calls that wait, first come, first served; with the lock held."""
        if self._closed:
            self._fail_waiters(_closed_error())
        while self._waiters and self._idle:
            waiter = self._waiters.popleft()
            waiter.session = self._idle.pop()
            try:
                waiter.wake()
            except RuntimeError:
                self._idle.append(waiter.session)

    def _fail_waiters(self, failure: Exception, waiters: Container[Waiter] | None = None) -> None:
        """Let these calls raise this if they still wait, or all that wait; with the lock held."""
        for waiter in [waiter for waiter in self._waiters if waiters is None or waiter in waiters]:
            self._waiters.remove(waiter)
            waiter.failure = failure
            with contextlib.suppress(RuntimeError):
                waiter.wake()

    def _connect_more(self) -> None:
        """Start a thread that connects, if calls wait and there may be more connections; with the lock held."""
        if (
            len(self._openers) < min(_MAX_OPENERS, len(self._waiters))
            and len(self._sessions) + len(self._openers) < self._max_connections
        ):
            opener = object()
            try:
                self._openers.add(opener)
                # Not Thread.start: it waits for the thread, and an interrupt there can raise RuntimeError instead.
                _thread.start_new_thread(self._open, (opener,))
            except BaseException:
                self._openers.discard(opener)
                raise

    def _open(self, opener: object) -> None:
        """Connect while calls wait and there may be more connections."""
        try:
            while self._open_one(opener):
                pass
        finally:
            self._openers.discard(opener)

    def _open_one(self, opener: object) -> bool:
        """Connect once. Return whether to connect again; if not, the opener is no longer counted."""
        with self._lock:
            waiting_before = set(self._waiters)
        session, failure = self._connected()
        with self._lock:
            is_wanted = not self._closed and len(self._sessions) < self._max_connections
            if session is not None and is_wanted:
                self._sessions.add(session)
                self._idle.append(session)
                self._serve()
            elif failure is not None and not self._sessions:
                # Otherwise a session in use may still be given back. A call that began to wait during this attempt
                # needs one of its own: the server may have come back after this attempt began.
                self._fail_waiters(failure, waiting_before)
            again = len(self._sessions) + len(self._openers) <= self._max_connections and (
                bool(self._waiters) if failure is None else not waiting_before.issuperset(self._waiters)
            )
            if not again:
                self._openers.discard(opener)
        if session is not None and not is_wanted:
            session.close()
        return again

    def _connected(self) -> tuple[Session | None, Exception | None]:
        """Return a new session, or why there is none."""
        try:
            session = Session(connect_to_any(self._arguments))
            try:
                session.deadline = time.monotonic() + _SET_UP_WITHIN_S
                limit_ms = max(1, int(self.timeout_s * _STATEMENT_SHARE * 1000))
                with translated_errors(session):
                    prepare_session(session)
                    session.execute(sql.SQL(queries.SET_STATEMENT_TIMEOUT).format(limit_ms))
                    check_schema(session)
            except BaseException:
                session.close()
                raise
        except DeadlineExceeded as exc:
            return None, DatabaseUnavailable(str(exc))
        except Exception as exc:  # noqa: BLE001 - the calls that wait raise it
            return None, exc
        return session, None


class Call:
    """One call: its deadline, and which of its failures another session may repair."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.deadline = time.monotonic() + pool.timeout_s
        self._repeated = False
        self._conflicts = 0
        self._backoff = Backoff(_RNG, first_s=0.01, most_s=0.5)

    @property
    def connection_wait_s(self) -> float:
        """How long it may wait for a connection from now on."""
        return max(0.0, min(self._pool.connection_timeout_s, self.deadline - time.monotonic()))

    def may_repeat(self, session: Session, error: Exception) -> bool:
        """Whether this error says only that the session was lost while idle. Then another session may do the same."""
        if _READ_ONLY in _sqlstates(error):
            # It was connected before that server became a standby, or the URL allows one.
            session.abort()
        silent = isinstance(error, DeadlineExceeded)
        if silent or session.is_lost(error):
            # If this one was lost or is silent, the idle ones probably are too.
            self._pool.drop_idle()
            return session.reused and not silent
        return False

    def read_error(
        self, session: Session, error: psycopg.Error | UnicodeEncodeError | DeadlineExceeded
    ) -> OrderlibError:
        """Return our error for a failed read."""
        if isinstance(error, DeadlineExceeded):
            return DatabaseUnavailable(f"PostgreSQL: no answer within {self._pool.timeout_s:g} s")
        return translate(error, session, writing=False)

    def wait_before_retry_s(self, session: Session, error: psycopg.Error | OrderlibError, *, committing: bool) -> float:
        """Return after how many seconds to try a failed write again, or raise the error that ends the call."""
        # After COMMIT was sent, another writer may have replaced what it stored.
        if self.may_repeat(session, error) and not committing:
            return 0
        ours = self._write_error(session, error, committing=committing)
        if isinstance(ours, TransactionConflict):
            self._conflicts += 1
            wait_s = self._backoff.next_wait_s()
            if self._conflicts <= _MAX_CONFLICTS and time.monotonic() + wait_s < self.deadline:
                return wait_s
        raise ours from (error.__cause__ if ours is error else error)

    def _write_error(
        self, session: Session, error: psycopg.Error | OrderlibError, *, committing: bool
    ) -> OrderlibError:
        """Return our error for a failed write. After a lost answer it says what is known about the outcome."""
        silent = isinstance(error, DeadlineExceeded)
        ours = translate(error, session) if isinstance(error, psycopg.Error) else error
        reason = f"PostgreSQL: no answer within {self._pool.timeout_s:g} s" if silent else str(ours)
        if committing and session.is_lost(error):
            return DatabaseUnavailable(f"{reason}; whether the orders are stored is unknown; saving them again is safe")
        return DatabaseUnavailable(f"{reason}; nothing was stored") if silent else ours

    def may_repeat_read(self, session: Session, error: Exception) -> bool:
        """Whether to read again, on another session, after this error."""
        # PostgreSQL also cancels a statement that took nearly all the time there was.
        is_early = time.monotonic() < self.deadline - (1 - _STATEMENT_SHARE) * self._pool.timeout_s
        if is_early and not self._repeated and any(map(_is_repeatable, _sqlstates(error))):
            self._repeated = True
            return True
        return self.may_repeat(session, error)


def _is_repeatable(sqlstate: str) -> bool:
    return sqlstate in _REPEATABLE or sqlstate.startswith(_REPEATABLE_CLASS)


def _sqlstates(error: BaseException | None) -> Iterator[str]:
    """Yield the SQLSTATEs of an error and of its causes."""
    while error is not None:
        if isinstance(error, psycopg.Error) and error.sqlstate:
            yield error.sqlstate
        error = error.__cause__


def _closed_error() -> ConfigurationError:
    return ConfigurationError("the repository is closed")
