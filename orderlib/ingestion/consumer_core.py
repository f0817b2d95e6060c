"""The consumer without I/O: events go in, commands come out.

Kafka, PostgreSQL, the clock and the random numbers are outside. At most one store task is in progress: resolve the
offsets of partitions, commit a batch, or check the topics. The core keeps two offsets of each partition in memory:

``_fetched_offset``    the next offset after the records in the open batch
``_submitted_offset``  the next offset after the last batch that was given to the store; the open batch begins here

The third offset, the stored next offset, is in PostgreSQL. The offsets in memory may be stale, for example after a
rebalance. The fenced UPDATE of a batch is authoritative.
"""

from __future__ import annotations

import enum
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random
from types import MappingProxyType

import attrs

from orderlib.errors import (
    BreakerTripped,
    BrokerUnavailable,
    DatabaseUnavailable,
    FenceLost,
    OrderlibError,
    TopicRecreated,
    TransactionConflict,
    TransientError,
)
from orderlib.ingestion.records import Batch, Classified, OffsetRange, Record, Reject, TopicPartition
from orderlib.ingestion.retry import Backoff

#: A batch closes as soon as the store is idle, and at the latest at one of these. The next batch fills meanwhile.
MAX_RECORDS = 2_000
MAX_BYTES = 16 * 1024 * 1024

#: With a larger lag than a batch, the store waits for a full batch, but at most for this time: orders that are late
#: anyway are stored faster in fewer transactions.
LINGER_S = 0.05

#: One turn of the loop classifies at least one record, and no more after this number of bytes. A record of 8 MiB takes
#: up to a second, and the loop must check for signals between two of them.
CLASSIFY_BYTES = 1024 * 1024

#: One fetch returns at most this number of records, and fewer if their expected size exceeds this number of bytes.
FETCH_RECORDS = 200
FETCH_BYTES = 2 * 1024 * 1024

#: A store task that has no result after this time is an outage: fetching pauses.
STALL_S = 2.0

#: While the consumer is idle, it checks the topic id this often.
TOPIC_CHECK_S = 5.0
#: While the consumer is idle, or past the offsets to stop at, it compares them with the stored offsets this often.
END_CHECK_S = 0.2

#: The breaker examines this number of the last records, never fewer.
BREAKER_RECORDS = 1_000


@attrs.frozen
class ResolveOffsets:
    """Store task: read the topic ids and the stored next offsets of these partitions. Create the missing offsets."""

    partitions: frozenset[TopicPartition]


@attrs.frozen
class CommitBatch:
    """Store task: commit a batch in one transaction that begins with its fence."""

    batch: Batch


@attrs.frozen
class CheckTopics:
    """Store task: read the topic ids and the stored next offsets of all partitions, also those of other members."""


@attrs.frozen
class Assign:
    """Fetch these partitions, each from its next offset."""

    next_offsets: Mapping[TopicPartition, int]


@attrs.frozen
class Seek:
    """Fetch this partition from another offset."""

    partition: TopicPartition
    next_offset: int


@attrs.frozen
class CommitKafkaOffsets:
    """Commit these next offsets to Kafka. Only lag tools read them."""

    next_offsets: Mapping[TopicPartition, int]


@attrs.frozen
class Pause:
    """An outage: stop fetching, keep polling. The core repeats this command at each failed attempt."""

    reason: OrderlibError
    #: Seconds until the next attempt; 0 while the store task is still in progress.
    wait_s: float


@attrs.frozen
class Resume:
    """The outage is over."""


StoreTask = ResolveOffsets | CommitBatch | CheckTopics
Command = StoreTask | Assign | Seek | CommitKafkaOffsets | Pause | Resume


@attrs.frozen
class PartitionEof:
    """Event: the end of a partition was reached. The next offset is after any gap at the end."""

    partition: TopicPartition
    next_offset: int


class AwaitedServer(enum.Enum):
    """A server whose response a store task may wait for."""

    KAFKA = "Kafka"
    POSTGRES = "PostgreSQL"


class Breaker:
    """Trips when at least this fraction of the last 1,000 records was rejected. With a fraction of 0 it never trips."""

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction
        self._recent: deque[bool] = deque(maxlen=BREAKER_RECORDS)

    def would_trip(self, rejected: Iterable[bool]) -> bool:
        """Return whether the breaker trips at one of these records. Record nothing."""
        if not self._fraction:
            return False
        recent = self._recent.copy()
        count = sum(recent)
        for is_rejected in rejected:
            if len(recent) == BREAKER_RECORDS:
                count -= recent[0]
            recent.append(is_rejected)
            count += is_rejected
            if len(recent) == BREAKER_RECORDS and count >= self._fraction * BREAKER_RECORDS:
                return True
        return False

    def record(self, rejected: Iterable[bool]) -> None:
        """Record which records of a committed batch were rejected. A batch that was rolled back does not count."""
        self._recent.extend(rejected)

    def error(self, rejects: Sequence[Reject]) -> BreakerTripped:
        """Return the error for a batch that would trip the breaker. It names the most frequent cause of its rejects."""
        return BreakerTripped(
            f"at least {100 * self._fraction:.4g} % of the last {BREAKER_RECORDS:,} records were rejected"
            f"{_most_frequent_cause(rejects)}, and nothing of this batch was stored. Check the topic and the "
            "version of orderlib. If both are correct, store these records as rejects: run the "
            "consumer once with ORDERS_BREAKER_FRACTION=0 and --exit-at-end; then start as usual"
        )


def _most_frequent_cause(rejects: Sequence[Reject]) -> str:
    """Return the code, path and kind of the most frequent first fault, never a value."""
    causes = Counter((reject.code, reject.faults[0].path, reject.faults[0].found) for reject in rejects)
    if not causes:
        return ""
    [((code, path, found), _)] = causes.most_common(1)
    return f" (most often {code} at {path}, found {found})"


class ConsumerCore:
    """Decides what the consumer does next.

    The caller reports each event, and then carries out the commands from ``take_commands`` in their order. All
    ``now_s`` come from the same monotonic clock. With ``until``, stop when the stored next offset of each partition has
    reached the given one.
    """

    def __init__(
        self,
        classify_record: Callable[[Record], Classified],
        rng: Random,
        until: Mapping[TopicPartition, int] | None = None,
    ) -> None:
        self._classify_record = classify_record
        self._backoff = Backoff(rng=rng)
        self._until = until
        self._commands: list[Command] = []
        self._topic_ids: dict[str, str] = {}
        #: Assigned by the group; their stored next offsets are not known yet.
        self._unresolved: set[TopicPartition] = set()
        self._fetched_offset: dict[TopicPartition, int] = {}
        self._submitted_offset: dict[TopicPartition, int] = {}
        self._classified: list[tuple[Record, Classified]] = []
        self._bytes = 0
        #: Fetched, but not classified yet.
        self._fetched: deque[Record | PartitionEof] = deque()
        #: Revoked since the last fetch.
        self._just_revoked: set[tuple[str, int]] = set()
        #: Mean size of the records that the last turn classified; large until a record was classified.
        self._mean_bytes = FETCH_BYTES
        self._batch_opened_at_s: float | None = None
        #: The lag was larger than a batch when it was last reported.
        self._has_large_lag = False
        self._task: StoreTask | None = None
        self._task_since_s = 0.0
        self._end_checked_s = 0.0
        #: The store task failed; its next attempt begins at this time.
        self._retry_at_s: float | None = None
        self._paused = False
        self._stopping = False
        self._error: OrderlibError | None = None

    # Commands and state.

    def take_commands(self) -> list[Command]:
        """Return the commands since the last call."""
        commands, self._commands = self._commands, []
        return commands

    @property
    def wants_records(self) -> bool:
        """Return whether to fetch records now."""
        return not self._paused and not self._stopping and not self._fetched and not self._full

    @property
    def fetch_limit(self) -> int:
        """Return the maximum number of records for the next fetch: fewer if records are large."""
        return max(1, min(FETCH_RECORDS, FETCH_BYTES // max(1, self._mean_bytes)))

    @property
    def has_more(self) -> bool:
        """Return whether ``classify`` has fetched records to continue with."""
        return bool(self._fetched) and not self._paused and not self._stopping and not self._full

    @property
    def topic_ids(self) -> Mapping[str, str]:
        """Return the id of each topic. A topic is missing until the first offsets of its partitions are resolved."""
        return self._topic_ids

    @property
    def idle(self) -> bool:
        """Return whether there is no store task, no record to classify or commit, and no offset to resolve."""
        return (
            self._task is None
            and not self._unresolved
            and not self._fetched
            and self._fetched_offset == self._submitted_offset
        )

    @property
    def busy(self) -> bool:
        """Return whether a store task is in progress."""
        return self._task is not None and self._retry_at_s is None

    @property
    def waits_only_for_records(self) -> bool:
        """Return whether the runner may wait for the next record.

        No store task is in progress, or due before that record or the next tick.
        """
        return (
            self._task is None
            and not self._unresolved
            and not self._fetched
            and (self._batch_opened_at_s is None or self._has_large_lag)
        )

    @property
    def assigned(self) -> frozenset[TopicPartition]:
        """Return the partitions that are assigned and whose offsets are resolved."""
        return frozenset(self._fetched_offset)

    @property
    def in_outage(self) -> bool:
        """Return whether fetching is paused because of an outage."""
        return self._paused

    # Events from Kafka and the consumer group.

    def on_partitions_assigned(self, partitions: Iterable[TopicPartition]) -> None:
        """The group assigned partitions: resolve their offsets."""
        self._unresolved.update(partitions)

    def on_partitions_revoked(self, partitions: Iterable[TopicPartition]) -> None:
        """The group revoked partitions, or they were lost: drop their records.

        A batch in progress continues. Its fence decides whether it may commit.
        """
        for partition in partitions:
            self._unresolved.discard(partition)
            self._drop(partition)
            self._just_revoked.add(partition)

    def on_fetched(self, fetched: Iterable[Record | PartitionEof]) -> None:
        """Records and partition ends were fetched: keep them for ``classify``."""
        if self._just_revoked:
            # The callback of a revocation runs inside the fetch that returned these records.
            fetched = [item for item in fetched if _partition_of(item) not in self._just_revoked]
            self._just_revoked.clear()
        self._fetched.extend(fetched)

    def classify(self, now_s: float) -> None:
        """Classify fetched records and add them to the open batch, until it is full or the turn's limit is reached.

        Skip records of revoked partitions and records that were fetched before.
        """
        if not self.has_more:
            return
        fetched, fetched_offset, classified = self._fetched, self._fetched_offset, self._classified
        before, bytes_before = len(classified), self._bytes
        max_bytes = min(self._bytes + CLASSIFY_BYTES, MAX_BYTES)
        topic, number, partition = "", -1, TopicPartition("", -1)
        next_offset: int | None = None
        while fetched and len(classified) < MAX_RECORDS and self._bytes < max_bytes:
            item = fetched.popleft()
            if isinstance(item, Record):
                position = item.position
                # Kafka returns many records of a partition in a row: look its offset up once.
                if position.partition != number or item.topic != topic:
                    topic, number = item.topic, position.partition
                    partition = TopicPartition(topic, number)
                    next_offset = fetched_offset.get(partition)
                if next_offset is None or position.offset < next_offset:
                    continue
                next_offset = fetched_offset[partition] = position.offset + 1
                classified.append((item, self._classify_record(item)))
                self._bytes += item.size_bytes
            elif item.next_offset > fetched_offset.get(item.partition, item.next_offset):
                # The gap was left by transaction markers or compaction. The batch moves the stored offset past it.
                fetched_offset[item.partition] = item.next_offset
                number = -1
        if len(classified) > before:
            self._mean_bytes = (self._bytes - bytes_before) // (len(classified) - before)
        self._open_batch(now_s)

    def on_lag(self, records: int) -> None:
        """The lag of the assigned partitions was measured. It affects latency and throughput, never what is stored."""
        self._has_large_lag = records > MAX_RECORDS

    def on_fatal(self, error: OrderlibError) -> None:
        """Stop because of an error that a retry cannot correct."""
        self._stop(error)

    def on_tick(self, now_s: float, awaited: AwaitedServer = AwaitedServer.POSTGRES) -> None:
        """Start the store task that is due, retry a failed one, or pause because the one in progress takes too long.

        ``awaited`` is the server whose response the task in progress waits for.
        """
        if self._task is None:
            if not self._stopping:
                self._start_next_task(now_s)
        elif self._retry_at_s is not None:
            if now_s >= self._retry_at_s:
                self._retry_at_s = None
                self._start(self._task, now_s)
        elif not self._paused and now_s - self._task_since_s >= STALL_S:
            kind = BrokerUnavailable if awaited is AwaitedServer.KAFKA else DatabaseUnavailable
            self._pause(kind(f"{awaited.value} did not answer within {STALL_S:g} s"), 0)

    # Results of the store task in progress.

    def on_offsets_resolved(self, topic_ids: Mapping[str, str], next_offsets: Mapping[TopicPartition, int]) -> None:
        """The offsets are resolved: fetch the partitions that are still assigned, from their stored next offsets."""
        self._finish()
        if self._is_recreated(topic_ids):
            return
        self._topic_ids.update(topic_ids)
        resolved = {partition: offset for partition, offset in next_offsets.items() if partition in self._unresolved}
        self._unresolved -= resolved.keys()
        self._fetched_offset.update(resolved)
        self._submitted_offset.update(resolved)
        if resolved:
            self._commands.append(Assign(resolved))

    def on_topics_checked(self, topic_ids: Mapping[str, str], next_offsets: Mapping[TopicPartition, int]) -> None:
        """The topics were checked: stop if one was recreated, or if the stored next offsets have reached ``until``."""
        self._finish()
        if self._is_recreated(topic_ids):
            return
        self._continue_at_stored(next_offsets)
        if self._until is not None and all(
            next_offsets.get(partition, 0) >= end for partition, end in self._until.items()
        ):
            self.on_stop()

    def on_batch_committed(self, next_offsets: Mapping[TopicPartition, int] = MappingProxyType({})) -> None:
        """The batch in progress is committed. ``next_offsets`` are the stored ones, if they were read after that."""
        assert isinstance(self._task, CommitBatch)
        ranges = self._task.batch.ranges
        self._finish()
        committed = {p: offset_range.next_offset for p, offset_range in ranges.items() if p in self._fetched_offset}
        if committed:
            self._commands.append(CommitKafkaOffsets(committed))
        self._continue_at_stored(next_offsets)

    def on_failed(self, error: OrderlibError, now_s: float) -> None:
        """The store task in progress failed.

        Nothing changed in the store, unless a COMMIT got no answer: then the fence of the next attempt shows its
        outcome.
        """
        if self._stopping and isinstance(error, FenceLost | TransientError):
            self._task = None
        elif isinstance(error, FenceLost):
            self._on_fence_lost(error, now_s)
        elif isinstance(error, TransactionConflict):
            self._retry_at_s = now_s
        elif isinstance(error, TransientError):
            wait_s = self._backoff.next_wait_s()
            self._retry_at_s = now_s + wait_s
            self._pause(error, wait_s)
        else:
            self._task = None
            self._stop(error)

    def on_stop(self) -> None:
        """Stop: wait for the store task in progress, start nothing new."""
        self._stopping = True
        self._fetched.clear()
        if self._task in self._commands:
            # After a lost fence, the rest of the batch is still a command that the caller has not taken.
            self._commands.remove(self._task)
            self._task = None
        elif self._retry_at_s is not None:
            self._task = self._retry_at_s = None

    @property
    def stopping(self) -> bool:
        """Return whether nothing new starts: after ``on_stop``, at ``until``, or after an error."""
        return self._stopping

    @property
    def stopped(self) -> bool:
        """Return whether the consumer is stopping and no store task is in progress."""
        return self._stopping and self._task is None

    @property
    def error(self) -> OrderlibError | None:
        """Return the first error that stopped the consumer, or ``None``."""
        return self._error

    # Bookkeeping.

    @property
    def _full(self) -> bool:
        return len(self._classified) >= MAX_RECORDS or self._bytes >= MAX_BYTES

    def _open_batch(self, now_s: float) -> None:
        if self._batch_opened_at_s is None and self._fetched_offset != self._submitted_offset:
            self._batch_opened_at_s = now_s

    def _is_due(self, now_s: float) -> bool:
        """Return whether to commit the open batch although it is not full."""
        opened_at_s = self._batch_opened_at_s
        return opened_at_s is not None and (not self._has_large_lag or now_s - opened_at_s >= LINGER_S)

    def _close_batch(self) -> Batch:
        ranges = {
            partition: OffsetRange(expected_offset=self._submitted_offset[partition], next_offset=next_offset)
            for partition, next_offset in self._fetched_offset.items()
            if next_offset != self._submitted_offset[partition]
        }
        topic_ids = {topic: self._topic_ids[topic] for topic, _ in ranges}
        batch = Batch(topic_ids=topic_ids, ranges=ranges, classified=tuple(self._classified))
        self._submitted_offset = dict(self._fetched_offset)
        self._classified, self._bytes, self._batch_opened_at_s = [], 0, None
        return batch

    def _start_next_task(self, now_s: float) -> None:
        if self._unresolved:
            self._start(ResolveOffsets(frozenset(self._unresolved)), now_s)
        elif self._is_past_until and now_s - self._end_checked_s >= END_CHECK_S:
            # Also while records arrive: other producers may never stop.
            self._check_topics(now_s)
        elif self._full or self._is_due(now_s):
            self._start(CommitBatch(self._close_batch()), now_s)
        elif self.idle and now_s - self._task_since_s >= (TOPIC_CHECK_S if self._until is None else END_CHECK_S):
            self._check_topics(now_s)

    @property
    def _is_past_until(self) -> bool:
        """Return whether this consumer has committed its partitions up to ``until``. Other members may not yet have."""
        submitted = self._submitted_offset
        return self._until is not None and all(submitted.get(p, end) >= end for p, end in self._until.items())

    def _check_topics(self, now_s: float) -> None:
        self._end_checked_s = now_s
        self._start(CheckTopics(), now_s)

    def _is_recreated(self, topic_ids: Mapping[str, str]) -> bool:
        """Return whether a topic was recreated since its first offsets were resolved; if so, stop."""
        for topic, topic_id in topic_ids.items():
            if (known := self._topic_ids.get(topic, topic_id)) != topic_id:
                self._stop(recreated_error(topic, topic_id, known))
                return True
        return False

    def _start(self, task: StoreTask, now_s: float) -> None:
        self._task, self._task_since_s = task, now_s
        self._commands.append(task)

    def _pause(self, reason: OrderlibError, wait_s: float) -> None:
        self._paused = True
        self._commands.append(Pause(reason, wait_s))

    def _finish(self) -> None:
        self._task = None
        self._backoff.reset()
        if self._paused:
            self._paused = False
            self._commands.append(Resume())

    def _stop(self, error: OrderlibError) -> None:
        self._error = self._error or error
        self.on_stop()

    def _drop(self, partition: TopicPartition) -> None:
        self._fetched_offset.pop(partition, None)
        self._submitted_offset.pop(partition, None)
        # Records fetched before a seek must not enter a batch after it.
        self._fetched = deque(item for item in self._fetched if _partition_of(item) != partition)
        self._classified = [pair for pair in self._classified if _partition_of(pair[0]) != partition]
        self._bytes = sum(record.size_bytes for record, _ in self._classified)
        if self._fetched_offset == self._submitted_offset:
            self._batch_opened_at_s = None

    def _on_fence_lost(self, error: FenceLost, now_s: float) -> None:
        """Continue the lost partitions from their stored offsets, and commit the rest of the batch without them."""
        assert isinstance(self._task, CommitBatch)
        batch = self._task.batch
        lost = {p: error.next_offsets[p] for p in self._fetched_offset if p in error.partitions}
        for partition, stored_offset in lost.items():
            # If it equals the end of the batch, an earlier COMMIT of this batch succeeded and its answer was lost.
            if stored_offset != batch.ranges[partition].next_offset:
                self._continue_at(partition, stored_offset)
        if lost:
            self._commands.append(CommitKafkaOffsets(lost))
        rest = batch.without(error.partitions)
        if rest.ranges:
            self._start(CommitBatch(rest), now_s)
        else:
            self._finish()

    def _continue_at_stored(self, next_offsets: Mapping[TopicPartition, int]) -> None:
        """Continue at the stored offsets. With no batch in progress, they are those of the last batch of this consumer.

        A server that is promoted without the last transactions has earlier ones. A partition without new records would
        not notice: no batch of it would lose its fence.
        """
        moved = {
            p: next_offsets[p]
            for p, submitted in self._submitted_offset.items()
            if next_offsets.get(p, submitted) != submitted
        }
        for partition, stored_offset in moved.items():
            self._continue_at(partition, stored_offset)
        if moved:
            self._commands.append(CommitKafkaOffsets(moved))

    def _continue_at(self, partition: TopicPartition, stored_offset: int) -> None:
        self._drop(partition)
        self._fetched_offset[partition] = self._submitted_offset[partition] = stored_offset
        self._commands.append(Seek(partition, stored_offset))


def recreated_error(topic: str, topic_id: str, known_topic_id: str) -> TopicRecreated:
    """Return the error for a topic whose present id is not the known one."""
    return TopicRecreated(f"topic {topic} was recreated: its id is {topic_id}, it was {known_topic_id}")


def _partition_of(fetched: Record | PartitionEof) -> tuple[str, int]:
    return (fetched.topic, fetched.position.partition) if isinstance(fetched, Record) else fetched.partition
