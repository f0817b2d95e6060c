"""The repository in memory passes the contract suite."""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Callable

import pytest

from orderlib import OrderRepository, RejectedError
from orderlib.testing import MemoryOrderRepository
from tests.support.repository_contract import (
    HANDLED,
    REJECTED,
    WAITING,
    PositionContract,
    Records,
    RepositoryContract,
    StreamContract,
    an_order,
    stored,
)


def ticking() -> MemoryOrderRepository:
    """Return a repository whose clock advances one second each time it is read."""
    began = dt.datetime(2021, 11, 26, tzinfo=dt.UTC)
    seconds = itertools.count()
    return MemoryOrderRepository(clock=lambda: began + dt.timedelta(seconds=next(seconds)))


class MemoryRecords:
    """Gives records their states in a repository in memory. See ``Records``."""

    def __init__(self, repository: MemoryOrderRepository) -> None:
        self._repository = repository
        self._next_offsets: dict[int, int] = {}

    def begin(self, next_offset: int, *, partition: int = 0) -> None:
        self._next_offsets[partition] = next_offset
        self._repository.set_position_state("orders", partition, next_offset, WAITING)

    def handle(self, *, partition: int = 0, error: RejectedError | None = None) -> None:
        offset = self._next_offsets[partition]
        self._repository.set_position_state("orders", partition, offset, HANDLED if error is None else REJECTED)
        self.begin(offset + 1, partition=partition)


class TestMemoryOrderRepository(RepositoryContract, StreamContract, PositionContract):
    @pytest.fixture
    def memory(self) -> MemoryOrderRepository:
        return ticking()

    @pytest.fixture
    def repository(self, memory: MemoryOrderRepository) -> OrderRepository:
        return memory

    @pytest.fixture
    def writer(self, memory: MemoryOrderRepository) -> OrderRepository:
        return memory

    @pytest.fixture
    def delete(self, memory: MemoryOrderRepository) -> Callable[[str], None]:
        return memory._stored.__delitem__

    @pytest.fixture
    def records(self, memory: MemoryOrderRepository) -> Records:
        return MemoryRecords(memory)


def test_the_given_clock_determines_when_an_order_is_stored() -> None:
    repository = ticking()
    repository.save(an_order("a", 1))
    repository.save(an_order("a", 2))
    found = stored(repository, "a")
    assert (found.first_stored_at.second, found.stored_at.second) == (0, 1)


def test_orders_of_more_than_five_minutes_ago_are_not_of_lately() -> None:
    now = dt.datetime(2021, 11, 26, tzinfo=dt.UTC)
    repository = MemoryOrderRepository(clock=lambda: now)
    repository.save(an_order("a"))
    assert repository.status().stored_recently == 1
    now += dt.timedelta(minutes=5)
    assert repository.status().stored_recently == 0


def test_without_a_clock_it_is_now_in_utc() -> None:
    repository = MemoryOrderRepository()
    before = dt.datetime.now(dt.UTC)
    repository.save(an_order("a"))
    assert before <= stored(repository, "a").stored_at <= dt.datetime.now(dt.UTC)
