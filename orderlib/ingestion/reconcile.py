"""The proof that every record is accounted for: compare the records of Kafka with a snapshot of the database.

Create a ``Reconciliation`` with the offsets and rejects of one snapshot. Feed it the records below those offsets, each
partition by offset, and then the orders of the same snapshot. Then ``findings`` yields the discrepancies, and
``not_proved`` what cannot be proved. It stores a position, a digest and a time of each order, never its content.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import attrs

from orderlib.codecs import (
    CanonicalOrder,
    content_sha256,
    decode_canonical,
    digest,
    earlier_forms,
    may_have_optional_fields,
    required_sha256,
)
from orderlib.errors import REJECT_CODES, Fault, RefusedByDatabase, RejectedError, TooLarge
from orderlib.ingestion.records import (
    Classified,
    OrderChange,
    PreparedOrder,
    Record,
    Reject,
    StoredOffset,
    Tombstone,
    classify_record,
    tombstone_of,
)
from orderlib.models import Order
from orderlib.repository import Outcome, RecordPosition

#: How many examples are listed of each kind of what cannot be proved. All are counted.
MAX_EXAMPLES = 100

#: The digest of what is stored after a tombstone.
_NO_CONTENT = b""

#: How many findings are kept, and listed by `reconcile --json`. All are counted.
MAX_FINDINGS = 10_000

#: A lower limit of records is not realistic, because orders would not fit.
_SMALLEST_LIMIT_BYTES = 1024
#: PostgreSQL has microseconds, Kafka has milliseconds.
_TIME_TOLERANCE = dt.timedelta(milliseconds=1)
#: A redrive reads the clock for ``redriven_at`` and stores its orders within this time. Earlier releases stored first.
_MAX_REDRIVE_TIME = dt.timedelta(seconds=10)


@attrs.frozen(kw_only=True)
class Finding:
    """A discrepancy, or an example of what cannot be proved."""

    #: What is wrong, as text.
    what: str
    #: Where: an order_uid, a position or both.
    order_uid: str | None = None
    partition: int | None = None
    #: ``None`` if the finding is about the partition.
    offset: int | None = None

    def __str__(self) -> str:
        at = ""
        if self.partition is not None:
            at = f" [{self.partition}]" + ("" if self.offset is None else f"@{self.offset}")
        place = "record" if self.offset is not None else "partition" if self.partition is not None else "store"
        return f"{self.order_uid or place}{at}: {self.what}"


@attrs.frozen(kw_only=True)
class NotProved:
    """A kind of what cannot be proved."""

    what: str
    count: int
    #: The first ``MAX_EXAMPLES`` of them.
    examples: tuple[Finding, ...]


@attrs.frozen(kw_only=True)
class TopicState:
    """What Kafka says about the topic."""

    topic: str
    topic_id: str
    #: The earliest offset that each partition still holds, and its log end.
    earliest: Mapping[int, int]
    ends: Mapping[int, int]
    #: Whether Kafka compacts it, so that any record before the log end may be missing.
    is_compacted: bool


@attrs.frozen(kw_only=True)
class SnapshotReject:
    """A row of ``rejects``: digests of its content only."""

    topic_id: str
    partition: int
    offset: int
    topic: str
    #: ``None`` if it is not a possible time of a record.
    record_time: dt.datetime | None
    key_sha256: bytes | None
    value_sha256: bytes | None
    headers_sha256: bytes | None
    code: str
    #: The number of faults and the paths of the first ones, as they are in the JSON.
    faults_total: object
    fault_paths: object
    redriven_at: dt.datetime | None
    redrive_outcome: str | None
    #: Whether ``redriven_at`` is null or not before ``rejected_at``.
    times_in_order: bool


@attrs.frozen(kw_only=True)
class SnapshotOriginal:
    """A row of ``order_originals``: digests only."""

    value_sha256: bytes
    #: The digest of its content by the rules of this release; ``None`` if they refuse it.
    content_sha256: bytes | None
    #: The digest of its known fields by the rules of the release that stored it; ``None`` if no release did.
    known_sha256: bytes | None

    @classmethod
    def of(cls, value: bytes, stored_sha256: bytes) -> SnapshotOriginal:
        """Return the digests of the original of a stored order, which has this content digest."""
        content = None
        current_form: list[tuple[CanonicalOrder, bytes]] = []
        with contextlib.suppress(RejectedError):
            order, unknown = decode_canonical(value)
            content = digest(order, unknown)
            if unknown:
                current_form = [(order, unknown)]
        known = None
        for order, unknown in itertools.chain(current_form, earlier_forms(value)):
            if digest(order, unknown) == stored_sha256:
                known = digest(order)
                break
        return cls(value_sha256=hashlib.sha256(value).digest(), content_sha256=content, known_sha256=known)


@attrs.frozen(kw_only=True)
class SnapshotOrder:
    """A stored order."""

    order_uid: str
    #: ``None`` if a part of it is missing or unreadable, or its line numbers have a gap.
    order: Order | None
    content_sha256: bytes
    #: All ``None`` for an order saved from Python.
    topic_id: str | None
    partition: int | None
    offset: int | None
    source_time: dt.datetime | None
    stored_at: dt.datetime | None
    #: Whether ``first_stored_at`` is not after ``stored_at``, and neither is in the future.
    times_in_order: bool
    #: The column ``has_original``, and the row that it announces.
    has_original: bool
    original: SnapshotOriginal | None


@attrs.frozen(kw_only=True)
class SnapshotErased:
    """A row of ``erased``."""

    order_uid: str
    topic_id: str
    partition: int
    offset: int


@attrs.frozen(kw_only=True)
class _Version:
    """A valid record of an order, or a tombstone, of which both digests are ``_NO_CONTENT``."""

    offset: int
    #: By the rules of this release; ``None`` if they refuse the record, and those of an earlier release accept it.
    content_sha256: bytes | None
    #: The digest of the required fields only, as releases stored it that ignored unknown fields.
    required_sha256: bytes
    time: dt.datetime
    #: How the reject at this position was redriven; ``None`` where there is no reject.
    redriven: str | None = None
    redriven_at: dt.datetime | None = None
    #: Whether it exceeds the present limit and has no reject.
    is_too_large: bool = False


class Reconciliation:
    """Compares one topic id of a topic with one snapshot of the store.

    ``start_offsets`` is where reading began in each partition: at the earliest record that Kafka still has, or later.
    ``group`` is the consumer group that the database belongs to, ``forgotten`` has the SHA-256 digests of the forgotten
    order_uids, ``originals`` those of the stored originals.
    """

    def __init__(
        self,
        topic: TopicState,
        start_offsets: Mapping[int, int],
        group: str | None,
        offsets: Sequence[StoredOffset],
        rejects: Iterable[SnapshotReject],
        forgotten: Collection[bytes] = (),
        originals: Iterable[bytes] = (),
    ) -> None:
        self._topic = topic
        self._forgotten = frozenset(forgotten)
        #: Those of the forgotten orders of which no record was read yet.
        self._forgotten_without_record = set(forgotten)
        self._start_offsets = start_offsets
        self._offsets = {(offset.topic_id, offset.partition): offset for offset in offsets}
        #: The stored offset of each partition.
        self.next_offsets = {
            partition: offset.next_offset
            for (topic_id, partition), offset in self._offsets.items()
            if topic_id == topic.topic_id
        }
        #: Rejects whose record was not read yet, by partition and offset.
        self._rejects: dict[tuple[int, int], SnapshotReject] = {}
        #: The last valid record of each order in each partition, by order_uid.
        self._versions: dict[str, dict[int, _Version]] = {}
        #: By order_uid, where it was erased.
        self._erased: dict[str, RecordPosition] = {}
        #: Valid records and tombstones with a reject that was not redriven, by order_uid.
        self._not_redriven: dict[str, dict[tuple[int, int], _Version]] = {}
        #: Those of the originals that no record has had as its value.
        self._originals = set(originals)
        self._findings: list[Finding] = []
        #: Findings beyond ``MAX_FINDINGS``, which ``findings`` does not yield.
        self.unlisted = 0
        self._not_proved: Counter[str] = Counter()
        self._examples: dict[str, list[Finding]] = {}
        #: The number of records, orders and so on that were compared.
        self.counts: Counter[str] = Counter()
        self._check_offsets(group, offsets)
        for reject in rejects:
            self._add_reject(reject)

    # Offsets

    def _check_offsets(self, group: str | None, offsets: Iterable[StoredOffset]) -> None:
        topic = self._topic
        for offset in offsets:
            topic_id, partition = offset.topic_id, offset.partition
            if offset.group != group:
                what = f"its offset belongs to consumer group {offset.group!r}, but the database to {group!r}"
                self._add_finding(what, partition=partition)
            if topic_id != topic.topic_id:
                what = "offsets of another topic or of an earlier topic id"
                self._add_not_proved(what, order_uid=f"{offset.topic} ({topic_id})", partition=partition)
                continue
            if offset.topic != topic.topic:
                self._add_finding(f"its offset names topic {offset.topic!r}", partition=partition)
            if partition not in topic.ends:
                self._add_finding("it has a stored offset, but Kafka does not have this partition", partition=partition)
            elif offset.next_offset > topic.ends[partition]:
                what = f"next_offset {offset.next_offset:,} is after the log end {topic.ends[partition]:,}"
                self._add_finding(what, partition=partition)
            elif offset.next_offset < topic.earliest[partition]:
                what = f"records {offset.next_offset:,} to {topic.earliest[partition] - 1:,} were never handled, and "
                self._add_finding(what + "Kafka no longer has them", partition=partition)
        for partition, end in sorted(topic.ends.items()):
            if partition not in self.next_offsets and topic.earliest[partition] < end:
                self._add_finding("it has records, but no stored offset", partition=partition)

    def _why_impossible(self, position: RecordPosition, done: str = "stored") -> str | None:
        """Return why nothing can be stored or erased from this position, or ``None`` if that is possible."""
        offset = self._offsets.get((position.topic_id, position.partition))
        if offset is None:
            return f"{done} from a partition without a stored offset (topic id {position.topic_id})"
        if not 0 <= position.offset < offset.next_offset:
            return f"{done} from a record at or after the stored offset: it was moved back, and the lag is not 0 yet"
        return None

    def _was_read(self, position: RecordPosition) -> bool:
        first = self._start_offsets.get(position.partition)
        return position.topic_id == self._topic.topic_id and first is not None and first <= position.offset

    # Rejects

    def _add_reject(self, reject: SnapshotReject) -> None:
        position = RecordPosition(topic_id=reject.topic_id, partition=reject.partition, offset=reject.offset)
        if not reject.times_in_order:
            self._add_finding("the reject was redriven before it was rejected", position)
        if reject.key_sha256 in self._forgotten:
            self._add_finding("its key is a forgotten order: forget it again", position)
        if problem := self._why_impossible(position):
            self._add_finding(f"the reject was {problem}", position)
        elif self._was_read(position):
            self._rejects[position.partition, position.offset] = reject
        else:
            self.counts["rejects of records that were not read"] += 1
            self._add_not_proved("rejects of records that were not read", position)

    def on_record(self, record: Record, classified: Classified) -> None:
        """Add a record below the stored offset, and its classification by the rules of this release.

        Whether tombstones are rejects does not matter: a tombstone without a reject must have erased its order.
        """
        self.counts["records"] += 1
        position = record.position
        if self._originals:
            self._originals.discard(_sha256(record.value) or b"")
        reject = self._rejects.pop((position.partition, position.offset), None)
        is_too_large = _is_above_limit(classified) and not _is_reject_of_size(reject)
        if is_too_large:
            # It was handled under a higher limit: classify it without one.
            classified = classify_record(record, len(record.value or b""))
        if reject is not None:
            self.counts["rejects"] += 1
            self._compare_content(record, reject)
            self._compare_faults(record, classified, reject)
            self._compare_redrive(record, classified, reject)
        elif self._is_forgotten(record, classified):
            self.counts["forgotten"] += 1
        elif tombstone := tombstone_of(record):
            self.counts["tombstones"] += 1
            self._add_version(tombstone.order_uid, _version(record, tombstone), position.partition)
        elif isinstance(classified, Reject) and (earlier := _earlier_version(record)):
            self._add_version(*earlier, position.partition)
        elif isinstance(classified, Reject):
            self._add_finding(_without_reject(TooLarge.code if is_too_large else classified.code), position)
        else:
            if is_too_large:
                what = "valid records above ORDERS_MAX_RECORD_BYTES that have no reject: the limit was higher"
                self._add_not_proved(what, position, classified.order_uid)
            version = attrs.evolve(_version(record, classified), is_too_large=is_too_large)
            self._add_version(classified.order_uid, version, position.partition)

    def _is_forgotten(self, record: Record, classified: Classified) -> bool:
        """Return whether nothing of this record is stored because its order was forgotten."""
        if not self._forgotten:
            return False
        uid_sha256 = _sha256(record.key if isinstance(classified, Reject) else classified.order_uid.encode())
        if uid_sha256 not in self._forgotten:
            return False
        self._forgotten_without_record.discard(uid_sha256)
        return True

    def _compare_content(self, record: Record, reject: SnapshotReject) -> None:
        unstorable = record.unstorable
        headers = None if "headers" in unstorable else record.headers_json
        same = {
            "topic": reject.topic == record.topic,
            "record_time": _is_same_time(reject.record_time, record.time),
            "key": reject.key_sha256 == _sha256(record.key),
            "value": reject.value_sha256 == (None if "value" in unstorable else _sha256(record.value)),
            "headers": reject.headers_sha256 == _sha256(None if headers is None else headers.encode()),
        }
        if different := [name for name, is_same in same.items() if not is_same]:
            self._add_finding(f"the reject differs from Kafka's record in {', '.join(different)}", record.position)

    def _compare_faults(self, record: Record, classified: Classified, reject: SnapshotReject) -> None:
        """Compare code and faults of a reject with those that this release finds."""
        position = record.position
        expected = _other_refusal(record, reject.code)
        is_refused_tombstone = reject.code == RefusedByDatabase.code and tombstone_of(record) is not None
        if isinstance(classified, Reject) and not is_refused_tombstone:
            expected = classified
        if expected is None:
            # The rules of an earlier release refused it, so only the form of its faults can be checked.
            if reject.code not in REJECT_CODES:
                self._add_finding("the reject has an unknown code", position)
            self._add_not_proved("rejects that only the rules of an earlier release reject", position)
            if not _is_plausible(reject):
                self._add_finding("the faults of the reject are malformed", position)
        elif reject.code == TooLarge.code != expected.code and _may_have_been_too_large(record, reject):
            self._add_not_proved(
                "rejects that were too large for an earlier limit, and are invalid for another reason now", position
            )
        elif reject.code != expected.code:
            self._add_finding(f"stored as {reject.code}, but {expected.code} by the rules of this release", position)
        elif (reject.faults_total, reject.fault_paths) != (expected.total_faults, [f.path for f in expected.faults]):
            self._add_finding("the faults of the reject differ from those that this release finds", position)

    def _compare_redrive(self, record: Record, classified: Classified, reject: SnapshotReject) -> None:
        """Compare the outcome of a redrive with the record, and add its version."""
        outcome, position, tombstone = reject.redrive_outcome, record.position, tombstone_of(record)
        is_redriven = outcome not in {None, Outcome.REJECTED}
        if outcome not in {None, *Outcome}:
            self._add_finding("the reject has an unknown redrive_outcome", position)
        if outcome == Outcome.FORGOTTEN and not self._is_forgotten(record, classified):
            self._add_finding("redriven as forgotten, but its order is not forgotten", position)
        change = classified if tombstone is None else tombstone
        if isinstance(change, Reject):
            if is_redriven:
                self._add_finding(
                    f"redriven as {outcome}, but invalid ({change.code}) by the rules of this release", position
                )
            return
        if self._is_forgotten(record, classified):
            self.counts["forgotten"] += 1
            return
        if outcome == (Outcome.STORED if tombstone else Outcome.ERASED):
            self._add_finding(f"redriven as {outcome}, but it is {'' if tombstone else 'not '}a tombstone", position)
        version = _version(record, change, outcome, reject.redriven_at)
        if outcome in {Outcome.STORED, Outcome.DUPLICATE, Outcome.ERASED}:
            self._compare_with_previous(change, position, version)
            self._add_version(change.order_uid, version, position.partition)
            return
        self._not_redriven.setdefault(change.order_uid, {})[position.partition, position.offset] = version
        if is_redriven or tombstone:
            return
        if reject.code == RefusedByDatabase.code:
            self._add_not_proved("rejects that PostgreSQL refused: only a redrive can try them again", position)
        else:
            self._add_finding(
                "stored as a reject, but a valid order by the rules of this release: redrive it", position
            )

    def _compare_with_previous(self, change: OrderChange, position: RecordPosition, version: _Version) -> None:
        """Compare the outcome of a redrive with the previous valid record, the only one that it can replace."""
        uid, partition = change.order_uid, position.partition
        before = self._versions.get(uid, {}).get(partition)
        # A later record that is a reject now may have been handled then: the last rewind may have had stricter rules.
        rejects = self._not_redriven.get(uid, {}).items()
        begin = before.offset if before else -1
        later = [reject for (number, offset), reject in rejects if number == partition and offset > begin]
        previous = [*([before] if before else []), *later]
        is_same = before is not None and all(one.content_sha256 == version.content_sha256 for one in previous)
        # Earlier releases ignored unknown fields.
        may_be_same = any(one.required_sha256 == version.required_sha256 for one in previous)
        if version.redriven != Outcome.DUPLICATE and is_same:
            self._add_finding(f"redriven as {version.redriven}, but it was so already", position, uid)
        is_complete = not self._topic.is_compacted and self._start_offsets[partition] == 0
        if version.redriven == Outcome.DUPLICATE and not may_be_same and (before is not None or is_complete):
            self._add_finding("redriven as duplicate, but its content was not stored before", position, uid)

    def _add_version(self, order_uid: str, version: _Version, partition: int) -> None:
        self._versions.setdefault(order_uid, {})[partition] = version

    # Orders

    def several_partitions(self) -> Iterator[str]:
        """Yield the orders with records in several partitions. Call it before ``on_order``."""
        return (order_uid for order_uid, versions in self._versions.items() if len(versions) > 1)

    def on_stored(
        self,
        erased: Iterable[SnapshotErased],
        orders: Iterable[SnapshotOrder],
        orphans: Iterable[tuple[str, str]],
    ) -> None:
        """Add everything that is stored, after all records. The arguments are read one after another."""
        for one in erased:
            self.on_erased(one)
        for order in orders:
            self.on_order(order)
        for table, order_uid in orphans:
            self.on_orphan(table, order_uid)

    def on_erased(self, erased: SnapshotErased) -> None:
        """Add an erased order, after all records and before all orders."""
        self.counts["erased"] += 1
        uid = erased.order_uid
        position = RecordPosition(topic_id=erased.topic_id, partition=erased.partition, offset=erased.offset)
        self._erased[uid] = position
        versions, not_redriven = self._versions.get(uid, {}), self._not_redriven.get(uid, {})
        expected = versions.get(position.partition)
        # A tombstone may also be a reject, from a time when tombstones were rejects.
        reject = not_redriven.get((position.partition, position.offset))
        if reject is not None and (expected is None or expected.offset < reject.offset):
            expected = reject
        if _sha256(uid.encode()) in self._forgotten:
            self._add_finding("erased, but forgotten: forget it again", position, uid)
        elif problem := self._why_impossible(position, "erased"):
            self._add_finding(problem, position, uid)
        elif position.topic_id != self._topic.topic_id:
            self._add_not_proved("erased by tombstones of another topic, or of an earlier topic id", position, uid)
        elif expected is not None and position.offset < expected.offset:
            what = f"erased, but its later record [{position.partition}]@{expected.offset} was not handled"
            self._add_finding(what, position, uid)
        elif not self._was_read(position):
            self._add_not_proved("erased by tombstones that were not read", position, uid)
        elif expected is None or expected.offset != position.offset or expected.content_sha256 != _NO_CONTENT:
            what = "erased, but Kafka has no tombstone of it at this position"
            if self._topic.is_compacted:
                self._add_not_proved(f"{what}: the topic is compacted", position, uid)
            else:
                self._add_finding(what, position, uid)

    def on_order(self, stored: SnapshotOrder) -> None:
        """Add a stored order, after all records."""
        self.counts["orders"] += 1
        uid = stored.order_uid
        versions, not_redriven = self._versions.pop(uid, {}), self._not_redriven.pop(uid, {})
        position_columns = stored.topic_id, stored.partition, stored.offset, stored.source_time
        position = _position(stored)
        if self._forgotten and _sha256(uid.encode()) in self._forgotten:
            self._add_finding("stored, but forgotten: forget it again", position, uid)
            return
        erased = self._erased.get(uid)
        if erased and position and (erased.topic_id, erased.partition) == (position.topic_id, position.partition):
            self._add_finding(f"stored, but erased at offset {erased.offset} of its partition", position, uid)
        if stored.order is None:
            self._add_finding(
                "a part of the order is missing or unreadable, or the line numbers of its items have a gap",
                position,
                uid,
            )
        elif not _matches_digest(stored, content_sha256(stored.order)):
            self._add_finding("its content does not match content_sha256, or its original is missing", position, uid)
        self._check_original(stored, position)
        if not stored.times_in_order:
            self._add_finding(
                "its first_stored_at is later than its stored_at, or one of them is not a possible time", position, uid
            )
        if position_columns == (None,) * 4:
            self.counts["saved from Python"] += 1
            self._check_saved(stored, versions)
        elif position is None or stored.source_time is None:
            self._add_finding("its position is incomplete", position, uid)
        elif problem := self._why_impossible(position):
            self._add_finding(problem, position, uid)
        else:
            self._check_position(stored, position, versions, not_redriven)
        self._check_redriven_at(stored, versions)

    def _check_original(self, stored: SnapshotOrder, position: RecordPosition | None) -> None:
        original, uid = stored.original, stored.order_uid
        if stored.has_original != (original is not None):
            self._add_finding("has_original does not say whether it has an original", position, uid)
        if original is None:
            return
        self.counts["originals"] += 1
        if original.known_sha256 is not None and _current_sha256(stored) != stored.content_sha256:
            what = "originals with fields that an earlier release did not know: run `admin backfill`"
            if original.content_sha256 is None:
                what = "originals that only the rules of an earlier release accept"
            self._add_not_proved(what, position, uid)
        if original.value_sha256 not in self._originals:
            return
        # Of several sources with the same content, the original is that of the first one: a record of another topic or
        # of an earlier topic id, or a call from Python.
        has_same_content = original.known_sha256 is not None
        if has_same_content or position is None or self._topic.is_compacted or any(self._start_offsets.values()):
            self._add_not_proved("originals that are not the value of a record that was read", position, uid)
        else:
            self._add_finding("its original is not the value of a record", position, uid)

    def _check_saved(self, stored: SnapshotOrder, versions: Mapping[int, _Version]) -> None:
        """Report an order without a position. Its content cannot be compared with anything."""
        what = "saved from Python"
        if versions:
            is_same = any(version.content_sha256 == stored.content_sha256 for version in versions.values())
            what += f" after Kafka's record of it, with {'the same' if is_same else 'other'} content"
        self._add_not_proved(what, None, stored.order_uid)

    def _check_position(
        self,
        stored: SnapshotOrder,
        position: RecordPosition,
        versions: Mapping[int, _Version],
        not_redriven: Mapping[tuple[int, int], _Version],
    ) -> None:
        uid, partition = stored.order_uid, position.partition
        expected = versions.get(partition)
        # After a rewind, the record of a reject may be stored, if the rules were relaxed.
        reject = not_redriven.get((partition, position.offset)) if position.topic_id == self._topic.topic_id else None
        if reject is not None and (expected is None or expected.offset < reject.offset):
            expected = reject
            if _was_stored_by(stored, reject):
                self._add_finding("redriven as superseded, but that redrive stored its order", position, uid)
        if position.topic_id != self._topic.topic_id:
            known = self._offsets[position.topic_id, partition]
            if known.topic == self._topic.topic and versions:
                self._add_finding(
                    "stored from an earlier topic id, but the current topic has records of it", position, uid
                )
            else:
                self._add_not_proved("stored from another topic, or from an earlier topic id", position, uid)
        elif expected is not None and position.offset < expected.offset and expected.is_too_large:
            what = _without_reject(TooLarge.code)
            self._add_finding(what, attrs.evolve(position, offset=expected.offset), uid)
        elif expected is not None and position.offset < expected.offset:
            is_tombstone = expected.content_sha256 == _NO_CONTENT
            what = "tombstone [{}]@{} did not erase it" if is_tombstone else "record [{}]@{} was not stored"
            self._add_finding("its later " + what.format(partition, expected.offset), position, uid)
        elif not self._was_read(position):
            self.counts["from records that were not read"] += 1
            self._add_not_proved("stored from records that were not read", position, uid)
        elif expected is None or expected.offset != position.offset:
            what = "Kafka has no record of it at its position"
            if self._topic.is_compacted:
                self._add_not_proved(f"{what}: the topic is compacted", position, uid)
            else:
                self._add_finding(what, position, uid)
        elif (
            stored.original is None
            and expected.content_sha256 != stored.content_sha256 == expected.required_sha256
            and _is_same_time(stored.source_time, expected.time)
        ):
            what = "stored by an earlier release without the unknown fields of its record: a rewind stores them"
            self._add_not_proved(what, position, uid)
        elif expected.content_sha256 != _current_sha256(stored):
            self._add_finding("differs from the record at its position", position, uid)
        elif not _is_same_time(stored.source_time, expected.time):
            self._add_finding("its source_time is not the time of its record", position, uid)
        for (other, offset), version in not_redriven.items():
            if (
                version.redriven == Outcome.SUPERSEDED
                and versions.keys() <= {partition}
                and (other, position.topic_id) == (partition, self._topic.topic_id)
                and offset > position.offset
            ):
                what = "redriven as superseded, but the stored order is older"
                self._add_finding(what, attrs.evolve(position, offset=offset), uid)

    def _check_redriven_at(self, stored: SnapshotOrder, versions: Mapping[int, _Version]) -> None:
        for partition, version in versions.items():
            if version.redriven != Outcome.STORED or version.redriven_at is None or stored.stored_at is None:
                continue
            if stored.stored_at < version.redriven_at - _MAX_REDRIVE_TIME:
                position = RecordPosition(topic_id=self._topic.topic_id, partition=partition, offset=version.offset)
                self._add_finding(
                    "redriven as stored, but its order was stored before the redrive", position, stored.order_uid
                )

    def on_orphan(self, table: str, order_uid: str) -> None:
        """Add a row of another table whose order is not stored."""
        self._add_finding(f"{table} has a row of this order, but the order is not stored", order_uid=order_uid)

    # Results

    def findings(self) -> Iterator[Finding]:
        """Yield the discrepancies except the ``unlisted`` ones. Call it last."""
        yield from self._findings
        what = "Kafka has no record of this reject"
        for partition, offset in self._rejects:
            # For a compacted topic, not_proved yields them.
            if not self._topic.is_compacted:
                yield Finding(what=what, partition=partition, offset=offset)
        for order_uid, versions in self._versions.items():
            if order_uid in self._erased:
                continue
            partition, version = max(versions.items(), key=lambda entry: entry[1].offset)
            is_tombstone = version.content_sha256 == _NO_CONTENT
            what = "is not stored: it was lost"
            if is_tombstone:
                what = "a tombstone, but neither `erased` nor a reject has it"
            elif version.is_too_large:
                what = _without_reject(TooLarge.code)
            yield Finding(what=what, order_uid=order_uid, partition=partition, offset=version.offset)
        for order_uid, not_redriven in self._not_redriven.items():
            for (partition, offset), version in not_redriven.items():
                is_known = order_uid in self._versions or order_uid in self._erased
                if version.redriven == Outcome.SUPERSEDED and not is_known:
                    what = "redriven as superseded, but not stored: it was lost"
                    yield Finding(what=what, order_uid=order_uid, partition=partition, offset=offset)

    def not_proved(self) -> Iterator[NotProved]:
        """Yield what cannot be proved. Call it last."""
        if self._forgotten_without_record:
            what = "forgotten orders of which no record was read"
            yield NotProved(what=what, count=len(self._forgotten_without_record), examples=())
        for what, count in self._not_proved.items():
            yield NotProved(what=what, count=count, examples=tuple(self._examples[what]))
        if self._topic.is_compacted and self._rejects:
            positions = list(self._rejects)
            what = "rejects whose record Kafka no longer has: the topic is compacted"
            examples = tuple(Finding(what=what, partition=p, offset=o) for p, o in positions[:MAX_EXAMPLES])
            yield NotProved(what=what, count=len(positions), examples=examples)

    def unread_ranges(self) -> Iterator[tuple[int, int, int]]:
        """Yield the handled ranges that were not read: partition, first offset, and the offset after the last."""
        for partition, first in sorted(self._start_offsets.items()):
            if unread := min(first, self.next_offsets.get(partition, 0)):
                yield partition, 0, unread

    def _add_finding(
        self,
        what: str,
        position: RecordPosition | None = None,
        order_uid: str | None = None,
        partition: int | None = None,
    ) -> None:
        if len(self._findings) < MAX_FINDINGS:
            self._findings.append(self._make_finding(what, position, order_uid, partition))
        else:
            self.unlisted += 1

    def _add_not_proved(
        self,
        what: str,
        position: RecordPosition | None = None,
        order_uid: str | None = None,
        partition: int | None = None,
    ) -> None:
        self._not_proved[what] += 1
        examples = self._examples.setdefault(what, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(self._make_finding(what, position, order_uid, partition))

    def _make_finding(
        self, what: str, position: RecordPosition | None, order_uid: str | None, partition: int | None
    ) -> Finding:
        if position is None:
            return Finding(what=what, order_uid=order_uid, partition=partition)
        if position.topic_id != self._topic.topic_id:
            what = f"{what} (topic id {position.topic_id})"
        return Finding(what=what, order_uid=order_uid, partition=position.partition, offset=position.offset)


def _sha256(data: bytes | None) -> bytes | None:
    return None if data is None else hashlib.sha256(data).digest()


def _matches_digest(stored: SnapshotOrder, known_sha256: bytes) -> bool:
    if stored.original is None:
        return known_sha256 == stored.content_sha256
    return known_sha256 == stored.original.known_sha256


def _current_sha256(stored: SnapshotOrder) -> bytes | None:
    """Return the digest of a stored order by the rules of this release; ``None`` if they refuse its original."""
    original = stored.original
    return stored.content_sha256 if original is None or original.known_sha256 is None else original.content_sha256


def _is_same_time(stored: dt.datetime | None, time: dt.datetime) -> bool:
    return stored is not None and abs(stored - time) < _TIME_TOLERANCE


def _version(
    record: Record, change: OrderChange, redriven: str | None = None, redriven_at: dt.datetime | None = None
) -> _Version:
    content = required = _NO_CONTENT if isinstance(change, Tombstone) else change.content_sha256
    value = record.value or b""
    if isinstance(change, PreparedOrder) and (change.original is not None or may_have_optional_fields(value)):
        required = required_sha256(value)
    return _Version(
        offset=record.position.offset,
        content_sha256=content,
        required_sha256=required,
        time=record.time,
        redriven=redriven,
        redriven_at=redriven_at,
    )


def _earlier_version(record: Record) -> tuple[str, _Version] | None:
    """Return the order_uid and the version of a record that only the rules of earlier releases accept."""
    value = record.value or b""
    for order, _ in earlier_forms(value):
        version = _Version(
            offset=record.position.offset,
            content_sha256=None,
            required_sha256=required_sha256(value),
            time=record.time,
        )
        return order.order_uid, version
    return None


def _position(stored: SnapshotOrder) -> RecordPosition | None:
    if stored.topic_id is None or stored.partition is None or stored.offset is None:
        return None
    return RecordPosition(topic_id=stored.topic_id, partition=stored.partition, offset=stored.offset)


def _is_plausible(reject: SnapshotReject) -> bool:
    total, paths = reject.faults_total, reject.fault_paths
    return (
        isinstance(total, int)
        and isinstance(paths, list)
        and 0 < len(paths) <= total
        and set(map(type, paths)) == {str}
    )


def _other_refusal(record: Record, code: str) -> Reject | None:
    """Return the reject that PostgreSQL or an earlier limit makes of a valid record. Its wording is not compared."""
    match code:
        case RefusedByDatabase.code:
            return Reject.of(record, RefusedByDatabase(None))
        case TooLarge.code:
            return Reject.of(record, TooLarge([Fault(path="$", expected="", found="")]))
        case _:
            return None


def _without_reject(code: str) -> str:
    return f"invalid ({code}), but not stored as a reject: it was purged or lost"


def _is_above_limit(classified: Classified) -> bool:
    return isinstance(classified, Reject) and classified.code == TooLarge.code


def _is_reject_of_size(reject: SnapshotReject | None) -> bool:
    """Return whether a record is a reject because of its size, and no redrive has changed that."""
    if reject is None or reject.code != TooLarge.code:
        return False
    return reject.redrive_outcome in {None, Outcome.REJECTED}


def _may_have_been_too_large(record: Record, reject: SnapshotReject) -> bool:
    size_bytes = len(record.value or b"")
    return size_bytes >= _SMALLEST_LIMIT_BYTES and (reject.faults_total, reject.fault_paths) == (1, ["$"])


def _was_stored_by(stored: SnapshotOrder, reject: _Version) -> bool:
    """Return whether this version was stored by the redrive of this reject, although its outcome is superseded."""
    if reject.redriven != Outcome.SUPERSEDED or reject.redriven_at is None or stored.stored_at is None:
        return False
    return reject.redriven_at <= stored.stored_at <= reject.redriven_at + _MAX_REDRIVE_TIME
