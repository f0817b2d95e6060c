"""Checks of arguments, the same for every repository. No message shows a value."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")

#: The most orders on a page.
MAX_PAGE_SIZE = 100


def checked_type(name: str, value: object, kind: type[T]) -> T:
    """Return an argument, or raise TypeError naming it."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, not {type(value).__name__}")
    return value


def checked_uids(order_uids: Iterable[str]) -> list[str]:
    """Return the order_uids, or raise TypeError. A text is an iterable of texts too, but its letters are not meant."""
    if isinstance(order_uids, str) or not isinstance(order_uids, Iterable):
        raise TypeError(f"get_many takes several order_uids, not one {type(order_uids).__name__}; see get")
    return [checked_type("an order_uid", uid, str) for uid in order_uids]


def checked_limit(limit: int) -> int:
    """Return the limit, or raise TypeError or ValueError."""
    if type(limit) is not int:
        raise TypeError(f"limit must be an int, not {type(limit).__name__}")
    if not 1 <= limit <= MAX_PAGE_SIZE:
        raise ValueError(f"limit must be from 1 to {MAX_PAGE_SIZE}, not {limit}")
    return limit


def checked_filters(customer_id: str | None = None, track_number: str | None = None) -> tuple[str | None, str | None]:
    """Return both filters, or raise TypeError naming the one that is not a text."""
    for name, value in (("customer_id", customer_id), ("track_number", track_number)):
        if value is not None:
            checked_type(name, value, str)
    return customer_id, track_number
