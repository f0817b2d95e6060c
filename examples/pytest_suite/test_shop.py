"""Tests of ``shop.py`` with repositories in memory whose calls fail. They need orderlib and pytest only."""

from __future__ import annotations

import asyncio
from random import Random

import pytest
from shop import import_orders, place_order, receipt, revenue

import orderlib
from orderlib.testing import (
    AsyncMemoryOrderRepository,
    FaultKind,
    MemoryOrderRepository,
    break_order,
    make_item,
    make_order,
    make_orders,
    make_payment,
)


@pytest.fixture
def repository() -> MemoryOrderRepository:
    return MemoryOrderRepository()


@pytest.fixture
def pauses() -> list[float]:
    """The pauses of the shop, which no test waits for."""
    return []


# Orders


def test_the_revenue_is_that_of_one_customer(repository: MemoryOrderRepository) -> None:
    repository.save_many(make_orders(3, customer_id="ann", payment=make_payment(amount=500)))
    repository.save(make_order(customer_id="bob"))
    assert revenue(repository, "ann") == 1500


def test_an_order_with_two_items_is_stored_with_both(repository: MemoryOrderRepository) -> None:
    order = make_order(items=[make_item(name="Mug"), make_item(name="Lamp")])
    place_order(repository, order)
    assert [item.name for item in repository.get(order.order_uid).items] == ["Mug", "Lamp"]


# Failures


def test_an_outage_of_two_calls_is_not_noticed(repository: MemoryOrderRepository, pauses: list[float]) -> None:
    repository.fail("save", call=1)
    repository.fail("save", call=2)
    assert place_order(repository, make_order(seed=7), pauses.append) == "Thank you for order order-7."
    assert pauses == [0.1, 0.2]


def test_the_customer_is_asked_to_come_back_while_the_outage_lasts(
    repository: MemoryOrderRepository, pauses: list[float]
) -> None:
    order = make_order()
    with repository.fail("save", with_=orderlib.DatabaseUnavailable) as outage:
        assert place_order(repository, order, pauses.append) == "Please try again later."
        assert outage.count == 3
    assert place_order(repository, order, pauses.append).startswith("Thank you")


def test_an_order_whose_commit_has_no_answer_is_stored_once(
    repository: MemoryOrderRepository, pauses: list[float]
) -> None:
    order = make_order(customer_id="ann", payment=make_payment(amount=500))
    repository.lose_answer("save", call=1)
    assert place_order(repository, order, pauses.append).startswith("Thank you")
    assert revenue(repository, "ann") == 500


def test_a_conflict_with_another_writer_is_tried_again(repository: MemoryOrderRepository, pauses: list[float]) -> None:
    conflict = repository.fail("save", call=1, with_=orderlib.TransactionConflict)
    assert place_order(repository, make_order(), pauses.append).startswith("Thank you")
    assert conflict.count == 1


def test_an_order_that_postgresql_refuses_is_not_tried_again(
    repository: MemoryOrderRepository, pauses: list[float]
) -> None:
    refusal = repository.fail("save", with_=orderlib.RefusedByDatabase("23505", "a"))
    assert place_order(repository, make_order(order_uid="a"), pauses.append) == "We cannot take this order."
    assert (refusal.count, pauses) == (1, [])


def test_the_third_call_of_any_method_is_an_outage(repository: MemoryOrderRepository) -> None:
    first, second = make_orders(2)
    repository.fail(call=3)
    place_order(repository, first)
    place_order(repository, second)
    with pytest.raises(orderlib.DatabaseUnavailable):
        repository.get(first.order_uid)
    assert repository.get(first.order_uid) == first


# Invalid orders


@pytest.mark.parametrize("kind", FaultKind)
def test_an_import_reports_an_invalid_order_and_stores_the_others(
    repository: MemoryOrderRepository, kind: FaultKind
) -> None:
    good = make_orders(2, seed=7)
    bad = break_order(make_order(), kind, Random(7))
    faults = import_orders(repository, [orderlib.encode_order(good[0]), bad.data, orderlib.encode_order(good[1])])
    assert len(faults) == 1
    assert faults[0].startswith(f"line 2: {bad.path}: expected ")
    assert repository.get_many(order.order_uid for order in good).keys() == {"order-7-0", "order-7-1"}


# asyncio


def test_a_receipt_shows_the_total_and_survives_an_outage() -> None:
    async def receipts() -> list[str]:
        repository = AsyncMemoryOrderRepository()
        await repository.save(make_order(order_uid="a", payment=make_payment(amount=1817, currency="USD")))
        shown = [await receipt(repository, "a"), await receipt(repository, "b")]
        with repository.fail("get"):
            shown.append(await receipt(repository, "a"))
        return shown

    assert asyncio.run(receipts()) == ["18.17 USD", "unknown order", "not available"]
