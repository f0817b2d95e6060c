"""Valid orders for tests, without hypothesis."""

from __future__ import annotations

import datetime as dt
import itertools
import string
from collections.abc import Iterable
from random import Random
from typing import Any

import attrs

from orderlib.models import Delivery, Item, Order, Payment

_FIRST_DATE = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
_numbers = itertools.count(1)


def make_order(seed: int | None = None, **fields: Any) -> Order:
    """Return a valid order. It has the fields that are given, and invented values in the others.

    In one process every call returns a different order; each process begins with the same ones. With a ``seed``, the
    order depends only on the seed and the fields, and its order_uid is ``order-SEED``. The payment's totals are the
    sums over the items, unless you pass a payment. Parts are models: ``make_order(customer_id="c1",
    payment=make_payment(amount=500), items=[make_item(), make_item()])``.

    Raises InvalidOrder for an invalid value, and TypeError for an unknown field.
    """
    return _make_order(_label(seed), fields)


def make_orders(count: int, seed: int | None = None, **fields: Any) -> list[Order]:
    """Return this number of different orders. Each has the fields that are given. See ``make_order``."""
    label = _label(seed)
    return [_make_order(f"{label}-{number}", fields) for number in range(count)]


def make_delivery(seed: int | None = None, **fields: Any) -> Delivery:
    """Return a valid delivery with the fields that are given. See ``make_order``."""
    return _make_delivery(_label(seed), fields)


def make_payment(seed: int | None = None, **fields: Any) -> Payment:
    """Return a valid payment with the fields that are given. See ``make_order``."""
    label = _label(seed)
    return _make_payment(label, f"order-{label}", [_make_item(label, {})], fields)


def make_item(seed: int | None = None, **fields: Any) -> Item:
    """Return a valid item with the fields that are given. See ``make_order``."""
    return _make_item(_label(seed), fields)


def _label(seed: int | None) -> str:
    """Return a text that no other call gets, or that of the seed."""
    return f"auto-{next(_numbers)}" if seed is None else str(seed)


def _make_order(label: str, fields: dict[str, Any]) -> Order:
    rng = Random(label)  # noqa: S311 # test data
    track_number = fields.get("track_number", _code(rng, "TRACK"))
    invented_items = [
        _make_item(f"{label}-{line}", {"track_number": track_number}) for line in range(rng.randint(1, 3))
    ]
    values: dict[str, Any] = {
        "order_uid": f"order-{label}",
        "track_number": track_number,
        "entry": "WBIL",
        "delivery": _make_delivery(label, {}),
        "payment": _make_payment(label, "not known yet", invented_items, {}),
        "items": invented_items,
        "locale": rng.choice(["de", "en", "ru"]),
        "internal_signature": "",
        "customer_id": f"customer-{rng.randrange(10**6)}",
        "delivery_service": rng.choice(["meest", "dhl", "post"]),
        "shardkey": str(rng.randrange(10)),
        "sm_id": rng.randrange(1_000),
        "date_created": _FIRST_DATE + dt.timedelta(seconds=rng.randrange(365 * 24 * 3600)),
        "oof_shard": str(rng.randrange(10)),
    }
    order = Order(**values | fields)
    if "payment" in fields:
        return order
    return attrs.evolve(order, payment=_make_payment(label, order.order_uid, order.items, {}))


def _make_delivery(label: str, fields: dict[str, Any]) -> Delivery:
    rng = Random(f"{label} delivery")  # noqa: S311 # test data
    number = rng.randrange(10**6)
    values: dict[str, Any] = {
        "name": f"Test Person {number}",
        "phone": f"+1555{number:07}",
        "zip": f"{rng.randrange(10**5):05}",
        "city": rng.choice(["Testville", "Sampletown", "Mockburg"]),
        "address": f"{rng.randint(1, 200)} Example Street",
        "region": rng.choice(["North", "South"]),
        "email": f"person{number}@example.org",
    }
    return Delivery(**values | fields)


def _make_payment(label: str, transaction: str, items: Iterable[Item], fields: dict[str, Any]) -> Payment:
    rng = Random(f"{label} payment")  # noqa: S311 # test data
    goods_total = sum(item.total_price for item in items)
    delivery_cost = rng.choice([0, 490, 1500])
    values: dict[str, Any] = {
        "transaction": transaction,
        "request_id": "",
        "currency": rng.choice(["EUR", "USD"]),
        "provider": "wbpay",
        "amount": goods_total + delivery_cost,
        "payment_dt": int(_FIRST_DATE.timestamp()) + rng.randrange(365 * 24 * 3600),
        "bank": "alpha",
        "delivery_cost": delivery_cost,
        "goods_total": goods_total,
        "custom_fee": 0,
    }
    return Payment(**values | fields)


def _make_item(label: str, fields: dict[str, Any]) -> Item:
    rng = Random(f"{label} item")  # noqa: S311 # test data
    price = rng.randrange(100, 100_000)
    sale = rng.choice([0, 0, 10, 30])
    values: dict[str, Any] = {
        "chrt_id": rng.randrange(10**7),
        "track_number": _code(rng, "TRACK"),
        "price": price,
        "rid": _code(rng, "rid"),
        "name": rng.choice(["Mug", "Lamp", "Notebook", "Scarf"]),
        "sale": sale,
        "size": rng.choice(["", "S", "M", "L"]),
        "total_price": price * (100 - sale) // 100,
        "nm_id": rng.randrange(10**7),
        "brand": rng.choice(["Acme", "Contoso"]),
        "status": 202,
    }
    return Item(**values | fields)


def _code(rng: Random, prefix: str) -> str:
    return prefix + "".join(rng.choices(string.digits, k=12))
