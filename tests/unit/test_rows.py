"""Rows follow the models, and every column list in SQL follows the rows."""

from __future__ import annotations

import re
from operator import attrgetter
from typing import LiteralString

import pytest
from hypothesis import given, settings

from orderlib import Order, queries
from orderlib.rows import (
    DELIVERY_COLUMNS,
    ITEM_COLUMNS,
    JOINED_WIDTH,
    ORDER_COLUMNS,
    PAYMENT_COLUMNS,
    order_from_rows,
    orders_from_rows,
)
from orderlib.testing.strategies import orders

JOINED = [
    *(f"o.{name}" for name in ORDER_COLUMNS),
    *(f"d.{name}" for name in DELIVERY_COLUMNS),
    *(f"p.{name}" for name in PAYMENT_COLUMNS),
]


def columns(text: str) -> list[str]:
    return [column.strip() for column in text.split(",")]


def joined_row(order: Order) -> tuple[object, ...]:
    return (
        *attrgetter(*ORDER_COLUMNS)(order),
        *attrgetter(*DELIVERY_COLUMNS)(order.delivery),
        *attrgetter(*PAYMENT_COLUMNS)(order.payment),
    )


def item_rows(order: Order) -> list[tuple[object, ...]]:
    return [(order.order_uid, *attrgetter(*ITEM_COLUMNS)(item)) for item in order.items]


@pytest.mark.parametrize(
    "statement", [queries.GET_ORDER, queries.GET_ORDERS, queries.newest("top", customer=False, track=False)]
)
def test_a_joined_row_has_the_columns_of_the_models_in_their_order(statement: LiteralString) -> None:
    selected = re.search(r"SELECT(.*?)FROM orders o", statement, re.DOTALL)
    assert selected
    assert columns(selected[1])[:JOINED_WIDTH] == JOINED


@pytest.mark.parametrize("statement", [queries.GET_ITEMS, queries.GET_ITEMS_OF_ORDERS, queries.GET_ITEMS_OF_PAGE])
def test_an_items_row_is_its_order_uid_and_the_columns_of_the_model(statement: LiteralString) -> None:
    selected = re.search(r"SELECT(.*?)FROM items", statement, re.DOTALL)
    assert selected
    assert columns(selected[1]) == ["order_uid", *ITEM_COLUMNS]


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        (queries.COPY_ORDERS, ORDER_COLUMNS),
        (queries.COPY_DELIVERY, ("order_uid", *DELIVERY_COLUMNS)),
        (queries.COPY_PAYMENT, ("order_uid", *PAYMENT_COLUMNS)),
        (queries.COPY_ITEMS, ("order_uid", "line", *ITEM_COLUMNS)),
    ],
)
def test_rows_are_copied_into_the_columns_of_the_models(statement: LiteralString, expected: tuple[str, ...]) -> None:
    copied = re.search(r"COPY \w+ \((.*?)\)", statement, re.DOTALL)
    assert copied
    assert columns(copied[1])[: len(expected)] == list(expected)


@given(orders())
@settings(max_examples=25)
def test_an_order_goes_into_rows_and_comes_back(order: Order) -> None:
    stored_at = order.date_created
    assert order_from_rows((*joined_row(order), stored_at, stored_at), item_rows(order)) == order


@given(orders(max_items=2), orders(max_items=2))
@settings(max_examples=15)
def test_items_find_their_order_whatever_the_order_of_the_rows(one: Order, other: Order) -> None:
    if one.order_uid == other.order_uid:
        return
    items = [*item_rows(other), *item_rows(one)]
    assert orders_from_rows([joined_row(one), joined_row(other)], items) == [one, other]


def test_a_row_of_another_width_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        order_from_rows(("too", "short"), [])
