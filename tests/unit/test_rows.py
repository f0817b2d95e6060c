"""Rows have the fields of the models in their order, and so has every column list in SQL."""

from __future__ import annotations

import datetime as dt
import re
import struct
from collections.abc import Mapping
from operator import attrgetter
from typing import LiteralString

import attrs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from psycopg import adapters
from psycopg.adapt import PyFormat, Transformer
from psycopg.pq import Format

from orderlib import Order, decode_order
from orderlib.codecs import canonical_form
from orderlib.contract import column_type
from orderlib.postgres import queries
from orderlib.postgres.rows import (
    DELIVERY_COLUMNS,
    ITEM_COLUMNS,
    JOINED_WIDTH,
    ORDER_COLUMNS,
    PAYMENT_COLUMNS,
    order_from_rows,
    orders_from_rows,
    pack_rows,
    pack_store_columns,
)
from orderlib.repository import Direction, RecordPosition
from orderlib.testing import SAMPLE
from orderlib.testing.strategies import orders
from tests.support.boundary_values import PLACES

JOINED = [
    *(f"o.{name}" for name in ORDER_COLUMNS),
    *(f"d.{name}" for name in DELIVERY_COLUMNS),
    *(f"p.{name}" for name in PAYMENT_COLUMNS),
]


SAMPLE_ORDER = decode_order(SAMPLE)


def columns(text: str) -> list[str]:
    return [column.strip() for column in text.split(",")]


def copied_columns(statement: str) -> list[str]:
    copied = re.search(r"COPY \w+ \((.*?)\)", statement, re.DOTALL)
    assert copied
    return columns(copied[1])


def joined_row(order: Order) -> tuple[object, ...]:
    return (
        *attrgetter(*ORDER_COLUMNS)(order),
        *attrgetter(*DELIVERY_COLUMNS)(order.delivery),
        *attrgetter(*PAYMENT_COLUMNS)(order.payment),
    )


def item_rows(order: Order) -> list[tuple[object, ...]]:
    return [(order.order_uid, *attrgetter(*ITEM_COLUMNS)(item)) for item in order.items]


@pytest.mark.parametrize(
    "statement",
    [
        queries.GET_ORDER,
        queries.GET_ORDERS,
        queries.list_orders(Direction.OLDER, [], cursor=False),
    ],
)
def test_a_joined_row_has_the_columns_of_the_models_in_their_order(statement: LiteralString) -> None:
    selected = re.search(r"SELECT(.*?)FROM orders o", statement, re.DOTALL)
    assert selected
    assert columns(selected[1])[:JOINED_WIDTH] == JOINED


@pytest.mark.parametrize("statement", [queries.GET_ITEMS, queries.GET_ITEMS_OF_ORDERS, queries.GET_ITEMS_OF_PAGE])
def test_the_row_of_an_item_is_its_order_uid_and_the_columns_of_the_model(statement: LiteralString) -> None:
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
    assert copied_columns(statement)[: len(expected)] == list(expected)


@given(orders())
@settings(max_examples=25)
def test_an_order_read_from_its_rows_is_equal(order: Order) -> None:
    stored_at = order.date_created
    assert order_from_rows((*joined_row(order), stored_at, stored_at), item_rows(order)) == order


@given(orders(max_items=2), orders(max_items=2))
@settings(max_examples=15)
def test_items_are_assigned_to_their_order_in_any_sequence_of_rows(one: Order, other: Order) -> None:
    if one.order_uid == other.order_uid:
        return
    items = [*item_rows(other), *item_rows(one)]
    assert orders_from_rows([joined_row(one), joined_row(other)], items) == [one, other]


def test_a_row_with_another_number_of_columns_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        order_from_rows(("too", "short"), [])


# Rows in the binary format

#: The type of each column in the schema (tests/integration/test_contract.py compares them).
TYPES = {(place.part, place.name): column_type(place.rule) for place in PLACES}
OF_THE_STORE = {
    "order_uid": "text",
    "line": "integer",
    "content_sha256": "bytea",
    "source_topic_id": "text",
    "source_partition": "integer",
    "source_offset": "bigint",
    "source_time": "timestamptz",
    "first_stored_at": "timestamptz",
    "stored_at": "timestamptz",
    "version": "bigint",
    "has_original": "boolean",
}
MOMENTS = st.datetimes(timezones=st.just(dt.UTC))
Place = tuple[str, int, int, dt.datetime]
PLACES_IN_KAFKA = st.tuples(
    st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 2**31 - 1), st.integers(0, 2**63 - 1), MOMENTS
)

FIRST, LAST = dt.datetime.min.replace(tzinfo=dt.UTC), dt.datetime.max.replace(tzinfo=dt.UTC)
BEFORE_2000 = dt.datetime(1999, 12, 31, 23, 59, 59, 999999, dt.timezone(dt.timedelta(hours=-14)))
LEAST = attrs.evolve(SAMPLE_ORDER, date_created=FIRST, sm_id=0, shardkey="", oof_shard="", internal_signature="")
MOST = attrs.evolve(
    SAMPLE_ORDER,
    date_created=LAST,
    sm_id=2**63 - 1,
    entry="\U0001f600\U0010ffff" * 127,
    items=[attrs.evolve(SAMPLE_ORDER.items[0], status=2**31 - 1, chrt_id=2**63 - 1, name="\u0301")] * 3,
)


def written_by_psycopg(part: str | None, statement: str, values: Mapping[str, object]) -> bytes:
    """Return a row for a binary COPY as psycopg packs it, with the columns of the statement."""
    names = copied_columns(statement)
    types = [TYPES.get((part, name)) or OF_THE_STORE[name] for name in names]
    transformer = Transformer()
    transformer.set_dumper_types([adapters.types[name].oid for name in types], Format.BINARY)
    fields = transformer.dump_sequence([values[name] for name in names], [PyFormat.BINARY] * len(names))
    packed = (struct.pack("!i", -1) if data is None else struct.pack("!i", len(data)) + bytes(data) for data in fields)
    return struct.pack("!h", len(names)) + b"".join(packed)


@given(
    orders(),
    st.binary(min_size=32, max_size=32),
    st.none() | PLACES_IN_KAFKA,
    MOMENTS,
    MOMENTS,
    st.integers(1, 2**63 - 1),
    st.booleans(),
)
@example(LEAST, bytes(32), None, FIRST, FIRST, 1, False)
@example(MOST, b"\xff" * 32, ("", 2**31 - 1, 2**63 - 1, LAST), LAST, LAST, 2**63 - 1, True)
@example(
    attrs.evolve(SAMPLE_ORDER, date_created=BEFORE_2000), bytes(32), ("id", 0, 0, FIRST), BEFORE_2000, LAST, 2, False
)
@settings(max_examples=50)
def test_packed_rows_equal_those_of_psycopg(
    order: Order,
    sha256: bytes,
    place: Place | None,
    first_stored_at: dt.datetime,
    stored_at: dt.datetime,
    number: int,
    has_original: bool,
) -> None:
    topic_id, partition, offset, time = place or (None, None, None, None)
    of_order = {
        **{name: getattr(order, name) for name in ORDER_COLUMNS},
        "content_sha256": sha256,
        "source_topic_id": topic_id,
        "source_partition": partition,
        "source_offset": offset,
        "source_time": time,
        "first_stored_at": first_stored_at,
        "stored_at": stored_at,
        "version": number,
        "has_original": has_original,
    }

    def of_part(part: object, names: tuple[str, ...]) -> dict[str, object]:
        return {"order_uid": order.order_uid, **{name: getattr(part, name) for name in names}}

    position = None if place is None else RecordPosition(topic_id=place[0], partition=place[1], offset=place[2])
    rows = pack_rows(canonical_form(order), sha256, position, time)
    assert rows.order + pack_store_columns(first_stored_at, stored_at, number, has_original) == written_by_psycopg(
        None, queries.COPY_ORDERS, of_order
    )
    for name, made, statement, names in (
        ("delivery", rows.delivery, queries.COPY_DELIVERY, DELIVERY_COLUMNS),
        ("payment", rows.payment, queries.COPY_PAYMENT, PAYMENT_COLUMNS),
    ):
        assert made == written_by_psycopg(name, statement, of_part(getattr(order, name), names))
    assert rows.items == b"".join(
        written_by_psycopg("items", queries.COPY_ITEMS, {"line": line, **of_part(item, ITEM_COLUMNS)})
        for line, item in enumerate(order.items)
    )
