"""Reads from asyncio: the same results and errors as from a thread, and no connection is lost."""

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
from orderlib.errors import ConfigurationError, DatabaseUnavailable, OrderNotFound
from orderlib.models import Order
from orderlib.repository import AsyncOrderRepository, Direction
from orderlib.testing import SAMPLE as SAMPLE_JSON
from orderlib.testing.strategies import orders
from tests.support.databases import Database
from tests.support.tcp_proxy import TcpProxy

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
def read(module_database: Database, store: object) -> Callable[[Callable[[AsyncOrderRepository], Awaitable[T]]], T]:  # noqa: ARG001 - a fixture that it needs
    def read(question: Callable[[AsyncOrderRepository], Awaitable[T]]) -> T:
        async def ask() -> T:
            async with orderlib.connect_async(module_database.reader_url) as reader:
                return await question(reader)

        return asyncio.run(ask())

    return read


Read = Callable[[Callable[[AsyncOrderRepository], Awaitable[T]]], T]


def test_every_read_returns_what_the_repository_returns(
    store: orderlib.PostgresOrderRepository, module_database: Database
) -> None:
    async def compare() -> None:
        async with orderlib.connect_async(module_database.reader_url) as reader:
            assert await reader.get("u-3") == store.get("u-3")
            assert await reader.get_stored("u-3") == store.get_stored("u-3")
            uids = ["u-1", "missing", "u-2", "a\0b"]
            assert await reader.get_many(uids) == store.get_many(uids)
            assert await reader.content_sha256("u-5") == store.content_sha256("u-5")
            assert await reader.list_orders(limit=5) == store.list_orders(limit=5)
            after = store.list_orders(limit=5).next_cursor
            assert after is not None
            older = await reader.list_orders(limit=4, cursor=after, customer_id="c-1")
            assert older == store.list_orders(limit=4, cursor=after, customer_id="c-1")
            assert await reader.list_orders(cursor=after, direction=Direction.NEWER, limit=3) == store.list_orders(
                cursor=after, direction=Direction.NEWER, limit=3
            )
            actual, expected = await reader.stats(), store.stats()
            assert attrs.evolve(actual, asked_at=expected.asked_at) == expected
            await reader.check()

    asyncio.run(compare())


@pytest.mark.parametrize("order_uid", ["missing", "", "a\0b", "\ud800", "x" * 10_000])
def test_a_missing_order_is_not_found(read: Read[object], order_uid: str) -> None:
    with pytest.raises(OrderNotFound):
        read(lambda reader: reader.get(order_uid))
    with pytest.raises(OrderNotFound):
        read(lambda reader: reader.content_sha256(order_uid))


def test_a_filter_that_no_order_can_match_finds_nothing(read: Read[orderlib.Page]) -> None:
    assert read(lambda reader: reader.list_orders(customer_id="a\0b")).orders == ()


def test_a_limit_outside_its_bounds_is_an_invalid_query(read: Read[object]) -> None:
    with pytest.raises(ValueError, match="limit"):
        read(lambda reader: reader.list_orders(limit=0))


@pytest.mark.usefixtures("store")
def test_an_invalid_query_leaves_the_connection_usable(module_database: Database) -> None:
    async def ask() -> Order:
        async with orderlib.connect_async(module_database.reader_url, max_connections=1) as reader:
            with pytest.raises(ValueError, match="limit"):
                await reader.list_orders(limit=101)
            with pytest.raises(OrderNotFound):
                await reader.get("missing")
            return await reader.get("u-1")

    assert asyncio.run(ask()).order_uid == "u-1"


@pytest.mark.usefixtures("store")
def test_a_cancelled_read_releases_its_connection(module_database: Database) -> None:
    async def ask() -> None:
        with TcpProxy(module_database.reader_url) as wire:
            async with orderlib.connect_async(wire.url, max_connections=1) as reader:
                await reader.get("u-1")
                wire.freeze()
                for _ in range(3):
                    with pytest.raises(TimeoutError):
                        await asyncio.wait_for(reader.get("u-1"), 0.05)
                wire.thaw()
                assert (await reader.get("u-2")).order_uid == "u-2"

    asyncio.run(ask())


@pytest.mark.usefixtures("store")
def test_more_readers_than_connections_take_turns(module_database: Database) -> None:
    async def ask() -> list[Order]:
        async with orderlib.connect_async(module_database.reader_url, max_connections=2) as reader:
            return list(await asyncio.gather(*(reader.get(f"u-{n % 12}") for n in range(100))))

    assert [order.order_uid for order in asyncio.run(ask())] == [f"u-{n % 12}" for n in range(100)]


def test_an_outage_is_not_a_configuration_error(module_database: Database, empty_database: Database) -> None:
    async def ask(url: str) -> None:
        async with orderlib.connect_async(url) as reader:
            await reader.get("u-1")

    with pytest.raises(DatabaseUnavailable):
        asyncio.run(ask(make_conninfo(module_database.reader_url, port=1)))
    with pytest.raises(ConfigurationError, match="password"):
        asyncio.run(ask(make_conninfo(module_database.reader_url, password="wrong")))
    with pytest.raises(ConfigurationError, match="migrate"):
        asyncio.run(ask(empty_database.superuser_url))


def test_a_check_notices_a_table_that_cannot_be_read(database: Database) -> None:
    async def check() -> None:
        async with orderlib.connect_async(database.reader_url) as reader:
            await reader.check()

    asyncio.run(check())
    with psycopg.connect(database.superuser_url, autocommit=True) as superuser:
        superuser.execute("REVOKE SELECT ON items FROM orders_reader")
    with pytest.raises(ConfigurationError, match="items"):
        asyncio.run(check())


@pytest.mark.usefixtures("store")
def test_postgresql_ends_a_statement_that_waits_for_a_lock(module_database: Database) -> None:
    """The statement does not continue to wait in PostgreSQL after the read has ended."""

    async def ask() -> None:
        async with orderlib.connect_async(module_database.reader_url) as reader:
            await reader.get("u-1")

    with psycopg.connect(module_database.superuser_url) as locker:
        locker.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(DatabaseUnavailable, match="57014"):
            asyncio.run(ask())


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=orders())
def test_any_order_is_read_as_it_was_saved(
    store: orderlib.PostgresOrderRepository, read: Read[Order], order: Order
) -> None:
    store.save(order)
    assert store.get(order.order_uid) == order
    assert read(lambda reader: reader.get(order.order_uid)) == order
    assert store.content_sha256(order.order_uid) == orderlib.content_sha256(order)
