"""The connections of one repository: one policy for threads and for asyncio.

A call takes a session, uses it, and gives it back. It gets an idle session at once, the most recently used one first.
Otherwise it waits for the first session that is given back or newly connected. Background threads connect. So no call
waits longer than its limit. A connection that takes longer serves a later call.
"""

from __future__ import annotations

import _thread
import contextlib
import copy
import os
import threading
import time
from collections import deque
from collections.abc import Container
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

import psycopg
from psycopg import sql, waiting
from psycopg.abc import PQGen
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg.pq.abc import PGconn

from orderlib.errors import ConfigurationError, DatabaseUnavailable, OrderlibError, TransactionConflict
from orderlib.ingestion.retry import Conflicts
from orderlib.postgres import queries
from orderlib.postgres.connections import OwnConnection, connection_arguments, prepare_session
from orderlib.postgres.errors import READ_ONLY, is_lost, sqlstates, translate, translate_errors
from orderlib.postgres.hosts import addresses, connect_to_any
from orderlib.postgres.reads import ReadQueries
from orderlib.postgres.schema import check_schema
from orderlib.postgres.wire import PREPARED_IS_STALE, DeadlineExceeded, Wire, run_until
from orderlib.repository import require_seconds

T = TypeVar("T")

#: Threads of one pool that connect at the same time.
_MAX_CONNECTING_THREADS = 2
#: PostgreSQL itself ends a statement after this part of ``timeout_s``, so that no statement outlives its caller.
_STATEMENT_SHARE = 0.9
#: About eleven days: PostgreSQL counts the milliseconds of a timeout in 32 bits.
_MAX_TIMEOUT_S = 1_000_000.0
#: The limit for the set-up of a new session. No call waits for it.
_SET_UP_WITHIN_S = 5.0

#: A read that fails with one of these is repeated once: a conflict with recovery on a standby or a deadlock (class
#: 40), a cancelled statement (57014), or a stale prepared statement.
_REPEATABLE = {"57014", *PREPARED_IS_STALE}
_REPEATABLE_CLASS = "40"

#: The errors of a read that are translated, or repaired by a retry.
READ_ERRORS = (psycopg.Error, UnicodeEncodeError, DeadlineExceeded)
#: The same for a write, whose errors are partly translated already.
WRITE_ERRORS = (psycopg.Error, OrderlibError)


class Session(OwnConnection):
    """A connection of a pool, with the reads over it. Every operation ends at the deadline."""

    def __init__(self, pgconn: PGconn) -> None:
        super().__init__(pgconn)
        self.wire = Wire(pgconn)
        self.read_queries = ReadQueries(self.wire)
        #: When the current call must end, by the monotonic clock.
        self.deadline = 0.0
        #: Whether it was connected before the current call. Then it may have been lost while idle, although the server
        #: accepts connections now.
        self.reused = False

    def __del__(self, _warn: Any = None, /) -> None:
        """Do nothing. ``pgconn`` closes itself, and only in the process that opened it."""

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """Run a generator until the deadline. Close the connection then, and on an interrupt."""
        remaining = self.deadline - time.monotonic()
        if timeout is not None:
            remaining = min(remaining, timeout)
        steps = run_until(gen, time.monotonic() + remaining)
        try:
            return waiting.wait(steps, self.pgconn.socket, max(0.0, min(interval, remaining)))
        except BaseException as exc:
            if isinstance(exc, DeadlineExceeded) or not isinstance(exc, Exception):
                self.abort()
            raise

    def abort(self) -> None:
        """Close the connection in any state. The server rolls back an open transaction."""
        self.pgconn.finish()

    @property
    def is_usable(self) -> bool:
        """Whether another call may use it: nothing is in progress, and the connection is not known to be lost."""
        pgconn = self.pgconn
        return pgconn.transaction_status == TransactionStatus.IDLE and pgconn.pipeline_status == PipelineStatus.OFF

    def is_lost(self, error: BaseException | None) -> bool:
        """Return whether the connection was lost, for this error or one of its causes."""
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
    """At most ``max_connections`` sessions with one database, for the process that created it.

    A call ends within ``timeout_s``; it waits at most ``connection_timeout_s`` of that for a connection. Any
    number of threads and event loops may share a pool.
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
        _check_time_limit("timeout_s", timeout_s)
        if connection_timeout_s is not None:
            _check_time_limit("connection_timeout_s", connection_timeout_s)
        if type(max_connections) is not int:
            raise TypeError(f"max_connections must be an int, not {type(max_connections).__name__}")
        if max_connections < 1:
            raise ValueError(f"max_connections must be at least 1, not {max_connections}")
        self._arguments = connection_arguments(url, application_name)
        self._max_connections = max_connections
        self.timeout_s = timeout_s
        self.connection_timeout_s = timeout_s if connection_timeout_s is None else min(timeout_s, connection_timeout_s)
        self._process = os.getpid()
        #: Reentrant: inside any method, Python may run a destructor or a signal handler, which may call another method
        #: in the same thread. An iterator of ``stream`` that was not read to its end gives its session back in that
        #: way. So after any call, a method must check again what it has checked before. A call that begins inside such
        #: a destructor or handler, and must wait for a connection, gets none: the connecting thread needs this lock.
        self._lock = threading.RLock()
        self._closed = False
        #: Sorted by last use, the most recent one last. Empty while calls wait.
        self._idle: list[Session] = []
        self._waiters: deque[Waiter] = deque()
        #: Idle or in use. Weak references, so that a session does not count if an interrupt lost the last reference to
        #: it.
        self._sessions: WeakSet[Session] = WeakSet()
        #: The error of the last attempt to connect, unless a later one succeeded.
        self._connect_failure: Exception | None = None
        #: One key for each thread that connects.
        self._connecting_threads: set[object] = set()

    def take(self) -> Session | None:
        """Return an idle session, or ``None`` if the call must wait for one. Raise ConfigurationError if closed."""
        self._check_open()
        with self._lock:
            session = self._pop_idle()
        if session is not None:
            # Also for a session that no call has used yet: it may have been lost since it was connected.
            session.reused = True
        return session

    def enqueue(self, waiter: Waiter) -> None:
        """Serve the waiter as soon as there is a session for it. Connect if there may be more connections."""
        self._check_open()
        with self._lock:
            self._waiters.append(waiter)
            self._serve()
            self._connect_more()

    def session_of(self, waiter: Waiter, waited_s: float) -> Session:
        """Return the session of a waiter after a wait of at most this long, or raise the reason why it has none."""
        with self._lock, contextlib.suppress(ValueError):
            self._waiters.remove(waiter)
        if waiter.failure is not None:
            # A copy for each waiter, because each raise adds a traceback.
            raise copy.copy(waiter.failure) from waiter.failure.__cause__
        session, waiter.session = waiter.session, None
        if session is None:
            raise self._no_connection_error(waited_s)
        return session

    def _no_connection_error(self, waited_s: float) -> DatabaseUnavailable:
        text = f"no connection within {round(waited_s, 1):g} s"
        if len(self._sessions) >= self._max_connections:
            return DatabaseUnavailable(f"PostgreSQL: {text}, because all {self._max_connections} are in use")
        # Read once: another thread may connect now.
        if (failure := self._connect_failure) is not None:
            return DatabaseUnavailable(f"PostgreSQL: {text}; the last attempt failed: {failure}")
        return DatabaseUnavailable(f"PostgreSQL{self.addresses}: {text}")

    @property
    def addresses(self) -> str:
        """The addresses of the hosts, as the continuation of a message that begins with ``PostgreSQL``."""
        return addresses(self._arguments)

    def cancel(self, waiter: Waiter) -> None:
        """Remove a waiter that was interrupted, and take back a session that it was given meanwhile."""
        with contextlib.suppress(OrderlibError):
            self.give_back(self.session_of(waiter, 0.0))

    def give_back(self, session: Session) -> None:
        """Let another call use the session, or close it if it is not usable."""
        if os.getpid() != self._process:
            # It belongs to the parent process, whose session would end if this process closed it.
            return
        session.reused = True
        if session.is_usable:
            with self._lock:
                self._idle.append(session)
                self._serve()
            return
        with self._lock:
            self._sessions.discard(session)
            self._connect_more()
        session.close()

    def drop_idle(self) -> None:
        """Close the idle sessions: one was lost, so the others probably were too."""
        for _ in range(len(self._idle)):
            with self._lock:
                # The oldest first: others may give sessions back meanwhile.
                session = self._pop_idle(0)
                if session is None:
                    return
                self._sessions.discard(session)
            session.close()

    def close(self) -> None:
        """Close every session: idle ones at once, those in use when they are given back. Later calls raise."""
        self._closed = True
        if os.getpid() == self._process:
            with self._lock:
                self._serve()

    def check_process(self) -> None:
        """Raise ConfigurationError in a forked process."""
        check_process(self._process)

    def _check_open(self) -> None:
        self.check_process()
        if self._closed:
            raise _closed_error()

    def _pop_idle(self, index: int = -1) -> Session | None:
        """Remove and return an idle session, by default the one that was used last. The caller holds the lock."""
        try:
            return self._idle.pop(index)
        except IndexError:
            return None

    def _serve(self) -> None:
        """Give idle sessions to waiting calls, first come, first served. If the pool is closed, leave neither.

        The caller holds the lock.
        """
        if self._closed:
            self._fail_waiters(_closed_error())
        while self._waiters and (session := self._pop_idle()) is not None:
            try:
                waiter = self._waiters.popleft()
            except IndexError:
                self._idle.append(session)
                break
            waiter.session = session
            try:
                waiter.wake()
            except RuntimeError:
                # Unless ``cancel`` has given it back already.
                if waiter.session is not None:
                    waiter.session = None
                    self._idle.append(session)
        if self._closed:
            self.drop_idle()

    def _fail_waiters(self, failure: Exception, waiters: Container[Waiter] | None = None) -> None:
        """Let these calls, or all calls, raise this error if they still wait. The caller holds the lock."""
        for waiter in list(self._waiters):
            if waiters is not None and waiter not in waiters:
                continue
            try:
                self._waiters.remove(waiter)
            except ValueError:
                continue
            waiter.failure = failure
            with contextlib.suppress(RuntimeError):
                waiter.wake()

    def _connect_more(self) -> None:
        """Start a thread that connects, if calls wait and the pool is not full. The caller holds the lock.

        If the system starts no thread (at its limit, or while the interpreter ends), calls that no other thread and no
        session can serve fail.
        """
        if (
            len(self._connecting_threads) < min(_MAX_CONNECTING_THREADS, len(self._waiters))
            and len(self._sessions) + len(self._connecting_threads) < self._max_connections
        ):
            thread = object()
            try:
                self._connecting_threads.add(thread)
                # Not Thread.start: it waits for the thread, and an interrupt there can raise RuntimeError instead.
                _thread.start_new_thread(self._connect_in_thread, (thread,))
            except RuntimeError:
                self._connecting_threads.discard(thread)
                if not self._connecting_threads and not self._sessions:
                    self._fail_waiters(DatabaseUnavailable("PostgreSQL: no thread can be started that connects"))
            except BaseException:
                self._connecting_threads.discard(thread)
                raise

    def _connect_in_thread(self, thread: object) -> None:
        """Connect while calls wait and the pool is not full."""
        try:
            while self._connect_once(thread):
                pass
        finally:
            self._connecting_threads.discard(thread)

    def _connect_once(self, thread: object) -> bool:
        """Connect once. Return whether to connect again; if not, the thread is no longer counted."""
        with self._lock:
            waiting_before = set(self._waiters)
        session, failure = self._open_session()
        with self._lock:
            self._connect_failure = failure
            # This thread is no longer counted, so a place that becomes free may start another one.
            self._connecting_threads.discard(thread)
            is_wanted = not self._closed and len(self._sessions) < self._max_connections
            if session is not None and is_wanted:
                self._sessions.add(session)
                self._idle.append(session)
                self._serve()
            elif failure is not None and not self._sessions:
                # If there are other sessions, one may still be given back. A call that began to wait during this
                # attempt gets its own attempt: the server may have become available meanwhile.
                self._fail_waiters(failure, waiting_before)
            again = len(self._sessions) + len(self._connecting_threads) < self._max_connections and (
                bool(self._waiters) if failure is None else not waiting_before.issuperset(self._waiters)
            )
            if again:
                self._connecting_threads.add(thread)
        if session is not None and not is_wanted:
            session.close()
        return again

    def _open_session(self) -> tuple[Session | None, Exception | None]:
        """Return a new session, or the error of the attempt."""
        try:
            session = Session(connect_to_any(self._arguments))
            try:
                session.deadline = time.monotonic() + _SET_UP_WITHIN_S
                limit_ms = max(1, int(self.timeout_s * _STATEMENT_SHARE * 1000))
                with translate_errors(session):
                    prepare_session(session, self._arguments)
                    session.execute(sql.SQL(queries.SET_UP_POOL_SESSION).format(limit_ms))
                    check_schema(session)
            except BaseException:
                session.close()
                raise
        except DeadlineExceeded:
            text = f"PostgreSQL{self.addresses} did not answer within {_SET_UP_WITHIN_S:g} s"
            return None, DatabaseUnavailable(text)
        except Exception as exc:  # noqa: BLE001  the waiting calls raise it
            return None, exc
        return session, None


class Call:
    """One call: its deadline, and whether to repeat it after an error. ``timeout_s`` may shorten that of the pool."""

    def __init__(self, pool: Pool, timeout_s: float | None = None) -> None:
        self._pool = pool
        self._timeout_s = pool.timeout_s if timeout_s is None else min(pool.timeout_s, timeout_s)
        self.deadline = time.monotonic() + self._timeout_s
        self._repeated = False
        self._conflicts = Conflicts()

    @property
    def connection_wait_s(self) -> float:
        """How long it may still wait for a connection."""
        return max(0.0, min(self._pool.connection_timeout_s, self.deadline - time.monotonic()))

    @property
    def _no_answer(self) -> str:
        return f"PostgreSQL{self._pool.addresses} did not answer within {self._timeout_s:g} s"

    def _close_lost(self, session: Session, error: Exception) -> bool:
        """Close what the error shows to be unusable. Return whether to repeat the call: this session was lost idle.

        Unusable: the idle sessions after a loss or a timeout; this session if it is on a standby and cannot write.
        """
        if READ_ONLY in sqlstates(error):
            # The server became a standby after the session was connected, or the URL allows a standby.
            session.abort()
        timed_out = isinstance(error, DeadlineExceeded)
        if timed_out or session.is_lost(error):
            # The idle sessions are probably lost or without an answer, too.
            self._pool.drop_idle()
            return session.reused and not timed_out
        return False

    def wait_before_retry_s(self, session: Session, error: psycopg.Error | OrderlibError, *, committing: bool) -> float:
        """Return how long to wait before a failed write is repeated, or raise the error that ends the call."""
        # If COMMIT was sent and succeeded, another writer may have replaced the orders since. Do not repeat it.
        if self._close_lost(session, error) and not committing:
            return 0
        translated = self._write_error(session, error, committing=committing)
        if isinstance(translated, TransactionConflict):
            wait_s = self._conflicts.next_wait_s()
            if wait_s is not None and time.monotonic() + wait_s < self.deadline:
                return wait_s
        raise translated from (error.__cause__ if translated is error else error)

    def _write_error(
        self, session: Session, error: psycopg.Error | OrderlibError, *, committing: bool
    ) -> OrderlibError:
        """Return the library's error for a failed write. Its message says if it is unknown whether they are stored."""
        timed_out = isinstance(error, DeadlineExceeded)
        translated = translate(error, session) if isinstance(error, psycopg.Error) else error
        reason = self._no_answer if timed_out else str(translated)
        if committing and (timed_out or session.is_lost(error)):
            return DatabaseUnavailable(f"{reason}; whether the orders are stored is unknown; saving them again is safe")
        return DatabaseUnavailable(f"{reason}; nothing was stored") if timed_out else translated

    def check_read_retry(
        self, session: Session, error: psycopg.Error | UnicodeEncodeError | DeadlineExceeded, *, begun: bool = False
    ) -> None:
        """Return if the read is to be repeated on another session, else raise the library's error for it.

        ``begun``: pages of a stream were returned already. Another session has another snapshot.
        """
        if self._may_repeat_read(session, error) and not begun:
            return
        if isinstance(error, DeadlineExceeded):
            raise DatabaseUnavailable(self._no_answer) from error
        raise translate(error, session, writing=False) from error

    def _may_repeat_read(self, session: Session, error: Exception) -> bool:
        # Not if statement_timeout cancelled the statement: then there is no time left.
        is_early = time.monotonic() < self.deadline - (1 - _STATEMENT_SHARE) * self._timeout_s
        if is_early and not self._repeated and any(map(_is_repeatable, sqlstates(error))):
            self._repeated = True
            return True
        return self._close_lost(session, error)


def check_process(process: int) -> None:
    """Raise ConfigurationError if this process is not the one with this id that opened the connections."""
    if os.getpid() != process:
        raise ConfigurationError("the repository belongs to another process: connect again after a fork")


def _check_time_limit(name: str, limit_s: float) -> None:
    if not 0 < require_seconds(name, limit_s) <= _MAX_TIMEOUT_S:
        raise ValueError(f"{name} must be positive and at most {_MAX_TIMEOUT_S:.0f}, not {limit_s}")


def _is_repeatable(sqlstate: str) -> bool:
    return sqlstate in _REPEATABLE or sqlstate.startswith(_REPEATABLE_CLASS)


def _closed_error() -> ConfigurationError:
    return ConfigurationError("the repository is closed")
