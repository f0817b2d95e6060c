"""The repository in memory passes the contract suite."""

from __future__ import annotations

import datetime as dt
import itertools

import pytest

from orderlib import OrderRepository
from orderlib.testing import MemoryOrderRepository
from tests.support.repository_contract import RepositoryContract, an_order, stored


def ticking() -> MemoryOrderRepository:
    """Return a repository whose clock advances one second each time it is read."""
    began = dt.datetime(2021, 11, 26, tzinfo=dt.UTC)
    seconds = itertools.count()
    return MemoryOrderRepository(clock=lambda: began + dt.timedelta(seconds=next(seconds)))


class TestMemoryOrderRepository(RepositoryContract):
    @pytest.fixture
    def repository(self) -> OrderRepository:
        return ticking()


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
