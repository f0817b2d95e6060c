"""Orders in memory, held to the same contract suite as PostgreSQL."""

from __future__ import annotations

import datetime as dt
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Unpack

from orderlib.arguments import checked_filters, checked_limit, checked_type, checked_uids
from orderlib.errors import OrderNotFound, Refused
from orderlib.ingest import Arrival, StoredVersion, settle
from orderlib.models import Order
from orderlib.repository import COUNTED_AT_MOST, PAGE_SIZE, Cursor, Filters, Outcome, Page, Status, StoredOrder

#: What ``status`` means by lately.
STORED_LATELY = dt.timedelta(minutes=5)


def _utc_now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class MemoryOrderRepository:
    """Keeps the promises of ``OrderRepository`` in memory, and is never unreachable. Threads may share it.

    ``clock`` says when an order is stored: an aware time, asked once for each ``save`` or ``save_many``.
    """

    def __init__(self, clock: Callable[[], dt.datetime] = _utc_now) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._stored: dict[str, StoredOrder] = {}
        self._versions: dict[str, StoredVersion] = {}

    def get(self, order_uid: str) -> Order:
        """See ``OrderRepository.get``."""
        with self._lock:
            stored = self._stored.get(checked_type("order_uid", order_uid, str))
        if stored is None:
            raise OrderNotFound(order_uid)
        return stored.order

    def get_many(self, order_uids: Iterable[str]) -> dict[str, Order]:
        """See ``OrderRepository.get_many``."""
        wanted = checked_uids(order_uids)
        with self._lock:
            return {uid: self._stored[uid].order for uid in wanted if uid in self._stored}

    def content_sha256(self, order_uid: str) -> bytes:
        """See ``OrderRepository.content_sha256``."""
        with self._lock:
            version = self._versions.get(checked_type("order_uid", order_uid, str))
        if version is None:
            raise OrderNotFound(order_uid)
        return version.content_sha256

    def newest(self, *, limit: int = PAGE_SIZE, after: Cursor | None = None, **filters: Unpack[Filters]) -> Page:
        """See ``OrderRepository.newest``."""
        checked_limit(limit)
        shown = self._matching(**filters)
        if after is not None:
            place = _place(checked_type("after", after, Cursor))
            shown = [stored for stored in shown if _place(stored.cursor) < place]
        page = shown[:limit]
        return Page(orders=tuple(page), next_cursor=page[-1].cursor if len(shown) > limit else None)

    def newer_than(self, before: Cursor, *, limit: int = PAGE_SIZE, **filters: Unpack[Filters]) -> Page:
        """See ``OrderRepository.newer_than``."""
        place = _place(checked_type("before", before, Cursor))
        newer = [stored for stored in self._matching(**filters) if _place(stored.cursor) > place]
        page = newer[-checked_limit(limit) :]
        return Page(orders=tuple(page), next_cursor=page[-1].cursor if page else None)

    def status(self) -> Status:
        """See ``OrderRepository.status``."""
        now = self._clock()
        with self._lock:
            stored_at = [stored.first_stored_at for stored in self._stored.values()]
        lately = sum(moment > now - STORED_LATELY for moment in stored_at)
        return Status(
            asked_at=now,
            newest_first_stored_at=max(stored_at, default=None),
            stored_lately=min(lately, COUNTED_AT_MOST),
            rejects_by_code={refusal.code: 0 for refusal in Refused.__subclasses__()},
            replication_delay_s=None,
        )

    def save(self, order: Order) -> Outcome:
        """See ``OrderRepository.save``."""
        [outcome] = self.save_many([order])
        return outcome

    def save_many(self, orders: Iterable[Order]) -> Counter[Outcome]:
        """See ``OrderRepository.save_many``."""
        orders = list(orders)
        arrivals = [Arrival.of(order) for order in orders]
        contents = {arrival.content_sha256: order for arrival, order in zip(arrivals, orders, strict=True)}
        now = self._clock()
        with self._lock:
            settlement = settle(arrivals, self._versions)
            for arrival in settlement.writes:
                uid = arrival.order_uid
                replaced = self._stored.get(uid)
                first_stored_at = replaced.first_stored_at if replaced else now
                order = contents[arrival.content_sha256]
                self._stored[uid] = StoredOrder(order=order, first_stored_at=first_stored_at, stored_at=now)
                self._versions[uid] = StoredVersion(
                    content_sha256=arrival.content_sha256, source=None, first_stored_at=first_stored_at
                )
        return Counter(settlement.outcomes)

    def _matching(self, **filters: Unpack[Filters]) -> list[StoredOrder]:
        """Return the orders that match the filters, newest first."""
        customer_id, track_number = checked_filters(**filters)
        with self._lock:
            everything = sorted(self._stored.values(), key=lambda stored: _place(stored.cursor), reverse=True)
        return [
            stored
            for stored in everything
            if customer_id in {None, stored.order.customer_id} and track_number in {None, stored.order.track_number}
        ]


def _place(cursor: Cursor) -> tuple[dt.datetime, str]:
    return cursor.first_stored_at, cursor.order_uid
