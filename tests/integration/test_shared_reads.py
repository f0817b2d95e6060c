"""Reads of single orders that share a round trip, and what each of them keeps for itself."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar, cast

import attrs
import psycopg
import pytest

import orderlib
from orderlib import AsyncPostgresOrderRepository, DatabaseUnavailable, Order, OrderNotFound
from orderlib.postgres.pool import Call
from orderlib.postgres.shared_reads import _MAX_ITEMS, _MAX_ORDERS, SharedReads, _CoalescedRead
from orderlib.testing import SAMPLE
from tests.support.databases import Database
from tests.support.locking import locked
from tests.support.tcp_proxy import TcpProxy

T = TypeVar("T")

ORDER = orderlib.decode_order(SAMPLE)
LARGE = attrs.evolve(ORDER, order_uid="large", items=[ORDER.items[0]] * (_MAX_ITEMS + 1))
NAME = "shared-reads"
#: BEGIN, the join, the items, COMMIT.
STATEMENTS = 4


@pytest.fixture(scope="module")
def stored(module_database: Database) -> Database:
    with orderlib.connect(module_database.writer_url) as repository:
        repository.save_many([*map(order, range(_MAX_ORDERS + 2)), LARGE])
    return module_database


def order(number: int) -> Order:
    return attrs.evolve(ORDER, order_uid=f"u-{number}", items=[ORDER.items[0]] * (number % 3 + 1))


def with_reader(url: str, ask: Callable[[AsyncPostgresOrderRepository], Awaitable[T]], **options: Any) -> T:
    async def run() -> T:
        async with orderlib.connect_async(url, application_name=NAME, **options) as reader:
            return await ask(reader)

    return asyncio.run(run())


async def gathered(reader: AsyncPostgresOrderRepository, order_uids: Iterable[str]) -> list[Order | BaseException]:
    return await asyncio.gather(*map(reader.get, order_uids), return_exceptions=True)


async def blocked(superuser: psycopg.Connection, reads: int) -> None:
    """Wait until reads wait for a lock."""
    statement = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND wait_event_type = 'Lock'"
    async with asyncio.timeout(10):
        while superuser.execute(statement, [NAME]).fetchone() != (reads,):
            await asyncio.sleep(0.01)


def test_reads_that_arrive_during_a_read_take_one_round_trip(stored: Database) -> None:
    async def ask(reader: AsyncPostgresOrderRepository) -> None:
        await reader.get("u-0")
        for waiting, groups in ((1, 1), (_MAX_ORDERS, 1), (_MAX_ORDERS + 1, 2)):
            before = proxy.executed
            expected = [order(number) for number in range(waiting + 1)]
            assert await gathered(reader, [each.order_uid for each in expected]) == expected
            assert proxy.executed - before == STATEMENTS * (1 + groups)

    with TcpProxy(stored.reader_url) as proxy:
        with_reader(proxy.url, ask, max_connections=1)


def test_reads_of_digests_share_a_round_trip(stored: Database) -> None:
    async def ask(reader: AsyncPostgresOrderRepository) -> None:
        await reader.content_sha256("u-0")
        before = proxy.executed
        *digests, missing = await asyncio.gather(
            *map(reader.content_sha256, ["u-0", "u-1", "u-2", "missing"]), return_exceptions=True
        )
        assert digests == [orderlib.content_sha256(order(number)) for number in range(3)]
        assert isinstance(missing, OrderNotFound)
        assert proxy.executed - before == 2

    with TcpProxy(stored.reader_url) as proxy:
        with_reader(proxy.url, ask)


def test_each_read_has_its_own_result(stored: Database) -> None:
    async def ask(reader: AsyncPostgresOrderRepository) -> None:
        first, large, again, same, missing, unsendable = await gathered(
            reader, ["u-1", "large", "u-2", "u-2", "missing", "a\0b"]
        )
        assert [first, large, again, same] == [order(1), LARGE, order(2), order(2)]
        assert isinstance(missing, OrderNotFound)
        assert isinstance(unsendable, OrderNotFound)
        assert [missing.order_uid, unsendable.order_uid] == ["missing", "a\0b"]

    with_reader(stored.reader_url, ask)


def test_an_unreadable_order_fails_only_its_own_read(database: Database) -> None:
    async def ask(reader: AsyncPostgresOrderRepository) -> None:
        with pytest.raises(orderlib.OrderlibError) as alone:
            await reader.get("u-1")
        first, bad, *others = await gathered(reader, ["u-0", "u-1", "u-2", "u-3"])
        assert [first, *others] == [order(0), order(2), order(3)]
        assert repr(bad) == repr(alone.value)

    with orderlib.connect(database.writer_url) as repository:
        repository.save_many(map(order, range(4)))
    with psycopg.connect(database.superuser_url) as superuser:
        superuser.execute("ALTER TABLE orders DROP CONSTRAINT orders_date_created_check")
        superuser.execute("UPDATE orders SET date_created = 'infinity' WHERE order_uid = 'u-1'")
    with_reader(database.reader_url, ask)


def test_reads_that_share_a_round_trip_share_a_snapshot(database: Database) -> None:
    async def ask(reader: AsyncPostgresOrderRepository) -> None:
        before = [order(number) for number in range(4)]
        with (
            locked(database, "LOCK TABLE items IN ACCESS EXCLUSIVE MODE") as writer,
            psycopg.connect(database.superuser_url, autocommit=True) as superuser,
        ):
            reading = asyncio.create_task(gathered(reader, [each.order_uid for each in before]))
            # They have read the orders, and wait for the items.
            await blocked(superuser, 2)
            writer.execute("UPDATE orders SET customer_id = 'changed'")
            writer.execute("UPDATE items SET brand = 'changed'")
            writer.commit()
            assert await reading == before

    with orderlib.connect(database.writer_url) as repository:
        repository.save_many(map(order, range(4)))
    with_reader(database.reader_url, ask)


def test_a_read_sees_what_was_stored_before_it_began(database: Database) -> None:
    """It never joins a read in flight, whose snapshot may be older."""

    async def ask(reader: AsyncPostgresOrderRepository) -> None:
        with (
            locked(database, "LOCK TABLE items IN ACCESS EXCLUSIVE MODE") as writer,
            psycopg.connect(database.superuser_url, autocommit=True) as superuser,
        ):
            old = [asyncio.create_task(reader.get("u-1")) for _ in range(2)]
            await blocked(superuser, 2)
            writer.execute("UPDATE orders SET customer_id = 'changed'")
            writer.commit()
            assert (await reader.get("u-1")).customer_id == "changed"
            assert await asyncio.gather(*old) == [order(1)] * 2

    with orderlib.connect(database.writer_url) as repository:
        repository.save(order(1))
    with_reader(database.reader_url, ask)


def test_a_cancelled_read_does_not_end_the_others(stored: Database) -> None:
    async def ask(reader: AsyncPostgresOrderRepository) -> None:
        with (
            locked(stored, "LOCK TABLE items IN ACCESS EXCLUSIVE MODE") as stranger,
            psycopg.connect(stored.superuser_url, autocommit=True) as superuser,
        ):
            first, second, third, fourth = [asyncio.create_task(reader.get(f"u-{number}")) for number in range(4)]
            second_group = third, fourth
            await asyncio.sleep(0)
            # One that waits, one in flight alone, and one in flight with others.
            second.cancel()
            await blocked(superuser, 2)
            first.cancel()
            third.cancel()
            stranger.rollback()
            results = await asyncio.gather(first, second, *second_group, return_exceptions=True)
        assert [type(result) for result in results] == [*[asyncio.CancelledError] * 3, Order]

    with_reader(stored.reader_url, ask)


def test_a_read_without_an_answer_fails_alone(stored: Database) -> None:
    async def ask(reader: AsyncPostgresOrderRepository) -> None:
        await reader.get("u-0")
        with psycopg.connect(stored.superuser_url, autocommit=True) as superuser:
            [[pid]] = superuser.execute(
                "SELECT pid FROM pg_stat_activity WHERE application_name = %s", [NAME]
            ).fetchall()
        os.kill(pid, signal.SIGSTOP)
        try:
            stuck, *others = [asyncio.create_task(reader.get(f"u-{number}")) for number in range(4)]
            assert await asyncio.gather(*others) == [order(number) for number in range(1, 4)]
            assert not stuck.done()
            with pytest.raises(DatabaseUnavailable, match="did not answer within 2 s"):
                await stuck
        finally:
            os.kill(pid, signal.SIGCONT)

    with_reader(stored.reader_url, ask, max_connections=2, timeout_s=2.0)


def test_an_outage_fails_every_read_of_a_group(stored: Database) -> None:
    async def ask(reader: AsyncPostgresOrderRepository) -> None:
        await reader.get("u-0")
        proxy.cut()
        results = await gathered(reader, ["u-1", "u-2", "u-3"])
        assert [type(result) for result in results] == [DatabaseUnavailable] * 3
        # Each has its own error, with its own traceback.
        assert len(set(map(id, results))) == 3
        proxy.mend()
        assert await gathered(reader, ["u-1", "u-2", "u-3"]) == [order(1), order(2), order(3)]

    with TcpProxy(stored.reader_url) as proxy:
        with_reader(proxy.url, ask)


@pytest.mark.parametrize("cause", [psycopg.errors.IoError, psycopg.errors.OutOfMemory])
def test_an_order_that_the_server_cannot_read_fails_only_its_own_read(cause: type[psycopg.Error]) -> None:
    """PostgreSQL reports it as an outage. A test cannot damage one page of a disk, so the reads are simulated."""

    async def ask() -> None:
        first_ends = asyncio.Event()

        async def read(wanted: Any, _call: object) -> Any:
            if wanted(None) == ["first"]:
                await first_ends.wait()
            if "bad" in wanted(None):
                raise DatabaseUnavailable("PostgreSQL: could not read a block") from cause()
            return wanted(None)[0] if len(wanted(None)) == 1 else dict.fromkeys(wanted(None), "in a group")

        shared: Any = _CoalescedRead(read, lambda _, uid: [uid], lambda _, uids: uids)  # type: ignore[arg-type, return-value]
        tasks = [asyncio.create_task(shared.get(uid, None)) for uid in ("first", "good", "bad", "better")]
        await asyncio.sleep(0)
        first_ends.set()
        first, good, bad, better = await asyncio.gather(*tasks, return_exceptions=True)
        assert [first, good, better] == ["first", "good", "better"]
        assert isinstance(bad, DatabaseUnavailable)

    asyncio.run(ask())


def test_each_event_loop_keeps_its_shared_reads_until_it_ends() -> None:
    reader = orderlib.connect_async("postgresql://nobody@127.0.0.1:1/none")

    async def shared() -> int:
        return id(reader._shared())

    with asyncio.Runner() as first, asyncio.Runner() as second:
        ids = [runner.run(shared()) for runner in (first, second, first, second)]
    assert ids[:2] == ids[2:]
    assert ids[0] != ids[1]
    del first, second
    gc.collect()
    assert not reader._shared_reads


def test_a_single_read_leaves_at_once() -> None:
    async def ask() -> None:
        started: list[object] = []

        async def read(_read: object, call: object) -> Any:
            started.append(call)

        call = cast(Call, object())
        # Without a turn of the event loop.
        with pytest.raises(StopIteration):
            SharedReads(read).orders.get("u-1", call).send(None)
        assert started == [call]

    asyncio.run(ask())
