"""``using`` and ``using_async``: orders and the caller's own rows in one transaction, both or neither."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from random import Random

import psycopg
import pytest
from psycopg.rows import class_row, dict_row, scalar_row

import orderlib
from orderlib import ConfigurationError, DatabaseUnavailable, Outcome, RefusedByDatabase, TransactionConflict
from orderlib.postgres.wire import Wire
from orderlib.repository import STREAM_SIZE
from tests.integration.test_postgres_repository import with_unchecked
from tests.support import ROOT
from tests.support.databases import Database
from tests.support.over_asyncio import cancelled_after
from tests.support.repository_contract import an_order, versions_in
from tests.support.waiting import wait_for

REFUSED = with_unchecked(an_order("refused"), track_number="")

#: What a call must not leave behind in the caller's session.
SESSION_STATE = """
SELECT (SELECT array_agg((name, setting) ORDER BY name) FROM pg_settings WHERE name <> 'transaction_isolation'),
       (SELECT count(*) FROM pg_prepared_statements), (SELECT count(*) FROM pg_cursors)
"""


@pytest.fixture
def shop(module_database: Database) -> Database:
    """A database with an empty table of the caller's own."""
    with psycopg.connect(module_database.superuser_url, autocommit=True) as superuser:
        superuser.execute("DELETE FROM orders")
        superuser.execute("DROP TABLE IF EXISTS outbox")
        superuser.execute("CREATE TABLE outbox (order_uid text PRIMARY KEY)")
        superuser.execute("GRANT SELECT, INSERT ON outbox TO orders_writer")
    return module_database


def add_row(connection: psycopg.Connection, order_uid: str) -> None:
    connection.execute("INSERT INTO outbox VALUES (%s)", [order_uid])


def stored_uids(shop: Database) -> tuple[list[str], list[str]]:
    """Return the order_uids of the orders, and those of the caller's rows, as another session sees them."""
    with psycopg.connect(shop.superuser_url) as superuser:
        orders = superuser.execute("SELECT order_uid FROM orders ORDER BY 1").fetchall()
        rows = superuser.execute("SELECT order_uid FROM outbox ORDER BY 1").fetchall()
    return [uid for (uid,) in orders], [uid for (uid,) in rows]


# Both or neither


@pytest.mark.parametrize("commits", [True, False])
def test_the_callers_commit_decides_about_orders_and_rows(shop: Database, commits: bool) -> None:
    with psycopg.connect(shop.writer_url) as connection:
        repository = orderlib.using(connection)
        assert repository.save(an_order("a")) is Outcome.STORED
        add_row(connection, "a")
        assert repository.get("a") == an_order("a")
        assert stored_uids(shop) == ([], [])
        connection.commit() if commits else connection.rollback()
    assert stored_uids(shop) == ((["a"], ["a"]) if commits else ([], []))


def test_an_error_of_the_caller_undoes_the_order_too(shop: Database) -> None:
    def save_with_the_same_row_twice(connection: psycopg.Connection) -> None:
        with connection.transaction():
            orderlib.using(connection).save(an_order("a"))
            add_row(connection, "a")
            add_row(connection, "a")

    with (
        psycopg.connect(shop.writer_url, autocommit=True) as connection,
        pytest.raises(psycopg.errors.UniqueViolation),
    ):
        save_with_the_same_row_twice(connection)
    assert stored_uids(shop) == ([], [])


def test_after_a_refused_order_the_transaction_goes_on_without_any_order_of_that_call(shop: Database) -> None:
    with psycopg.connect(shop.writer_url) as connection:
        repository = orderlib.using(connection)
        add_row(connection, "before")
        repository.save(an_order("kept"))
        with pytest.raises(RefusedByDatabase, match="refused"):
            repository.save_many([an_order("a"), REFUSED, an_order("b")])
        add_row(connection, "after")
    assert stored_uids(shop) == (["kept"], ["after", "before"])


def test_a_nested_transaction_of_the_caller_can_be_undone_alone(shop: Database) -> None:
    with psycopg.connect(shop.writer_url, autocommit=True) as connection, connection.transaction():
        repository = orderlib.using(connection)
        repository.save(an_order("outer"))
        with connection.transaction(force_rollback=True):
            repository.save(an_order("inner"))
        add_row(connection, "outer")
    assert stored_uids(shop) == (["outer"], ["outer"])


def test_a_program_killed_at_any_moment_leaves_orders_and_rows_equal(shop: Database) -> None:
    program = """
import sys, psycopg, attrs, orderlib
from orderlib.testing import SAMPLE
order = orderlib.decode_order(SAMPLE)
with psycopg.connect(sys.argv[1], autocommit=True) as connection:
    number = int(sys.argv[2])
    while True:
        uid = f"order-{number:07}"
        with connection.transaction():
            orderlib.using(connection).save(attrs.evolve(order, order_uid=uid))
            connection.execute("INSERT INTO outbox VALUES (%s)", [uid])
        print("stored", flush=True)
        number += 1
"""
    rng = Random(7)
    for turn in range(4):
        command = [sys.executable, "-c", program, shop.writer_url, str(turn * 1_000_000)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.05 + 0.1 * rng.random())  # the moment of the kill, not a wait for something
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    with psycopg.connect(shop.superuser_url) as superuser:
        sessions = (
            "SELECT count(*) FROM pg_stat_activity WHERE usename = 'orders_writer' AND datname = current_database()"
        )
        wait_for(lambda: superuser.execute(sessions).fetchone() == (0,), 10)
    orders, rows = stored_uids(shop)
    assert orders == rows
    assert len(orders) >= 4


# What a call leaves behind


@pytest.mark.parametrize("seqscan", ["on", "off"])
def test_calls_leave_no_setting_statement_or_cursor_behind(shop: Database, seqscan: str) -> None:
    with psycopg.connect(shop.writer_url) as connection:
        connection.execute(f"SET enable_seqscan = {seqscan}")
        connection.execute("SET search_path = public")
        connection.commit()
        before = connection.execute(SESSION_STATE).fetchone()
        repository = orderlib.using(connection)
        repository.save_many([an_order("a"), an_order("b")])
        repository.save(an_order("a", 2))
        repository.save(an_order("a", 2))
        with pytest.raises(RefusedByDatabase):
            repository.save(REFUSED)
        repository.get("a")
        repository.list_orders()
        repository.stats()
        assert connection.execute(SESSION_STATE).fetchone() == before
        connection.commit()
        assert connection.execute(SESSION_STATE).fetchone() == before
        # psycopg prepares a statement that it has executed five times.
        for _ in range(12):
            repository.get("a")
            repository.save(an_order("a", 3))
            connection.commit()
        assert connection.execute(SESSION_STATE).fetchone() == before
        with pytest.raises(psycopg.errors.InvalidSavepointSpecification):
            connection.execute("RELEASE SAVEPOINT orderlib")


def test_without_a_transaction_to_join_calls_are_refused(shop: Database) -> None:
    with psycopg.connect(shop.writer_url, autocommit=True) as connection:
        repository = orderlib.using(connection)
        with pytest.raises(ConfigurationError, match=r"open one with connection\.transaction"):
            repository.save(an_order("a"))
        with pytest.raises(ConfigurationError, match="needs a transaction"):
            repository.get("a")
        with connection.transaction(), connection.pipeline(), pytest.raises(ConfigurationError, match="pipeline"):
            repository.save(an_order("a"))
    with pytest.raises(ConfigurationError, match="closed"):
        repository.get("a")
    assert stored_uids(shop) == ([], [])


def test_in_a_failed_or_read_only_transaction_calls_are_refused(shop: Database) -> None:
    with psycopg.connect(shop.writer_url) as connection:
        with pytest.raises(psycopg.errors.DivisionByZero):
            connection.execute("SELECT 1 / 0")
        with pytest.raises(ConfigurationError, match="the transaction has failed"):
            orderlib.using(connection).get("a")
        connection.rollback()
        connection.read_only = True
        with pytest.raises(ConfigurationError, match="the transaction is read-only"):
            orderlib.using(connection).save(an_order("a"))
        assert orderlib.using(connection).list_orders().orders == ()
    # By default, as when an administrator protects a full disk: that may end at any time.
    options = "-c default_transaction_read_only=on"
    with psycopg.connect(shop.writer_url, options=options) as connection, pytest.raises(DatabaseUnavailable):
        orderlib.using(connection).save(an_order("a"))


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_connection_that_is_not_utf8_is_refused(shop: Database, encoding: str) -> None:
    with psycopg.connect(shop.writer_url, client_encoding=encoding) as connection:
        with pytest.raises(ConfigurationError, match="client_encoding is UTF8"):
            orderlib.using(connection).save(an_order("a"))
        connection.execute("SET client_encoding = 'utf-8'")
        assert orderlib.using(connection).save(an_order("a")) is Outcome.STORED


def test_the_rows_of_the_callers_connection_do_not_matter(shop: Database) -> None:
    async def save_and_read(order: orderlib.Order) -> None:
        async with await psycopg.AsyncConnection.connect(shop.writer_url, row_factory=scalar_row) as connection:
            repository = orderlib.using_async(connection)
            await repository.save(order)
            assert await repository.get(order.order_uid) == order

    for row_factory in (scalar_row, dict_row, class_row(Random)):
        with psycopg.connect(shop.writer_url, row_factory=row_factory) as connection:
            assert orderlib.using(connection).save(an_order("a")) in {Outcome.STORED, Outcome.DUPLICATE}
            assert orderlib.using(connection).get("a") == an_order("a")
    asyncio.run(save_and_read(an_order("b")))


def test_a_connection_of_the_wrong_kind_is_refused(shop: Database) -> None:
    async def use(url: str) -> None:
        async with await psycopg.AsyncConnection.connect(url) as connection:
            with pytest.raises(TypeError, match="connection must be a Connection, not AsyncConnection"):
                orderlib.using(connection)  # type: ignore[arg-type]

    asyncio.run(use(shop.writer_url))
    message = "connection must be an AsyncConnection, not Connection"
    with psycopg.connect(shop.writer_url) as connection, pytest.raises(TypeError, match=message):
        orderlib.using_async(connection)  # type: ignore[arg-type]


def test_stream_needs_one_snapshot(shop: Database) -> None:
    with psycopg.connect(shop.writer_url) as connection:
        with pytest.raises(ConfigurationError, match="REPEATABLE READ"):
            list(orderlib.using(connection).stream())
        connection.rollback()
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        orderlib.using(connection).save(an_order("a"))
        assert [stored.order.order_uid for stored in orderlib.using(connection).stream()] == ["a"]


@pytest.mark.parametrize("orders", [3, STREAM_SIZE + 20])
@pytest.mark.parametrize("autocommit", [False, True])
def test_a_stream_ends_with_its_transaction(shop: Database, orders: int, autocommit: bool) -> None:
    with orderlib.connect(shop.writer_url) as pool:
        pool.save_many(an_order(f"{index:04}", items=1) for index in range(orders))
    with psycopg.connect(shop.writer_url, autocommit=autocommit) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        for end in (connection.commit, connection.rollback):
            connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ") if autocommit else None
            stream = orderlib.using(connection).stream()
            next(stream)
            end()
            connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ") if autocommit else None
            with pytest.raises(ConfigurationError, match=r"the transaction ended during stream\(\)"):
                list(stream)
            connection.rollback()


def test_a_stream_of_a_task_ends_with_its_transaction(shop: Database) -> None:
    async def run() -> None:
        async with await psycopg.AsyncConnection.connect(shop.writer_url) as connection:
            await connection.set_isolation_level(psycopg.IsolationLevel.REPEATABLE_READ)
            repository = orderlib.using_async(connection)
            await repository.save_many([an_order("a"), an_order("b")])
            stream = repository.stream()
            await anext(stream)
            await connection.commit()
            with pytest.raises(ConfigurationError, match=r"the transaction ended during stream\(\)"):
                [stored async for stored in stream]

    asyncio.run(run())


def test_a_stream_shows_what_its_own_transaction_saves_on_pages_that_are_read_later(shop: Database) -> None:
    with psycopg.connect(shop.writer_url) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        repository = orderlib.using(connection)
        repository.save_many(an_order(f"{index:04}", items=1) for index in range(STREAM_SIZE + 1))
        stream = repository.stream()
        first = next(stream)
        repository.save_many([an_order("0000", 2), an_order(first.order.order_uid, 2), an_order("new")])
        # A savepoint of the caller ends no transaction.
        with connection.transaction():
            repository.save(an_order("0001", 2))
        versions = [(stored.order.order_uid, stored.version) for stored in (first, *stream)]
        assert versions[0] == (f"{STREAM_SIZE:04}", 1)
        assert versions[-2:] == [("0001", 1), ("0000", 2)]
        assert len(versions) == STREAM_SIZE + 1


# Other writers


def test_a_writer_that_commits_first_is_replaced_and_reads_are_never_mixed(shop: Database) -> None:
    """In READ COMMITTED each statement has a snapshot of its own."""
    with orderlib.connect(shop.writer_url) as pool:
        pool.save_many([an_order("a", 1), an_order("b", 1)])
    enough = threading.Event()

    def rewrite() -> None:
        version = 1
        with psycopg.connect(shop.writer_url) as connection:
            repository = orderlib.using(connection)
            while not enough.is_set():
                version += 1
                lines = 1 + version % 5
                repository.save_many([an_order("a", version, items=lines), an_order("b", version, items=lines)])
                connection.commit()

    with ThreadPoolExecutor(1) as thread, psycopg.connect(shop.reader_url) as connection:
        writing = thread.submit(rewrite)
        repository = orderlib.using(connection)
        seen: set[int] = set()
        try:
            for _ in range(300):
                seen |= versions_in(repository.get("a"))
                for order in repository.get_many(["a", "b"]).values():
                    assert len(versions_in(order)) == 1
                for stored in repository.list_orders().orders:
                    assert len(versions_in(stored.order)) == 1
        finally:
            enough.set()
        writing.result(30)
    assert len(seen) > 3


@pytest.mark.parametrize(
    "isolation",
    [psycopg.IsolationLevel.REPEATABLE_READ, psycopg.IsolationLevel.SERIALIZABLE],
    ids=lambda level: level.name,
)
def test_a_conflict_is_for_the_caller_to_repeat(shop: Database, isolation: psycopg.IsolationLevel) -> None:
    with psycopg.connect(shop.writer_url) as first, psycopg.connect(shop.writer_url) as second:
        first.isolation_level = second.isolation_level = isolation
        first.execute("SELECT 1 FROM orders")
        second.execute("SELECT 1 FROM orders")
        orderlib.using(first).save(an_order("a", 1))
        first.commit()
        with pytest.raises(TransactionConflict):
            orderlib.using(second).save(an_order("a", 2))
        second.rollback()
        add_row(second, "a")
        orderlib.using(second).save(an_order("a", 2))
        second.commit()
    assert stored_uids(shop) == (["a"], ["a"])


def test_a_deadlock_is_a_conflict(shop: Database) -> None:
    with psycopg.connect(shop.writer_url) as first, psycopg.connect(shop.writer_url) as second:
        orderlib.using(first).save(an_order("a"))
        orderlib.using(second).save(an_order("b"))
        with ThreadPoolExecutor(2) as threads:
            outcomes = [
                threads.submit(orderlib.using(first).save, an_order("b", 2)),
                threads.submit(orderlib.using(second).save, an_order("a", 2)),
            ]
            # The victim keeps its transaction, and with it the lock that the other needs, until it is rolled back.
            wait_for(lambda: any(outcome.done() for outcome in outcomes), 20)
            [victim, other] = (first, second) if outcomes[0].done() else (second, first)
            with pytest.raises(TransactionConflict):
                outcomes[0 if victim is first else 1].result()
            victim.rollback()
            assert outcomes[1 if victim is first else 0].result(20) is Outcome.STORED
            other.commit()
    assert stored_uids(shop) == (["a", "b"], [])


def test_a_terminated_session_is_an_outage_and_stores_nothing(shop: Database) -> None:
    with psycopg.connect(shop.superuser_url, autocommit=True) as superuser:
        connection = psycopg.connect(shop.writer_url)
        repository = orderlib.using(connection)
        repository.save(an_order("a"))
        add_row(connection, "a")
        superuser.execute("SELECT pg_terminate_backend(%s::integer)", [connection.info.backend_pid])
        with pytest.raises(DatabaseUnavailable):
            repository.save(an_order("b"))
        for call in (lambda: repository.save(an_order("b")), repository.count, lambda: list(repository.stream())):
            with pytest.raises(DatabaseUnavailable, match="lost: connect again"):
                call()
        connection.close()
    assert stored_uids(shop) == ([], [])


def test_after_the_callers_own_statement_has_lost_the_connection_calls_are_an_outage(shop: Database) -> None:
    async def use(superuser: psycopg.Connection) -> None:
        connection = await psycopg.AsyncConnection.connect(shop.writer_url)
        superuser.execute("SELECT pg_terminate_backend(%s::integer)", [connection.info.backend_pid])
        with pytest.raises(psycopg.OperationalError):
            await connection.execute("SELECT 1")
        repository = orderlib.using_async(connection)
        for _ in range(2):
            with pytest.raises(DatabaseUnavailable, match="lost: connect again"):
                await repository.get("a")
        await connection.close()

    with psycopg.connect(shop.superuser_url, autocommit=True) as superuser:
        asyncio.run(use(superuser))


# Cancellation


def test_a_save_cancelled_at_any_await_leaves_the_transaction_usable_and_the_order_whole(shop: Database) -> None:
    async def run() -> tuple[int, int]:
        connection = await psycopg.AsyncConnection.connect(shop.writer_url)
        repository = orderlib.using_async(connection)
        cancels = saves = 0
        for rounds in range(4_000):
            order = an_order(f"order-{rounds}", items=3)
            was_cancelled = await cancelled_after(rounds, repository.save_many([order, an_order(f"other-{rounds}")]))
            assert connection.info.transaction_status in {
                psycopg.pq.TransactionStatus.INTRANS,
                psycopg.pq.TransactionStatus.IDLE,
            }
            # The same transaction goes on, and nothing is half done.
            await connection.execute("INSERT INTO outbox VALUES (%s)", [order.order_uid])
            found = await repository.get_many([order.order_uid, f"other-{rounds}"])
            assert found in ({}, {order.order_uid: order, f"other-{rounds}": an_order(f"other-{rounds}")})
            await connection.commit()
            cancels += was_cancelled
            if not was_cancelled:
                saves += 1
                if saves == 3:
                    break
        await connection.close()
        return cancels, saves

    cancels, saves = asyncio.run(run())
    assert cancels > 5
    assert saves == 3


def test_a_pools_save_cancelled_at_any_await_stores_all_or_nothing_and_loses_no_connection(shop: Database) -> None:
    async def run() -> int:
        cancels = 0
        async with orderlib.connect_async(shop.writer_url, max_connections=1, connection_timeout_s=5) as repository:
            # Every third await: a cancel costs a new connection.
            for rounds in range(0, 400, 3):
                orders = [an_order(f"order-{rounds}", items=3), an_order(f"other-{rounds}")]
                was_cancelled = await cancelled_after(rounds, repository.save_many(orders))
                cancels += was_cancelled
                # With one connection at most, a lost one would make this call fail.
                counts = await asyncio.wait_for(repository.save_many(orders), 10)
                assert set(counts) <= {Outcome.STORED, Outcome.DUPLICATE}
                assert len(counts) == 1, counts
                if not was_cancelled:
                    break
        return cancels

    assert asyncio.run(run()) > 5


def test_a_value_that_cannot_be_sent_leaves_the_connection_usable(shop: Database) -> None:
    with psycopg.connect(shop.writer_url) as connection:
        wire = Wire(connection.pgconn)
        with pytest.raises(UnicodeEncodeError):
            connection.wait(wire.pipeline(("SELECT $1::text", ["\ud800"])))
        assert connection.execute("SELECT 1").fetchall() == [(1,)]
