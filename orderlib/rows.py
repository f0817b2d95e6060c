"""Orders to rows and back, field by field; no driver, no SQL.

The order of fields is the models', and the column lists in ``orderlib.queries`` follow it; a test compares them.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs

from orderlib.contract import M, trusted
from orderlib.models import Delivery, Item, Order, Payment

Row = tuple[Any, ...]


def _names(model: type[attrs.AttrsInstance]) -> tuple[str, ...]:
    return tuple(field.name for field in attrs.fields(model))


#: The scalar fields of an order, which are columns of ``orders``; its parts have tables of their own.
ORDER_COLUMNS = tuple(name for name in _names(Order) if name not in {"delivery", "payment", "items"})
DELIVERY_COLUMNS = _names(Delivery)
PAYMENT_COLUMNS = _names(Payment)
ITEM_COLUMNS = _names(Item)

_DELIVERY_AT = len(ORDER_COLUMNS)
_PAYMENT_AT = _DELIVERY_AT + len(DELIVERY_COLUMNS)
#: Where an order's joined row ends and what the store adds begins.
JOINED_WIDTH = _PAYMENT_AT + len(PAYMENT_COLUMNS)


def _reader(names: Sequence[str]) -> Callable[[Any], Row]:
    return operator.attrgetter(*names)


#: The columns of a model as a row.
order_row = _reader(ORDER_COLUMNS)
delivery_row = _reader(DELIVERY_COLUMNS)
payment_row = _reader(PAYMENT_COLUMNS)
item_row = _reader(ITEM_COLUMNS)


def _model(cls: type[M], names: Sequence[str], row: Sequence[Any]) -> M:
    return trusted(cls, **dict(zip(names, row, strict=True)))


def order_from_rows(joined: Row, items: Iterable[Row]) -> Order:
    """An order from its joined row (orders, delivery, payment; more columns are passed over) and its items' rows.

    An item's row begins with its order_uid. Rows are trusted: the CHECK constraints hold them to the contract.
    """
    return trusted(
        Order,
        **dict(zip(ORDER_COLUMNS, joined[:_DELIVERY_AT], strict=True)),
        delivery=_model(Delivery, DELIVERY_COLUMNS, joined[_DELIVERY_AT:_PAYMENT_AT]),
        payment=_model(Payment, PAYMENT_COLUMNS, joined[_PAYMENT_AT:JOINED_WIDTH]),
        items=[_model(Item, ITEM_COLUMNS, row[1:]) for row in items],
    )


def orders_from_rows(joined: Iterable[Row], items: Iterable[Row]) -> list[Order]:
    """Orders from joined rows and the rows of all their items, in the order of the joined rows."""
    items_of: defaultdict[str, list[Row]] = defaultdict(list)
    for row in items:
        items_of[row[0]].append(row)
    return [order_from_rows(row, items_of[row[0]]) for row in joined]
