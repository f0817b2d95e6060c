"""Orders as msgspec structs: what their canonical JSON is written from.

A struct has the model's fields under the model's rules, in the contract's order. (msgspec writes slotted attrs classes
in the order of their slots, which CPython sorts by name.) Whoever only stores an order decodes it straight into
structs, and needs two thirds of the time that models take.
"""

from __future__ import annotations

import datetime as dt
import functools
import operator
import typing
from typing import Annotated, Any

import attrs
import msgspec

from orderlib.models import Delivery, Item, Order, Payment

#: A ``CanonicalOrder``, its time in UTC; a type checker cannot know the fields of a class that is made here.
Canonical = Any


@functools.cache
def _struct(model: type[attrs.AttrsInstance]) -> Any:
    hints = typing.get_type_hints(model, include_extras=True)
    fields = [(field.name, _of_structs(hints[field.name])) for field in attrs.fields(model)]
    return msgspec.defstruct(
        f"Canonical{model.__name__}", fields, namespace={"__repr__": _repr_without_values}, gc=False
    )


def _repr_without_values(self: object) -> str:
    return f"{type(self).__name__}(…)"


def _of_structs(hint: Any) -> Any:
    """A type with structs where it has models."""
    if attrs.has(hint):
        return _struct(hint)
    if typing.get_origin(hint) is Annotated:
        plain, *rules = typing.get_args(hint)
        return Annotated[_of_structs(plain), *rules]
    if typing.get_origin(hint) is tuple:
        return tuple[_of_structs(typing.get_args(hint)[0]), ...]  # type: ignore[misc]  # made here
    return hint


def _fields(model: type[attrs.AttrsInstance]) -> operator.attrgetter[tuple[Any, ...]]:
    return operator.attrgetter(*(field.name for field in attrs.fields(model)))


CanonicalOrder = _struct(Order)
_CanonicalDelivery = _struct(Delivery)
_CanonicalPayment = _struct(Payment)
_CanonicalItem = _struct(Item)

_fields_of_order = _fields(Order)
_fields_of_delivery = _fields(Delivery)
_fields_of_payment = _fields(Payment)
_fields_of_item = _fields(Item)


def canonical_form(order: Order) -> Canonical:
    """Return an order as structs. Raises TypeError for anything but an ``Order``."""
    if type(order) is not Order:
        raise TypeError(f"an orderlib.Order is needed, not {type(order).__name__}")
    *head, date_created, oof_shard, delivery, payment, items = _fields_of_order(order)
    return CanonicalOrder(
        *head,
        date_created.astimezone(dt.UTC),
        oof_shard,
        _CanonicalDelivery(*_fields_of_delivery(delivery)),
        _CanonicalPayment(*_fields_of_payment(payment)),
        [_CanonicalItem(*_fields_of_item(item)) for item in items],
    )
