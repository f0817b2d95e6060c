"""Repositories and what they return, in other processes."""

from __future__ import annotations

import asyncio
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import psycopg
import pytest

import orderlib
from tests.support.databases import Database
from tests.support.repository_contract import SAMPLE_ORDER, an_order

_in_this_process: list[orderlib.OrderRepository] = []


def connect_here(url: str) -> None:
    _in_this_process.append(orderlib.connect(url))


def stored_here(order_uid: str) -> orderlib.StoredOrder:
    return _in_this_process[0].get_stored(order_uid)


def test_a_repository_cannot_be_pickled_and_says_what_to_do(database: Database) -> None:
    with orderlib.connect(database.writer_url) as repository, psycopg.connect(database.writer_url) as connection:
        for one in (repository, orderlib.using(connection)):
            with pytest.raises(TypeError, match="connect in each process"):
                pickle.dumps(one)

    async def pickle_another() -> None:
        async with orderlib.connect_async(database.writer_url) as repository:
            with pytest.raises(TypeError, match="connect in each process"):
                pickle.dumps(repository)

    asyncio.run(pickle_another())


def test_a_process_pool_connects_in_its_initializer_and_returns_orders(database: Database) -> None:
    with orderlib.connect(database.writer_url) as repository:
        repository.save_many([SAMPLE_ORDER, an_order("another", 1)])
        expected = [repository.get_stored(uid) for uid in (SAMPLE_ORDER.order_uid, "another")]
        with ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=connect_here, initargs=(database.reader_url,)
        ) as processes:
            assert list(processes.map(stored_here, [SAMPLE_ORDER.order_uid, "another"])) == expected


def test_what_a_repository_returns_can_be_pickled(database: Database) -> None:
    with orderlib.connect(database.writer_url) as repository:
        repository.save_many([SAMPLE_ORDER, an_order("another", 1)])
        page = repository.list_orders(limit=1)
        returned = [
            page,
            page.next_cursor,
            page.orders[0],
            page.orders[0].order,
            repository.position_state("orders", 0, 7),
            repository.stats(),
        ]
        for value in returned:
            assert pickle.loads(pickle.dumps(value)) == value  # noqa: S301 - our own
