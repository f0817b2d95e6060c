"""What every store of orders promises, on PostgreSQL and in memory."""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import enum
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Protocol, TypedDict, Unpack

import attrs

from orderlib.arguments import checked_type
from orderlib.contract import fits_postgres
from orderlib.errors import Fault, InvalidOrder
from orderlib.models import Order

#: Orders on a page of ``newest`` unless told otherwise.
PAGE_SIZE = 20

#: A page ends early rather than hold so many items: nobody else should have to wait for it.
MAX_PAGE_ITEMS = 5_000

#: ``status`` counts no further: a larger number would cost time and tell nobody more.
COUNTED_AT_MOST = 10_000


class Outcome(enum.StrEnum):
    """What became of an order or a record: exactly one of these."""

    #: It became the current version.
    STORED = "stored"
    #: Its content was the current version already.
    DUPLICATE = "duplicate"
    #: A later one of the same order_uid won.
    SUPERSEDED = "superseded"
    #: It was refused, and kept as a reject.
    REJECTED = "rejected"


@attrs.frozen(kw_only=True)
class Cursor:
    """A place in the list of orders, newest first: just after this order.

    ``str`` gives it as URL-safe text for a caller to hand back; ``parse`` reads that. Raises TypeError for values of
    other types, and ValueError for a time without an offset or a text that no order_uid can be.
    """

    #: When the order was stored for the first time; UTC.
    first_stored_at: dt.datetime
    #: Breaks ties.
    order_uid: str

    def __attrs_post_init__(self) -> None:
        if checked_type("first_stored_at", self.first_stored_at, dt.datetime).utcoffset() is None:
            raise ValueError("first_stored_at must have an offset")
        if not fits_postgres(checked_type("order_uid", self.order_uid, str)):
            raise ValueError("order_uid must not contain NUL or lone surrogates")

    def __str__(self) -> str:
        plain = f"{self.first_stored_at.astimezone(dt.UTC).isoformat()} {self.order_uid}"
        return base64.urlsafe_b64encode(plain.encode()).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """The cursor that ``str`` gave. Raises InvalidOrder, path ``cursor``, for anything else."""
        checked_type("text", text, str)
        try:
            plain = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode()
            moment, _, order_uid = plain.partition(" ")
            cursor = cls(first_stored_at=dt.datetime.fromisoformat(moment), order_uid=order_uid)
            if str(cursor) == text:
                return cursor
        except (ValueError, OverflowError, binascii.Error):
            pass
        raise InvalidOrder([Fault(path="cursor", expected="a next_cursor as it was given", found="another text")])


@attrs.frozen(kw_only=True)
class StoredOrder:
    """An order with what the store knows about it."""

    #: Its current version.
    order: Order
    #: When an order of this order_uid was stored for the first time; UTC. Updates never move it.
    first_stored_at: dt.datetime
    #: When the current version was stored; UTC.
    stored_at: dt.datetime

    @property
    def cursor(self) -> Cursor:
        """Its place in the list."""
        return Cursor(first_stored_at=self.first_stored_at, order_uid=self.order.order_uid)


@attrs.frozen(kw_only=True)
class Page:
    """Some orders, newest first."""

    #: At most as many as were asked for.
    orders: tuple[StoredOrder, ...]
    #: Where the next page begins; ``None`` on the last page.
    next_cursor: Cursor | None


@attrs.frozen(kw_only=True)
class Status:
    """How the store is doing. No count goes past ``COUNTED_AT_MOST``."""

    #: The store's own time when it was asked; UTC.
    asked_at: dt.datetime
    #: ``first_stored_at`` of the newest order; ``None`` without orders.
    newest_first_stored_at: dt.datetime | None
    #: How many orders were first stored in the last five minutes.
    stored_lately: int
    #: How many rejects are kept, for every code.
    rejects_by_code: Mapping[str, int]
    #: How many seconds the store is behind its primary at most; ``None`` if it is a primary. 0 means that a standby has
    #: replayed everything that it received over streaming replication. Otherwise it is the age of the last replayed
    #: transaction: also while the standby has no connection to the primary, or gets its WAL from an archive. That age
    #: grows while the primary writes nothing.
    replication_delay_s: float | None


class OrderRepository(Protocol):
    """A store of whole orders.

    Every call is one transaction, or for reads one consistent look. Any may raise StoreUnreachable (an outage: calling
    again is safe, saving included) or BrokenSetup. An argument of another type than the one declared raises TypeError,
    which names the argument and never shows its value. A subclass of ``str`` is accepted, ``bool`` is not an ``int``.
    """

    def get(self, order_uid: str) -> Order:
        """The current version of an order, exactly as it was saved. Raises OrderNotFound."""
        ...

    def get_many(self, order_uids: Iterable[str]) -> dict[str, Order]:
        """The orders among these that exist, by order_uid, all as of one moment; as few queries as for one.

        Raises TypeError for one text instead of several.
        """
        ...

    def content_sha256(self, order_uid: str) -> bytes:
        """The 32 bytes of ``orderlib.content_sha256`` for the current version, without reading it.

        Raises OrderNotFound.
        """
        ...

    def newest(
        self,
        *,
        limit: int = PAGE_SIZE,
        after: Cursor | None = None,
        customer_id: str | None = None,
        track_number: str | None = None,
    ) -> Page:
        """At most ``limit`` orders by ``first_stored_at``, newest first; the filters are exact and both hold.

        A page of very large orders ends early, before 5,000 items, and has a ``next_cursor`` then.

        ``after`` is the ``next_cursor`` of the page before. Updates never move an order, so following it shows each
        order once. Raises ValueError for a limit outside 1 to 100.
        """
        ...

    def newer_than(
        self,
        before: Cursor,
        *,
        limit: int = PAGE_SIZE,
        customer_id: str | None = None,
        track_number: str | None = None,
    ) -> Page:
        """The page of ``newest`` that ends just before this place: the way back. Its ``next_cursor`` leads on again.

        Raises ValueError for a limit outside 1 to 100.
        """
        ...

    def status(self) -> Status:
        """How the store is doing."""
        ...

    def save(self, order: Order) -> Outcome:
        """Store an order, in one transaction: STORED or DUPLICATE; as ``save_many`` with one.

        Raises what that raises.
        """
        ...

    def save_many(self, orders: Iterable[Order]) -> Counter[Outcome]:
        """Store the orders with their items, all or nothing, in one transaction; how many came to which outcome.

        Content that is stored already counts as DUPLICATE and changes no field; other content replaces the stored order
        whole. Of several with the same order_uid the last wins and the others count as SUPERSEDED or DUPLICATE.
        Raises RefusedByDatabase naming the order at fault; nothing is stored then.
        Raises StoreUnreachable if the outcome is unknown, or Collision if other writers were in the way again and
        again; calling again is safe.
        """
        ...


class Filters(TypedDict, total=False):
    """Which orders a list shows: those with exactly these values. Without a value, or with ``None``, all match."""

    customer_id: str | None
    track_number: str | None


class AsyncOrderReader(Protocol):
    """The reads of ``OrderRepository`` for asyncio: the same results, the same errors, each within a bounded time.

    A store that does not answer in time raises StoreUnreachable.
    """

    async def get(self, order_uid: str) -> Order:
        """See ``OrderRepository.get``."""
        ...

    async def get_many(self, order_uids: Iterable[str]) -> dict[str, Order]:
        """See ``OrderRepository.get_many``."""
        ...

    async def content_sha256(self, order_uid: str) -> bytes:
        """See ``OrderRepository.content_sha256``."""
        ...

    async def newest(self, *, limit: int = PAGE_SIZE, after: Cursor | None = None, **filters: Unpack[Filters]) -> Page:
        """See ``OrderRepository.newest``."""
        ...

    async def newer_than(self, before: Cursor, *, limit: int = PAGE_SIZE, **filters: Unpack[Filters]) -> Page:
        """See ``OrderRepository.newer_than``."""
        ...

    async def status(self) -> Status:
        """See ``OrderRepository.status``."""
        ...

    async def check(self) -> float | None:
        """Return ``Status.replication_delay_s`` if the store answers and is fit to be read.

        Raises StoreUnreachable or BrokenSetup.
        """
        ...
