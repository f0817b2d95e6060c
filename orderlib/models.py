"""The models of an order, with their rules.

The classes are frozen, keyword-only attrs classes. Their ``Annotated`` types are the contract; ``orderlib.contract``
reads it. Creating an instance validates it: ``Item(sale=101, …)`` raises ``InvalidOrder`` with the path ``$.sale``.
Money is in minor units of the payment's currency, never a float. Times have an offset. Lengths count code points.

The classes are final. Their reprs show no personal data; ``orderlib.order_to_plain`` shows every field.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from typing import Annotated, final

import attrs
import msgspec

from orderlib.contract import CURRENCY, INTEGER_MAX, ORDER_UID, integer, text, validated

#: Unix time of 9999-12-31T23:59:59Z, the last second of a year with four digits.
LAST_UNIX_SECOND = 253402300799

MAX_ITEMS = 1000


@final
@validated
@attrs.frozen(kw_only=True, repr=False)
class Delivery:
    """The address and the recipient of an order. Every field is personal data."""

    #: Name of the recipient, in any form.
    name: Annotated[str, text(1, 255)]
    #: Phone number, in any form.
    phone: Annotated[str, text(1, 64)]
    #: Postal code; empty where the country has none.
    zip: Annotated[str, text(0, 32)]
    #: Town.
    city: Annotated[str, text(1, 255)]
    #: Street, house, flat.
    address: Annotated[str, text(1, 1024)]
    #: Region; may be empty.
    region: Annotated[str, text(0, 255)]
    #: E-mail address, in any form; may be empty.
    email: Annotated[str, text(0, 320)]


@final
@validated
@attrs.frozen(kw_only=True, repr=False)
class Payment:
    """How an order was paid."""

    #: The provider's reference; usually the order_uid, but any other text is valid too.
    transaction: Annotated[str, text(1, 255)]
    #: Id of the payment request; may be empty.
    request_id: Annotated[str, text(0, 255)]
    #: Currency code of ISO 4217, in capitals.
    currency: Annotated[str, text(3, 3, CURRENCY)]
    #: Payment provider.
    provider: Annotated[str, text(1, 255)]
    #: Total paid, in minor units of the currency.
    amount: Annotated[int, integer(0)]
    #: Time of the payment, in Unix seconds.
    payment_dt: Annotated[int, integer(0, LAST_UNIX_SECOND)]
    #: Name of the bank; may be empty.
    bank: Annotated[str, text(0, 255)]
    #: Part of the amount that pays for delivery, in minor units.
    delivery_cost: Annotated[int, integer(0)]
    #: Part of the amount that pays for goods, in minor units.
    goods_total: Annotated[int, integer(0)]
    #: Part of the amount that pays for customs, in minor units.
    custom_fee: Annotated[int, integer(0)]


@final
@validated
@attrs.frozen(kw_only=True, repr=False)
class Item:
    """One item of an order."""

    #: Stock-keeping number.
    chrt_id: Annotated[int, integer(0)]
    #: Tracking number of the parcel; may be empty.
    track_number: Annotated[str, text(0, 255)]
    #: Price of one piece before the discount, in minor units.
    price: Annotated[int, integer(0)]
    #: The shop's reference for this item.
    rid: Annotated[str, text(1, 255)]
    #: Name of the product; may be empty.
    name: Annotated[str, text(0, 1024)]
    #: Discount in percent.
    sale: Annotated[int, integer(0, 100)]
    #: Size, in any form; may be empty.
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
    # Datetimes of two zones are unequal if either is in an hour that its clocks repeat (PEP 495).
    return time.astimezone(dt.UTC)


def _to_tuple(items: Iterable[Item]) -> tuple[Item, ...]:
    if not isinstance(items, Iterable):
        return items  # type: ignore[unreachable]  # a wrong type, which the validation reports
    return tuple(items)


@final
@validated
@attrs.frozen(kw_only=True, repr=False)
class Order:
    """An order, as a shop publishes it. orderlib reads it back with every known field equal.

    Two orders are equal if their content is: times compare as instants, with any offsets.
    """

    #: Id of the order: the key in Kafka, in the tables and in URLs.
    order_uid: Annotated[str, text(1, 128, ORDER_UID)]
    #: Tracking number of the order.
    track_number: Annotated[str, text(1, 255)]
    #: Channel through which the order reached the shop.
    entry: Annotated[str, text(1, 255)]
    #: Language tag of the customer.
    locale: Annotated[str, text(1, 35)]
    #: The shop's own signature; may be empty.
    internal_signature: Annotated[str, text(0, 4096)]
    #: The shop's id of the customer.
    customer_id: Annotated[str, text(1, 255)]
    #: Name of the carrier.
    delivery_service: Annotated[str, text(1, 255)]
    #: The shop's shard key; may be empty.
    shardkey: Annotated[str, text(0, 255)]
    #: The shop's service number.
    sm_id: Annotated[int, integer(0)]
    #: When the order was created; always with an offset, to the microsecond.
    date_created: Annotated[dt.datetime, msgspec.Meta(tz=True)] = attrs.field(eq=_instant)
    #: The shop's second shard key (out-of-family); may be empty.
    oof_shard: Annotated[str, text(0, 255)]
    #: Address and recipient.
    delivery: Delivery
    #: Payment.
    payment: Payment
    #: Items, in the sequence that the shop gave them.
    items: Annotated[tuple[Item, ...], msgspec.Meta(min_length=1, max_length=MAX_ITEMS)] = attrs.field(
        converter=_to_tuple
    )

    def __repr__(self) -> str:
        """Return the order_uid and the number of items, without personal data."""
        return f"Order(order_uid={self.order_uid!r}, items={len(self.items)})"
