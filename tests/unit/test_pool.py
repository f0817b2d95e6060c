"""A pool whose methods call each other at any moment, as destructors and signal handlers may do.

The sessions have no server; tests/integration/test_connections.py uses real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from orderlib import AsyncPostgresOrderRepository, ConfigurationError, DatabaseUnavailable
from orderlib.postgres import pool
from orderlib.postgres.pool import Pool, ThreadWaiter

MAX_CONNECTIONS = 2


class FakeSession:
    """A session without a server."""

    def __init__(self) -> None:
        self.is_usable = True
        self.reused = False
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


class Scenario:
    """Some calls on a pool, and another method that begins before the ``moment``-th instruction of the pool's code."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: list[FakeSession] = []
        #: Whether the server refuses new connections.
        self.refuses = False
        self.threads: list[Callable[[], None]] = []
        self.failed: list[BaseException] = []
        self.began = threading.Event()
        #: The calls that got neither a session nor an error, although the other method had begun.
        self.unserved: list[ThreadWaiter] = []
        monkeypatch.setattr(Pool, "_open_session", self._open_session)
        monkeypatch.setattr("orderlib.postgres.pool._thread.start_new_thread", self._start_new_thread)
        self.pool = Pool(
            "postgresql://x@127.0.0.1:1/x", application_name="test", max_connections=MAX_CONNECTIONS, timeout_s=1
        )
        #: Two sessions in use. The interrupting method may give one back.
        self.in_use, self._lost = self._get(), self._get()

    def run(self, interrupt: Callable[[Scenario], None], moment: int) -> bool:
        """Return whether there was such a moment. A deadlock fails the test."""
        counter = iter(range(sys.maxsize))

        def trace(frame: FrameType, what: str, _value: Any) -> Any:
            if frame.f_code.co_filename != pool.__file__ or self.began.is_set():
                return None
            frame.f_trace_opcodes = True
            if what == "opcode" and next(counter) == moment:
                self.began.set()
                with contextlib.suppress(ConfigurationError):
                    interrupt(self)
            return trace

        def use() -> None:
            # Before settrace: Python 3.12 looks only then whether any frame wants them.
            sys._getframe().f_trace_opcodes = True
            sys.settrace(trace)
            try:
                with contextlib.suppress(ConfigurationError):
                    self._use()
            except BaseException as exc:  # noqa: BLE001 - the test's thread raises it
                self.failed.append(exc)
            finally:
                sys.settrace(None)

        thread = threading.Thread(target=use, daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive(), "deadlock"
        assert self.failed == []
        return self.began.is_set()

    def _use(self) -> None:
        waiters: list[ThreadWaiter] = []
        try:
            if (taken := self.pool.take()) is not None:
                self.pool.give_back(taken)
            for _ in range(MAX_CONNECTIONS):
                waiter = ThreadWaiter()
                self.pool.enqueue(waiter)
                waiters.append(waiter)
        finally:
            self._lost.is_usable = False  # type: ignore[misc]  # a fake one
            self.pool.give_back(self._lost)
            self.run_threads()
            if self.began.is_set():
                self.unserved = [each for each in waiters if each.session is None and each.failure is None]
            for waiter in waiters:
                self.pool.cancel(waiter)
            self.pool.drop_idle()

    def _get(self) -> pool.Session:
        session = self.pool.take()
        if session is None:
            waiter = ThreadWaiter()
            self.pool.enqueue(waiter)
            self.run_threads()
            session = self.pool.session_of(waiter, 0)
        return session

    def run_threads(self) -> None:
        while self.threads:
            self.threads.pop()()

    def _open_session(self) -> tuple[FakeSession | None, Exception | None]:
        if self.refuses:
            return None, DatabaseUnavailable("refused")
        self.opened.append(FakeSession())
        return self.opened[-1], None

    def _start_new_thread(self, function: Callable[..., None], args: tuple[object, ...]) -> None:
        self.threads.append(lambda: function(*args))


def give_back(scenario: Scenario) -> None:
    scenario.pool.give_back(scenario.in_use)


def give_back_lost(scenario: Scenario) -> None:
    scenario.in_use.is_usable = False  # type: ignore[misc]  # a fake one
    give_back(scenario)


def close(scenario: Scenario) -> None:
    scenario.pool.close()


def drop_idle(scenario: Scenario) -> None:
    scenario.pool.drop_idle()


@pytest.mark.parametrize("refuses", [False, True])
@pytest.mark.parametrize("interrupt", [give_back, give_back_lost, close, drop_idle])
def test_a_method_may_begin_within_any_other_of_the_same_thread(
    monkeypatch: pytest.MonkeyPatch, interrupt: Callable[[Scenario], None], *, refuses: bool
) -> None:
    def next_scenario() -> Scenario:
        scenario = Scenario(monkeypatch)
        scenario.refuses = refuses
        return scenario

    serves_all = interrupt in (give_back_lost, close) or (interrupt is give_back and not refuses)
    moment = 0
    while (scenario := next_scenario()).run(interrupt, moment):
        moment += 1
        used = scenario.pool
        scenario.run_threads()
        assert not (serves_all and scenario.unserved)
        assert len(used._sessions) <= MAX_CONNECTIONS
        assert not used._waiters
        assert not used._connecting_threads
        idle = [id(session) for session in used._idle]
        assert len(idle) == len(set(idle))
        assert set(idle) <= {id(session) for session in used._sessions}
        give_back(scenario)
        used.close()
        assert all(session.is_closed for session in scenario.opened)
    assert moment > 200


def test_a_call_without_a_connection_names_the_last_failure_or_that_all_connections_are_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scenario = Scenario(monkeypatch)
    with pytest.raises(DatabaseUnavailable, match=r"no connection within 1 s, because all 2 are in use$"):
        scenario.pool.session_of(ThreadWaiter(), 1.0)
    failing = Pool("host=127.0.0.1 port=1", application_name="test", max_connections=1, timeout_s=1)
    failure = DatabaseUnavailable("PostgreSQL at 127.0.0.1:1: Connection refused")
    monkeypatch.setattr(failing, "_open_session", lambda: (None, failure))
    assert not failing._connect_once(object())
    with pytest.raises(DatabaseUnavailable, match=r"no connection within 1 s; the last attempt failed: .* refused$"):
        failing.session_of(ThreadWaiter(), 1.0)
    monkeypatch.setattr(failing, "_open_session", lambda: (FakeSession(), None))
    assert not failing._connect_once(object())
    assert failing._connect_failure is None


def test_the_error_of_a_call_without_an_answer_resolves_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be raised in the thread of an event loop, and the name server may not answer."""

    def resolve(*_: object, **_options: object) -> None:
        raise AssertionError

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    pool = Pool("postgresql://x@one,two:5433,[::1]/x", application_name="test", max_connections=1, timeout_s=1)
    with pytest.raises(DatabaseUnavailable, match=r"^PostgreSQL at one:5432, at two:5433, at \[::1\]:5432: no conn"):
        pool.session_of(ThreadWaiter(), 1.0)
    one_port = Pool("host=one,two port=7", application_name="test", max_connections=1, timeout_s=1)
    assert one_port.addresses == " at one:7, at two:7"


@pytest.fixture
def without_threads(monkeypatch: pytest.MonkeyPatch) -> Pool:
    """A pool in a process that may start no thread, as at its limit or while the interpreter ends."""

    def start_new_thread(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("orderlib.postgres.pool._thread.start_new_thread", start_new_thread)
    return Pool("postgresql://x@127.0.0.1:1/x", application_name="test", max_connections=2, timeout_s=1)


def test_without_a_thread_that_connects_calls_are_an_outage(without_threads: Pool) -> None:
    for _ in range(2):
        waiter = ThreadWaiter()
        without_threads.enqueue(waiter)
        with pytest.raises(DatabaseUnavailable, match="no thread can be started"):
            without_threads.session_of(waiter, 0)
        assert not without_threads._connecting_threads
        assert not without_threads._waiters


def test_without_a_thread_that_connects_calls_of_tasks_are_an_outage(without_threads: Pool) -> None:
    async def get() -> None:
        await AsyncPostgresOrderRepository(without_threads).get("a")

    with pytest.raises(DatabaseUnavailable, match="no thread can be started"):
        asyncio.run(get())


def test_without_a_thread_that_connects_a_lost_session_is_given_back_without_an_error(without_threads: Pool) -> None:
    """The error of the call that lost it would be replaced."""
    sessions: list[Any] = [FakeSession(), FakeSession()]
    without_threads._sessions.update(sessions)
    first, second = ThreadWaiter(), ThreadWaiter()
    without_threads.enqueue(first)
    without_threads.enqueue(second)
    sessions[0].is_usable = False
    without_threads.give_back(sessions[0])
    assert sessions[0].is_closed
    # The other session may still serve both.
    without_threads.give_back(sessions[1])
    assert [without_threads.session_of(first, 0)] == sessions[1:]
    sessions[1].is_usable = False
    without_threads.give_back(sessions[1])
    with pytest.raises(DatabaseUnavailable, match="no thread can be started"):
        without_threads.session_of(second, 0)
