"""The interface of every repository: Protocols, and the values that they take and return."""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import enum
import itertools
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping
from typing import Any, Protocol, TypedDict, TypeVar, Unpack

import attrs

from orderlib.contract import BIGINT_MAX, INTEGER_MAX, datetime_class, fits_postgres, plain_time, within_utc_years
from orderlib.errors import Fault, InvalidQuery
from orderlib.models import Order
from orderlib.search import SearchField, lower_ascii, phone_digits

T = TypeVar("T")

#: The largest number of a partition, and the largest offset.
MAX_PARTITION = INTEGER_MAX
MAX_OFFSET = BIGINT_MAX

#: Orders on a page of ``list_orders``: the default and the largest limit.
PAGE_SIZE = 20
MAX_PAGE_SIZE = 100

#: A page ends early, before it has this number of items: one large page must not delay other readers.
MAX_PAGE_ITEMS = 5_000

#: ``stats`` and ``count`` stop to count here: an exact larger number is not worth its time.
COUNT_LIMIT = 10_000

#: How many orders ``stream`` reads at once.
STREAM_SIZE = 500

#: ``wait_until_handled`` queries again after this pause, which then doubles up to the longest one.
_FIRST_PAUSE_S = 0.005
_LONGEST_PAUSE_S = 0.1
#: How long its last query may take, after the timeout.
_LAST_QUERY_S = 0.5

#: The period of ``Stats.stored_recently``.
STORED_RECENTLY = dt.timedelta(minutes=5)


class Outcome(enum.StrEnum):
    """The outcome of an order or a record: exactly one of these."""

    #: It became the current version.
    STORED = "stored"
    #: Its content was the current version already.
    DUPLICATE = "duplicate"
    #: A later one of the same order_uid won.
    SUPERSEDED = "superseded"
    #: It was rejected, and stored as a reject.
    REJECTED = "rejected"
    #: It was a tombstone that erased its order.
    ERASED = "erased"
    #: Its order_uid was forgotten permanently; nothing of it was stored.
    FORGOTTEN = "forgotten"


class Direction(enum.StrEnum):
    """Which way ``list_orders`` goes from its cursor."""

    #: To orders that were first stored earlier.
    OLDER = "older"
    #: To orders that were first stored later.
    NEWER = "newer"


def in_utc(time: Any) -> Any:
    """Return a time in UTC, because PostgreSQL refuses offsets of 16 hours or more. Validators refuse other values.

    A time whose UTC year is 0 or 10000 becomes the first or the last one that a datetime can be.
    """
    time = plain_time(time)
    if not isinstance(time, datetime_class()) or time.utcoffset() is None:
        return time
    if within_utc_years(time):
        return time.astimezone(dt.UTC)
    limit = datetime_class().min if time.year == 1 else datetime_class().max
    return limit.replace(tzinfo=dt.UTC)


def encode_cursor(plain: str) -> str:
    """Return a text as URL-safe text without padding: what ``str`` of a cursor is."""
    return base64.urlsafe_b64encode(plain.encode()).decode().rstrip("=")


def parse_cursor(text: str, of_plain: Callable[[str], T]) -> T:
    """Return the cursor whose ``str`` is this text. ``of_plain`` makes it from the text that was encoded.

    Raises InvalidQuery for a text that is no cursor, also if ``of_plain`` raises ValueError or OverflowError.
    """
    try:
        cursor = of_plain(base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode())
        if str(cursor) == text:
            return cursor
    except (ValueError, OverflowError, binascii.Error):
        pass
    raise InvalidQuery("cursor: expected a next_cursor as it was returned")


@attrs.frozen(kw_only=True)
class Cursor:
    """A place in the list of orders. It names an order, and the next page begins after that order.

    ``str`` encodes it as URL-safe text, and ``parse`` decodes that text. The constructor raises TypeError for values of
    other types, and ValueError for a time without an offset or a text that cannot be an order_uid.
    """

    #: When the order was stored for the first time; UTC.
    first_stored_at: dt.datetime = attrs.field(converter=in_utc)
    #: Breaks ties.
    order_uid: str

    def __attrs_post_init__(self) -> None:
        if require_type("first_stored_at", self.first_stored_at, datetime_class()).utcoffset() is None:
            raise ValueError("first_stored_at must have an offset")
        if not fits_postgres(require_type("order_uid", self.order_uid, str)):
            raise ValueError("order_uid must not contain NUL or lone surrogates")

    def __str__(self) -> str:
        return encode_cursor(f"{self.first_stored_at.astimezone(dt.UTC).isoformat()} {self.order_uid}")

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Return the cursor that ``str`` encoded. Raises InvalidQuery for any other text."""
        return parse_cursor(require_type("text", text, str), cls._of_plain)

    @classmethod
    def _of_plain(cls, plain: str) -> Cursor:
        moment, _, order_uid = plain.partition(" ")
        return cls(first_stored_at=dt.datetime.fromisoformat(moment), order_uid=order_uid)


@attrs.frozen(kw_only=True)
class RecordPosition:
    """The position of a record in Kafka. Two records with equal positions are the same record."""

    #: The topic id as Kafka's tools print it. A recreated topic has a new one.
    topic_id: str
    #: The partition of the topic, from 0.
    partition: int
    #: The offset in the partition, from 0.
    offset: int

    def is_after(self, other: RecordPosition | None) -> bool:
        """Return whether this is a later record of the same partition."""
        return (
            other is not None
            and (self.topic_id, self.partition) == (other.topic_id, other.partition)
            and self.offset > other.offset
        )


@attrs.frozen(kw_only=True)
class StoredOrder:
    """An order with its times and its digest."""

    #: The current version.
    order: Order
    #: When an order of this order_uid was stored for the first time; UTC. Updates never move it.
    first_stored_at: dt.datetime
    #: When the current version was stored; UTC.
    stored_at: dt.datetime
    #: Identifies the content of the current version: 32 bytes. Without an original it is ``orderlib.content_sha256`` of
    #: the order; with one it covers the unknown fields, too.
    content_sha256: bytes
    #: The number of the current version: 1, 2, …; each change of the content is a new version.
    version: int
    #: The Kafka record that last confirmed the content; ``None`` for an order saved from Python.
    position: RecordPosition | None
    #: Whether it was sent with fields that orderlib does not know; ``original`` returns them.
    has_original: bool = False

    @property
    def cursor(self) -> Cursor:
        """The order's position in the list."""
        return Cursor(first_stored_at=self.first_stored_at, order_uid=self.order.order_uid)

    @property
    def summary(self) -> OrderSummary:
        """The order as a list shows it."""
        return OrderSummary(
            order_uid=self.order.order_uid,
            customer_id=self.order.customer_id,
            track_number=self.order.track_number,
            items=len(self.order.items),
            amount=self.order.payment.amount,
            currency=self.order.payment.currency,
            first_stored_at=self.first_stored_at,
        )


@attrs.frozen(kw_only=True)
class Page:
    """One page of ``list_orders``."""

    #: Newest first in both directions; at most ``limit``.
    orders: tuple[StoredOrder, ...]
    #: Continues in the same direction; ``None`` on the last page.
    next_cursor: Cursor | None


@attrs.frozen(kw_only=True)
class OrderSummary:
    """An order in a list, without its delivery and its items. Its repr shows no personal data."""

    #: The id of the order.
    order_uid: str
    #: The shop's id of the customer.
    customer_id: str = attrs.field(repr=False)
    #: The track number.
    track_number: str = attrs.field(repr=False)
    #: How many items it has.
    items: int
    #: The total paid, in minor units of the currency.
    amount: int
    #: The currency of the amount.
    currency: str
    #: When an order of this order_uid was stored for the first time; UTC.
    first_stored_at: dt.datetime


@attrs.frozen(kw_only=True)
class Match:
    """An order that ``find`` has found, and why."""

    #: The current version.
    order: OrderSummary
    #: The fields that match, at least one.
    fields: tuple[SearchField, ...]


class RecordState(enum.StrEnum):
    """What has happened to a record."""

    #: The consumer has not handled it yet.
    WAITING = "waiting"
    #: It was stored, it erased its order, or it changed nothing: a duplicate, an older version, or a forgotten order.
    HANDLED = "handled"
    #: It was rejected, and is stored as a reject.
    REJECTED = "rejected"
    #: No consumer has read this partition, or the position cannot exist.
    UNKNOWN = "unknown"


@attrs.frozen(kw_only=True)
class PositionState:
    """What has happened to the record at a position. Shows no value of the record."""

    #: Waiting, handled, rejected or unknown.
    state: RecordState
    #: Why it was rejected; ``None`` unless it was.
    code: str | None = None
    #: The first 100 faults.
    faults: tuple[Fault, ...] = ()
    #: How many faults there were.
    total_faults: int = 0


@attrs.frozen(kw_only=True)
class Stats:
    """Statistics of the store. No count is greater than 10,000."""

    #: When the database was asked, by its clock; UTC.
    asked_at: dt.datetime
    #: ``first_stored_at`` of the newest order; ``None`` without orders.
    newest_first_stored_at: dt.datetime | None
    #: How many orders were first stored in the last five minutes.
    stored_recently: int
    #: How many rejects are stored, for every code.
    rejects_by_code: Mapping[str, int]
    #: How many seconds a standby is behind its primary, at most; ``None`` for a primary. 0: it has replayed everything
    #: that it received over streaming replication. Otherwise it is the age of the last replayed transaction. Without
    #: streaming replication, that age also grows while the primary writes nothing.
    replication_delay_s: float | None


class Filters(TypedDict, total=False):
    """Which orders to return: those that match all filters given. ``None`` matches every order."""

    #: Only orders with exactly this customer_id.
    customer_id: str | None
    #: Only orders with exactly this track_number.
    track_number: str | None
    #: Only orders whose phone number has exactly these digits. Other characters are ignored.
    phone: str | None
    #: Only orders with this e-mail address. The case of the letters A to Z does not count.
    email: str | None
    #: Only orders whose ``first_stored_at`` is this time or later. The time needs an offset.
    since: dt.datetime | None
    #: Only orders whose ``first_stored_at`` is before this time. The time needs an offset.
    until: dt.datetime | None


#: The names of the filters.
FILTERS: tuple[str, ...] = tuple(Filters.__annotations__)


class ListOptions(Filters, total=False):
    """The arguments of ``list_orders``: those of ``Filters``, and these. Each may be left out."""

    #: Where to begin: a page's ``next_cursor`` or an order's ``cursor``. ``None``: at the newest order, or at the
    #: oldest one for ``Direction.NEWER``.
    cursor: Cursor | None
    #: Which way to go from there: ``Direction.OLDER`` unless given.
    direction: Direction
    #: How many orders at most, 1 to 100: 20 unless given.
    limit: int


def _direction(direction: Any) -> Any:
    """Return the direction that a text names. Validators refuse other values."""
    return Direction(direction) if isinstance(direction, str) and direction in set(Direction) else direction


def _digits(phone: Any) -> Any:
    return phone_digits(phone) if isinstance(phone, str) else phone


def _lower(email: Any) -> Any:
    return lower_ascii(email) if isinstance(email, str) and fits_postgres(email) else email


@attrs.frozen(kw_only=True)
class ListQuery:
    """The arguments of ``list_orders`` with their defaults, checked: what an implementation reads.

    Raises InvalidQuery for a limit outside its bounds, an unknown direction, a time without an offset or a phone number
    without digits, and TypeError for an argument of another type.
    """

    cursor: Cursor | None = attrs.field(default=None)
    direction: Direction = attrs.field(default=Direction.OLDER, converter=_direction)
    limit: int = attrs.field(default=PAGE_SIZE)
    customer_id: str | None = attrs.field(default=None, repr=False)
    track_number: str | None = attrs.field(default=None, repr=False)
    #: Its digits.
    phone: str | None = attrs.field(default=None, converter=_digits, repr=False)
    #: In small letters.
    email: str | None = attrs.field(default=None, converter=_lower, repr=False)
    since: dt.datetime | None = attrs.field(default=None, converter=in_utc)
    until: dt.datetime | None = attrs.field(default=None, converter=in_utc)

    @cursor.validator
    def _check_cursor(self, _attribute: object, cursor: object) -> None:
        if cursor is not None:
            require_type("cursor", cursor, Cursor)

    @direction.validator
    def _check_direction(self, _attribute: object, direction: object) -> None:
        if isinstance(direction, str) and not isinstance(direction, Direction):
            raise InvalidQuery(f"direction: expected {' or '.join(Direction)}, found another text")
        require_type("direction", direction, Direction)

    @customer_id.validator
    @track_number.validator
    @phone.validator
    @email.validator
    def _check_filter(self, attribute: attrs.Attribute[str | None], value: object) -> None:
        if value is not None:
            require_type(attribute.name, value, str)
        if attribute.name == "phone" and value == "":
            raise InvalidQuery("phone: expected digits, found none")

    @since.validator
    @until.validator
    def _check_time(self, attribute: attrs.Attribute[dt.datetime | None], value: object) -> None:
        if value is None:
            return
        if require_type(attribute.name, value, datetime_class()).utcoffset() is None:
            raise InvalidQuery(f"{attribute.name}: expected a time with an offset, found one without")

    @limit.validator
    def _check_limit(self, _attribute: object, limit: int) -> None:
        check_limit(limit)


def filter_query(**filters: Unpack[Filters]) -> ListQuery:
    """Return the query of a call that takes filters only. Raises TypeError for other arguments of ``list_orders``."""
    for name in filters:
        if name not in FILTERS:
            raise TypeError(f"unexpected keyword argument {name!r}: the filters are {', '.join(FILTERS)}")
    return ListQuery(**filters)


class Polling:
    """When a wait for a record queries its state: after pauses that double, until the timeout."""

    def __init__(self, timeout_s: float) -> None:
        self._deadline_s = time.monotonic() + require_seconds("timeout_s", timeout_s)
        self._pause_s = _FIRST_PAUSE_S

    @property
    def remaining_s(self) -> float:
        """How long it may still wait."""
        return max(0.0, self._deadline_s - time.monotonic())

    @property
    def query_limit_s(self) -> float:
        """How long the next query may take: also the last one needs some time."""
        return max(_LAST_QUERY_S, self.remaining_s)

    def ends_with(self, state: PositionState) -> bool:
        """Return whether this state is the result."""
        return state.state in {RecordState.HANDLED, RecordState.REJECTED} or not self.remaining_s

    def next_pause_s(self, min_s: float = 0.0) -> float:
        """Return how long to wait before the next query: at least ``min_s``, but never beyond the timeout."""
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return min(max(pause_s, min_s), self.remaining_s)


class OrderRepository(Protocol):
    """Stores and returns complete orders.

    Every call is one transaction; a read sees one snapshot. Every call may raise DatabaseUnavailable (an outage: it is
    safe to repeat any call, also a write) or ConfigurationError. An argument of another type than the declared one
    raises TypeError, which names the argument and never its value. A subclass of ``str`` is accepted; ``bool`` is not
    an ``int``.
    """

    def get(self, order_uid: str) -> Order:
        """Return the current version of an order, equal to what was saved. Raises OrderNotFound."""
        ...

    def get_stored(self, order_uid: str) -> StoredOrder:
        """Return the current version of an order with its times and its digest, all read in one transaction.

        Raises OrderNotFound.
        """
        ...

    def get_many(self, order_uids: Iterable[str]) -> dict[str, Order]:
        """Return these orders by order_uid, in the sequence given, without those that do not exist.

        They are read from one snapshot, with as few queries as one order. Raises TypeError for one string in place of
        several.
        """
        ...

    def content_sha256(self, order_uid: str) -> bytes:
        """Return the stored digest of the current version without reading the order (see ``StoredOrder``).

        Raises OrderNotFound.
        """
        ...

    def original(self, order_uid: str) -> bytes | None:
        """Return the JSON text of the current version, byte for byte as it was sent.

        Return ``None`` for an order without unknown fields: no text is kept, because the order is equal to what was
        sent. Raises OrderNotFound.
        """
        ...

    def list_orders(self, **options: Unpack[ListOptions]) -> Page:
        """Return a page of the orders in the sequence of their ``first_stored_at``; ``ListOptions`` has the arguments.

        Updates never move an order, so following ``next_cursor`` shows each order once. Filters are exact, and an order
        must match all of them. A page of very large orders ends early, before 5,000 items, and has a ``next_cursor``.
        Raises InvalidQuery for a limit outside 1 to 100, an unknown direction, a time without an offset and a phone
        number without digits.
        """
        ...

    def count(self, **filters: Unpack[Filters]) -> int:
        """Return how many orders match the filters, at most 10,000. Raises InvalidQuery as ``list_orders`` does."""
        ...

    def find(self, text: str, *, limit: int = PAGE_SIZE) -> tuple[Match, ...]:
        """Return the orders that a text identifies, newest ``first_stored_at`` first, with the fields that match.

        The text is a complete order_uid in any case, the URL of an order's page, a track number, a customer_id, the
        digits of a phone number as in the order, an e-mail address in any case, or the rid of an item. If none of these
        matches, the text is taken as the beginning of an order_uid, and the orders are sorted by order_uid, both in any
        case. If more than 1,000 order_uids begin with it, some may be missing. White space and invisible characters
        around the text do not count, and a text of more than 4,096 characters matches nothing. At most ``limit``
        orders, 1 to 100; to know whether there are more, ask for one more. Raises InvalidQuery for another limit.
        """
        ...

    def stream(self, **filters: Unpack[Filters]) -> Generator[StoredOrder, None, None]:
        """Iterate over all orders that match the filters, newest ``first_stored_at`` first, from one snapshot.

        Needs constant memory for any number of orders. It uses one connection until the iteration ends or ``close`` is
        called on the iterator. Each page is bounded like a call. An outage ends the iteration with DatabaseUnavailable.
        Raises InvalidQuery as ``list_orders`` does, at the call and not in the iteration.
        """
        ...

    def position_state(self, topic: str, partition: int, offset: int) -> PositionState:
        """Return what has happened to a Kafka record, from one snapshot.

        If a topic of this name was deleted and created again, this is the state of the topic that a consumer read last.
        """
        ...

    def wait_until_handled(self, topic: str, partition: int, offset: int, *, timeout_s: float) -> PositionState:
        """Wait until a Kafka record is handled or rejected, and return its state.

        An order that was sent there can be read afterwards, unless it was forgotten, or a later record has replaced or
        erased it. After ``timeout_s`` seconds return the last state: WAITING, or UNKNOWN before a consumer has begun to
        read the partition. An outage that lasts until then raises DatabaseUnavailable, at most half a second later.
        """
        ...

    def stats(self) -> Stats:
        """Return statistics of the store."""
        ...

    def check(self) -> float | None:
        """Check that the store can be read, and return ``Stats.replication_delay_s``.

        Raises DatabaseUnavailable or ConfigurationError if it cannot.
        """
        ...

    def save(self, order: Order, *, original: bytes | None = None) -> Outcome:
        """Store an order in one transaction, and return its outcome. It raises what ``save_many`` raises.

        STORED; DUPLICATE if the content is stored already; FORGOTTEN, with nothing stored, for a forgotten order.

        ``original`` is the JSON text that the order was decoded from. If it has unknown fields, they are part of the
        content, and the text is stored for ``original``. Raises ValueError if it is the text of another order, and what
        ``decode_order`` raises.
        """
        ...

    def save_many(self, orders: Iterable[Order]) -> Counter[Outcome]:
        """Store the orders with their items, all or nothing, in one transaction. Return the count of each outcome.

        Content that is stored already counts as DUPLICATE and changes no field. Other content replaces the complete
        stored order. If several have the same order_uid, the last one wins, and the others count as SUPERSEDED or
        DUPLICATE. A forgotten order counts as FORGOTTEN and is not stored.

        Raises RefusedByDatabase that names the refused order; nothing is stored then.
        Raises DatabaseUnavailable if the outcome is unknown, or TransactionConflict if the transaction conflicted with
        other writers many times; it is safe to repeat the call.
        """
        ...


class AsyncOrderRepository(Protocol):
    """``OrderRepository`` for asyncio, with the same results and errors."""

    async def get(self, order_uid: str) -> Order:
        """See ``OrderRepository.get``."""
        ...

    async def get_stored(self, order_uid: str) -> StoredOrder:
        """See ``OrderRepository.get_stored``."""
        ...

    async def get_many(self, order_uids: Iterable[str]) -> dict[str, Order]:
        """See ``OrderRepository.get_many``."""
        ...

    async def content_sha256(self, order_uid: str) -> bytes:
        """See ``OrderRepository.content_sha256``."""
        ...

    async def original(self, order_uid: str) -> bytes | None:
        """See ``OrderRepository.original``."""
        ...

    async def list_orders(self, **options: Unpack[ListOptions]) -> Page:
        """See ``OrderRepository.list_orders``."""
        ...

    async def count(self, **filters: Unpack[Filters]) -> int:
        """See ``OrderRepository.count``."""
        ...

    async def find(self, text: str, *, limit: int = PAGE_SIZE) -> tuple[Match, ...]:
        """See ``OrderRepository.find``."""
        ...

    def stream(self, **filters: Unpack[Filters]) -> AsyncGenerator[StoredOrder, None]:
        """See ``OrderRepository.stream``. To end it early, await ``aclose`` of the iterator."""
        ...

    async def position_state(self, topic: str, partition: int, offset: int) -> PositionState:
        """See ``OrderRepository.position_state``."""
        ...

    async def wait_until_handled(self, topic: str, partition: int, offset: int, *, timeout_s: float) -> PositionState:
        """See ``OrderRepository.wait_until_handled``."""
        ...

    async def stats(self) -> Stats:
        """See ``OrderRepository.stats``."""
        ...

    async def check(self) -> float | None:
        """See ``OrderRepository.check``."""
        ...

    async def save(self, order: Order, *, original: bytes | None = None) -> Outcome:
        """See ``OrderRepository.save``."""
        ...

    async def save_many(self, orders: Iterable[Order]) -> Counter[Outcome]:
        """See ``OrderRepository.save_many``."""
        ...


def require_type(name: str, value: object, kind: type[T]) -> T:
    """Return an argument, or raise TypeError naming it."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOUaeiou" else "a"
        raise TypeError(f"{name} must be {article} {kind.__name__}, not {type(value).__name__}")
    return value


def require_seconds(name: str, value: float) -> float:
    """Return an argument that is a number of seconds, or raise TypeError naming it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
    # An int may be greater or less than every float.
    return max(-sys.float_info.max, min(value, sys.float_info.max))


def check_limit(limit: int) -> None:
    """Raise InvalidQuery for a limit outside 1 to 100, and TypeError for a value of another type."""
    if type(limit) is not int:
        raise TypeError(f"limit must be an int, not {type(limit).__name__}")
    if not 1 <= limit <= MAX_PAGE_SIZE:
        raise InvalidQuery(f"limit: expected 1 to {MAX_PAGE_SIZE}, found {limit}")


def fitting_orders(items: Iterable[int]) -> int:
    """Return how many of the first orders fit on a page, from the number of items of each."""
    return sum(total < MAX_PAGE_ITEMS for total in itertools.accumulate(items))


def is_position(topic: str, partition: int, offset: int) -> bool:
    """Return whether a record can have this position. Raises TypeError for values of other types."""
    require_type("topic", topic, str)
    for name, value in (("partition", partition), ("offset", offset)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    return fits_postgres(topic) and 0 <= partition <= MAX_PARTITION and 0 <= offset <= MAX_OFFSET


def require_uids(order_uids: Iterable[str]) -> list[str]:
    """Return the order_uids as a list. Raises TypeError for a string: it is an iterable of its characters."""
    if isinstance(order_uids, str) or not isinstance(order_uids, Iterable):
        raise TypeError(
            f"get_many takes several order_uids, not one {type(order_uids).__name__}; use get for one order"
        )
    return [require_type("an order_uid", uid, str) for uid in order_uids]


def require_orders(orders: Iterable[Order]) -> Iterable[Order]:
    """Return the orders, or raise TypeError for a value that is not iterable, such as one order."""
    if not isinstance(orders, Iterable):
        raise TypeError(f"save_many takes several orders, not one {type(orders).__name__}; use save for one order")
    return orders
