"""Connections of a repository: deadlines, outages, several hosts, close, fork, interrupts and cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import attrs
import psycopg
import pytest
from psycopg import waiting
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq.abc import PGconn

import orderlib
from orderlib import (
    AsyncPostgresOrderRepository,
    ConfigurationError,
    DatabaseUnavailable,
    Outcome,
    PostgresOrderRepository,
)
from orderlib.postgres import hosts, pool, wire
from orderlib.postgres.async_repository import _run
from orderlib.postgres.pool import Pool
from orderlib.testing import SAMPLE as SAMPLE_JSON
from tests.support import ROOT
from tests.support.databases import Database
from tests.support.over_asyncio import cancelled_after
from tests.support.tcp_proxy import Moment, TcpProxy
from tests.support.waiting import wait_for

SAMPLE = orderlib.decode_order(SAMPLE_JSON)
UID = SAMPLE.order_uid

#: The contract's bound on recovery, and time for a busy machine.
RECOVERY_S = 1.0
MACHINE_S = 2.0


@pytest.fixture(scope="module")
def stored(module_database: Database) -> Database:
    with orderlib.connect(module_database.writer_url) as repository:
        repository.save(SAMPLE)
    return module_database


def backends(database: Database, name: str) -> list[int]:
    with psycopg.connect(database.superuser_url, autocommit=True) as superuser:
        found = superuser.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = %s", [name]
        )
        return [pid for (pid,) in found]


@contextmanager
def stopped(database: Database, name: str) -> Iterator[None]:
    """Stop the backends of an application as a hung machine would."""
    pids = backends(database, name)
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@contextmanager
def silent_host() -> Iterator[int]:
    """The port of a host that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield listener.getsockname()[1]


def with_hosts(url: str, *ports: object, **more: str) -> str:
    hosts = ",".join(["127.0.0.1"] * len(ports))
    return make_conninfo(url, host=hosts, port=",".join(map(str, ports)), **more)


def port_of(url: str) -> object:
    return conninfo_to_dict(url)["port"]


def seconds(call: Callable[[], object]) -> float:
    begin = time.monotonic()
    call()
    return time.monotonic() - begin


# Several hosts


@pytest.mark.parametrize("mode", ["any", "read-write", "prefer-standby", "primary"])
def test_a_silent_first_host_does_not_keep_readers_from_the_second(stored: Database, mode: str) -> None:
    async def ask(url: str) -> orderlib.Order:
        async with orderlib.connect_async(url) as reader:
            return await reader.get(UID)

    with silent_host() as silent:
        url = with_hosts(stored.reader_url, silent, port_of(stored.reader_url), target_session_attrs=mode)
        assert asyncio.run(ask(url)) == SAMPLE
        with orderlib.connect(url, timeout_s=1.5) as repository:
            assert repository.get(UID) == SAMPLE


def test_a_server_that_refuses_the_wanted_kind_of_session_is_skipped(stored: Database) -> None:
    url = with_hosts(stored.reader_url, port_of(stored.reader_url), target_session_attrs="standby")
    with pytest.raises(DatabaseUnavailable):
        orderlib.connect(url)


def test_an_outage_of_one_host_is_an_outage_for_every_result_of_the_others(stored: Database) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        refusing = listener.getsockname()[1]
    answering = port_of(stored.reader_url)
    for ports in ([refusing, answering], [answering, refusing], [answering, refusing, answering]):
        with pytest.raises(DatabaseUnavailable):
            orderlib.connect(with_hosts(stored.reader_url, *ports, dbname="missing"))
    with pytest.raises(ConfigurationError, match="3D000"):
        orderlib.connect(with_hosts(stored.reader_url, answering, answering, dbname="missing"))


def test_a_host_that_comes_back_behind_a_silent_one_is_found_at_once(stored: Database) -> None:
    with silent_host() as silent, TcpProxy(stored.reader_url) as wire:
        url = with_hosts(wire.url, silent, port_of(wire.url))
        with orderlib.connect(url, timeout_s=1) as repository:
            wire.cut()
            for _ in range(3):
                with pytest.raises(DatabaseUnavailable):
                    repository.get(UID)
            wire.mend()
            assert seconds(lambda: until_answered(repository)) < RECOVERY_S + MACHINE_S


def test_a_connection_that_takes_longer_than_a_call_serves_a_later_one(
    stored: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected = hosts.connect_to_any
    may_connect = threading.Event()

    def slowly(arguments: Mapping[str, str | int]) -> PGconn:
        may_connect.wait(10)
        return connected(arguments)

    async def ask() -> None:
        async with orderlib.connect_async(stored.reader_url, connection_timeout_s=0.2) as reader:
            with pytest.raises(DatabaseUnavailable, match=r"no connection within 0\.2 s"):
                await reader.get(UID)
            may_connect.set()
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                with contextlib.suppress(DatabaseUnavailable):
                    assert await reader.get(UID) == SAMPLE
                    return
            pytest.fail("it was never connected")

    monkeypatch.setattr(pool, "connect_to_any", slowly)
    asyncio.run(ask())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_connections": "4"}, "max_connections must be an int, not str"),
        ({"max_connections": 2.5}, "max_connections must be an int, not float"),
        ({"max_connections": True}, "max_connections must be an int, not bool"),
        ({"timeout_s": "5"}, "timeout_s must be a number of seconds, not str"),
        ({"timeout_s": None}, "timeout_s must be a number of seconds, not NoneType"),
        ({"application_name": 5}, "application_name must be a str, not int"),
    ],
)
def test_options_of_other_types_are_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    for create in (orderlib.connect, orderlib.connect_async):
        with pytest.raises(TypeError, match=message):
            create("postgresql://127.0.0.1:1/orders", **wrong)


def test_an_application_name_with_nul_is_refused() -> None:
    with pytest.raises(ValueError, match="application_name"):
        orderlib.connect("postgresql://127.0.0.1:1/orders", application_name="a\0b")


# Outages


def until_answered(repository: PostgresOrderRepository) -> orderlib.Order:
    deadline = time.monotonic() + 30
    while True:
        try:
            return repository.get(UID)
        except DatabaseUnavailable:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_repository_recovers_within_a_second_after_an_outage_of_any_length(stored: Database) -> None:
    with TcpProxy(stored.writer_url) as wire, orderlib.connect(wire.url) as repository:
        wire.cut()
        end = time.monotonic() + 5
        while time.monotonic() < end:
            begin = time.monotonic()
            with pytest.raises(DatabaseUnavailable):
                repository.get(UID)
            assert time.monotonic() - begin < MACHINE_S
            time.sleep(0.05)
        wire.mend()
        assert seconds(lambda: until_answered(repository)) < RECOVERY_S + MACHINE_S
        assert repository.save(SAMPLE) is Outcome.DUPLICATE


@pytest.mark.parametrize("call", ["get", "get_many", "stream", "save"])
def test_a_connection_lost_while_idle_fails_no_call(stored: Database, call: str) -> None:
    with TcpProxy(stored.writer_url) as wire, orderlib.connect(wire.url, max_connections=3) as repository:
        with ThreadPoolExecutor(3) as threads:
            list(threads.map(lambda _: repository.get(UID), range(30)))
        wire.cut()
        wire.mend()
        if call == "get":
            assert repository.get(UID) == SAMPLE
        elif call == "get_many":
            # The second attempt needs the order_uids again.
            assert repository.get_many(iter([UID])) == {UID: SAMPLE}
        elif call == "stream":
            assert [found.order for found in repository.stream()] == [SAMPLE]
        else:
            assert repository.save(SAMPLE) is Outcome.DUPLICATE


def test_a_connection_lost_while_idle_fails_no_stream_of_a_task(stored: Database) -> None:
    async def ask(wire: TcpProxy) -> None:
        async with orderlib.connect_async(wire.url) as reader:
            await reader.count()
            wire.cut()
            wire.mend()
            assert [found.order async for found in reader.stream()] == [SAMPLE]

    with TcpProxy(stored.reader_url) as wire:
        asyncio.run(ask(wire))


def test_a_connection_attempt_from_before_a_call_does_not_fail_it(
    stored: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected = hosts.connect_to_any
    began, may_fail = threading.Event(), threading.Event()

    def fails_at_first(arguments: Mapping[str, str | int]) -> PGconn:
        if not began.is_set():
            began.set()
            may_fail.wait(10)
            raise DatabaseUnavailable("server closed the connection unexpectedly")
        return connected(arguments)

    async def ask() -> None:
        async with orderlib.connect_async(stored.reader_url, max_connections=1, connection_timeout_s=5) as reader:
            before = asyncio.create_task(reader.get(UID))
            while not began.is_set():
                await asyncio.sleep(0.001)
            after = asyncio.create_task(reader.get(UID))
            while len(reader._pool._waiters) != 2:
                await asyncio.sleep(0.001)
            may_fail.set()
            assert await after == SAMPLE
            with pytest.raises(DatabaseUnavailable):
                await before

    monkeypatch.setattr(pool, "connect_to_any", fails_at_first)
    asyncio.run(ask())


@pytest.mark.parametrize("setting", ["idle_session_timeout = '200ms'", "idle_in_transaction_session_timeout = '200ms'"])
def test_a_connection_that_postgresql_ended_while_idle_fails_no_call(stored: Database, setting: str) -> None:
    name = "idle-limit"
    url = make_conninfo(stored.writer_url, options=f"-c {setting.replace(' = ', '=')}".replace("'", ""))
    with orderlib.connect(url, application_name=name) as repository:
        assert repository.get(UID) == SAMPLE
        if setting.startswith("idle_session"):
            wait_for(lambda: not backends(stored, name), 10)
        assert repository.save(SAMPLE) is Outcome.DUPLICATE


def test_a_commit_whose_answer_is_lost_is_reported_as_unknown_and_may_be_repeated(database: Database) -> None:
    with TcpProxy(database.writer_url) as carrier, orderlib.connect(carrier.url) as repository:
        repository.save(SAMPLE)
        carrier.set_trap(Moment.COMMITTED)
        with ThreadPoolExecutor(1) as thread:
            saving = thread.submit(repository.save, attrs.evolve(SAMPLE, entry="changed"))
            assert carrier.trapped.wait(30)
            carrier.drop()
            with pytest.raises(DatabaseUnavailable, match=r"unknown.*safe"):
                saving.result(10)
        assert repository.save(attrs.evolve(SAMPLE, entry="changed")) is Outcome.DUPLICATE


# Deadlines


CALLS: dict[str, Callable[[PostgresOrderRepository], object]] = {
    "get": lambda repository: repository.get(UID),
    "get_many": lambda repository: repository.get_many([UID]),
    "content_sha256": lambda repository: repository.content_sha256(UID),
    "original": lambda repository: repository.original(UID),
    "list_orders": lambda repository: repository.list_orders(),
    "stats": lambda repository: repository.stats(),
    "check": lambda repository: repository.check(),
    "save": lambda repository: repository.save(SAMPLE),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_stopped_backend_delays_a_call_no_longer_than_its_limit(
    stored: Database, call: Callable[[PostgresOrderRepository], object]
) -> None:
    with orderlib.connect(stored.writer_url, application_name="bounded", timeout_s=0.5) as repository:
        repository.get(UID)
        with stopped(stored, "bounded"):
            begin = time.monotonic()
            with pytest.raises(DatabaseUnavailable, match=r"did not answer within 0\.5 s"):
                call(repository)
            assert time.monotonic() - begin < 0.5 + MACHINE_S
            # The silent connection was given up.
            assert repository.get(UID) == SAMPLE


def test_both_reads_of_a_check_have_one_limit(stored: Database) -> None:
    """The first read takes most of it, and the second one waits for a lock."""
    with (
        psycopg.connect(stored.superuser_url) as locker,
        orderlib.connect(stored.writer_url, application_name="checked", timeout_s=4) as repository,
        ThreadPoolExecutor(1) as threads,
    ):
        locker.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
        begin = time.monotonic()
        with stopped(stored, "checked"):
            checking = threads.submit(repository.check)
            time.sleep(3)
        assert isinstance(checking.exception(20), DatabaseUnavailable)
        assert time.monotonic() - begin < 4 + MACHINE_S


def test_a_silent_server_is_reported_within_the_limit(stored: Database) -> None:
    with silent_host() as silent:
        url = with_hosts(stored.reader_url, silent)
        begin = time.monotonic()
        with pytest.raises(DatabaseUnavailable, match=r"no connection within 0\.5 s"):
            orderlib.connect(url, timeout_s=0.5)
        assert time.monotonic() - begin < 0.5 + MACHINE_S


def test_a_part_of_an_answer_does_not_prolong_a_call() -> None:
    """A server that sends something shortly before the deadline, and then nothing more."""

    def steps() -> PQGen[None]:
        while True:
            if (yield waiting.Wait.R):
                ours.recv(1)

    async def ask() -> None:
        call = pool.Call(Pool("host=127.0.0.1", application_name="part", max_connections=1, timeout_s=4))
        asyncio.get_running_loop().call_later(3.5, theirs.send, b"x")
        with pytest.raises(wire.DeadlineExceeded):
            await _run(cast("Any", SimpleNamespace(pgconn=SimpleNamespace(socket=ours.fileno()))), steps(), call)

    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert seconds(lambda: asyncio.run(ask())) < 4 + MACHINE_S


def test_a_silent_server_is_reported_with_the_time_that_the_call_had(stored: Database) -> None:
    async def ask(url: str) -> None:
        async with orderlib.connect_async(url, connection_timeout_s=5) as reader:
            with pytest.raises(DatabaseUnavailable, match=r"no connection within 0\.5 s"):
                await reader.wait_until_handled("orders", 0, 0, timeout_s=0.1)

    with silent_host() as silent:
        asyncio.run(ask(with_hosts(stored.reader_url, silent)))


def test_a_commit_without_an_answer_in_time_is_unknown_and_a_copy_stored_nothing(database: Database) -> None:
    with TcpProxy(database.writer_url) as carrier:
        for moment, message in [(Moment.COPY, "nothing was stored"), (Moment.COMMITTED, "unknown")]:
            with orderlib.connect(carrier.url, timeout_s=1) as repository:
                carrier.set_trap(moment)
                with pytest.raises(DatabaseUnavailable, match=message):
                    repository.save(attrs.evolve(SAMPLE, entry=message[:3]))
                carrier.drop()
    with orderlib.connect(database.writer_url) as repository:
        assert repository.get(UID).entry == "unk"


def test_the_same_for_asyncio(database: Database) -> None:
    async def save(moment: Moment, message: str) -> None:
        async with orderlib.connect_async(carrier.url, timeout_s=1) as repository:
            carrier.set_trap(moment)
            with pytest.raises(DatabaseUnavailable, match=message):
                await repository.save(attrs.evolve(SAMPLE, entry=message[:3]))
            carrier.drop()

    with TcpProxy(database.writer_url) as carrier:
        for moment, message in [(Moment.COPY, "nothing was stored"), (Moment.COMMITTED, "unknown")]:
            asyncio.run(save(moment, message))
    with orderlib.connect(database.writer_url) as repository:
        assert repository.get(UID).entry == "unk"


def test_postgresql_ends_a_statement_before_its_caller_gives_up(stored: Database) -> None:
    with (
        psycopg.connect(stored.superuser_url) as locker,
        orderlib.connect(stored.writer_url, application_name="locked", timeout_s=1) as repository,
    ):
        before = backends(stored, "locked")
        locker.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(DatabaseUnavailable):
            repository.save(attrs.evolve(SAMPLE, entry="locked"))
        assert backends(stored, "locked") == before


def test_a_call_without_a_connection_raises_in_time(stored: Database) -> None:
    with orderlib.connect(stored.writer_url, application_name="full", timeout_s=0.5, max_connections=1) as repository:
        with stopped(stored, "full"), ThreadPoolExecutor(2) as threads:
            begin = time.monotonic()
            errors = [threads.submit(repository.get, UID).exception(10) for _ in range(2)]
            assert time.monotonic() - begin < 1 + MACHINE_S
        assert isinstance(errors[0], DatabaseUnavailable)
        assert repository.get(UID) == SAMPLE


@pytest.mark.parametrize("limits", [{"timeout_s": 0}, {"timeout_s": float("nan")}, {"max_connections": 0}])
def test_limits_that_allow_no_call_are_refused(stored: Database, limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        orderlib.connect(stored.reader_url, **limits)  # type: ignore[arg-type]  # mypy takes them for all arguments


@pytest.mark.parametrize("limit_s", [0, -1, float("inf")])
def test_a_limit_of_the_wait_for_a_connection_that_allows_no_call_is_refused(stored: Database, limit_s: float) -> None:
    with pytest.raises(ValueError, match="connection_timeout_s must be positive"):
        orderlib.connect_async(stored.reader_url, connection_timeout_s=limit_s)


# Close


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_closed_repository_raises_one_error(
    stored: Database, call: Callable[[PostgresOrderRepository], object]
) -> None:
    repository = orderlib.connect(stored.writer_url)
    repository.close()
    repository.close()
    with pytest.raises(ConfigurationError, match="the repository is closed"):
        call(repository)


def test_a_closed_reader_raises_the_same_error_and_does_not_reconnect(stored: Database) -> None:
    async def ask() -> None:
        reader = orderlib.connect_async(stored.reader_url, application_name="closed")
        await reader.get(UID)
        await reader.close()
        for call in (reader.get(UID), reader.list_orders(), reader.check()):
            with pytest.raises(ConfigurationError, match="the repository is closed"):
                await call

    asyncio.run(ask())
    wait_for(lambda: not backends(stored, "closed"), 10)


def test_close_ends_the_wait_for_a_connection(stored: Database) -> None:
    with psycopg.connect(stored.superuser_url) as locker, ThreadPoolExecutor(3) as threads:
        locker.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
        repository = orderlib.connect(stored.writer_url, application_name="closing", max_connections=1)
        reading = [threads.submit(repository.get, UID) for _ in range(3)]
        wait_for(lambda: len(repository._pool._waiters) == 2, 10)
        repository.close()
        # One is in its read; it may end that.
        wait_for(lambda: sum(future.done() for future in reading) == 2, 2)
        for future in reading:
            if future.done():
                with pytest.raises(ConfigurationError, match="closed"):
                    future.result()
        locker.rollback()
        assert SAMPLE in [future.result(10) for future in reading if future.exception(10) is None]
    wait_for(lambda: not backends(stored, "closing"), 10)


def test_close_ends_the_wait_of_a_task(stored: Database) -> None:
    async def ask() -> None:
        with psycopg.connect(stored.superuser_url) as locker:
            locker.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
            reader = orderlib.connect_async(stored.reader_url, max_connections=1, connection_timeout_s=5)
            reading = [asyncio.create_task(reader.get(UID)) for _ in range(3)]
            # One has the connection, and the others wait for it.
            while not (reader._pool._sessions and reader._pool._waiters):
                await asyncio.sleep(0.01)
            await reader.close()
            done, [last] = await asyncio.wait(reading, timeout=2)
            assert [str(task.exception()) for task in done] == ["the repository is closed"] * 2
            locker.rollback()
        assert await last == SAMPLE

    asyncio.run(ask())


# Fork


#: For scripts: the calls that a forked child may not make.
ASSERT_REFUSED = """
    def assert_refused(*calls):
        signal.alarm(20)
        for call in calls:
            try:
                call()
            except orderlib.ConfigurationError as exc:
                assert "fork" in str(exc), exc
            else:
                raise AssertionError("no error")
"""

FORK = """
    import os, signal, sys, warnings
    import orderlib, psycopg
    warnings.simplefilter("ignore", DeprecationWarning)

    def backends():
        with psycopg.connect(sys.argv[1]) as other:
            return other.execute("SELECT pid FROM pg_stat_activity WHERE application_name = 'forked'").fetchall()

    repository = orderlib.connect(sys.argv[1], application_name="forked", max_connections=2)
    for _ in range(10):
        repository.get(sys.argv[2])
    before = backends()
    assert len(before) == 1, before

    order = repository.get(sys.argv[2])
    for ending in sys.argv[3:]:
        child = os.fork()
        if child == 0:
            assert_refused(
                lambda: repository.get(sys.argv[2]), lambda: repository.save(order), repository.list_orders
            )
            if ending == "close":
                repository.close()
            elif ending == "with":
                with repository:
                    pass
            elif ending == "collect":
                import gc
                repository = None
                gc.collect()
            elif ending == "anew":
                with orderlib.connect(sys.argv[1]) as another:
                    assert another.get(sys.argv[2]) == order
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0, ending
        for _ in range(10):
            assert repository.get(sys.argv[2]) == order
        # The parent's connection was not replaced: a call in progress would have lost it.
        assert backends() == before, ending
    assert repository.save(order) == "duplicate"
    print("done")
"""


def errors_of_script(script: str, *arguments: str) -> str:
    """Run a script that prints `done` in the end. Return what it wrote to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ASSERT_REFUSED) + textwrap.dedent(script), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout == "done\n", done.stderr
    return done.stderr


def test_a_forked_child_gets_one_error_and_the_parent_continues(stored: Database) -> None:
    assert errors_of_script(FORK, stored.writer_url, UID, "exit", "close", "with", "collect", "anew") == ""


def test_what_was_begun_before_a_fork_does_not_continue_in_the_child(stored: Database) -> None:
    script = """
        import os, signal, sys
        import orderlib, psycopg

        connection = psycopg.connect(sys.argv[1])
        in_transaction = orderlib.using(connection)
        order = in_transaction.get(sys.argv[2])
        stream = orderlib.connect(sys.argv[1]).stream()
        assert next(stream).order == order
        child = os.fork()
        if child == 0:
            assert_refused(lambda: next(stream), lambda: in_transaction.get(sys.argv[2]))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert list(stream) == []
        assert in_transaction.get(sys.argv[2]) == order
        print("done")
    """
    assert errors_of_script(script, stored.reader_url, UID) == ""


def test_a_fork_while_other_threads_read_neither_hangs_nor_harms_them(stored: Database) -> None:
    script = """
        import os, sys, threading, warnings, signal
        import orderlib
        warnings.simplefilter("ignore", DeprecationWarning)
        repository = orderlib.connect(sys.argv[1], max_connections=2)
        enough = threading.Event()
        failures = []
        def read():
            while not enough.is_set():
                try:
                    repository.get(sys.argv[2])
                except Exception as exc:
                    failures.append(exc)
                    return
        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                try:
                    repository.get(sys.argv[2])
                except orderlib.ConfigurationError:
                    repository.close()
                    os._exit(0)
                os._exit(1)
            assert os.waitpid(child, 0)[1] == 0
        enough.set()
        for thread in threads:
            thread.join()
        assert not failures, failures
        print("done")
    """
    errors_of_script(script, stored.reader_url, UID)


# Threads and interrupts


def test_many_threads_share_a_few_connections(stored: Database) -> None:
    with orderlib.connect(stored.writer_url, application_name="shared", max_connections=3, timeout_s=30) as repository:
        with ThreadPoolExecutor(40) as threads:
            found = list(threads.map(lambda _: repository.get(UID), range(400)))
        assert Counter(order.order_uid for order in found) == {UID: 400}
        assert len(backends(stored, "shared")) <= 3


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt, which pytest would take for its own."""


# psycopg's pipeline talks to its connection once more when it is collected; an interrupt has closed that by then.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <generator object BasePipeline")
@pytest.mark.parametrize("call", ["get", "save"])
def test_interrupts_lose_no_connection(stored: Database, call: str) -> None:
    def abort(*_: object) -> None:
        raise Interrupted

    interrupts = 0
    with orderlib.connect(stored.writer_url, max_connections=1, timeout_s=20) as repository:
        before = signal.signal(signal.SIGALRM, abort)
        try:
            for step in range(400):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 20e-6 * (1 + step % 100))
                    try:
                        for _ in range(3):
                            repository.get(UID) if call == "get" else repository.save(SAMPLE)
                    finally:
                        signal.setitimer(signal.ITIMER_REAL, 0)
                except Interrupted:
                    interrupts += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert interrupts > 100
        begin = time.monotonic()
        assert repository.get(UID) == SAMPLE
        assert repository.save(SAMPLE) is Outcome.DUPLICATE
        assert time.monotonic() - begin < 10


# Reads that another session can repeat


def conflict(code: str) -> psycopg.Error:
    return psycopg.errors.lookup(code)("canceling statement due to conflict with recovery")


@pytest.mark.parametrize("code", ["40001", "40P01", "57014", "26000", "0A000"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_conflict_with_recovery_is_retried_once(
    stored: Database, monkeypatch: pytest.MonkeyPatch, code: str, times: int
) -> None:
    left = 0

    def conflicting(steps: PQGen[object], deadline: float) -> PQGen[object]:
        nonlocal left
        if left and getattr(steps, "__name__", "") == "get_stored":
            left -= 1
            raise conflict(code)
        return (yield from run_until(steps, deadline))

    run_until = wire.run_until
    monkeypatch.setattr(pool, "run_until", conflicting)
    monkeypatch.setattr("orderlib.postgres.async_repository.run_until", conflicting)

    async def ask() -> orderlib.Order:
        async with orderlib.connect_async(stored.reader_url) as reader:
            return await reader.get(UID)

    with orderlib.connect(stored.reader_url) as repository:
        reads: list[Callable[[], orderlib.Order]] = [lambda: repository.get(UID), lambda: asyncio.run(ask())]
        for read in reads:
            left = times
            if times == 1:
                assert read() == SAMPLE
            else:
                # A prepared statement that fails again is a configuration error, not an outage.
                with pytest.raises(
                    ConfigurationError if code in ("0A000", "26000") else DatabaseUnavailable, match=code
                ):
                    read()
            left = 0


@pytest.mark.parametrize("code", ["22012", "23514", "54000", "XX000"])
def test_a_read_never_raises_refused_by_database(stored: Database, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    def failing(steps: PQGen[object], deadline: float) -> PQGen[object]:
        if getattr(steps, "__name__", "") == "get_stored":
            raise conflict(code)
        return (yield from run_until(steps, deadline))

    run_until = wire.run_until
    monkeypatch.setattr(pool, "run_until", failing)
    with orderlib.connect(stored.reader_url) as repository, pytest.raises(ConfigurationError, match=code):
        repository.get(UID)


def test_a_read_after_deallocate_all_succeeds(stored: Database) -> None:
    """Some poolers reset sessions that are in use."""
    with orderlib.connect(stored.reader_url) as repository:
        repository.get(UID)
        [session] = repository._pool._idle
        session.deadline = time.monotonic() + 10
        session.execute("DEALLOCATE ALL")
        assert repository.get(UID) == SAMPLE


def test_a_statement_that_fails_is_prepared_once(stored: Database) -> None:
    """PostgreSQL keeps it after the error, so another one each time would fill its memory."""
    with psycopg.connect(stored.reader_url, autocommit=True) as connection:
        prepared = wire.Wire(connection.pgconn)
        good, bad, last = (("SELECT $1::int", ["7"]), ("SELECT 1 / $1::int", ["0"]), ("SELECT 2 * $1::int", ["3"]))
        for _ in range(3):
            with pytest.raises(psycopg.errors.DivisionByZero):
                connection.wait(prepared.pipeline(good, bad, last))
            with connection.transaction(force_rollback=True), pytest.raises(psycopg.errors.DivisionByZero):
                connection.wait(prepared.pipeline(bad))
            assert connection.wait(prepared.pipeline(good)) == [[(7,)]]
        names = "SELECT name, statement FROM pg_prepared_statements ORDER BY 1"
        assert connection.execute(names).fetchall() == [("orderlib_0", good[0]), ("orderlib_1", bad[0])]
        for _ in range(2):
            assert connection.wait(prepared.pipeline(last, good)) == [[(6,)], [(7,)]]
        assert [statement for _, statement in connection.execute(names)] == [good[0], bad[0], last[0]]
        # A stale statement is prepared again, also one that was prepared in the same round trip.
        connection.execute("DEALLOCATE ALL")
        with pytest.raises(psycopg.errors.InvalidSqlStatementName):
            connection.wait(prepared.pipeline(("SELECT 4 * $1::int", ["3"]), good))
        assert connection.wait(prepared.pipeline(last, good, ("SELECT 4 * $1::int", ["3"]))) == [
            [(6,)],
            [(7,)],
            [(12,)],
        ]


# Cancellation


def test_a_read_cancelled_at_any_step_loses_no_connection(stored: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loop run n rounds, then cancel: before, while and after it waits for a connection and for an answer."""
    # Each wait takes the loop's way, so that there are many steps.
    monkeypatch.setattr(waiting, "MAX_BUSY_TIME", 0.0, raising=False)

    async def any_cancelled(rounds: int, reader: AsyncPostgresOrderRepository) -> bool:
        return any(await asyncio.gather(*(cancelled_after(rounds, reader.get(UID)) for _ in range(3))))

    async def ask() -> None:
        async with orderlib.connect_async(
            stored.reader_url, max_connections=1, application_name="cancelled", connection_timeout_s=5
        ) as reader:
            rounds = cancels = 0
            while await any_cancelled(rounds, reader) and rounds < 300:
                cancels += 1
                rounds += 1
                assert await asyncio.wait_for(reader.get(UID), 10) == SAMPLE
                assert len(reader._pool._sessions) == 1
            assert cancels > 3

    asyncio.run(ask())
    wait_for(lambda: not backends(stored, "cancelled"), 10)


def test_tasks_that_are_cancelled_while_they_wait_leave_the_connection_to_others(stored: Database) -> None:
    async def ask() -> None:
        async with orderlib.connect_async(stored.reader_url, max_connections=2, connection_timeout_s=10) as reader:
            for step in range(60):
                tasks = [asyncio.create_task(reader.get(UID)) for _ in range(8)]
                await asyncio.sleep(0.0001 * step)
                for task in tasks[:: 1 + step % 3]:
                    task.cancel()
                found = await asyncio.gather(*tasks, return_exceptions=True)
                assert {type(item) for item in found} <= {orderlib.Order, asyncio.CancelledError}
                assert len(reader._pool._sessions) <= 2
            assert await reader.get(UID) == SAMPLE

    asyncio.run(ask())


def test_one_reader_serves_several_event_loops(stored: Database) -> None:
    reader = orderlib.connect_async(stored.reader_url, max_connections=1)
    for _ in range(3):
        assert asyncio.run(reader.get(UID)) == SAMPLE
    asyncio.run(reader.close())


def test_a_call_of_a_closed_event_loop_leaves_its_connection_to_one_other_call(stored: Database) -> None:
    reader = orderlib.connect_async(stored.reader_url, max_connections=1)
    asyncio.run(reader.count())
    session = reader._pool.take()
    assert session is not None
    loop = asyncio.new_event_loop()
    waiting_call = loop.create_task(reader.count())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    reader._pool.give_back(session)
    # asyncio would log that the task never ended.
    waiting_call._log_destroy_pending = False  # type: ignore[attr-defined]
    del waiting_call
    gc.collect()
    assert reader._pool.take() is session
    assert reader._pool.take() is None
    reader._pool.give_back(session)
    asyncio.run(reader.close())
