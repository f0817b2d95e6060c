"""The contract suite on the repositories in memory, and the failures of their calls."""

from __future__ import annotations

import asyncio
import datetime as dt
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from orderlib import (
    ConfigurationError,
    Cursor,
    DatabaseUnavailable,
    InvalidOrder,
    OrderNotFound,
    OrderRepository,
    Outcome,
    RefusedByDatabase,
    RejectedError,
    TransactionConflict,
)
from orderlib.testing import AsyncMemoryOrderRepository, MemoryOrderRepository
from orderlib.testing.failures import METHODS
from tests.support.over_asyncio import cancelled_after, event_loop, over_asyncio
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


def ticking_clock() -> Callable[[], dt.datetime]:
    """Return a clock that advances one second each time it is read."""
    began = dt.datetime(2021, 11, 26, tzinfo=dt.UTC)
    seconds = itertools.count()
    return lambda: began + dt.timedelta(seconds=next(seconds))


def ticking() -> MemoryOrderRepository:
    return MemoryOrderRepository(ticking_clock())


class MemoryRecords:
    """Gives records their states in a repository in memory. See ``Records``."""

    def __init__(self, repository: MemoryOrderRepository | AsyncMemoryOrderRepository) -> None:
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
        return memory._store._stored.__delitem__

    @pytest.fixture
    def records(self, memory: MemoryOrderRepository) -> Records:
        return MemoryRecords(memory)


class TestAsyncMemoryOrderRepository(RepositoryContract, StreamContract, PositionContract):
    @pytest.fixture
    def memory(self) -> AsyncMemoryOrderRepository:
        return AsyncMemoryOrderRepository(ticking_clock())

    @pytest.fixture
    def repository(self, memory: AsyncMemoryOrderRepository) -> Iterator[OrderRepository]:
        with event_loop() as run:
            yield over_asyncio(memory, run)

    @pytest.fixture
    def writer(self, repository: OrderRepository) -> OrderRepository:
        return repository

    @pytest.fixture
    def delete(self, memory: AsyncMemoryOrderRepository) -> Callable[[str], None]:
        return memory._store._stored.__delitem__

    @pytest.fixture
    def records(self, memory: AsyncMemoryOrderRepository) -> Records:
        return MemoryRecords(memory)


def test_the_given_clock_determines_when_an_order_is_stored() -> None:
    repository = ticking()
    repository.save(an_order("a", 1))
    repository.save(an_order("a", 2))
    found = stored(repository, "a")
    assert (found.first_stored_at.second, found.stored_at.second) == (0, 1)


def test_a_clock_that_goes_back_never_stores_a_version_before_the_first() -> None:
    now = dt.datetime(2021, 11, 26, tzinfo=dt.UTC)
    repository = MemoryOrderRepository(clock=lambda: now)
    repository.save(an_order("a", 1))
    first, now = now, now - dt.timedelta(hours=1)
    repository.save(an_order("a", 2))
    found = stored(repository, "a")
    assert (found.first_stored_at, found.stored_at) == (first, first)


def test_orders_of_more_than_five_minutes_ago_are_not_stored_recently() -> None:
    now = dt.datetime(2021, 11, 26, tzinfo=dt.UTC)
    repository = MemoryOrderRepository(clock=lambda: now)
    repository.save(an_order("a"))
    assert repository.stats().stored_recently == 1
    now += dt.timedelta(minutes=5)
    assert repository.stats().stored_recently == 0


@pytest.mark.parametrize("offset_h", [-12, 5, 20])
def test_the_times_of_a_clock_with_any_offset_are_in_utc(offset_h: int) -> None:
    now = dt.datetime(2021, 11, 26, tzinfo=dt.timezone(dt.timedelta(hours=offset_h)))
    repository = MemoryOrderRepository(clock=lambda: now)
    repository.save(an_order("a"))
    found = stored(repository, "a")
    for time in (found.first_stored_at, found.stored_at, repository.stats().asked_at):
        assert (time, time.tzinfo) == (now, dt.UTC)
    assert Cursor.parse(str(found.cursor)) == found.cursor
    assert repository.stats().stored_recently == 1


def test_a_clock_without_an_offset_is_refused_before_anything_is_stored() -> None:
    times: list[tuple[Any, type[Exception], str]] = [
        (dt.datetime(2021, 11, 26), ValueError, "the clock's time must have an offset"),  # noqa: DTZ001 - the test
        (0.0, TypeError, "the clock's time must be a datetime, not float"),
    ]
    for time, error, message in times:
        repository = MemoryOrderRepository(clock=functools.partial(lambda time: time, time))
        with pytest.raises(error, match=message):
            repository.save(an_order("a"))
        with pytest.raises(error, match=message):
            repository.stats()
        assert repository.count() == 0


def test_without_a_clock_it_is_now_in_utc() -> None:
    repository = MemoryOrderRepository()
    before = dt.datetime.now(dt.UTC)
    repository.save(an_order("a"))
    assert before <= stored(repository, "a").stored_at <= dt.datetime.now(dt.UTC)


# Failures. Both repositories share the code that decides; their calls are tested one by one.


def call_method(repository: OrderRepository, method: str) -> object:
    """Call a method of a repository that has an order ``a``."""
    calls: dict[str, Callable[[], object]] = {
        "get": lambda: repository.get("a"),
        "get_stored": lambda: repository.get_stored("a"),
        "get_many": lambda: repository.get_many(["a"]),
        "content_sha256": lambda: repository.content_sha256("a"),
        "original": lambda: repository.original("a"),
        "list_orders": repository.list_orders,
        "count": repository.count,
        "find": lambda: repository.find("a"),
        "stream": lambda: list(repository.stream()),
        "position_state": lambda: repository.position_state("orders", 0, 0),
        "wait_until_handled": lambda: repository.wait_until_handled("orders", 0, 0, timeout_s=0),
        "stats": repository.stats,
        "check": repository.check,
        "save": lambda: repository.save(an_order("a", 2)),
        "save_many": lambda: repository.save_many([an_order("a", 2)]),
    }
    return calls[method]()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("is_async", [False, True])
def test_each_method_can_fail_alone_and_then_changes_nothing(method: str, is_async: bool) -> None:
    with event_loop() as run:
        memory = AsyncMemoryOrderRepository() if is_async else MemoryOrderRepository()
        repository = over_asyncio(memory, run) if isinstance(memory, AsyncMemoryOrderRepository) else memory
        repository.save(an_order("a", 1))
        with memory.fail(method) as failure:  # type: ignore[arg-type] # a method's name as str
            for other in set(METHODS) - {method, "save", "save_many"}:
                call_method(repository, other)
            for _ in range(2):
                with pytest.raises(DatabaseUnavailable, match="Connection refused"):
                    call_method(repository, method)
            assert failure.count == 2
            with memory.fail("get", call=100):
                if method not in {"get", "get_stored"}:
                    assert repository.get("a") == an_order("a", 1)
        call_method(repository, method)
        assert failure.count == 2


def test_only_the_call_with_the_number_fails() -> None:
    repository = MemoryOrderRepository()
    repository.save(an_order("a"))
    failure = repository.fail("get", "save", call=3)
    repository.get("a")
    repository.content_sha256("a")
    repository.save(an_order("a"))
    with pytest.raises(DatabaseUnavailable):
        repository.get("a")
    repository.get("a")
    assert failure.count == 1


def test_without_methods_every_call_fails_until_the_failure_ends() -> None:
    repository = MemoryOrderRepository()
    outage = repository.fail()
    for method in METHODS:
        with pytest.raises(DatabaseUnavailable):
            call_method(repository, method)
    assert outage.count == len(METHODS)
    outage.end()
    assert repository.list_orders().orders == ()


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("method", ["save", "save_many"])
def test_after_a_lost_answer_the_order_is_stored_and_saving_again_is_a_duplicate(is_async: bool, method: str) -> None:
    with event_loop() as run:
        memory = AsyncMemoryOrderRepository() if is_async else MemoryOrderRepository()
        repository = over_asyncio(memory, run) if isinstance(memory, AsyncMemoryOrderRepository) else memory
        failure = memory.lose_answer(call=1)
        with pytest.raises(DatabaseUnavailable, match="whether the orders are stored is unknown; saving them again is"):
            call_method(repository, method)
        assert failure.count == 1
        assert repository.get("a") == an_order("a", 2)
        assert repository.save(an_order("a", 2)) is Outcome.DUPLICATE


def test_each_class_of_errors_has_the_text_and_the_attributes_of_a_real_one() -> None:
    repository = MemoryOrderRepository()
    for kind, text in (
        (TransactionConflict, r"PostgreSQL: deadlock detected \(40P01\)"),
        (ConfigurationError, "permission denied"),
        (RefusedByDatabase, "refused_by_database: .* SQLSTATE 23514"),
    ):
        with repository.fail("save", with_=kind), pytest.raises(kind, match=text):
            repository.save(an_order("a"))
    refused = RefusedByDatabase("23505", "a")
    raised: list[RefusedByDatabase] = []
    with repository.fail("save", with_=refused):
        for _ in range(2):
            with pytest.raises(RefusedByDatabase) as refusal:
                repository.save(an_order("a"))
            raised.append(refusal.value)
    assert [(error.sqlstate, error.order_uid) for error in raised] == [("23505", "a")] * 2
    # Each has its own traceback.
    assert raised[0] is not raised[1]
    with pytest.raises(OrderNotFound):
        repository.get("a")


def test_a_failure_that_can_never_happen_is_refused() -> None:
    repository = MemoryOrderRepository()
    with pytest.raises(ValueError, match="no method 'gett'"):
        repository.fail("gett")  # type: ignore[arg-type] # a wrong name
    with pytest.raises(ValueError, match="call must be an integer from 1"):
        repository.fail("get", call=0)
    with pytest.raises(TypeError, match="not the class InvalidOrder"):
        repository.fail("get", with_=InvalidOrder)
    repository.list_orders()


def test_a_call_that_is_cancelled_before_it_began_does_nothing() -> None:
    async def cancel() -> None:
        repository = AsyncMemoryOrderRepository()
        assert await cancelled_after(1, repository.save(an_order("a")))
        assert (await repository.list_orders()).orders == ()

    asyncio.run(cancel())
