"""A simulated PostgreSQL, with the real rules of ``orderlib.ingestion``.

Every operation is a generator. At each ``yield`` others may act and failures may occur. An operation that is closed
before its COMMIT is rolled back.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

from orderlib.errors import FenceLost, TopicRecreated, TransactionConflict
from orderlib.ingestion.consumer_core import ConsumerCore
from orderlib.ingestion.records import (
    Batch,
    OrderChange,
    Reject,
    StoredVersion,
    TopicPartition,
    WritePlan,
    plan_redrive,
    plan_writes,
)
from orderlib.repository import Outcome, RecordPosition
from tests.simulation.invariants import STILL_REJECTED, Invariants, Place, accepted, is_bad
from tests.simulation.kafka import REFUSED, TOPIC, Fetched


class Bug(enum.Enum):
    """A bug that the invariants must find."""

    NO_FENCE = "no-fence"
    COMMIT_BEFORE_WRITE = "commit-before-write"
    NO_SUPERSEDED_RULE = "no-superseded-rule"
    NO_ERASED_POSITION = "no-erased-position"
    REJECT_SKIPPED = "reject-skipped"
    DOUBLE_REDRIVE = "double-redrive"
    ACCEPTED_STAYS_REJECTED = "accepted-stays-rejected"
    NO_TOPIC_ID_CHECK = "no-topic-id-check"
    SILENT_STOP = "silent-stop"


class Step(enum.Enum):
    """The progress of an operation."""

    ASKING = "asking"
    #: Another session holds a lock.
    WAITING = "waiting"
    #: In its transaction.
    WORKING = "working"
    #: COMMIT was sent, and may or may not have taken effect.
    COMMITTING = "committing"
    #: COMMIT took effect, and its response has not arrived yet.
    ANSWERING = "answering"


#: The result of an operation: it reports the event to the core.
ReportEvent = Callable[[ConsumerCore], None]
Steps = Generator[Step, None, ReportEvent | None]
#: The key of a row that can be locked: an offset, an order or a reject.
Row = tuple[str | int, ...]
Planner = Callable[[Sequence[OrderChange], Mapping[str, StoredVersion]], WritePlan]


class Operation:
    """An operation in the store, and its progress."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.step = Step.ASKING


class Store:
    """Offsets, orders and rejects; READ COMMITTED, row locks held until the end of a transaction."""

    def __init__(self, invariants: Invariants, bug: Bug | None) -> None:
        self._invariants = invariants
        self._bug = bug
        self.offsets: dict[tuple[str, int], int] = {}
        self.orders: dict[str, StoredVersion] = {}
        #: With the outcome of a redrive.
        self.rejects: dict[Place, tuple[Fetched, Outcome | None]] = {}
        self.locks: dict[Row, object] = {}
        self.unavailable = False

    def next_offsets(
        self, topic_ids: Mapping[str, str], partitions: Iterable[TopicPartition]
    ) -> dict[TopicPartition, int]:
        rows = {partition: (topic_ids[partition.topic], partition.partition) for partition in sorted(partitions)}
        return {partition: self.offsets[row] for partition, row in rows.items() if row in self.offsets}

    def start_partitions(
        self, topic_ids: Mapping[str, str], earliest: Mapping[TopicPartition, int]
    ) -> Generator[Step, None, dict[TopicPartition, int]]:
        """Like ``ConsumerStore.start_partitions``."""
        if earliest.keys() - self.next_offsets(topic_ids, earliest).keys():
            yield Step.COMMITTING
            for (topic, number), offset in earliest.items():
                self.offsets.setdefault((topic_ids[topic], number), offset)
            yield Step.ANSWERING
        return self.next_offsets(topic_ids, earliest)

    def write(self, batch: Batch, topic_id: Callable[[], str]) -> Steps:
        """Like ``ConsumerStore.write``, with the check of the topic id before COMMIT."""
        transaction = object()
        try:
            yield from self._lock(
                transaction, [(batch.topic_ids[topic], number) for topic, number in sorted(batch.ranges)]
            )
            self._fence(batch)
            if self._bug is Bug.COMMIT_BEFORE_WRITE:
                self._move_offsets(batch)
            yield Step.WORKING
            order_changes = [classified for _, classified in batch.classified if not isinstance(classified, Reject)]
            read = self.orders.copy()
            after = read.copy()
            outcomes = self._store(order_changes, after, self._plan)
            self._invariants.on_planned(batch, read, after)
            changed = [uid for uid in sorted(after) if after[uid] is not read.get(uid)]
            yield Step.WORKING
            yield from self._lock(transaction, [(uid,) for uid in changed])
            changes = self._changes(changed, read, after)
            if self._bug is not Bug.NO_TOPIC_ID_CHECK and topic_id() != batch.topic_ids[TOPIC]:
                raise TopicRecreated(f"the topic id is no longer {batch.topic_ids}")
            yield Step.COMMITTING
            self._invariants.on_batch(batch, outcomes, self.orders, changes)
            self.orders.update(changes)
            self._supersede_rejects(batch)
            self._store_rejects(batch)
            self._move_offsets(batch)
            self._invariants.on_accepted(batch, self.rejects, self.locks)
        finally:
            self._unlock(transaction)
        yield Step.ANSWERING
        return ConsumerCore.on_batch_committed

    def redrive(self) -> Steps:
        """Like ``rejects.redrive``, for all rejects."""
        transaction = object()
        try:
            places = self._to_redrive()
            yield from self._lock(transaction, places)
            places = [place for place in places if self._is_waiting(place)]
            of_topics = {topic_id for topic_id, _, _ in places}
            yield from self._lock(transaction, [key for key in self.offsets if key[0] in of_topics])
            yield Step.WORKING
            redriven = {place: self.rejects[place][0].redriven for place in places}
            uids = sorted({change.order_uid for change in redriven.values() if change is not None})
            yield from self._lock(transaction, [(uid,) for uid in uids])
            after = self.orders.copy()
            outcomes = {
                place: Outcome.REJECTED if change is None else self._store([change], after, plan_redrive)[0]
                for place, change in redriven.items()
            }
            yield Step.COMMITTING
            for place, outcome in outcomes.items():
                record, before = self.rejects[place]
                self._invariants.on_redriven(place, before, outcome)
                self.rejects[place] = record, outcome
            changes = {uid: after[uid] for uid in uids if uid in after}
            self._invariants.on_orders(self.orders, changes)
            self.orders.update(changes)
        finally:
            self._unlock(transaction)
        yield Step.ANSWERING
        return None

    # Locks.

    def _lock(self, transaction: object, rows: Sequence[Row]) -> Generator[Step]:
        while any(self.locks.get(row, transaction) is not transaction for row in rows):
            yield Step.WAITING
        for row in rows:
            self.locks[row] = transaction

    def _unlock(self, transaction: object) -> None:
        if transaction in self.locks.values():
            self.locks = {row: holder for row, holder in self.locks.items() if holder is not transaction}

    # Offsets.

    def _fence(self, batch: Batch) -> None:
        stored = self.next_offsets(batch.topic_ids, batch.ranges)
        lost = {p for p, offset_range in batch.ranges.items() if stored[p] != offset_range.expected_offset}
        if lost and self._bug is not Bug.NO_FENCE:
            raise FenceLost(lost, stored)

    def _move_offsets(self, batch: Batch) -> None:
        for (topic, number), offset_range in batch.ranges.items():
            self.offsets[batch.topic_ids[topic], number] = offset_range.next_offset

    # Orders.

    def _plan(self, changes: Sequence[OrderChange], stored: Mapping[str, StoredVersion]) -> WritePlan:
        if self._bug is Bug.NO_SUPERSEDED_RULE:
            stored = {uid: _version(v.content_sha256, None) for uid, v in stored.items()}
        if self._bug is Bug.NO_ERASED_POSITION:
            stored = {uid: version for uid, version in stored.items() if version.content_sha256 is not None}
        return plan_writes(changes, stored)

    def _store(
        self, changes: Sequence[OrderChange], stored: dict[str, StoredVersion], planner: Planner
    ) -> list[Outcome]:
        """Like ``writes.store``: refused orders are found by bisection, and the others are stored."""
        if not any(change.content_sha256 == b"!" for change in changes):
            plan = planner(changes, stored)
            for write in plan.writes:
                stored[write.order_uid] = _version(write.content_sha256, write.position)
            for uid, move in plan.moves.items():
                stored[uid] = _version(stored[uid].content_sha256, move.position)
            return list(plan.outcomes)
        if len(changes) == 1:
            return [Outcome.REJECTED]
        middle = len(changes) // 2
        return self._store(changes[:middle], stored, planner) + self._store(changes[middle:], stored, planner)

    def _changes(
        self, uids: Sequence[str], read: Mapping[str, StoredVersion], after: Mapping[str, StoredVersion]
    ) -> dict[str, StoredVersion]:
        """Return the effect of the statements on the current rows, which may have changed since they were read."""
        changes = {}
        for uid in uids:
            if uid not in read and uid in self.orders:
                raise TransactionConflict("another transaction stored the same order meanwhile")
            version = after[uid]
            if uid in read and read[uid].content_sha256 == version.content_sha256:
                version = _version(self.orders[uid].content_sha256, version.position)
            changes[uid] = version
        return changes

    # Rejects.

    def _supersede_rejects(self, batch: Batch) -> None:
        """Like ``SUPERSEDE_REJECTS``: skip the rejects that a redrive has locked."""
        if self._bug is Bug.ACCEPTED_STAYS_REJECTED:
            return
        for place in accepted(batch):
            if place in self.rejects and place not in self.locks and self.rejects[place][1] in STILL_REJECTED:
                self.rejects[place] = self.rejects[place][0], Outcome.SUPERSEDED

    def _store_rejects(self, batch: Batch) -> None:
        bad = [record for record, classified in batch.classified if is_bad(record, classified)]
        if self._bug is Bug.REJECT_SKIPPED:
            bad = [record for record in bad if record.entry.kind != REFUSED or len(batch.classified) == 1]
        for record in bad:
            position = record.position
            self.rejects.setdefault((position.topic_id, position.partition, position.offset), (record, None))

    def _is_waiting(self, place: Place) -> bool:
        return self.rejects[place][1] in STILL_REJECTED or self._bug is Bug.DOUBLE_REDRIVE

    def _to_redrive(self) -> list[Place]:
        return sorted(place for place in self.rejects if self._is_waiting(place))


def _version(content_sha256: bytes | None, position: RecordPosition | None) -> StoredVersion:
    return StoredVersion(content_sha256=content_sha256, position=position, first_stored_at=None)
