"""Classify records as orders or rejects, and plan what to write. No I/O, no clock, no randomness."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import enum
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import attrs

from orderlib.codecs import CanonicalOrder, canonical_form, decode_canonical, decode_order, digest, is_order_uid
from orderlib.errors import MAX_FAULTS, Fault, MalformedJson, RejectedError, TooLarge
from orderlib.models import Order
from orderlib.repository import Outcome, RecordPosition

_FIRST_TIME = dt.datetime(1, 1, 1, tzinfo=dt.UTC)
_LAST_TIME = dt.datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=dt.UTC)


class TopicPartition(NamedTuple):
    """A partition of a topic, by the topic's name."""

    topic: str
    partition: int

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}]"


#: PostgreSQL limits a row and a value to 1 GiB.
_ROW_BYTES = 1_000_000_000

#: Memory of a header in CPython besides its name and value: a tuple and two objects.
HEADER_BYTES = 150

#: Names and values in the record's order, with repeated names.
Headers = tuple[tuple[str, bytes | None], ...]


def _size(part: bytes | Headers | None) -> str:
    """Return what a repr shows of a part that may contain personal data."""
    if part is None:
        return "None"
    return f"<{len(part):,} {'bytes' if isinstance(part, bytes) else 'headers'}>"


@attrs.frozen(kw_only=True)
class Record:
    """One Kafka message, byte for byte. Its repr shows no content."""

    position: RecordPosition
    #: The record's timestamp, in UTC. It does not order records: producers may set any.
    time: dt.datetime
    topic: str
    key: bytes | None = attrs.field(repr=_size)
    value: bytes | None = attrs.field(repr=_size)
    #: ``None`` if the client could not decode them.
    headers: Headers | None = attrs.field(default=(), repr=_size)

    @property
    def size_bytes(self) -> int:
        """Return the approximate memory of the record."""
        size = len(self.key or b"") + len(self.value or b"")
        if self.headers:
            size += sum(len(name) + len(value or b"") + HEADER_BYTES for name, value in self.headers)
        return size

    @property
    def unstorable(self) -> tuple[str, ...]:
        """Return the parts that a reject must leave out so that the others fit into a row."""
        content_bytes = len(self.key or b"") + len(self.value or b"")
        if content_bytes > _ROW_BYTES:
            return ("value", "headers") if self.headers else ("value",)
        # JSON may need six characters for a byte of a name.
        headers_bytes = 6 * (self.size_bytes - content_bytes)
        return ("headers",) if content_bytes + headers_bytes > _ROW_BYTES else ()

    @property
    def headers_json(self) -> str | None:
        """Return the headers as ``rejects`` stores them: in the record's order, with repeated names.

        ``reconcile`` compares this text with the stored one, so its format must never change.
        """
        if self.headers is None:
            return None
        return json.dumps(
            [
                {"key": key, "value": None if value is None else base64.b64encode(value).decode()}
                for key, value in self.headers
            ]
        )


def record_time(timestamp_ms: int) -> dt.datetime:
    """Return a record's timestamp as a time. Producers may set any number; the result is in years 0001 to 9999."""
    try:
        return dt.datetime.fromtimestamp(timestamp_ms / 1000, dt.UTC)
    except (OverflowError, OSError, ValueError):
        return _LAST_TIME if timestamp_ms > 0 else _FIRST_TIME


@attrs.frozen(repr=False)
class PackedRows:
    """An order's rows in the binary format of PostgreSQL's COPY, one field for each table."""

    #: Without the last four columns, which ``pack_store_columns`` adds in the transaction.
    order: bytes
    delivery: bytes
    payment: bytes
    items: bytes


#: Packs the rows of an order in canonical form, with its digest, and the position and time of its record.
PackRows = Callable[[CanonicalOrder, bytes, RecordPosition | None, dt.datetime | None], PackedRows]

_NO_ROWS = PackedRows(b"", b"", b"", b"")


def pack_no_rows(
    _order: CanonicalOrder, _content_sha256: bytes, _position: RecordPosition | None, _time: dt.datetime | None
) -> PackedRows:
    """Return empty rows, for an order that is compared and never stored in PostgreSQL."""
    return _NO_ROWS


@attrs.frozen(kw_only=True)
class PreparedOrder:
    """An order with all that can be computed before its transaction."""

    order_uid: str
    content_sha256: bytes
    rows: PackedRows = attrs.field(repr=False, eq=False)
    #: The JSON text of the order if it has unknown fields, otherwise ``None``.
    original: bytes | None = attrs.field(default=None, repr=_size)
    #: The record's position and time. Both are ``None`` for an order that was saved from Python.
    position: RecordPosition | None = None
    time: dt.datetime | None = None

    @classmethod
    def of(
        cls,
        order: Order,
        position: RecordPosition | None = None,
        time: dt.datetime | None = None,
        *,
        pack_rows: PackRows = pack_no_rows,
    ) -> PreparedOrder:
        """Prepare an order without unknown fields. Without a position it is one that is saved from Python."""
        return cls._of_canonical(canonical_form(order), position, time, pack_rows)

    @classmethod
    def of_text(
        cls,
        text: bytes,
        position: RecordPosition | None = None,
        time: dt.datetime | None = None,
        *,
        pack_rows: PackRows = pack_no_rows,
    ) -> PreparedOrder:
        """Prepare the order in a JSON text, with its unknown fields. Raises the errors of ``decode_order``."""
        order, unknown = decode_canonical(text)
        if not unknown:
            return cls._of_canonical(order, position, time, pack_rows)
        return cls._of_canonical(order, position, time, pack_rows, unknown, text)

    @classmethod
    def _of_canonical(
        cls,
        order: CanonicalOrder,
        position: RecordPosition | None,
        time: dt.datetime | None,
        pack_rows: PackRows,
        unknown: bytes = b"",
        original: bytes | None = None,
    ) -> PreparedOrder:
        sha256 = digest(order, unknown)
        return cls(
            order_uid=order.order_uid,
            content_sha256=sha256,
            rows=pack_rows(order, sha256, position, time),
            original=original,
            position=position,
            time=time,
        )


def prepare_order(order: Order, original: bytes | None, *, pack_rows: PackRows = pack_no_rows) -> PreparedOrder:
    """Prepare an order that is saved from Python, with its JSON text if there is one (see ``OrderRepository.save``)."""
    if original is None:
        return PreparedOrder.of(order, pack_rows=pack_rows)
    if not isinstance(original, bytes):
        raise TypeError(f"original must be bytes, not {type(original).__name__}")
    if canonical_form(order) != canonical_form(decode_order(original)):
        raise ValueError("original must be the JSON text of the order that is saved")
    return PreparedOrder.of_text(original, pack_rows=pack_rows)


@attrs.frozen(kw_only=True)
class Reject:
    """A rejected record, with all of its content and the reasons."""

    record: Record
    code: str
    #: The first faults, and the number of all.
    faults: tuple[Fault, ...]
    total_faults: int

    @classmethod
    def of(cls, record: Record, error: RejectedError) -> Reject:
        """Return the reject of a record with the faults of an error. Each part that is not stored is one more fault."""
        not_stored = [
            Fault(
                path=part,
                expected="a record that fits into a row of PostgreSQL",
                found="a larger one: this part is not stored",
            )
            for part in record.unstorable
        ]
        if record.headers is None:
            not_stored.append(Fault(path="headers", expected="headers in UTF-8", found="bytes that are not UTF-8"))
        faults = (*error.faults[: MAX_FAULTS - len(not_stored)], *not_stored)
        return cls(record=record, code=error.code, faults=faults, total_faults=error.total + len(not_stored))


class Tombstones(enum.StrEnum):
    """What to do with tombstones: records with an order_uid as key and no value."""

    #: They are rejects, like every record that is not an order.
    REJECT = "reject"
    #: Each erases its order.
    ERASE = "erase"


@attrs.frozen(kw_only=True)
class Tombstone:
    """A record that erases an order."""

    order_uid: str
    position: RecordPosition
    time: dt.datetime

    @property
    def content_sha256(self) -> None:
        """An erased order has no content."""


#: What a record, or a call from Python, does to an order: store this content, or erase it.
OrderChange: TypeAlias = PreparedOrder | Tombstone

#: What a record is.
Classified: TypeAlias = PreparedOrder | Tombstone | Reject


def tombstone_of(record: Record) -> Tombstone | None:
    """Return the tombstone that a record is: its key is an order_uid, and it has no value. Otherwise ``None``."""
    if record.value is not None or record.key is None:
        return None
    with contextlib.suppress(UnicodeDecodeError):
        if is_order_uid(order_uid := record.key.decode("ascii")):
            return Tombstone(order_uid=order_uid, position=record.position, time=record.time)
    return None


def classify_record(
    record: Record,
    max_bytes: int,
    pack_rows: PackRows = pack_no_rows,
    tombstones: Tombstones = Tombstones.REJECT,
) -> Classified:
    """Decode and validate a record. Return the prepared order, the tombstone, or a reject with every fault."""
    if record.value is None and tombstones is Tombstones.ERASE and (tombstone := tombstone_of(record)):
        return tombstone
    try:
        value = record.value
        if value is None:
            raise MalformedJson([Fault(path="$", expected="one JSON text in UTF-8", found="a record without a value")])
        if len(value) > max_bytes:
            found = f"{len(value):,} bytes"
            raise TooLarge([Fault(path="$", expected=f"at most {max_bytes:,} bytes", found=found)])
        return PreparedOrder.of_text(value, record.position, record.time, pack_rows=pack_rows)
    except RejectedError as error:
        return Reject.of(record, error)


@attrs.frozen(kw_only=True)
class StoredVersion:
    """The stored version of an order, or the position at which a tombstone erased it."""

    #: ``None`` if it was erased.
    content_sha256: bytes | None
    position: RecordPosition | None
    #: ``None`` if it was erased.
    first_stored_at: dt.datetime | None
    #: 1, 2, … per order_uid; 0 if it was erased.
    version_number: int = 1


@attrs.frozen(kw_only=True)
class WritePlan:
    """What to write for a batch of orders. The result in the store is the same as if they came one at a time."""

    #: One for each order of the batch, in the batch's order.
    outcomes: tuple[Outcome, ...]
    #: The orders to write with all their rows, and the orders to erase; at most one for each order_uid.
    writes: tuple[OrderChange, ...]
    #: The version number of each write, 0 of a tombstone. Orders of the batch that were superseded count, so it does
    #: not depend on where batches are cut.
    version_numbers: tuple[int, ...]
    #: When the order of each write was stored for the first time; ``None`` if that is now.
    first_stored: tuple[dt.datetime | None, ...]
    #: By order_uid: the record that confirmed a stored order, or that it is erased. Only the stored position moves.
    moves: Mapping[str, OrderChange]


def plan_writes(
    changes: Sequence[OrderChange], stored: Mapping[str, StoredVersion], forgotten: Collection[str] = ()
) -> WritePlan:
    """Compare the changes of a batch with the stored versions, one at a time, and return what to write.

    So the final state does not depend on where batches are cut. The first rule that applies counts:

    * the order_uid was forgotten: ``forgotten``; nothing is written
    * content equal to the current version, or a tombstone of an erased order: ``duplicate``; the stored position may
      move, but never back in a partition
    * from an earlier record of the partition than the current version: ``superseded``; nothing is written
    * otherwise: ``stored``, or ``erased`` for a tombstone; an order of this batch that it replaces becomes
      ``superseded``

    So the record of the current version is stored again if it has other content now: a release that knows more fields
    decodes it again after a rewind.
    """
    versions: dict[str, StoredVersion | OrderChange] = dict(stored)
    version_numbers: dict[str, int] = {}
    first_stored: dict[str, dt.datetime | None] = {}
    writes: dict[str, OrderChange] = {}
    write_index: dict[str, int] = {}
    moves: dict[str, OrderChange] = {}
    outcomes: list[Outcome] = []
    for index, change in enumerate(changes):
        uid = change.order_uid
        if uid in forgotten:
            outcomes.append(Outcome.FORGOTTEN)
            continue
        version = versions.get(uid)
        current = None if version is None else version.position
        if version is None or version.content_sha256 != change.content_sha256:
            if current is not None and current.is_after(change.position):
                outcomes.append(Outcome.SUPERSEDED)
                continue
            if uid in write_index:
                outcomes[write_index.pop(uid)] = Outcome.SUPERSEDED
            if isinstance(change, Tombstone):
                outcomes.append(Outcome.ERASED)
                version_numbers[uid], first_stored[uid] = 0, None
            else:
                outcomes.append(Outcome.STORED)
                if uid not in version_numbers:
                    before = stored.get(uid)
                    version_numbers[uid], first_stored[uid] = (
                        (before.version_number, before.first_stored_at) if before else (0, None)
                    )
                version_numbers[uid] += 1
                write_index[uid] = index
            writes[uid] = change
            moves.pop(uid, None)
        else:
            outcomes.append(Outcome.DUPLICATE)
            position = change.position
            if position is None or position == current or (current is not None and current.is_after(position)):
                continue
            if uid in writes:
                writes[uid] = _with_original_of(writes[uid], change)
            else:
                moves[uid] = change
        versions[uid] = change
    return WritePlan(
        outcomes=tuple(outcomes),
        writes=tuple(writes.values()),
        version_numbers=tuple(version_numbers[uid] for uid in writes),
        first_stored=tuple(first_stored[uid] for uid in writes),
        moves=moves,
    )


def _with_original_of(first: OrderChange, duplicate: OrderChange) -> OrderChange:
    """Return a duplicate with the original of the first record: only its position is newer."""
    if isinstance(first, PreparedOrder) and isinstance(duplicate, PreparedOrder):
        return attrs.evolve(duplicate, original=first.original)
    return duplicate


def may_redrive(change: OrderChange, stored: StoredVersion | None) -> bool:
    """Return whether a reject may change its order: no version is stored, or an earlier one of its partition.

    Otherwise the stored version is newer, or it comes from another partition and cannot be ordered.
    """
    if stored is None:
        return True
    return change.position is not None and change.position.is_after(stored.position)


def plan_redrive(
    changes: Sequence[OrderChange], stored: Mapping[str, StoredVersion], forgotten: Collection[str] = ()
) -> WritePlan:
    """Plan the one change from a reject like ``plan_writes``, but as superseded unless ``may_redrive``."""
    [change] = changes
    uid = change.order_uid
    if uid in forgotten or may_redrive(change, stored.get(uid)):
        return plan_writes(changes, stored, forgotten)
    return WritePlan(outcomes=(Outcome.SUPERSEDED,), writes=(), version_numbers=(), first_stored=(), moves={})


def plan_backfill(
    read: Mapping[str, StoredVersion],
    changes: Sequence[OrderChange],
    stored: Mapping[str, StoredVersion],
    forgotten: Collection[str] = (),
) -> WritePlan:
    """Plan like ``plan_writes``, but an order is superseded unless its stored version is the one in ``read``.

    The changes are those versions, decoded again; each order_uid occurs once.
    """

    def is_current(uid: str) -> bool:
        return uid in forgotten or (uid in read and stored.get(uid) == read[uid])

    current = [change for change in changes if is_current(change.order_uid)]
    plan = plan_writes(current, stored, forgotten)
    outcomes = iter(plan.outcomes)
    all_outcomes = (next(outcomes) if is_current(change.order_uid) else Outcome.SUPERSEDED for change in changes)
    return attrs.evolve(plan, outcomes=tuple(all_outcomes))


@attrs.frozen(kw_only=True)
class OffsetRange:
    """The offsets of one partition that a batch handles."""

    #: The next offset that the batch expects in the store: the fence.
    expected_offset: int
    #: The next offset after the batch.
    next_offset: int


@attrs.frozen(kw_only=True)
class StoredOffset:
    """The stored offset of a group for one partition of one topic id."""

    group: str
    topic: str
    topic_id: str
    partition: int
    next_offset: int
    #: When a batch last moved it; UTC.
    updated_at: dt.datetime


@attrs.frozen(kw_only=True)
class Batch:
    """The records of one transaction."""

    #: By topic: the topic id that the records were fetched with.
    topic_ids: Mapping[str, str]
    ranges: Mapping[TopicPartition, OffsetRange]
    #: In the order in which they were fetched.
    classified: tuple[tuple[Record, Classified], ...]

    def without(self, partitions: Iterable[tuple[str, int]]) -> Batch:
        """Return a batch without the records of these partitions."""
        dropped = frozenset(partitions)
        return attrs.evolve(
            self,
            ranges={
                partition: offset_range for partition, offset_range in self.ranges.items() if partition not in dropped
            },
            classified=tuple(
                (record, classified)
                for record, classified in self.classified
                if (record.topic, record.position.partition) not in dropped
            ),
        )
