"""A small shop that keeps its orders with orderlib. ``test_shop.py`` tests it without a database."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import orderlib

#: How often the shop tries to store an order.
ATTEMPTS = 3


def place_order(
    repository: orderlib.OrderRepository, order: orderlib.Order, sleep: Callable[[float], None] = time.sleep
) -> str:
    """Store an order, and return what the customer reads."""
    for attempt in range(ATTEMPTS):
        try:
            repository.save(order)
        except orderlib.TransientError:
            # Also if the outcome is unknown: an order that was stored is not stored twice.
            sleep(0.1 * 2**attempt)
        except orderlib.RejectedError:
            return "We cannot take this order."
        else:
            return f"Thank you for order {order.order_uid}."
    return "Please try again later."


def import_orders(repository: orderlib.OrderRepository, lines: Iterable[bytes]) -> list[str]:
    """Store the valid orders of a file, all or none. Return the faults of the others."""
    orders: list[orderlib.Order] = []
    faults: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            orders.append(orderlib.decode_order(line))
        except orderlib.RejectedError as rejected:
            faults += [f"line {number}: {fault}" for fault in rejected.faults]
    repository.save_many(orders)
    return faults


def revenue(repository: orderlib.OrderRepository, customer_id: str) -> int:
    """Return what a customer has paid for all orders, in minor units."""
    return sum(stored.order.payment.amount for stored in repository.stream(customer_id=customer_id))


async def receipt(repository: orderlib.AsyncOrderRepository, order_uid: str) -> str:
    """Return the total of an order as text."""
    try:
        payment = (await repository.get(order_uid)).payment
    except orderlib.OrderNotFound:
        return "unknown order"
    except orderlib.TransientError:
        return "not available"
    return f"{payment.amount / 100:.2f} {payment.currency}"
