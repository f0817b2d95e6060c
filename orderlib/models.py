"""The models of an order, with their rules.

The classes are frozen, keyword-only attrs classes. Their ``Annotated`` types are the contract; ``orderlib.contract``
reads it. Creating an instance validates it: ``Item(sale=101, …)`` raises ``InvalidOrder`` with the path ``$.sale``.
Money is in minor units of the payment's currency, never a float. Times have an offset. Lengths count code points.

JSON Schema, OpenAPI and the reference take the description of each field from the ``Attributes`` section of its class.

Every field is required, except those with a default. A field that is added later has one, and is declared last in its
class. Canonical JSON omits a field that equals its default, so it stays the same for every order without the field.

The classes are final. Their reprs show no personal data; ``orderlib.order_to_plain`` shows every field.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from typing import Annotated, final

import attrs
import msgspec

from orderlib.contract import CURRENCY_FORM, INTEGER_MAX, ORDER_UID_FORM, integer, plain_time, text, validated

#: Unix time of 9999-12-31T23:59:59Z, the last second of a year with four digits.
LAST_UNIX_SECOND = 253402300799

MAX_ITEMS = 1000


@final
@validated
@attrs.frozen(kw_only=True, repr=False)
class Delivery:
    """The address and the recipient of an order. Every field is personal data.

    Attributes:
        name: Name of the recipient, in any form.
        phone: Phone number, in any form.
        zip: Postal code; empty where the country has none.
        city: Town.
        address: Street, house, flat.
        region: Region; may be empty.
        email: E-mail address, in any form; may be empty.
    """

    name: Annotated[str, text(1, 255)]
    phone: Annotated[str, text(1, 64)]
    zip: Annotated[str, text(0, 32)]
    city: Annotated[str, text(1, 255)]
    address: Annotated[str, text(1, 1024)]
    region: Annotated[str, text(0, 255)]
    email: Annotated[str, text(0, 320)]


@final
@validated
@attrs.frozen(kw_only=True, repr=False)
class Payment:
    """How an order was paid.

    Attributes:
        transaction: The provider's reference; usually the order_uid, but any other text is valid too.
        request_id: Id of the payment request; may be empty.
        currency: Currency code of ISO 4217, in capitals.
        provider: Payment provider.
        amount: Total paid, in minor units of the currency.
        payment_dt: Time of the payment, in Unix seconds.
        bank: Name of the bank; may be empty.
        delivery_cost: Part of the amount that pays for delivery, in minor units.
        goods_total: Part of the amount that pays for goods, in minor units.
        custom_fee: Part of the amount that pays for customs, in minor units.
    """

    transaction: Annotated[str, text(1, 255)]
    request_id: Annotated[str, text(0, 255)]
    currency: Annotated[str, text(3, 3, CURRENCY_FORM)]
    provider: Annotated[str, text(1, 255)]
    amount: Annotated[int, integer(0)]
    payment_dt: Annotated[int, integer(0, LAST_UNIX_SECOND)]
    bank: Annotated[str, text(0, 255)]
    delivery_cost: Annotated[int, integer(0)]
    goods_total: Annotated[int, integer(0)]
    custom_fee: Annotated[int, integer(0)]


@final
@validated
@attrs.frozen(kw_only=True, repr=False)
class Item:
    """One item of an order.

    Attributes:
        chrt_id: Stock-keeping number.
        track_number: Tracking number of the parcel; may be empty.
        price: Price of one piece before the discount, in minor units.
        rid: The shop's reference for this item.
        name: Name of the product; may be empty.
        sale: Discount in percent.
        size: Size, in any form; may be empty.
        total_price: Price after the discount, in minor units.
        nm_id: Catalogue number.
        brand: Brand; may be empty.
        status: The shop's status code.
    """

    chrt_id: Annotated[int, integer(0)]
    track_number: Annotated[str, text(0, 255)]
    price: Annotated[int, integer(0)]
    rid: Annotated[str, text(1, 255)]
    name: Annotated[str, text(0, 1024)]
    sale: Annotated[int, integer(0, 100)]
    size: Annotated[str, text(0, 64)]
    total_price: Annotated[int, integer(0)]
    nm_id: Annotated[int, integer(0)]
    brand: Annotated[str, text(0, 255)]
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

    Attributes:
        order_uid: Id of the order: the key in Kafka, in the tables and in URLs.
        track_number: Tracking number of the order.
        entry: Channel through which the order reached the shop.
        locale: Language tag of the customer.
        internal_signature: The shop's own signature; may be empty.
        customer_id: The shop's id of the customer.
        delivery_service: Name of the carrier.
        shardkey: The shop's shard key; may be empty.
        sm_id: The shop's service number.
        date_created: When the order was created; always with an offset, to the microsecond.
        oof_shard: The shop's second shard key (out-of-family); may be empty.
        delivery: Address and recipient.
        payment: Payment.
        items: Items, in the sequence that the shop gave them.
    """

    order_uid: Annotated[str, text(1, 128, ORDER_UID_FORM)]
    track_number: Annotated[str, text(1, 255)]
    entry: Annotated[str, text(1, 255)]
    locale: Annotated[str, text(1, 35)]
    internal_signature: Annotated[str, text(0, 4096)]
    customer_id: Annotated[str, text(1, 255)]
    delivery_service: Annotated[str, text(1, 255)]
    shardkey: Annotated[str, text(0, 255)]
    sm_id: Annotated[int, integer(0)]
    date_created: Annotated[dt.datetime, msgspec.Meta(tz=True)] = attrs.field(eq=_instant, converter=plain_time)
    oof_shard: Annotated[str, text(0, 255)]
    delivery: Delivery
    payment: Payment
    items: Annotated[tuple[Item, ...], msgspec.Meta(min_length=1, max_length=MAX_ITEMS)] = attrs.field(
        converter=_to_tuple
    )

    def __repr__(self) -> str:
        """Return the order_uid and the number of items, without personal data."""
        return f"Order(order_uid={self.order_uid!r}, items={len(self.items)})"
