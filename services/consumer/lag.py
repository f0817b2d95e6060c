"""The lag of each partition, and the reason if a partition makes no progress."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

import attrs
from prometheus_client import Gauge

from orderlib.errors import OrderlibError, UnreadableRecord
from orderlib.ingestion.records import TopicPartition
from services.consumer.kafka_client import FetchFailed, KafkaClient
from services.program import event

#: The log ends are requested this often.
_LAG_S = 1.0

#: A partition with lag whose next offset has not moved for this long is not ready, whichever member has it.
STALLED_S = 20.0

#: An error that still occurs after this time makes the consumer not ready.
_ERROR_REPEATS_S = 5.0
#: An error that has not occurred for this time is over.
_ERROR_GONE_S = 15.0
#: An error that repeats is logged this often.
_ERROR_LOGGED_S = 30.0


@attrs.define
class _Repeating:
    error: OrderlibError
    first_s: float
    last_s: float
    logged_s: float


class LagMonitor:
    """The lag of the group in each partition of the topic, also in those of other members.

    It requests the log ends regularly, and never waits for them.
    """

    def __init__(
        self, kafka: KafkaClient, gauge: Gauge, clock: Callable[[], float], log: Callable[..., None] = event
    ) -> None:
        self._kafka = kafka
        self._log = log
        self._gauge = gauge
        self._clock = clock
        self._next_offsets: dict[TopicPartition, int] = {}
        self._moved_at_s: dict[TopicPartition, float] = {}
        self._lag: dict[TopicPartition, int] = {}
        self._ends: dict[TopicPartition, int] = {}
        #: When the log end was last read; for a new partition, when it became known.
        self._read_at_s: dict[TopicPartition, float] = {}
        self._published: set[TopicPartition] = set()
        self._request_at_s = clock()
        self._requested_ends: Callable[[], Mapping[TopicPartition, int] | None] | None = None
        #: By partition; ``None`` for an error of the whole group.
        self._errors: dict[TopicPartition | None, _Repeating] = {}

    def on_stored(self, next_offsets: Mapping[TopicPartition, int]) -> None:
        """Record the stored next offsets of these partitions."""
        for partition, next_offset in next_offsets.items():
            self._read_at_s.setdefault(partition, self._clock())
            if self._next_offsets.get(partition) != next_offset:
                self._next_offsets[partition] = next_offset
                self._moved_at_s[partition] = self._clock()
                self._errors.pop(partition, None)

    def on_assigned(self, next_offsets: Mapping[TopicPartition, int]) -> None:
        """Record that the group assigned these partitions, with these stored next offsets."""
        self._errors.pop(None, None)
        self.on_stored(next_offsets)

    def on_error(self, failed: FetchFailed) -> None:
        """Record an error that the client retries by itself. Log it if it is new, and then regularly."""
        now_s = self._clock()
        known = self._errors.get(failed.partition)
        if known is None or type(known.error) is not type(failed.error):
            known = self._errors[failed.partition] = _Repeating(failed.error, now_s, now_s, now_s - _ERROR_LOGGED_S)
        known.error, known.last_s = failed.error, now_s
        if now_s - known.logged_s >= _ERROR_LOGGED_S:
            known.logged_s = now_s
            self._log("kafka_error", logging.WARNING, reason=str(failed.error))

    def update(
        self, assigned: frozenset[TopicPartition], stored: Mapping[TopicPartition, int], *, in_outage: bool
    ) -> None:
        """Publish the lag, and request the log ends if it is time.

        ``stored`` has the next offsets of all partitions, as last read. In an outage no partition can make progress, so
        none counts as stalled.
        """
        now_s = self._clock()
        self.on_stored({p: next_offset for p, next_offset in stored.items() if p not in assigned})
        for partition, known in list(self._errors.items()):
            if now_s - known.last_s > _ERROR_GONE_S or (partition is not None and partition not in assigned):
                del self._errors[partition]
        if in_outage:
            self._moved_at_s = dict.fromkeys(self._next_offsets, now_s)
            self._read_at_s = self._moved_at_s.copy()
        if self._requested_ends is not None:
            requested_ends, self._requested_ends = self._requested_ends, None
            if (ends := requested_ends()) is None:
                self._requested_ends = requested_ends
            else:
                self._on_ends(ends)
        elif self._next_offsets and now_s >= self._request_at_s:
            self._request_at_s = now_s + _LAG_S
            self._requested_ends = self._kafka.request_ends(self._next_offsets)
        self._publish(assigned)

    def lag(self, partitions: Iterable[TopicPartition]) -> int:
        """Return the lag of these partitions together, as last measured."""
        return sum(self._lag.get(partition, 0) for partition in partitions)

    def remaining(self, partitions: Iterable[TopicPartition]) -> int | None:
        """Return how many records up to the log ends that were last read are not stored now, or ``None`` if unknown."""
        known = [p for p in partitions if p in self._ends]
        return sum(max(0, self._ends[p] - self._next_offsets[p]) for p in known) if known else None

    def error(self) -> OrderlibError | None:
        """Return an error that repeats without progress or that reports an unreadable record, or ``None``."""
        for known in self._errors.values():
            if isinstance(known.error, UnreadableRecord) or known.last_s - known.first_s >= _ERROR_REPEATS_S:
                return known.error
        return None

    def stalled_reason(self) -> str | None:
        """Return why records are not stored, or ``None`` if no partition is stalled."""
        if (error := self.error()) is not None:
            return str(error)
        stalled = [f"{p} {self._lag[p]:,}" for p in sorted(self._lag) if self._is_stalled(p)]
        if stalled:
            return f"records wait and none was stored for {STALLED_S:g} s; partition and lag: {', '.join(stalled)}"
        now_s = self._clock()
        unread = [str(p) for p, read_at_s in sorted(self._read_at_s.items()) if now_s - read_at_s >= STALLED_S]
        if unread:
            return f"the leader has not answered for {STALLED_S:g} s, so the lag is unknown: {', '.join(unread)}"
        return None

    def _is_stalled(self, partition: TopicPartition) -> bool:
        return bool(self._lag.get(partition)) and self._clock() - self._moved_at_s[partition] >= STALLED_S

    def _on_ends(self, ends: Mapping[TopicPartition, int]) -> None:
        self._ends.update(ends)
        for partition, end in ends.items():
            self._read_at_s[partition] = self._clock()
            self._lag[partition] = max(0, end - self._next_offsets[partition])
            if not self._lag[partition]:
                self._moved_at_s[partition] = self._clock()

    def _publish(self, assigned: Iterable[TopicPartition]) -> None:
        """Publish the lag of the assigned partitions, and of the stalled ones of other members."""
        published = {p for p in self._lag if p in assigned or self._is_stalled(p)}
        for partition in self._published - published:
            self._gauge.remove(str(partition.partition))
        for partition in published:
            self._gauge.labels(str(partition.partition)).set(self._lag[partition])
        self._published = published
