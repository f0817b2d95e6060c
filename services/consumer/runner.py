"""The loop: carries events from Kafka and the store to ``ConsumerCore``, and carries out what it says.

Two threads. This one listens for signals and polls Kafka, always soon; the store's thread does whatever can block.
``tests.simulation`` runs this same loop on a simulated Kafka and store.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import queue
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

import attrs

from orderlib.errors import (
    BrokerUnavailable,
    ConfigurationError,
    OrderlibError,
    TopicRecreated,
    TransactionConflict,
    TransientError,
)
from orderlib.ingestion.consumer_core import (
    Assign,
    Breaker,
    CheckTopic,
    CommitBatch,
    CommitKafkaOffsets,
    ConsumerCore,
    Pause,
    ResolveOffsets,
    Resume,
    Seek,
    Server,
    StoreTask,
)
from orderlib.ingestion.records import Batch, Record, Reject
from orderlib.postgres.consumer_store import BatchResult, ConsumerStore
from services.consumer.health import Health, Metrics, never_fatal
from services.consumer.kafka_consumer import FetchFailed, KafkaConsumer, PollResult
from services.consumer.progress import Progress
from services.kafka import TopicInfo
from services.program import EXIT_DONE, EXIT_FAILED, EXIT_SETUP, event

T = TypeVar("T")

#: How long one wait for Kafka or the store lasts, so that the other is not left waiting.
_TURN_S = 0.02
_TURN_PAUSED_S = 0.1

#: How long a transaction waits for Kafka, because its locks and its snapshot are held meanwhile.
_KAFKA_IN_TRANSACTION_S = 2.0

#: How often the next offsets of all partitions are read.
_STORED_OFFSETS_S = 5.0

#: Once stopping, the batch in hand may take so long; then its socket is shut. Then leaving the group may.
STOP_BATCH_S = 5.0
STOP_CLOSE_S = 3.0

#: What a job came to: what to tell the core, or why it failed.
Result = Callable[[ConsumerCore], None] | BaseException


class KafkaClient(Protocol):
    """What the loop needs of Kafka; see ``KafkaConsumer``."""

    @property
    def down(self) -> bool:
        """Whether no broker can be reached."""

    @property
    def unreachable(self) -> str:
        """What to say when Kafka does not answer."""

    def fetch(self, topic_id: str | None, limit: int, timeout_s: float) -> Sequence[PollResult]:
        """Fetch records, at most so many."""

    def poll(self, topic_id: str | None, timeout_s: float) -> Sequence[PollResult]:
        """Stay in the group."""

    def assign(self, next_offsets: Mapping[int, int]) -> None:
        """Fetch from these offsets on."""

    def seek(self, partition: int, next_offset: int) -> None:
        """Go on from another offset."""

    def pause(self) -> None:
        """Fetch nothing until ``resume``."""

    def resume(self) -> None:
        """Fetch again."""

    def report(self, next_offsets: Mapping[int, int]) -> None:
        """Commit offsets for lag tools."""

    def ask_ends(self, partitions: Iterable[int]) -> Callable[[], Mapping[int, int] | None]:
        """Ask for log ends."""


class StoreClient(Protocol):
    """What the loop needs of the store; see ``StoreWorker``."""

    awaited: Server

    @property
    def stored_offsets(self) -> Mapping[int, int]:
        """The next offset of each partition of the topic, as last read."""

    def submit(self, task: StoreTask) -> None:
        """Carry out a job."""

    def take_result(self, timeout_s: float) -> Result | None:
        """Return what the job came to, if it is known within that time."""

    def abort(self) -> None:
        """Make the job fail soon."""


class StoreWorker:
    """Carries out jobs, one at a time."""

    def __init__(self, store: ConsumerStore, topic: KafkaConsumer, breaker: Breaker, metrics: Metrics) -> None:
        self._store = store
        self._topic = topic
        self._breaker = breaker
        self._metrics = metrics
        #: The server whose answer the job under way waits for.
        self.awaited = Server.POSTGRES
        #: The next offset of each partition of the topic, as last read. Replaced whole, for the loop to read.
        self.stored_offsets: Mapping[int, int] = {}
        self._read_stored_at_s = 0.0
        #: Whether Kafka takes longer to answer than a transaction waits.
        self._kafka_is_slow = False
        self._tasks: queue.SimpleQueue[StoreTask | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Result] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="store", daemon=True)
        self._thread.start()

    def submit(self, task: StoreTask) -> None:
        """Carry out a job."""
        self._tasks.put(task)

    def take_result(self, timeout_s: float) -> Result | None:
        """Return what the job under way came to, or ``None`` if it is not known within that time."""
        try:
            return self._results.get(timeout=timeout_s) if timeout_s else self._results.get_nowait()
        except queue.Empty:
            return None

    def abort(self) -> None:
        """Make the job under way fail soon."""
        self._store.abort()

    def close(self, timeout_s: float) -> None:
        """End after the job in hand, or leave it behind."""
        self._tasks.put(None)
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                self._results.put(self._carry_out(task))
            except BaseException as exc:  # noqa: BLE001  the loop stops for it, or tells the core
                self._results.put(exc)

    def _carry_out(self, task: StoreTask) -> Callable[[ConsumerCore], None]:
        match task:
            case ResolveOffsets(partitions):
                topic_id = self._wait_for_kafka(self._topic.ask()).topic_id
                earliest = self._wait_for_kafka(lambda: self._topic.earliest(partitions))
                start_partitions = self._store.start_partitions(self._topic.name, topic_id, earliest)
                return lambda core: core.on_offsets_resolved(topic_id, start_partitions)
            case CheckTopic(partitions):
                info = self._wait_for_kafka(self._topic.ask())
                stored = self._read_stored_offsets(info)
                reached = {p: stored[p] for p in partitions & stored.keys()}
                return lambda core: core.on_topic_checked(info.topic_id, reached)
            case CommitBatch(batch):
                self._write(batch)
                return lambda core: core.on_batch_committed()

    def _wait_for_kafka(self, answer: Callable[[], T]) -> T:
        self.awaited = Server.KAFKA
        try:
            return answer()
        finally:
            self.awaited = Server.POSTGRES

    def _write(self, batch: Batch) -> None:
        answer = self._ask_for_topic()
        info: list[TopicInfo] = []
        remember: list[Callable[[], None]] = []

        def check(written: BatchResult) -> None:
            # By identity: to hash two thousand sources would keep the database waiting.
            refused = {id(reject.record) for reject in written.rejects}
            flags = (id(record) in refused for record, _ in batch.classified)
            remember.append(self._breaker.check(flags, written.rejects))
            info.append(answer())
            if (now := info[-1].topic_id) != batch.topic_id:
                raise TopicRecreated(f"topic {batch.topic} was made again: its id is {now}, it was {batch.topic_id}")

        written = self._store.write(batch, check)
        for step in remember:
            step()
        for reject in written.rejects:
            _log_reject(reject)
        with never_fatal("metrics"):
            self._count(batch, written)
        if time.monotonic() >= self._read_stored_at_s:
            # The batch is committed. An outage now is the next job's.
            with contextlib.suppress(OrderlibError):
                self._read_stored_offsets(info[-1])

    def _ask_for_topic(self) -> Callable[[], TopicInfo]:
        """Ask for the topic. The result waits for the answer in the batch's transaction, but never for long.

        If Kafka did not answer in time before, wait here, before the transaction begins.
        """
        if self._kafka_is_slow:
            began_s = time.monotonic()
            info = self._wait_for_kafka(self._topic.ask())
            self._kafka_is_slow = time.monotonic() - began_s >= _KAFKA_IN_TRANSACTION_S
            return lambda: info
        ask = self._topic.ask(_KAFKA_IN_TRANSACTION_S)

        def wait() -> TopicInfo:
            try:
                return self._wait_for_kafka(ask)
            except BrokerUnavailable:
                self._kafka_is_slow = True
                raise

        return wait

    def _read_stored_offsets(self, info: TopicInfo) -> Mapping[int, int]:
        """Read the next offsets of all partitions, and return those that are stored.

        A partition that no member ever had begins at its earliest record.
        """
        stored = self._store.next_offsets(info.topic_id, info.partitions)
        new = info.partitions - stored.keys()
        earliest = self._wait_for_kafka(lambda: self._topic.earliest(new)) if new else {}
        self.stored_offsets = {**earliest, **stored}
        self._read_stored_at_s = time.monotonic() + _STORED_OFFSETS_S
        return stored

    def _count(self, batch: Batch, written: BatchResult) -> None:
        for outcome, count in written.outcomes.items():
            self._metrics.records.labels(outcome).inc(count)
        self._metrics.count_rejects(Counter(reject.code for reject in written.rejects))
        self._metrics.batch_records.observe(len(batch.classified))
        for step, seconds in written.seconds.items():
            self._metrics.batch_seconds.labels(step).observe(seconds)
        now = dt.datetime.now(dt.UTC)
        self._metrics.end_to_end.observe((now - record.time).total_seconds() for record, _ in batch.classified)


@attrs.define
class ConsumerRunner:
    """Runs until told to stop, until the ends asked for are reached, or until nothing can go on.

    The last turn logs why, and its exit status follows from the same facts: 0 if it was told to stop or is at the end,
    2 if a right is missing at the start, else 1.
    """

    _core: ConsumerCore
    _kafka: KafkaClient
    _worker: StoreClient
    _health: Health
    _metrics: Metrics
    _clock: Callable[[], float]
    _told_to_stop: threading.Event
    _log: Callable[..., None] = event
    #: Also stop for an error that keeps records from being read: the ends would never be reached.
    _exit_at_end: bool = False
    #: Told before anything failed.
    _stop_requested: bool = attrs.field(default=False, init=False)
    _stop_by_s: float | None = attrs.field(default=None, init=False)
    _progress: Progress = attrs.field(init=False)
    _fetched: bool = attrs.field(default=False, init=False)
    _lacks_right: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self._progress = Progress(self._kafka, self._metrics.lag, self._clock, self._log)

    def run(self) -> int:
        """Return the exit status."""
        while (status := self.turn()) is None:
            pass
        return status

    def turn(self) -> int | None:
        """Do a little of everything that is due; the exit status if this was the last turn."""
        try:
            self._health.turn()
            self._check_stop_event()
            self._take_result(0)
            self._core.classify(self._clock())
            self._core.on_tick(self._clock(), self._worker.awaited)
            self._execute_commands()
            with never_fatal("lag"):
                aborted = self._core.in_outage or self._kafka.down
                self._progress.turn(self._core.assigned, self._worker.stored_offsets, aborted=aborted)
            if not self._core.stopped:
                self._poll_kafka()
        except OrderlibError as exc:
            self._core.on_fatal(exc)
        except Exception as exc:  # noqa: BLE001  a mistake in the program: nothing is certain any more
            return self._give_up(exc)
        if self._core.stopped:
            return self._end()
        if self._stop_by_s is not None and self._clock() >= self._stop_by_s:
            self._log("batch_abandoned", logging.WARNING, waited_seconds=STOP_BATCH_S)
            self._worker.abort()
            return self._end()
        return None

    def _end(self) -> int:
        error = self._core.error
        if error is not None:
            self._log("stopped", logging.ERROR, reason=str(error))
        elif not self._stop_requested:
            self._log("end_reached")
        if self._stop_requested or error is None:
            return EXIT_DONE
        return EXIT_SETUP if self._lacks_right else EXIT_FAILED

    def _give_up(self, exc: Exception) -> int:
        """Log where it happened. The message is left out: it may hold what a record says."""
        frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(exc.__traceback__)]
        self._log("unforeseen_error", logging.ERROR, error=type(exc).__name__, frames=frames)
        self._core.on_fatal(OrderlibError(f"unforeseen {type(exc).__name__}"))
        return self._end()

    def _check_stop_event(self) -> None:
        if self._told_to_stop.is_set() and not self._core.stopping:
            self._stop_requested = True
            self._log("stopping")
            self._core.on_stop()
        if self._core.stopping and self._stop_by_s is None:
            self._health.not_ready = "stopping"
            self._stop_by_s = self._clock() + STOP_BATCH_S

    def _take_result(self, timeout_s: float) -> None:
        result = self._worker.take_result(timeout_s)
        if isinstance(result, OrderlibError):
            self._metrics.retries.labels(type(result).__name__).inc()
            if isinstance(result, TransactionConflict):
                self._log("collision", logging.WARNING, reason=str(result))
            self._core.on_failed(result, self._clock())
        elif isinstance(result, BaseException):
            raise result
        elif result is not None:
            result(self._core)

    def _execute_commands(self) -> None:
        for command in self._core.take_commands():
            match command:
                case ResolveOffsets() | CommitBatch() | CheckTopic():
                    self._worker.submit(command)
                case Assign(next_offsets):
                    self._kafka.assign(next_offsets)
                    self._progress.on_assigned(next_offsets)
                    self._log("partitions_assigned", next_offsets=next_offsets)
                case Seek(partition, next_offset):
                    self._kafka.seek(partition, next_offset)
                    self._progress.at({partition: next_offset})
                    self._log("fence_lost", logging.WARNING, partition=partition, next_offset=next_offset)
                case CommitKafkaOffsets(next_offsets):
                    self._kafka.report(next_offsets)
                    self._progress.at(next_offsets)
                case Pause(reason, wait_s):
                    self._kafka.pause()
                    stalled_by_kafka = not wait_s and isinstance(reason, BrokerUnavailable)
                    cause = self._kafka.unreachable if stalled_by_kafka else str(reason)
                    self._health.not_ready = cause
                    self._log("waiting", logging.WARNING, reason=cause, seconds=round(wait_s, 2))
                case Resume():
                    self._kafka.resume()
                    self._log("resumed")
        if not self._core.stopping and not self._core.in_outage:
            self._health.not_ready = self._kafka.unreachable if self._kafka.down else self._progress.fault()

    def _poll_kafka(self) -> None:
        """Wait a little for the next event."""
        topic_id = self._core.topic_id
        if self._core.wants_records:
            fetched = self._kafka.fetch(topic_id, self._core.fetch_limit, _TURN_S)
        elif self._core.in_outage:
            fetched = self._kafka.poll(topic_id, _TURN_PAUSED_S)
        elif self._core.has_more:
            fetched = self._kafka.poll(topic_id, 0)
        else:
            self._take_result(_TURN_S)
            return
        self._fetched = self._fetched or any(isinstance(one, Record) for one in fetched)
        self._core.on_fetched([one for one in fetched if not isinstance(one, FetchFailed)])
        for one in fetched:
            if isinstance(one, FetchFailed):
                self._on_fetch_failed(one)

    def _on_fetch_failed(self, failed: FetchFailed) -> None:
        """Go on if the client may overcome the error by itself, else stop."""
        error = failed.error
        if not isinstance(error, TransientError):
            # A missing right shows with the first request that needs it.
            self._lacks_right = isinstance(error, ConfigurationError) and not self._fetched
            self._core.on_fatal(error)
            return
        self._metrics.retries.labels(type(error).__name__).inc()
        self._progress.on_error(failed)
        if self._exit_at_end and (repeated := self._progress.error()) is not None:
            self._core.on_fatal(repeated)


def _log_reject(reject: Reject) -> None:
    source = reject.record.source
    event(
        "rejected",
        logging.WARNING,
        topic=reject.record.topic,
        partition=source.partition,
        offset=source.offset,
        code=reject.code,
        fault=str(reject.faults[0]),
        faults=reject.total_faults,
    )
