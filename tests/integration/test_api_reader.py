"""Reading orders from asyncio: the same results and errors as from a thread, and connections that are given back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import attrs
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from psycopg.conninfo import make_conninfo

import orderlib
from orderlib.errors import BrokenSetup, OrderNotFound, StoreUnreachable
from orderlib.models import Order
from orderlib.postgres.asynchronous import AsyncPostgresOrderReader
from orderlib.repository import AsyncOrderReader
from orderlib.testing import SAMPLE as SAMPLE_JSON
from orderlib.testing.strategies import orders
from tests.conftest import Database
from tests.tcp_proxy import TcpProxy

T = TypeVar("T")

SAMPLE = orderlib.decode_order(SAMPLE_JSON)


@pytest.fixture(scope="module")
def store(module_database: Database) -> Iterator[orderlib.PostgresOrderRepository]:
    with orderlib.connect(module_database.writer_url) as repository:
        repository.save_many(
            attrs.evolve(SAMPLE, order_uid=f"u-{n}", customer_id=f"c-{n % 3}", items=[SAMPLE.items[0]] * (n % 4 + 1))
            for n in range(12)
        )
        yield repository


@pytest.fixture
def read(module_database: Database, store: object) -> Callable[[Callable[[AsyncOrderReader], Awaitable[T]]], T]:  # noqa: ARG001
    def read(question: Callable[[AsyncOrderReader], Awaitable[T]]) -> T:
        async def ask() -> T:
            async with AsyncPostgresOrderReader(module_database.reader_url) as reader:
                return await question(reader)

        return asyncio.run(ask())

    return read


Read = Callable[[Callable[[AsyncOrderReader], Awaitable[T]]], T]


def test_every_read_gives_what_the_repository_gives(
    store: orderlib.PostgresOrderRepository, module_database: Database
) -> None:
    async def compare() -> None:
        async with AsyncPostgresOrderReader(module_database.reader_url) as reader:
            assert await reader.get("u-3") == store.get("u-3")
            uids = ["u-1", "nobody", "u-2", "a\0b"]
            assert await reader.get_many(uids) == store.get_many(uids)
            assert await reader.content_sha256("u-5") == store.content_sha256("u-5")
            assert await reader.newest(limit=5) == store.newest(limit=5)
            after = store.newest(limit=5).next_cursor
            assert after is not None
            older = await reader.newest(limit=4, after=after, customer_id="c-1")
            assert older == store.newest(limit=4, after=after, customer_id="c-1")
            assert await reader.newer_than(after, limit=3) == store.newer_than(after, limit=3)
            ours, theirs = await reader.status(), store.status()
            assert attrs.evolve(ours, asked_at=theirs.asked_at) == theirs
            await reader.check()

    asyncio.run(compare())


@pytest.mark.parametrize("order_uid", ["nobody", "", "a\0b", "\ud800", "x" * 10_000])
def test_what_is_not_there_is_not_found(read: Read[object], order_uid: str) -> None:
    with pytest.raises(OrderNotFound):
        read(lambda reader: reader.get(order_uid))
    with pytest.raises(OrderNotFound):
        read(lambda reader: reader.content_sha256(order_uid))


def test_a_filter_that_no_order_can_have_finds_none(read: Read[orderlib.Page]) -> None:
    assert read(lambda reader: reader.newest(customer_id="a\0b")).orders == ()


def test_a_limit_outside_its_bounds_is_a_mistake(read: Read[object]) -> None:
    with pytest.raises(ValueError, match="limit"):
        read(lambda reader: reader.newest(limit=0))


def test_newer_than_is_the_way_back(store: orderlib.PostgresOrderRepository) -> None:
    first = store.newest(limit=4)
    assert first.next_cursor is not None
    second = store.newest(limit=4, after=first.next_cursor)
    assert store.newer_than(second.orders[0].cursor, limit=4) == first
    assert store.newer_than(second.orders[0].cursor, limit=2).orders == first.orders[2:]
    assert store.newer_than(first.orders[0].cursor).orders == ()


def test_a_mistake_leaves_the_connection_usable(module_database: Database, store: object) -> None:  # noqa: ARG001
    async def ask() -> Order:
        async with AsyncPostgresOrderReader(module_database.reader_url, max_connections=1) as reader:
            with pytest.raises(ValueError, match="limit"):
                await reader.newest(limit=101)
            with pytest.raises(OrderNotFound):
                await reader.get("nobody")
            return await reader.get("u-1")

    assert asyncio.run(ask()).order_uid == "u-1"


def test_a_cancelled_read_gives_its_connection_back(module_database: Database, store: object) -> None:  # noqa: ARG001
    async def ask() -> None:
        with TcpProxy(module_database.reader_url) as wire:
            async with AsyncPostgresOrderReader(wire.url, max_connections=1) as reader:
                await reader.get("u-1")
                wire.freeze()
                for _ in range(3):
                    with pytest.raises(TimeoutError):
                        await asyncio.wait_for(reader.get("u-1"), 0.05)
                wire.thaw()
                assert (await reader.get("u-2")).order_uid == "u-2"

    asyncio.run(ask())


def test_more_readers_than_connections_take_turns(module_database: Database, store: object) -> None:  # noqa: ARG001
    async def ask() -> list[Order]:
        async with AsyncPostgresOrderReader(module_database.reader_url, max_connections=2) as reader:
            return list(await asyncio.gather(*(reader.get(f"u-{n % 12}") for n in range(100))))

    assert [order.order_uid for order in asyncio.run(ask())] == [f"u-{n % 12}" for n in range(100)]


def test_an_outage_and_a_broken_set_up_are_told_apart(module_database: Database, empty_database: Database) -> None:
    async def ask(url: str) -> None:
        async with AsyncPostgresOrderReader(url) as reader:
            await reader.get("u-1")

    with pytest.raises(StoreUnreachable):
        asyncio.run(ask(make_conninfo(module_database.reader_url, port=1)))
    with pytest.raises(BrokenSetup, match="password"):
        asyncio.run(ask(make_conninfo(module_database.reader_url, password="wrong")))
    with pytest.raises(BrokenSetup, match="migrate"):
        asyncio.run(ask(empty_database.superuser_url))


def test_a_check_notices_a_table_that_cannot_be_read(database: Database) -> None:
    async def check() -> None:
        async with AsyncPostgresOrderReader(database.reader_url) as reader:
            await reader.check()

    asyncio.run(check())
    with psycopg.connect(database.superuser_url, autocommit=True) as superuser:
        superuser.execute("REVOKE SELECT ON items FROM orders_reader")
    with pytest.raises(BrokenSetup, match="items"):
        asyncio.run(check())


def test_the_reader_sets_utc_and_a_bound_on_statements(module_database: Database, store: object) -> None:  # noqa: ARG001
    """A lock keeps it waiting; PostgreSQL itself ends the statement, and nothing waits on there."""

    async def ask() -> None:
        async with AsyncPostgresOrderReader(module_database.reader_url) as reader:
            await reader.get("u-1")

    with psycopg.connect(module_database.superuser_url) as locker:
        locker.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(StoreUnreachable, match="57014"):
            asyncio.run(ask())


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=orders())
def test_any_order_is_read_as_it_was_saved(
    store: orderlib.PostgresOrderRepository, read: Read[Order], order: Order
) -> None:
    store.save(order)
    assert store.get(order.order_uid) == order
    assert read(lambda reader: reader.get(order.order_uid)) == order
    assert store.content_sha256(order.order_uid) == orderlib.content_sha256(order)
