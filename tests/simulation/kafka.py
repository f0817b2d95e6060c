"""A simulated Kafka: a topic that may be recreated, and a consumer group."""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import attrs

from orderlib import decode_order
from orderlib.errors import Fault
from orderlib.ingestion.records import Classified, OrderChange, PreparedOrder, Record, Reject, Tombstone, TopicPartition
from orderlib.repository import RecordPosition
from orderlib.testing import SAMPLE

if TYPE_CHECKING:
    from tests.simulation.process import Process

PARTITIONS = 3
TOPIC = "orders"

#: Each of these uids has one partition, uid modulo partitions. The others may be in any partition.
KEYED_UIDS = 5
UIDS = 7

#: The kinds of records. A redrive accepts one that is too large, because it contains a valid order, and a tombstone
#: from the time when tombstones were rejects. A consumer does, too, once the rules are relaxed.
GOOD, HEAVY, POISON, REFUSED, TOO_LARGE, TOMBSTONE, REJECTED_TOMBSTONE = range(7)
CODES = {
    POISON: "malformed_json",
    REFUSED: "refused_by_database",
    TOO_LARGE: "too_large",
    REJECTED_TOMBSTONE: "malformed_json",
}
TOMBSTONES = {TOMBSTONE, REJECTED_TOMBSTONE}

_TIME = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
_PREPARED_ORDERS = [PreparedOrder.of(attrs.evolve(decode_order(SAMPLE), order_uid=f"u{uid}")) for uid in range(UIDS)]
_FAULTS = (Fault(path="$", expected="something else", found="this"),)
#: Three of these fill a batch.
_HEAVY_VALUE = bytes(6 * 1024 * 1024)


class Entry(NamedTuple):
    """A record in the log."""

    uid: int
    content: int
    kind: int
    #: The number of its topic. No two topics have equal entries.
    topic_number: int

    @property
    def content_sha256(self) -> bytes | None:
        """What is stored of it; ``None`` if it erases its order."""
        return None if self.kind in TOMBSTONES else b"%d" % self.content


@attrs.frozen(kw_only=True, repr=False)
class Fetched(Record):
    """A record with its classification, so that nothing has to be decoded."""

    entry: Entry
    classified: Classified
    #: The result of a redrive, and what a consumer handles once the rules are relaxed.
    redriven: OrderChange | None

    def __repr__(self) -> str:
        return f"{self.position.partition}:{self.position.offset} {self.entry}"


@functools.cache
def fetched(topic_id: str, partition: int, offset: int, entry: Entry) -> Fetched:
    """Return the record that a consumer with this topic id gets."""
    position = RecordPosition(topic_id=topic_id, partition=partition, offset=offset)
    plain = Record(position=position, time=_TIME, topic=TOPIC, key=None, value=b"value")
    change: OrderChange
    if entry.kind in TOMBSTONES:
        change = Tombstone(order_uid=f"u{entry.uid}", position=position, time=_TIME)
    else:
        content_sha256 = b"!" if entry.kind == REFUSED else b"%d" % entry.content
        change = attrs.evolve(_PREPARED_ORDERS[entry.uid], content_sha256=content_sha256, position=position, time=_TIME)
    is_reject = entry.kind in {POISON, TOO_LARGE, REJECTED_TOMBSTONE}
    return Fetched(
        position=position,
        time=_TIME,
        topic=TOPIC,
        key=None,
        value=_HEAVY_VALUE if entry.kind == HEAVY else b"value",
        entry=entry,
        classified=Reject(record=plain, code=CODES[entry.kind], faults=_FAULTS, total_faults=1)
        if is_reject
        else change,
        redriven=None if entry.kind == POISON else change,
    )


class Topic:
    """The topic with one topic id. An offset without an entry is a gap, left by a marker or by compaction."""

    def __init__(self, number: int, earliest: list[int]) -> None:
        self.number = number
        self.topic_id = f"topic-{number}"
        self.earliest = earliest
        self.logs: list[list[Entry | None]] = [[None] * start for start in earliest]

    def ends(self) -> dict[TopicPartition, int]:
        return {TopicPartition(TOPIC, number): len(log) for number, log in enumerate(self.logs)}


class Group:
    """The assignment of partitions, now and after the rebalance. A process learns it with its next poll."""

    def __init__(self, chance: Callable[[], float]) -> None:
        self._chance = chance
        self.members: list[Process] = []
        self.holders: list[Process | None] = [None] * PARTITIONS
        self._targets: list[Process | None] = [None] * PARTITIONS

    def join(self, process: Process) -> None:
        self.members.append(process)
        self.rebalance()

    def drop(self, process: Process) -> None:
        """Remove a member: its partitions go to the others."""
        self.members.remove(process)
        self.holders = [None if holder is process else holder for holder in self.holders]
        self.rebalance()

    def rebalance(self) -> None:
        """Choose a random new assignment. A partition that stays with its member is not revoked."""
        members, chance = self.members, self._chance
        self._targets = [members[int(chance() * len(members))] if members else None for _ in range(PARTITIONS)]
        self.hand_over()

    def hand_over(self) -> None:
        """Revoke the partitions that move, and assign those that are free."""
        for partition, target in enumerate(self._targets):
            holder = self.holders[partition]
            if holder is target:
                continue
            if holder is not None:
                holder.kafka.inbox.append(("revoked", partition))
            elif target is not None:
                self.holders[partition] = target
                target.kafka.inbox.append(("assigned", partition))

    def released(self, process: Process, partition: int) -> None:
        """The process has released a revoked partition."""
        if self.holders[partition] is process:
            self.holders[partition] = None
            self.hand_over()
