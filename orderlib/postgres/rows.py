"""Orders to rows and back, field by field, without a driver or SQL.

Rows are packed in the binary format of PostgreSQL's COPY (its manual, "COPY", "Binary Format"). So one thread can pack
rows while another waits for the database.

The models' fields, in their order, are the columns. ``orderlib.postgres.queries`` takes its column lists from here, so
a new field changes no SQL text.
"""

from __future__ import annotations

import datetime as dt
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, LiteralString

import attrs

from orderlib.codecs import CanonicalOrder
from orderlib.contract import M, column_type, field_rules
from orderlib.ingestion.records import PackedRows
from orderlib.models import Delivery, Item, Order, Payment
from orderlib.repository import RecordPosition

Row = tuple[Any, ...]


def _names(model: type[attrs.AttrsInstance]) -> tuple[LiteralString, ...]:
    # The names are written on the models, so SQL may contain them. mypy takes any str for a LiteralString.
    return tuple(field.name for field in attrs.fields(model))


#: The scalar fields of an order are columns of ``orders``. Its parts have their own tables.
ORDER_COLUMNS = tuple(name for name in _names(Order) if name not in {"delivery", "payment", "items"})
DELIVERY_COLUMNS = _names(Delivery)
PAYMENT_COLUMNS = _names(Payment)
ITEM_COLUMNS = _names(Item)
#: The other columns of ``orders``, behind the fields of an order.
STORE_COLUMNS = (
    "content_sha256",
    "source_topic_id",
    "source_partition",
    "source_offset",
    "source_time",
    "first_stored_at",
    "stored_at",
    "version",
    "has_original",
)
#: The columns of ``orders`` that hold a time of the order.
ORDER_TIMES = tuple(
    name for name, rule in field_rules(Order).items() if name in ORDER_COLUMNS and column_type(rule) == "timestamptz"
)

_DELIVERY_AT = len(ORDER_COLUMNS)
_PAYMENT_AT = _DELIVERY_AT + len(DELIVERY_COLUMNS)
#: The number of columns of an order's joined row. Behind them come those that the store adds.
JOINED_WIDTH = _PAYMENT_AT + len(PAYMENT_COLUMNS)


def _maker(model: type[M], names: Sequence[str]) -> Callable[[Iterable[Any]], M]:
    """Return a function that makes a model of the values of these fields, without validation.

    It sets the slots of the instance: calling ``__init__`` by keywords takes twice the time.
    """
    setters = [getattr(model, name).__set__ for name in names]

    def make(values: Iterable[Any]) -> M:
        instance = model.__new__(model)
        for set_value, value in zip(setters, values, strict=True):
            set_value(instance, value)
        return instance

    return make


_make_order = _maker(Order, (*ORDER_COLUMNS, "delivery", "payment", "items"))
_make_delivery = _maker(Delivery, DELIVERY_COLUMNS)
_make_payment = _maker(Payment, PAYMENT_COLUMNS)
_make_item = _maker(Item, ITEM_COLUMNS)


def order_from_rows(joined: Row, items: Iterable[Row]) -> Order:
    """Return an order from its joined row (orders, delivery, payment; further columns are ignored) and its items' rows.

    An item's row begins with its order_uid. Rows are not validated again: CHECK constraints enforce the contract.
    """
    return _make_order(
        (
            *joined[:_DELIVERY_AT],
            _make_delivery(joined[_DELIVERY_AT:_PAYMENT_AT]),
            _make_payment(joined[_PAYMENT_AT:JOINED_WIDTH]),
            tuple([_make_item(row[1:]) for row in items]),
        )
    )


def orders_from_rows(joined: Iterable[Row], items: Iterable[Row]) -> list[Order]:
    """Return orders from their joined rows and the rows of all their items, in the sequence of the joined rows."""
    items_of: defaultdict[str, list[Row]] = defaultdict(list)
    for row in items:
        items_of[row[0]].append(row)
    return [order_from_rows(row, items_of[row[0]]) for row in joined]


_EPOCH = dt.datetime(2000, 1, 1, tzinfo=dt.UTC)
_MICROSECOND = dt.timedelta(microseconds=1)
_length = struct.Struct("!i").pack
_NULL = _length(-1)
#: The first argument of each is the length in bytes.
_bigint = struct.Struct("!iq").pack
_integer = struct.Struct("!ii").pack
_boolean = struct.Struct("!i?").pack
_field_count = struct.Struct("!h").pack


def _text(value: str) -> bytes:
    return _bytea(value.encode())


def _bytea(value: bytes) -> bytes:
    return _length(len(value)) + value


def _timestamptz(value: dt.datetime) -> bytes:
    return _bigint(8, (value - _EPOCH) // _MICROSECOND)


#: The beginning and the end of the data of a binary COPY.
COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
COPY_TRAILER = _field_count(-1)


#: How a field of each type is packed.
_PACKING = {
    "text": "_length(len(data := model.{name}.encode())), data",
    "bigint": "_bigint(8, model.{name})",
    "integer": "_integer(4, model.{name})",
    "timestamptz": "_timestamptz(model.{name})",
}


def _packer(model: type[attrs.AttrsInstance], names: Sequence[str]) -> Callable[[object], bytes]:
    """Return a function that packs a model's columns as the fields of a binary row.

    Its code is generated from the contract, as attrs generates methods: a call for each field took twice the time.
    """
    rules = field_rules(model)
    fields = ", ".join(_PACKING[column_type(rules[name])].format(name=name) for name in names)
    # The code has nothing from outside: only names of fields.
    pack: Callable[[object], bytes] = eval(f"lambda model: b''.join(({fields}))", globals())  # noqa: S307
    return pack


_order_fields = _packer(Order, ORDER_COLUMNS)
_delivery_fields = _packer(Delivery, DELIVERY_COLUMNS)
_payment_fields = _packer(Payment, PAYMENT_COLUMNS)
_item_fields = _packer(Item, ITEM_COLUMNS)

_ORDER_HEAD = _field_count(len(ORDER_COLUMNS) + len(STORE_COLUMNS))
_DELIVERY_HEAD = _field_count(1 + len(DELIVERY_COLUMNS))
_PAYMENT_HEAD = _field_count(1 + len(PAYMENT_COLUMNS))
_ITEM_HEAD = _field_count(2 + len(ITEM_COLUMNS))
_ORIGINAL_HEAD = _field_count(2)


def pack_rows(
    order: CanonicalOrder, content_sha256: bytes, position: RecordPosition | None, time: dt.datetime | None
) -> PackedRows:
    """Encode an order's rows for a binary COPY into each table (``PackRows``)."""
    uid = _text(order.order_uid)
    if position is None or time is None:
        packed_position = _NULL * 4
    else:
        packed_position = (
            _text(position.topic_id)
            + _integer(4, position.partition)
            + _bigint(8, position.offset)
            + _timestamptz(time)
        )
    return PackedRows(
        order=_ORDER_HEAD + _order_fields(order) + _bytea(content_sha256) + packed_position,
        delivery=_DELIVERY_HEAD + uid + _delivery_fields(order.delivery),
        payment=_PAYMENT_HEAD + uid + _payment_fields(order.payment),
        items=b"".join(
            [_ITEM_HEAD + uid + _integer(4, line) + _item_fields(item) for line, item in enumerate(order.items)]
        ),
    )


def original_row(order_uid: str, value: bytes) -> Iterator[bytes]:
    """Yield the binary row of an original in parts, so that a large value is not copied."""
    yield _ORIGINAL_HEAD + _text(order_uid) + _length(len(value))
    yield value


def pack_store_columns(first_stored_at: dt.datetime, stored_at: dt.datetime, version: int, has_original: bool) -> bytes:
    """Pack the last four columns of ``orders``; most of them are known only in the transaction."""
    return _timestamptz(first_stored_at) + _timestamptz(stored_at) + _bigint(8, version) + _boolean(1, has_original)


_REJECT_HEAD = _field_count(10)
#: The byte before the text of a jsonb.
_JSONB_VERSION = b"\1"


def reject_row(
    position: tuple[str, int, int],
    topic: str,
    time: dt.datetime,
    contents: tuple[bytes | None, bytes | None, bytes | None],
    code: str,
    faults: bytes,
) -> Iterator[bytes]:
    """Yield a reject's binary row in parts, so that a large record is not copied.

    ``position``: topic id, partition, offset; ``contents``: key, value, headers as JSON.
    """
    topic_id, partition, offset = position
    yield _REJECT_HEAD + _text(topic_id) + _integer(4, partition) + _bigint(8, offset) + _text(topic)
    yield _timestamptz(time)
    for content in contents:
        if content is None:
            yield _NULL
        else:
            yield _length(len(content))
            yield content
    yield _text(code) + _bytea(_JSONB_VERSION + faults)
