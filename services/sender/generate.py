"""Generate realistic orders from a random generator and a clock. The same input gives the same orders."""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import TypeVar

import attrs

from orderlib.codecs import encode_order
from orderlib.contract import unchecked
from orderlib.models import Delivery, Item, Order, Payment
from orderlib.testing import FaultKind, break_order
from services.sender.fake_data import MARKETS, PHONES, PRODUCTS, ZIPS, Market

T = TypeVar("T")

#: Returns the time, with a time zone.
Clock = Callable[[], dt.datetime]

#: The number of customers. Each orders often, always to the same address.
CUSTOMERS = 10_000

_NICKNAMES = ("sunny", "post", "j.doe", "cat-lover", "home", "mail", "the_one", "order", "nobody", "k")
_PROVIDERS = ("wbpay", "stripe", "paypal", "applepay", "invoice")
_ENTRIES = ("WBIL", "WBRU", "WEB", "APP", "MARKT")

#: Values to choose from. A value that is listed more often is more likely.
_ITEM_COUNTS = (1,) * 34 + (2,) * 26 + (3,) * 17 + (4,) * 11 + (5,) * 7 + (6,) * 4 + (0,)
_MANY_ITEMS = range(7, 41)
_DISCOUNTS = (0,) * 10 + (5, 10, 10, 15, 20, 25, 30, 30, 50, 70)
_STATUSES = (202,) * 16 + (200, 201, 204, 404)
_DELIVERY_CENTS = (0, 0, 299, 499, 499, 799, 1500)
_CUSTOM_CENTS = (0,) * 12 + (350, 1200, 4100)


@attrs.frozen(kw_only=True)
class _Customer:
    customer_id: str
    market: Market
    delivery: Delivery


def generate_values(rng: Random, clock: Clock, bad_rate: float) -> Iterator[bytes]:
    """Generate record values without end: orders, and at this rate (0 to 1) invalid ones."""
    kinds = list(FaultKind)
    while True:
        order = generate_order(rng, clock)
        if rng.random() < bad_rate:
            yield break_order(order, rng.choice(kinds), rng).data
        else:
            yield encode_order(order)


def generate_order(rng: Random, clock: Clock) -> Order:
    """Return a valid order with the current time. The sums add up, and its parts are consistent.

    Each item costs ``price * (100 - sale) // 100``, the goods are the sum of the items, and the amount is the sum of
    goods, delivery and customs. One order in ten has a ``payment.transaction`` other than its order_uid. The order is
    not validated here, because that takes three times as long as generating it; a test validates.
    """
    created = clock()
    customer = _customer(rng.randrange(CUSTOMERS))
    market = customer.market
    order_uid = f"{rng.getrandbits(60):015x}test"
    entry = _pick(rng, _ENTRIES)
    track_number = f"{entry}{rng.getrandbits(40):010X}TEST"
    count = _pick(rng, _ITEM_COUNTS) or _pick(rng, _MANY_ITEMS)
    items = [_generate_item(rng, market, track_number) for _ in range(count)]
    goods_total = sum(item.total_price for item in items)
    delivery_cost = int(_pick(rng, _DELIVERY_CENTS) * market.rate)
    custom_fee = int(_pick(rng, _CUSTOM_CENTS) * market.rate)
    provider = _pick(rng, _PROVIDERS)
    return unchecked(
        Order,
        order_uid=order_uid,
        track_number=track_number,
        entry=entry,
        locale=market.locale,
        internal_signature="" if rng.random() < 0.8 else f"{rng.getrandbits(128):032x}",
        customer_id=customer.customer_id,
        delivery_service=_pick(rng, market.carriers),
        shardkey=str(rng.randrange(10)),
        sm_id=rng.randrange(100),
        date_created=created,
        oof_shard=str(rng.randrange(1, 4)),
        delivery=customer.delivery,
        payment=unchecked(
            Payment,
            transaction=order_uid if rng.random() < 0.9 else f"{provider}/{rng.getrandbits(64):016x}",
            request_id="" if rng.random() < 0.7 else f"req-{rng.getrandbits(32):08x}",
            currency=market.currency,
            provider=provider,
            amount=goods_total + delivery_cost + custom_fee,
            payment_dt=int(created.timestamp()) - rng.randrange(1, 120),
            bank=_pick(rng, market.banks),
            delivery_cost=delivery_cost,
            goods_total=goods_total,
            custom_fee=custom_fee,
        ),
        items=tuple(items),
    )


def _generate_item(rng: Random, market: Market, track_number: str) -> Item:
    number = int(rng.random() * len(PRODUCTS))
    product = PRODUCTS[number]
    size = int(rng.random() * len(product.sizes))
    nm_id = 2_389_200 + 37 * number
    price = max(1, round(product.price_cents * market.rate / market.step)) * market.step - market.charm
    sale = _pick(rng, _DISCOUNTS)
    return unchecked(
        Item,
        chrt_id=4 * nm_id + size,
        track_number=track_number,
        price=price,
        rid=f"{rng.getrandbits(64):016x}test",
        name=product.name,
        sale=sale,
        size=product.sizes[size],
        total_price=price * (100 - sale) // 100,
        nm_id=nm_id,
        brand=product.brand,
        status=_pick(rng, _STATUSES),
    )


@functools.cache
def _customer(number: int) -> _Customer:
    """Return the customer with this number, with the same data each time."""
    rng = Random(number)  # noqa: S311 - generated customers, no secret
    market = rng.choice(MARKETS)
    people = rng.choice(market.people)
    town = rng.choice(market.towns)
    street, house, flat = rng.choice(market.streets), rng.randint(1, 140), rng.randint(1, 80)
    return _Customer(
        customer_id=f"customer-{number:05d}",
        market=market,
        delivery=Delivery(
            name=market.name_format.format(first=rng.choice(people.first_names), last=rng.choice(people.surnames)),
            phone=market.phone_format.format(rng.randrange(PHONES)),
            zip=town.zip_format.format(rng.randrange(ZIPS)),
            city=town.name,
            address=market.address_format.format(street=street, number=house, flat=flat),
            region=town.region,
            email=f"{rng.choice(_NICKNAMES)}{number}@example.{rng.choice(('com', 'org', 'net'))}",
        ),
    )


def _pick(rng: Random, choices: Sequence[T]) -> T:
    """Choose like ``rng.choice``, in a third of the time."""
    return choices[int(rng.random() * len(choices))]
