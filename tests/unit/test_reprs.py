"""No repr, text or error of the library shows personal data."""

from __future__ import annotations

import datetime as dt
import enum
import importlib
import json
import pkgutil
import types
import typing
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.inspect import StrType

import orderlib
from orderlib import InvalidOrder, Order
from orderlib.codecs import canonical_form
from orderlib.contract import rule_of, rules_of
from orderlib.errors import RejectedError
from orderlib.ingestion.records import Record, classify_record
from orderlib.repository import RecordPosition
from orderlib.testing import FaultKind, break_order
from orderlib.testing.strategies import orders

#: Part of every text of the orders in these tests, except the order_uid.
SECRET = "s3cret"


def _with_secrets(part: Any) -> Any:
    """Return a part of an order with the secret in every text that has no form."""
    changes: dict[str, Any] = {}
    model: Any = type(part)
    for field in rules_of(model).fields:
        value, rule = getattr(part, field.name), rule_of(field)
        if attrs.has(type(value)):
            changes[field.name] = _with_secrets(value)
        elif isinstance(value, tuple):
            changes[field.name] = tuple(map(_with_secrets, value))
        elif isinstance(rule, StrType) and rule.pattern is None:
            changes[field.name] = (SECRET + value)[: rule.max_length]
    return attrs.evolve(part, **changes)


def secret_orders() -> st.SearchStrategy[Order]:
    return orders(max_items=2).map(_with_secrets)


def _attrs_classes() -> Iterator[type[attrs.AttrsInstance]]:
    for module_info in pkgutil.walk_packages(orderlib.__path__, "orderlib."):
        if module_info.name.endswith("__main__"):
            continue
        module = importlib.import_module(module_info.name)
        for value in vars(module).values():
            if isinstance(value, type) and attrs.has(value) and value.__module__ == module.__name__:
                yield value


CLASSES = list(_attrs_classes())


def _value(hint: Any, name: str, order: Order) -> Any:
    """Return a value of this type. A value from an order or a record contains the secret."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _value(arguments[0], name, order)
    if origin in {typing.Union, types.UnionType}:
        return _value(arguments[0], name, order)
    if hint is Order:
        return order
    if attrs.has(hint):
        return _instance(hint, order)
    if hint is bytes:
        return b"digest" if name.endswith("sha256") else SECRET.encode()
    if origin is tuple:
        return tuple(_value(one, name, order) for one in arguments if one is not Ellipsis)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {_value(arguments[0], name, order): 1 if len(arguments) < 2 else _value(arguments[1], name, order)}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return next(iter(hint))
    plain = {str: "text 1", int: 1, float: 0.5, bool: True, dt.datetime: dt.datetime(2026, 1, 1, tzinfo=dt.UTC)}
    if hint in plain:
        return plain[hint]
    return SECRET if name in {"container", "headers"} else None


def _instance(cls: type[attrs.AttrsInstance], order: Order) -> Any:
    match cls.__name__:
        case "Order":
            return order
        case "Delivery" | "Payment":
            return getattr(order, cls.__name__.lower())
        case "Item":
            return order.items[0]
    hints = typing.get_type_hints(cls, include_extras=True)
    return cls(
        **{field.alias: _value(hints[field.name], field.name, order) for field in attrs.fields(cls) if field.init}
    )


@given(order=secret_orders())
@settings(max_examples=5)
def test_no_repr_shows_personal_data(order: Order) -> None:
    for cls in CLASSES:
        instance = _instance(cls, order)
        for text in (repr(instance), str(instance), f"{instance}", f"{[instance]}"):
            assert SECRET not in text, cls


def test_the_classes_that_contain_orders_and_records_are_tested() -> None:
    assert {"Order", "Delivery", "Payment", "Item", "Record", "Reject", "StoredOrder", "Page", "PackedRows"} <= {
        cls.__name__ for cls in CLASSES
    }


@given(secret_orders())
@settings(max_examples=20)
def test_the_repr_of_an_order_has_its_order_uid_and_the_number_of_items(order: Order) -> None:
    assert repr(order) == f"Order(order_uid={order.order_uid!r}, items={len(order.items)})"
    assert SECRET not in repr(canonical_form(order))
    assert SECRET in json.dumps(orderlib.order_to_plain(order))


@given(secret_orders(), st.binary(max_size=20))
@settings(max_examples=20)
def test_the_reprs_of_a_record_and_its_classification_show_no_content(order: Order, junk: bytes) -> None:
    for value in (orderlib.encode_order(order), SECRET.encode() + junk, None):
        position = RecordPosition(topic_id="id", partition=0, offset=7)
        record = Record(
            position=position,
            time=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
            topic="orders",
            key=SECRET.encode(),
            value=value,
            headers=((SECRET, SECRET.encode()),),
        )
        assert f"value={'None' if value is None else f'<{len(value):,} bytes>'}" in repr(record)
        assert SECRET not in repr(record) + repr(classify_record(record, 8_000_000))


@given(order=secret_orders(), seed=st.integers(0, 1000))
@settings(max_examples=5)
def test_no_error_shows_personal_data(order: Order, seed: int) -> None:
    for kind in FaultKind:
        bad = break_order(order, kind, Random(seed))
        with pytest.raises(RejectedError) as caught:
            orderlib.decode_order(bad.data)
        assert SECRET not in repr(caught.value) + str(caught.value) + repr(caught.value.faults) + repr(bad), kind


@given(secret_orders())
@settings(max_examples=5)
def test_no_error_of_a_model_shows_personal_data(order: Order) -> None:
    with pytest.raises(InvalidOrder) as caught:
        attrs.evolve(order.delivery, name=SECRET * 100, phone=SECRET * 100, city=None, zip=b"s3cret")  # type: ignore[arg-type]  # wrong types
    assert caught.value.total == 4
    assert SECRET not in repr(caught.value) + repr(caught.value.faults)
