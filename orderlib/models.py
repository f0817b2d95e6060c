"""What an order is: the one place where its rules stand.

Frozen, keyword-only attrs classes whose ``Annotated`` types carry the whole contract (see ``orderlib.contract`` for who
reads it). Making one in Python checks it: ``Item(sale=101, …)`` raises ``InvalidOrder`` naming ``$.sale``. Money is in
minor units of the payment's currency, never a float. Times carry an offset. Lengths count code points.

The classes are final, and their reprs show no personal data: ``orderlib.order_to_plain`` shows every field.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from typing import Annotated, final

import attrs
import msgspec

from orderlib.contract import CURRENCY, INTEGER_MAX, ORDER_UID, integer, text, validated

#: Unix seconds of 9999-12-31T23:59:59Z, the last that a calendar with four-digit years can show.
LAST_UNIX_SECOND = 253402300799

MAX_ITEMS = 1000


@final
@validated
@attrs.frozen(kw_only=True, repr=False)
class Delivery:
    """Where an order goes, and to whom. Every field is personal data."""

    #: Recipient's name as they wrote it.
    name: Annotated[str, text(1, 255)]
    #: Phone number as they wrote it; no form is imposed.
    phone: Annotated[str, text(1, 64)]
    #: Postal code; empty where the country has none.
    zip: Annotated[str, text(0, 32)]
    #: Town.
    city: Annotated[str, text(1, 255)]
    #: Street, house, flat.
    address: Annotated[str, text(1, 1024)]
    #: Region; may be empty.
    region: Annotated[str, text(0, 255)]
    #: E-mail address as they wrote it; may be empty.
    email: Annotated[str, text(0, 320)]


@final
@validated
@attrs.frozen(kw_only=True, repr=False)
class Payment:
    """How an order was paid."""

    #: The provider's reference; usually the order_uid, and any other text is as valid.
    transaction: Annotated[str, text(1, 255)]
    #: The request it answers; may be empty.
    request_id: Annotated[str, text(0, 255)]
    #: ISO 4217 code in capitals.
    currency: Annotated[str, text(3, 3, CURRENCY)]
    #: Payment provider.
    provider: Annotated[str, text(1, 255)]
    #: Paid in all, in minor units of the currency.
    amount: Annotated[int, integer(0)]
    #: When it was paid, in Unix seconds.
    payment_dt: Annotated[int, integer(0, LAST_UNIX_SECOND)]
    #: Bank; may be empty.
    bank: Annotated[str, text(0, 255)]
    #: Part of the amount for delivery, in minor units.
    delivery_cost: Annotated[int, integer(0)]
    #: Part of the amount for goods, in minor units.
    goods_total: Annotated[int, integer(0)]
    #: Part of the amount for customs, in minor units.
    custom_fee: Annotated[int, integer(0)]


@final
@validated
@attrs.frozen(kw_only=True, repr=False)
class Item:
    """One line of an order."""

    #: Stock-keeping number.
    chrt_id: Annotated[int, integer(0)]
    #: Parcel's tracking number; may be empty.
    track_number: Annotated[str, text(0, 255)]
    #: Price of one before the discount, in minor units.
    price: Annotated[int, integer(0)]
    #: The line's own reference.
    rid: Annotated[str, text(1, 255)]
    #: What it is; may be empty.
    name: Annotated[str, text(0, 1024)]
    #: Discount in percent.
    sale: Annotated[int, integer(0, 100)]
    #: Size as the shop spells it; may be empty.
    size: Annotated[str, text(0, 64)]
    #: Price after the discount, in minor units.
    total_price: Annotated[int, integer(0)]
    #: Catalogue number.
    nm_id: Annotated[int, integer(0)]
    #: Brand; may be empty.
    brand: Annotated[str, text(0, 255)]
    #: The shop's status code.
    status: Annotated[int, integer(0, INTEGER_MAX)]


def _instant(time: dt.datetime) -> dt.datetime:
    """By themselves datetimes of two zones are unequal where either zone turns its clocks (PEP 495)."""
    return time.astimezone(dt.UTC)


def _in_order(items: Iterable[Item]) -> tuple[Item, ...]:
    if not isinstance(items, Iterable):
        return items  # type: ignore[unreachable]  # the check says what it is
    return tuple(items)


@final
@validated
@attrs.frozen(kw_only=True, repr=False)
class Order:
    """An order, as a shop publishes it. It is read back with every known field equal.

    Equal orders have equal content: times compare as instants, in whichever offset they were written.
    """

    #: The order's name everywhere: the key in Kafka, in the tables and in URLs.
    order_uid: Annotated[str, text(1, 128, ORDER_UID)]
    #: Tracking number of the order.
    track_number: Annotated[str, text(1, 255)]
    #: Where the order entered the shop.
    entry: Annotated[str, text(1, 255)]
    #: Language tag of the customer.
    locale: Annotated[str, text(1, 35)]
    #: The shop's own signature; may be empty.
    internal_signature: Annotated[str, text(0, 4096)]
    #: Who ordered, by the shop's number.
    customer_id: Annotated[str, text(1, 255)]
    #: Carrier.
    delivery_service: Annotated[str, text(1, 255)]
    #: The shop's shard key; may be empty.
    shardkey: Annotated[str, text(0, 255)]
    #: The shop's service number.
    sm_id: Annotated[int, integer(0)]
    #: When the order was made; always with an offset, to the microsecond.
    date_created: Annotated[dt.datetime, msgspec.Meta(tz=True)] = attrs.field(eq=_instant)
    #: The shop's out-of-family shard; may be empty.
    oof_shard: Annotated[str, text(0, 255)]
    #: Where it goes.
    delivery: Delivery
    #: How it was paid.
    payment: Payment
    #: Its lines, in the shop's order.
    items: Annotated[tuple[Item, ...], msgspec.Meta(min_length=1, max_length=MAX_ITEMS)] = attrs.field(
        converter=_in_order
    )

    def __repr__(self) -> str:
        """Name the order and count its items. ``order_to_plain`` shows every field."""
        return f"Order(order_uid={self.order_uid!r}, items={len(self.items)})"
