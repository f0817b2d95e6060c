"""The consumer without its I/O: events go in, actions come out.

Kafka, PostgreSQL, the clock and chance are outside. One job at most is under way at a time, and it is what touches the
store: find where partitions begin, or write a batch. All else is bookkeeping of three offsets per partition:

``collected``   next record to collect; what is below has been fetched
``dispatched``  next record of the batch after the one under way
the store's     next record to handle; only the store knows it, and the fence asserts it

Whatever happens to a partition, its fence decides what counted; nothing here needs to be certain.
"""

from __future__ import annotations

import enum
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random

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
from orderlib.ingestion.records import Batch, OffsetRange, PreparedOrder, Record, Reject
from orderlib.ingestion.retry import Backoff

#: A batch closes at the first of these.
MAX_RECORDS = 2_000
MAX_BYTES = 16 * 1024 * 1024
MAX_AGE_S = 0.05

#: One turn classifies records up to this many bytes, and at least one record; the others wait for the next turn. A
#: record of 8 MiB takes up to a second, and the loop must listen for signals between two of them.
TURN_BYTES = 1024 * 1024

#: Fetch at most this many records at once, and fewer if their mean size would exceed these bytes.
FETCH_RECORDS = 200
FETCH_BYTES = 2 * 1024 * 1024

#: A job that has no answer for so long counts as an outage, and fetching pauses.
STALL_S = 2.0

#: With nothing to do for so long: look whether the topic is still the same; and whether the ends asked for are reached.
TOPIC_CHECK_S = 5.0
END_CHECK_S = 0.2

#: The breaker looks at so many records, never fewer.
BREAKER_RECORDS = 1_000


@attrs.frozen
class ResolveOffsets:
    """Job: read the topic's id, and where the store says these partitions go on."""

    partitions: frozenset[int]


@attrs.frozen
class CommitBatch:
    """Job: write a batch in one transaction, behind its fence."""

    batch: Batch


@attrs.frozen
class CheckTopic:
    """Job: read the topic's id, and where the group stands in these partitions, whoever of it handled them."""

    partitions: frozenset[int]


@attrs.frozen
class Assign:
    """Fetch these partitions from these offsets on."""

    next_offsets: Mapping[int, int]


@attrs.frozen
class Seek:
    """Go on with this partition from another offset."""

    partition: int
    next_offset: int


@attrs.frozen
class CommitKafkaOffsets:
    """Tell Kafka how far we are, for lag tools only."""

    next_offsets: Mapping[int, int]


@attrs.frozen
class Pause:
    """An outage: stop fetching, keep polling. Said at each try that fails."""

    reason: OrderlibError
    #: Seconds until the next try; 0 while an answer is still awaited.
    wait_s: float


@attrs.frozen
class Resume:
    """The outage is over."""


StoreTask = ResolveOffsets | CommitBatch | CheckTopic
Command = StoreTask | Assign | Seek | CommitKafkaOffsets | Pause | Resume


@attrs.frozen
class PartitionEof:
    """Event: the client's position in a partition, past anything that holds no records."""

    partition: int
    next_offset: int


class Server(enum.Enum):
    """What a job waits for."""

    KAFKA = "Kafka"
    POSTGRES = "PostgreSQL"


class Breaker:
    """Trips when at least this fraction of the last 1,000 records was refused; never with a fraction of 0."""

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction
        self._recent: deque[bool] = deque(maxlen=BREAKER_RECORDS)

    def check(self, refused: Iterable[bool], rejects: Sequence[Reject] = ()) -> Callable[[], None]:
        """Raise BreakerTripped if these and the ones remembered are too many; else give what remembers them.

        Call that once the batch is committed. The error names the most frequent cause of these rejects.
        """
        recent = self._recent.copy()
        count = sum(recent)
        for flag in refused:
            if len(recent) == BREAKER_RECORDS:
                count -= recent[0]
            recent.append(flag)
            count += flag
            if self._fraction and len(recent) == BREAKER_RECORDS and count >= self._fraction * BREAKER_RECORDS:
                raise BreakerTripped(
                    f"{count:,} of the last {BREAKER_RECORDS:,} records were refused{_most_frequent_cause(rejects)}, "
                    "and nothing of this batch was stored: is this the right topic, and does this version know its "
                    "orders? If so, store these records as rejects, and what follows them, with "
                    "`ORDERS_BREAKER_FRACTION=0 python -m services.consumer --exit-at-end`; then start as usual"
                )

        def remember() -> None:
            self._recent = recent

        return remember


def _most_frequent_cause(rejects: Sequence[Reject]) -> str:
    """Return the code, path and kind of the most frequent first fault, never a value."""
    causes = Counter((reject.code, reject.faults[0].path, reject.faults[0].found) for reject in rejects)
    if not causes:
        return ""
    [((code, path, found), _)] = causes.most_common(1)
    return f" (most often {code} at {path}, found {found})"


class ConsumerCore:
    """What the consumer does next.

    Feed it events; ``take_commands`` gives what they led to, in order. ``now_s`` is of any one monotonic clock.
    ``until``: stop when the group has handled each partition up to this offset.
    """

    def __init__(
        self,
        topic: str,
        classify_record: Callable[[Record], PreparedOrder | Reject],
        rng: Random,
        until: Mapping[int, int] | None = None,
    ) -> None:
        self._topic = topic
        self._classify_record = classify_record
        self._backoff = Backoff(rng=rng)
        self._until = until
        self._commands: list[Command] = []
        self._topic_id: str | None = None
        #: Given to us by the group, not yet located.
        self._unresolved: set[int] = set()
        self._fetched_offset: dict[int, int] = {}
        self._submitted_offset: dict[int, int] = {}
        self._classified: list[tuple[Record, PreparedOrder | Reject]] = []
        self._bytes = 0
        #: Fetched, not yet classified.
        self._fetched: deque[Record | PartitionEof] = deque()
        #: Revoked since records were fetched last.
        self._just_revoked: set[int] = set()
        #: Of the records classified last; large until one is known.
        self._mean_bytes = FETCH_BYTES
        self._batch_opened_at_s: float | None = None
        self._task: StoreTask | None = None
        self._task_since_s = 0.0
        #: The job failed and waits for this moment.
        self._retry_at_s: float | None = None
        self._paused = False
        self._stopping = False
        self._error: OrderlibError | None = None

    # What the loop may ask.

    def take_commands(self) -> list[Command]:
        """The actions since the last call."""
        commands, self._commands = self._commands, []
        return commands

    @property
    def wants_records(self) -> bool:
        """Whether to fetch more records now."""
        return not self._paused and not self._stopping and not self._fetched and not self._full

    @property
    def fetch_limit(self) -> int:
        """How many records to fetch at once: fewer if they are large."""
        return max(1, min(FETCH_RECORDS, FETCH_BYTES // max(1, self._mean_bytes)))

    @property
    def has_more(self) -> bool:
        """Whether records that were fetched can be taken without waiting for anything."""
        return bool(self._fetched) and not self._paused and not self._stopping and not self._full

    @property
    def topic_id(self) -> str | None:
        """Kafka's id of the topic; known once partitions were located."""
        return self._topic_id

    @property
    def idle(self) -> bool:
        """Whether nothing is fetched, collected, under way or to be located."""
        return (
            self._task is None
            and not self._unresolved
            and not self._fetched
            and self._fetched_offset == self._submitted_offset
        )

    @property
    def assigned(self) -> frozenset[int]:
        """The partitions being fetched."""
        return frozenset(self._fetched_offset)

    @property
    def in_outage(self) -> bool:
        """Whether a job failed and will be tried again."""
        return self._paused

    # Events of the group and of Kafka.

    def on_partitions_assigned(self, partitions: Iterable[int]) -> None:
        """The group gave us partitions."""
        self._unresolved.update(partitions)

    def on_partitions_revoked(self, partitions: Iterable[int]) -> None:
        """The group took partitions, or they were lost. What is under way goes on; its fence decides."""
        for partition in partitions:
            self._unresolved.discard(partition)
            self._forget(partition)
            self._just_revoked.add(partition)

    def on_fetched(self, fetched: Iterable[Record | PartitionEof]) -> None:
        """Records and partition ends were fetched. ``classify`` takes them, one turn's share at a time."""
        if self._just_revoked:
            # A revocation is reported from within the call that returns these records.
            fetched = [one for one in fetched if _partition_of(one) not in self._just_revoked]
            self._just_revoked.clear()
        self._fetched.extend(fetched)

    def classify(self, now_s: float) -> None:
        """Classify fetched records until the batch is full or this turn has done enough.

        Those of partitions that were revoked meanwhile, or seen already, are passed over.
        """
        if not self.has_more:
            return
        fetched, collected, classified = self._fetched, self._fetched_offset, self._classified
        before, bytes_before = len(classified), self._bytes
        enough = min(self._bytes + TURN_BYTES, MAX_BYTES)
        while fetched and len(classified) < MAX_RECORDS and self._bytes < enough:
            one = fetched.popleft()
            if isinstance(one, Record):
                partition, offset = one.source.partition, one.source.offset
                if offset < collected.get(partition, offset + 1):
                    continue
                collected[partition] = offset + 1
                classified.append((one, self._classify_record(one)))
                self._bytes += one.size_bytes
            elif one.next_offset > collected.get(one.partition, one.next_offset):
                # Transaction markers and compacted gaps hold no records.
                collected[one.partition] = one.next_offset
        if len(classified) > before:
            self._mean_bytes = (self._bytes - bytes_before) // (len(classified) - before)
        self._open(now_s)

    def on_fatal(self, error: OrderlibError) -> None:
        """Something failed that no retry can help: stop."""
        self._stop(error)

    def on_tick(self, now_s: float, awaited: Server = Server.POSTGRES) -> None:
        """Time passed: start the job that is due, if none is under way.

        ``awaited``: the server whose answer the job under way waits for.
        """
        if self._task is None:
            if not self._stopping:
                self._start_next_task(now_s)
        elif self._retry_at_s is not None:
            if now_s >= self._retry_at_s:
                self._retry_at_s = None
                self._start(self._task, now_s)
        elif not self._paused and now_s - self._task_since_s >= STALL_S:
            kind = BrokerUnavailable if awaited is Server.KAFKA else DatabaseUnavailable
            self._pause(kind(f"{awaited.value} has not answered for {STALL_S:g} s"), 0)

    # Events of the job under way.

    def on_offsets_resolved(self, topic_id: str, next_offsets: Mapping[int, int]) -> None:
        """Where the partitions asked for go on."""
        self._finish()
        if self._is_another(topic_id):
            return
        self._topic_id = topic_id
        mine = {partition: offset for partition, offset in next_offsets.items() if partition in self._unresolved}
        self._unresolved -= mine.keys()
        self._fetched_offset.update(mine)
        self._submitted_offset.update(mine)
        if mine:
            self._commands.append(Assign(mine))

    def on_topic_checked(self, topic_id: str, next_offsets: Mapping[int, int]) -> None:
        """Which topic this is, and where the group stands."""
        self._finish()
        if self._is_another(topic_id) or self._until is None:
            return
        if all(next_offsets.get(partition, 0) >= end for partition, end in self._until.items()):
            self.on_stop()

    def on_batch_committed(self) -> None:
        """The batch under way is committed."""
        assert isinstance(self._task, CommitBatch)
        ranges = self._task.batch.ranges
        self._finish()
        reported = {p: offset_range.next_offset for p, offset_range in ranges.items() if p in self._fetched_offset}
        if reported:
            self._commands.append(CommitKafkaOffsets(reported))

    def on_failed(self, error: OrderlibError, now_s: float) -> None:
        """The job under way failed, and left nothing behind; of a COMMIT without an answer the next fence will tell."""
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
        """Stop: a task that the store has begun may end, nothing new begins."""
        self._stopping = True
        self._fetched.clear()
        if self._task in self._commands:
            # A lost fence has started the rest of its batch, and the store has not begun it.
            self._commands.remove(self._task)
            self._task = None
        elif self._retry_at_s is not None:
            self._task = self._retry_at_s = None

    @property
    def stopping(self) -> bool:
        """Whether nothing new begins: told to stop, at the ends asked for, or after an error."""
        return self._stopping

    @property
    def stopped(self) -> bool:
        """Whether it is stopping and nothing is under way any more."""
        return self._stopping and self._task is None

    @property
    def error(self) -> OrderlibError | None:
        """The first error after which nothing can go on."""
        return self._error

    # Bookkeeping.

    @property
    def _full(self) -> bool:
        return len(self._classified) >= MAX_RECORDS or self._bytes >= MAX_BYTES

    def _open(self, now_s: float) -> None:
        if self._batch_opened_at_s is None and self._fetched_offset != self._submitted_offset:
            self._batch_opened_at_s = now_s

    def _close_batch(self) -> Batch:
        assert self._topic_id is not None
        ranges = {
            partition: OffsetRange(expected_offset=self._submitted_offset[partition], next_offset=collected)
            for partition, collected in self._fetched_offset.items()
            if collected != self._submitted_offset[partition]
        }
        batch = Batch(topic=self._topic, topic_id=self._topic_id, ranges=ranges, classified=tuple(self._classified))
        self._submitted_offset = dict(self._fetched_offset)
        self._classified, self._bytes, self._batch_opened_at_s = [], 0, None
        return batch

    def _start_next_task(self, now_s: float) -> None:
        if self._unresolved:
            self._start(ResolveOffsets(frozenset(self._unresolved)), now_s)
        elif self._full or (self._batch_opened_at_s is not None and now_s - self._batch_opened_at_s >= MAX_AGE_S):
            self._start(CommitBatch(self._close_batch()), now_s)
        elif self.idle and self._until is not None and now_s - self._task_since_s >= END_CHECK_S:
            self._start(CheckTopic(frozenset(self._until)), now_s)
        elif self.idle and now_s - self._task_since_s >= TOPIC_CHECK_S:
            self._start(CheckTopic(frozenset()), now_s)

    def _is_another(self, topic_id: str) -> bool:
        """Whether the topic was made again since we located; then there is no going on."""
        if self._topic_id in {None, topic_id}:
            return False
        self._stop(TopicRecreated(f"topic {self._topic} was made again: its id is {topic_id}, it was {self._topic_id}"))
        return True

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

    def _forget(self, partition: int) -> None:
        self._fetched_offset.pop(partition, None)
        self._submitted_offset.pop(partition, None)
        # What was fetched before a seek must not be taken after it.
        self._fetched = deque(one for one in self._fetched if _partition_of(one) != partition)
        self._classified = [pair for pair in self._classified if pair[0].source.partition != partition]
        self._bytes = sum(record.size_bytes for record, _ in self._classified)
        if self._fetched_offset == self._submitted_offset:
            self._batch_opened_at_s = None

    def _on_fence_lost(self, error: FenceLost, now_s: float) -> None:
        """Go on where the store is with the partitions that are still ours; try the batch's others without them."""
        assert isinstance(self._task, CommitBatch)
        batch = self._task.batch
        for partition in error.partitions & self._fetched_offset.keys():
            there = error.next_offsets[partition]
            if there != batch.ranges[partition].next_offset:
                self._forget(partition)
                self._fetched_offset[partition] = self._submitted_offset[partition] = there
                self._commands.append(Seek(partition, there))
        rest = batch.without(error.partitions)
        if rest.ranges:
            self._start(CommitBatch(rest), now_s)
        else:
            self._finish()


def _partition_of(fetched: Record | PartitionEof) -> int:
    return fetched.source.partition if isinstance(fetched, Record) else fetched.partition
