"""The promises of the consumer, checked against the records in the log and not against the store's own data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from typing import TypeGuard

from orderlib.ingestion.records import Batch, Classified, Record, Reject, StoredVersion
from orderlib.repository import Outcome
from tests.simulation.kafka import (
    CODES,
    KEYED_UIDS,
    POISON,
    REFUSED,
    REJECTED_TOMBSTONE,
    TOO_LARGE,
    TOPIC,
    Fetched,
    Topic,
)

#: The uids whose records are all in one partition.
KEYED = {f"u{uid}" for uid in range(KEYED_UIDS)}

#: Topic id, partition, offset.
Place = tuple[str, int, int]


#: The outcomes of a reject whose record counts as rejected.
STILL_REJECTED = {None, Outcome.REJECTED}


def is_bad(record: Record, classified: Classified) -> TypeGuard[Fetched]:
    """Return whether a record is a reject by the rules of its batch, or because PostgreSQL refuses it."""
    assert isinstance(record, Fetched)
    return isinstance(classified, Reject) or record.entry.kind == REFUSED


def accepted(batch: Batch) -> list[Place]:
    """Return the positions of the records that are no rejects."""
    positions = [record.position for record, classified in batch.classified if not is_bad(record, classified)]
    return [(position.topic_id, position.partition, position.offset) for position in positions]


class InvariantViolation(BaseException):
    """The consumer broke a promise. A BaseException, so that no ``except Exception`` of the program hides it."""


class Invariants:
    """Receives every commit. Raises InvariantViolation."""

    def __init__(self, count: Callable[[str], None]) -> None:
        self._count = count
        #: By topic id: each recreation of the topic adds one.
        self.topics: dict[str, Topic] = {}
        #: Next record to be handled, by topic id and partition; an operator's rewind sets it back.
        self.handled: dict[tuple[str, int], int] = {}
        #: The highest value that it ever had.
        self.reached: dict[tuple[str, int], int] = {}
        #: The records that a batch has rejected, and those that a batch has accepted.
        self.rejected: set[Place] = set()
        self.accepted: set[Place] = set()

    def on_topic_created(self, topic: Topic) -> None:
        """The topic was created or recreated. It begins at its earliest offsets."""
        self.topics[topic.topic_id] = topic
        for partition, earliest in enumerate(topic.earliest):
            self.handled[topic.topic_id, partition] = self.reached[topic.topic_id, partition] = earliest

    def on_batch(
        self,
        batch: Batch,
        outcomes: Sequence[Outcome],
        before: Mapping[str, StoredVersion],
        changes: Mapping[str, StoredVersion],
    ) -> None:
        """A batch is about to take effect."""
        topic = self.topics[batch.topic_ids[TOPIC]]
        records: dict[int, list[Fetched]] = {partition.partition: [] for partition in batch.ranges}
        bad = 0
        for record, classified in batch.classified:
            assert isinstance(record, Fetched)
            position = record.position
            records[position.partition].append(record)
            if is_bad(record, classified):
                bad += 1
                self.rejected.add((position.topic_id, position.partition, position.offset))
        self.accepted.update(accepted(batch))
        for (_, partition), offset_range in batch.ranges.items():
            key = (topic.topic_id, partition)
            if self.handled[key] != offset_range.expected_offset:
                raise InvariantViolation(f"{key} was handled up to {self.handled[key]}, and now {offset_range}")
            here = records[partition]
            log = topic.logs[partition]
            at = 0
            for offset in range(offset_range.expected_offset, offset_range.next_offset):
                entry = log[offset] if offset < len(log) else None
                if entry is None:
                    continue
                if at == len(here) or here[at].position.offset != offset or here[at].entry != entry:
                    raise InvariantViolation(f"{key} offset {offset} is not in its batch: {offset_range}")
                at += 1
            if at != len(here):
                raise InvariantViolation(
                    f"{key}: the batch holds records outside of {offset_range}, or of another topic"
                )
            self.handled[key] = offset_range.next_offset
            self.reached[key] = max(self.reached[key], offset_range.next_offset)
        refused = sum(
            not isinstance(classified, Reject) and classified.content_sha256 == b"!"
            for _, classified in batch.classified
        )
        if len(outcomes) - refused != len(batch.classified) - bad or outcomes.count(Outcome.REJECTED) != refused:
            raise InvariantViolation(f"{len(batch.classified)} records, {bad} of them bad, came to {outcomes}")
        if Outcome.SUPERSEDED in outcomes:
            self._count("superseded")
        self.on_orders(before, changes)

    def on_orders(self, before: Mapping[str, StoredVersion], changes: Mapping[str, StoredVersion]) -> None:
        """Orders are about to change: a keyed order never returns to an older version."""
        for uid, after in changes.items():
            old = before.get(uid)
            if old is not None and old.content_sha256 is None and after.content_sha256 is not None:
                self._count("stored after a tombstone")
            if old is None or uid not in KEYED or old == after:
                continue
            if after.position is None or (
                old.position is not None and old.position.topic_id != after.position.topic_id
            ):
                continue
            if old.position is None or after.position.offset < old.position.offset:
                raise InvariantViolation(f"{uid} went back from {old} to {after}")
            if after.position.offset == old.position.offset and old.content_sha256 != after.content_sha256:
                raise InvariantViolation(f"{uid} has another content at the same place: {old}, {after}")

    def on_accepted(
        self,
        batch: Batch,
        rejects: Mapping[Place, tuple[Fetched, Outcome | None]],
        redriving: Container[tuple[str | int, ...]],
    ) -> None:
        """A batch has taken effect: none of its accepted records counts as rejected, unless a redrive is at it."""
        for place in accepted(batch):
            if place in rejects and place not in redriving:
                self._count("reject accepted after a rewind")
                if rejects[place][1] in STILL_REJECTED:
                    raise InvariantViolation(f"{place} was accepted, and its reject is {rejects[place]}")

    def on_redriven(self, place: Place, before: Outcome | None, outcome: Outcome) -> None:
        """A reject is about to get its outcome."""
        if before not in {None, Outcome.REJECTED, outcome}:
            raise InvariantViolation(f"the reject {place} was {before} when redriven, and is {outcome} now")
        if outcome is Outcome.SUPERSEDED:
            self._count("redrive beside a newer version")
        elif outcome is Outcome.ERASED:
            self._count("erased by a redrive")

    def on_rewind(self, topic_id: str, partition: int, next_offset: int) -> None:
        """An operator moved an offset back: the records after it are handled again."""
        self.handled[topic_id, partition] = next_offset

    def all_handled(self, topic: Topic) -> bool:
        """Return whether all records of the topic are handled."""
        return all(self.handled[topic.topic_id, p] == len(log) for p, log in enumerate(topic.logs))

    def check_end(
        self,
        topic: Topic,
        orders: Mapping[str, StoredVersion],
        rejects: Mapping[Place, tuple[Fetched, Outcome | None]],
        offsets: Mapping[tuple[str, int], int],
    ) -> None:
        """All records are handled: check orders, rejects and offsets."""
        for partition, log in enumerate(topic.logs):
            if offsets.get((topic.topic_id, partition), topic.earliest[partition]) != len(log):
                raise InvariantViolation(f"the stored offsets are {offsets}, and the log ends are {topic.ends()}")
        expected_rejects: dict[Place, str] = {}
        #: Content and offset of the last valid record in each partition, and of the redriven ones behind it.
        last: dict[str, dict[tuple[str, int], list[tuple[bytes | None, int]]]] = {}
        #: Contents that a rewind may have written last, if the topic was recreated before it was complete.
        cut_short: defaultdict[str, set[bytes | None]] = defaultdict(set)
        for (topic_id, partition), reached in self.reached.items():
            for offset, entry in enumerate(self.topics[topic_id].logs[partition][:reached]):
                if entry is None:
                    continue
                place = (topic_id, partition, offset)
                earlier: list[tuple[bytes | None, int]] = []
                if place in self.rejected or entry.kind in {POISON, REFUSED}:
                    expected_rejects[place] = CODES[entry.kind]
                    redriven = rejects[place][1] if place in rejects else None
                    if entry.kind not in {TOO_LARGE, REJECTED_TOMBSTONE}:
                        continue
                    is_stored = redriven in {Outcome.STORED, Outcome.DUPLICATE, Outcome.ERASED}
                    if not is_stored and place not in self.accepted:
                        continue
                    earlier = last.get(f"u{entry.uid}", {}).get((topic_id, partition), [])
                uid, content = f"u{entry.uid}", entry.content_sha256
                last.setdefault(uid, {})[topic_id, partition] = [*earlier, (content, offset)]
                if self.handled[topic_id, partition] < reached:
                    cut_short[uid].add(content)
        stored = {place: CODES[record.entry.kind] for place, (record, _) in rejects.items()}
        if stored != expected_rejects:
            raise InvariantViolation(f"rejects: {stored}, expected {expected_rejects}")
        if orders.keys() != last.keys():
            raise InvariantViolation(f"stored are {sorted(orders)}, expected {sorted(last)}")
        for uid, version in orders.items():
            position = version.position
            if position is None:
                raise InvariantViolation(f"{uid} has no position")
            candidates = last[uid]
            if len(candidates) > 1:
                # Two partitions may write at the same time: a duplicate then has its position beside the other content.
                # And a reject that was redriven before a rewind is not redriven again after it.
                contents = {content for at in candidates.values() for content, _ in at} | cut_short[uid]
                holds = version.content_sha256 in contents
            else:
                at = candidates.get((position.topic_id, position.partition), [(b"", -1)])
                holds = at[-1] == (version.content_sha256, position.offset)
            if not holds:
                raise InvariantViolation(f"{uid} is {version}, expected one of {candidates}")

    def on_planned(self, batch: Batch, before: Mapping[str, StoredVersion], after: Mapping[str, StoredVersion]) -> None:
        """Compare the orders after a batch with the contract in its simplest form: one record after the other.

        That form does not exist for an order_uid in several partitions.
        """
        expected = {uid: (version.content_sha256, version.position) for uid, version in before.items()}
        for _, classified in batch.classified:
            if not isinstance(classified, Reject) and classified.content_sha256 != b"!":
                uid, position = classified.order_uid, classified.position
                at = expected[uid][1] if uid in expected else None
                # The record at the stored position itself counts, too: it may decode differently now.
                if at is None or position is None or at.topic_id != position.topic_id or at.offset <= position.offset:
                    expected[uid] = (classified.content_sha256, position)
        for uid, version in after.items():
            if uid in KEYED and (version.content_sha256, version.position) != expected[uid]:
                raise InvariantViolation(f"{uid} becomes {version}, one by one they would give {expected[uid]}")
