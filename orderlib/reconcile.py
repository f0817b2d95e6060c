"""The proof that every record is accounted for: a pure comparison of what Kafka holds with what the store holds.

Feed it one consistent look at the store and the records below the offsets in it, in any order of partitions; then
``findings`` names whatever does not hold. What it remembers of an order is a digest and a position, never its content.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import attrs

from orderlib.codecs import content_sha256
from orderlib.ingest import Arrival, Record, RecordPosition, Reject
from orderlib.models import Order
from orderlib.repository import Outcome


@attrs.frozen(kw_only=True)
class Finding:
    """One thing that does not hold."""

    #: What is wrong, in words.
    what: str
    #: Where: a uid, a position, or both. Never content.
    order_uid: str | None = None
    partition: int | None = None
    offset: int | None = None

    def __str__(self) -> str:
        at = "" if self.partition is None else f" [{self.partition}]@{self.offset}"
        return f"{self.order_uid or 'record'}{at}: {self.what}"


@attrs.frozen
class _Version:
    """The last valid record of an order in a partition."""

    offset: int
    content_sha256: bytes


class Reconciliation:
    """Compares one life of a topic with one look at the store.

    ``first``: where reading began in each partition, at the earliest record that Kafka still holds or later;
    ``next_offsets``: where the group stood in that look; ``rejects``: the rejects of this topic in that look, with the
    outcome of their redrive.
    """

    def __init__(
        self,
        topic_id: str,
        first: Mapping[int, int],
        next_offsets: Mapping[int, int],
        rejects: Mapping[tuple[int, int], Outcome | None],
    ) -> None:
        self._topic_id = topic_id
        self._first = first
        self._next_offsets = next_offsets
        self._rejects = rejects
        self._versions: dict[str, dict[int, _Version]] = {}
        self._findings: list[Finding] = []
        #: How many records, orders and so on were looked at.
        self.counts: Counter[str] = Counter()

    def on_record(self, record: Record, judged: Arrival | Reject) -> None:
        """A record below the group's next offset, and what it is by the rules of today."""
        place = (record.source.partition, record.source.offset)
        self.counts["records"] += 1
        if place in self._rejects:
            self.counts["rejects"] += 1
            if self._rejects[place] not in {Outcome.STORED, Outcome.DUPLICATE}:
                return
        if isinstance(judged, Reject):
            self._find(f"refused ({judged.code}), and not kept as a reject", record.source)
            return
        versions = self._versions.setdefault(judged.order_uid, {})
        before = versions.get(place[0])
        if before is None or before.offset < place[1]:
            versions[place[0]] = _Version(place[1], judged.content_sha256)

    def on_stored(self, order: Order | None, order_uid: str, sha256: bytes, source: RecordPosition | None) -> None:
        """A stored order as it reads now (``None`` if a part of it is missing), the digest kept with it, its source."""
        self.counts["orders"] += 1
        versions = self._versions.pop(order_uid, {})
        now = content_sha256(order) if order is not None else None
        if now is None:
            self._find("a part of it is missing", source, order_uid)
        elif now != sha256:
            self._find("its content is not what its digest says", source, order_uid)
        elif source is None:
            self.counts["saved from Python"] += 1
        elif source.topic_id != self._topic_id:
            if versions:
                self._find("stored from another life of the topic", source, order_uid)
        elif not self._was_read(source.partition, source.offset):
            self.counts["from records that were not read"] += 1
        elif not versions:
            self._find("stored, but Kafka has no such order", source, order_uid)
        elif now not in {version.content_sha256 for version in versions.values()}:
            self._find("differs from the last valid record", source, order_uid)

    def findings(self) -> Iterator[Finding]:
        """What does not hold, after the last event."""
        yield from self._findings
        for order_uid, versions in self._versions.items():
            partition, version = max(versions.items(), key=lambda entry: entry[1].offset)
            yield Finding(what="is not stored", order_uid=order_uid, partition=partition, offset=version.offset)

    def several_partitions(self) -> Iterator[str]:
        """The orders seen in more than one partition, so not keyed by order_uid; ask before the store's turn."""
        return (order_uid for order_uid, versions in self._versions.items() if len(versions) > 1)

    def unread_ranges(self) -> Iterator[tuple[int, int, int]]:
        """The (partition, from, to) that the group handled and nobody read again; ``to`` is not among them."""
        for partition, first in sorted(self._first.items()):
            if unread := min(first, self._next_offsets.get(partition, 0)):
                yield partition, 0, unread

    def _was_read(self, partition: int, offset: int) -> bool:
        return self._first.get(partition, 0) <= offset < self._next_offsets.get(partition, 0)

    def _find(self, what: str, source: RecordPosition | None, order_uid: str | None = None) -> None:
        self._findings.append(
            Finding(
                what=what,
                order_uid=order_uid,
                partition=source.partition if source else None,
                offset=source.offset if source else None,
            )
        )
