"""What the repositories in memory store, and their calls."""

from __future__ import annotations

import datetime as dt
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Unpack

import attrs

from orderlib.contract import datetime_class
from orderlib.errors import REJECT_CODES, OrderNotFound
from orderlib.ingestion.records import PreparedOrder, StoredVersion, plan_writes, prepare_order
from orderlib.models import Order
from orderlib.repository import (
    COUNT_LIMIT,
    STORED_RECENTLY,
    Cursor,
    Direction,
    Filters,
    ListOptions,
    ListQuery,
    Match,
    Outcome,
    Page,
    PositionState,
    RecordState,
    Stats,
    StoredOrder,
    check_limit,
    filter_query,
    fitting_orders,
    in_utc,
    is_position,
    require_orders,
    require_type,
    require_uids,
)
from orderlib.search import SearchField, SearchText, lower_ascii, phone_digits


class MemoryStore:
    """The orders of a repository in memory, with its calls, none of which fails. Threads may share it."""

    def __init__(self, clock: Callable[[], dt.datetime]) -> None:
        self._clock = clock
        # Reentrant: a destructor or a signal handler may use the repository inside one of its methods.
        self._lock = threading.RLock()
        self._stored: dict[str, StoredOrder] = {}
        self._versions: dict[str, StoredVersion] = {}
        self._originals: dict[str, bytes | None] = {}
        self._forgotten: set[str] = set()
        self._position_states: dict[tuple[str, int, int], PositionState] = {}

    def _now(self) -> dt.datetime:
        """Return the time of the clock in UTC. Raise ValueError for one without an offset."""
        now = require_type("the clock's time", in_utc(self._clock()), datetime_class())
        if now.utcoffset() is None:
            raise ValueError("the clock's time must have an offset")
        return now

    def get(self, order_uid: str) -> Order:
        """See ``OrderRepository.get``."""
        return self.get_stored(order_uid).order

    def get_stored(self, order_uid: str) -> StoredOrder:
        """See ``OrderRepository.get_stored``."""
        with self._lock:
            stored = self._stored.get(require_type("order_uid", order_uid, str))
        if stored is None:
            raise OrderNotFound(order_uid)
        return stored

    def get_many(self, order_uids: Iterable[str]) -> dict[str, Order]:
        """See ``OrderRepository.get_many``."""
        wanted = require_uids(order_uids)
        with self._lock:
            found = [stored.order for uid in wanted if (stored := self._stored.get(uid)) is not None]
        return {order.order_uid: order for order in found}

    def content_sha256(self, order_uid: str) -> bytes:
        """See ``OrderRepository.content_sha256``."""
        return self.get_stored(order_uid).content_sha256

    def original(self, order_uid: str) -> bytes | None:
        """See ``OrderRepository.original``."""
        with self._lock:
            if require_type("order_uid", order_uid, str) not in self._stored:
                raise OrderNotFound(order_uid)
            return self._originals.get(order_uid)

    def list_orders(self, **options: Unpack[ListOptions]) -> Page:
        """See ``OrderRepository.list_orders``."""
        query = ListQuery(**options)
        is_older = query.direction is Direction.OLDER
        with self._lock:
            listed = sorted(self._stored.values(), key=lambda stored: _sort_key(stored.cursor), reverse=is_older)
        matching = [stored for stored in listed if _matches(stored, query)]
        page = matching[: query.limit]
        page = page[: fitting_orders(len(stored.order.items) for stored in page)]
        next_cursor = page[-1].cursor if len(matching) > len(page) else None
        return Page(orders=tuple(page if is_older else page[::-1]), next_cursor=next_cursor)

    def count(self, **filters: Unpack[Filters]) -> int:
        """See ``OrderRepository.count``."""
        return min(sum(1 for _ in self.stream(**filters)), COUNT_LIMIT)

    def find(self, text: str, limit: int) -> tuple[Match, ...]:
        """See ``OrderRepository.find``."""
        check_limit(limit)
        search = SearchText.parse(require_type("text", text, str))
        with self._lock:
            listed = sorted(self._stored.values(), key=lambda stored: _sort_key(stored.cursor), reverse=True)
        found = [(stored, fields) for stored in listed if search and (fields := _matching_fields(stored.order, search))]
        if search and search.order_uid and not found:
            prefix = search.order_uid
            listed.sort(key=lambda stored: (stored.order.order_uid.lower(), stored.order.order_uid))
            begin = [stored for stored in listed if stored.order.order_uid.lower().startswith(prefix)]
            found = [(stored, (SearchField.ORDER_UID_PREFIX,)) for stored in begin]
        return tuple(Match(order=stored.summary, fields=fields) for stored, fields in found[:limit])

    def stream(self, **filters: Unpack[Filters]) -> Generator[StoredOrder, None, None]:
        """See ``OrderRepository.stream``."""
        # Not a generator itself, so that it refuses a wrong filter before the iteration.
        return self._stream(filter_query(**filters))

    def _stream(self, query: ListQuery) -> Generator[StoredOrder, None, None]:
        with self._lock:
            listed = sorted(self._stored.values(), key=lambda stored: _sort_key(stored.cursor), reverse=True)
        yield from (stored for stored in listed if _matches(stored, query))

    def position_state(self, topic: str, partition: int, offset: int) -> PositionState:
        """See ``MemoryOrderRepository.position_state``."""
        if not is_position(topic, partition, offset):
            return PositionState(state=RecordState.UNKNOWN)
        with self._lock:
            return self._position_states.get((topic, partition, offset), PositionState(state=RecordState.UNKNOWN))

    def set_position_state(self, topic: str, partition: int, offset: int, state: PositionState) -> None:
        """See ``MemoryOrderRepository.set_position_state``."""
        with self._lock:
            self._position_states[topic, partition, offset] = state

    def check(self) -> float | None:
        """See ``OrderRepository.check``."""
        return None

    def stats(self) -> Stats:
        """See ``OrderRepository.stats``."""
        now = self._now()
        with self._lock:
            stored_at = [stored.first_stored_at for stored in self._stored.values()]
        recent = sum(moment > now - STORED_RECENTLY for moment in stored_at)
        return Stats(
            asked_at=now,
            newest_first_stored_at=max(stored_at, default=None),
            stored_recently=min(recent, COUNT_LIMIT),
            rejects_by_code=dict.fromkeys(REJECT_CODES, 0),
            replication_delay_s=None,
        )

    def forget(self, order_uid: str) -> None:
        """See ``MemoryOrderRepository.forget``."""
        with self._lock:
            self._forgotten.add(order_uid)
            for orders in (self._stored, self._versions, self._originals):
                orders.pop(order_uid, None)

    def save(self, order: Order, *, original: bytes | None = None) -> Outcome:
        """See ``OrderRepository.save``."""
        [outcome] = self._save([order], [prepare_order(order, original)])
        return outcome

    def save_many(self, orders: Iterable[Order]) -> Counter[Outcome]:
        """See ``OrderRepository.save_many``."""
        orders = list(require_orders(orders))
        return self._save(orders, [PreparedOrder.of(order) for order in orders])

    def _save(self, orders: Iterable[Order], prepared_orders: Sequence[PreparedOrder]) -> Counter[Outcome]:
        contents = {
            # In UTC, as PostgreSQL returns it.
            prepared_order.content_sha256: attrs.evolve(order, date_created=in_utc(order.date_created))
            for prepared_order, order in zip(prepared_orders, orders, strict=True)
        }
        now = self._now()
        with self._lock:
            plan = plan_writes(prepared_orders, self._versions, self._forgotten)
            for write, number, first_stored in zip(plan.writes, plan.version_numbers, plan.first_stored, strict=True):
                assert isinstance(write, PreparedOrder)
                uid, first_stored_at = write.order_uid, first_stored or now
                self._stored[uid] = StoredOrder(
                    order=contents[write.content_sha256],
                    first_stored_at=first_stored_at,
                    stored_at=max(now, first_stored_at),
                    content_sha256=write.content_sha256,
                    version=number,
                    position=None,
                    has_original=write.original is not None,
                )
                self._originals[uid] = write.original
                self._versions[uid] = StoredVersion(
                    content_sha256=write.content_sha256,
                    position=None,
                    first_stored_at=first_stored_at,
                    version_number=number,
                )
        return Counter(plan.outcomes)


def _matches(stored: StoredOrder, query: ListQuery) -> bool:
    if query.cursor is not None:
        key, start = _sort_key(stored.cursor), _sort_key(query.cursor)
        if not (key < start if query.direction is Direction.OLDER else key > start):
            return False
    return (
        query.customer_id in {None, stored.order.customer_id}
        and query.track_number in {None, stored.order.track_number}
        and query.phone in {None, phone_digits(stored.order.delivery.phone)}
        and query.email in {None, lower_ascii(stored.order.delivery.email)}
        and (query.since is None or query.since <= stored.first_stored_at)
        and (query.until is None or query.until > stored.first_stored_at)
    )


def _matching_fields(order: Order, search: SearchText) -> tuple[SearchField, ...]:
    """Return the fields that match a search completely."""
    matches = {
        SearchField.ORDER_UID: order.order_uid.lower() == search.order_uid,
        SearchField.TRACK_NUMBER: order.track_number == search.text,
        SearchField.CUSTOMER_ID: order.customer_id == search.text,
        SearchField.PHONE: phone_digits(order.delivery.phone) == search.phone,
        SearchField.EMAIL: lower_ascii(order.delivery.email) == search.email,
        SearchField.RID: any(item.rid == search.text for item in order.items),
    }
    return tuple(field for field, is_match in matches.items() if is_match)


def _sort_key(cursor: Cursor) -> tuple[dt.datetime, str]:
    return cursor.first_stored_at, cursor.order_uid
