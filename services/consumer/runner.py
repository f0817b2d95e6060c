"""The runner: passes events from Kafka and the store to ``ConsumerCore``, and carries out its commands.

There are two threads. The runner's thread checks for signals and polls Kafka, and never waits for long. The store
thread (``StoreWorker``) carries out store tasks, which may block. ``tests.simulation`` runs the same runner with a
simulated Kafka and store.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import math
import queue
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Protocol, TypeVar

import attrs

from orderlib.entry_point import EXIT_CONFIGURATION, EXIT_DONE, EXIT_FAILED, StopEvent
from orderlib.errors import (
    BrokerUnavailable,
    ConfigurationError,
    FenceLost,
    OrderlibError,
    TransactionConflict,
    TransientError,
)
from orderlib.ingestion.consumer_core import (
    Assign,
    AwaitedServer,
    Breaker,
    CheckTopics,
    CommitBatch,
    CommitKafkaOffsets,
    ConsumerCore,
    Pause,
    ResolveOffsets,
    Resume,
    Seek,
    StoreTask,
    recreated_error,
)
from orderlib.ingestion.records import Batch, Record, Reject, TopicPartition
from orderlib.postgres.consumer_store import BatchResult, ConsumerStore
from orderlib.repository import Outcome
from services.consumer.health import Health, never_fatal
from services.consumer.kafka_client import FetchFailed, KafkaClient
from services.consumer.lag import LagMonitor
from services.consumer.metrics import ConsumerMetrics
from services.consumer.summary import Summary
from services.kafka import TopicInfo
from services.program import event

T = TypeVar("T")

#: The longest wait for the next record, or for the result of the store while the open batch is full.
_POLL_S = 0.02
#: The longest wait for the store while the open batch can take more records: they are collected this often.
_COLLECT_S = 0.005
_POLL_PAUSED_S = 0.1

#: How often offsets are committed to Kafka, for lag tools.
_KAFKA_COMMIT_S = 1.0

#: A transaction waits this long for Kafka, because it holds locks and a snapshot meanwhile.
_KAFKA_IN_TRANSACTION_S = 2.0

#: How often the next offsets of all partitions are read.
_STORED_OFFSETS_S = 5.0

#: After a request for the earliest offsets failed, the next one is sent this much later.
_NO_LEADER_S = 60.0

#: How often the size of the indexes is checked.
_ADVICE_S = 3600.0

#: While stopping, the batch in progress may take this long. After that its socket is shut down.
STOP_BATCH_S = 5.0
#: Then leaving the group may take this long.
STOP_CLOSE_S = 3.0

#: The result of a store task: a function that reports the event to the core, or the error.
Result = Callable[[ConsumerCore], None] | BaseException


class StoreClient(Protocol):
    """The store as the runner sees it. It carries out one store task at a time, outside of the runner's thread."""

    #: The server whose response the task in progress waits for.
    awaited: AwaitedServer

    @property
    def stored_offsets(self) -> Mapping[TopicPartition, int]:
        """The stored next offset of each partition of the topics, as last read."""

    @property
    def outcomes(self) -> Counter[Outcome]:
        """How many records had each outcome since the start. Never changed, only replaced."""

    def submit(self, task: StoreTask) -> None:
        """Start a task. The previous one must have ended. Never wait."""

    def take_result(self, timeout_s: float) -> Result | None:
        """Return the result of the task, once. Return ``None`` if there is none within ``timeout_s``."""

    def abort(self) -> None:
        """Make the task in progress fail soon, and every later one."""


class StoreWorker:
    """Carries out store tasks in its own thread, one at a time; see ``StoreClient``."""

    def __init__(self, store: ConsumerStore, kafka: KafkaClient, breaker: Breaker, metrics: ConsumerMetrics) -> None:
        self._store = store
        self._kafka = kafka
        self._breaker = breaker
        self._metrics = metrics
        self.awaited = AwaitedServer.POSTGRES
        #: Always replaced, never changed, because the runner reads them from another thread.
        self.stored_offsets: Mapping[TopicPartition, int] = {}
        self.outcomes: Counter[Outcome] = Counter()
        self._read_stored_at_s = 0.0
        self._ask_earliest_at_s = 0.0
        self._advise_at_s = 0.0
        #: Whether Kafka's last response took longer than a transaction waits.
        self._kafka_is_slow = False
        self._tasks: queue.SimpleQueue[StoreTask | None] = queue.SimpleQueue()
        # No SimpleQueue: Python 3.11 waits in its ``get`` without a limit if a signal interrupts it and the handler
        # returns after the timeout. The main thread takes the results and handles signals.
        self._results: queue.Queue[Result] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="store", daemon=True)
        self._thread.start()

    def submit(self, task: StoreTask) -> None:
        """Start a task."""
        self._tasks.put(task)

    def take_result(self, timeout_s: float) -> Result | None:
        """Return the result of the task, or ``None`` if there is none within ``timeout_s``."""
        try:
            return self._results.get(timeout=timeout_s) if timeout_s else self._results.get_nowait()
        except queue.Empty:
            return None

    def abort(self) -> None:
        """Make the task in progress fail soon, and every later one."""
        self._store.abort()

    def close(self, timeout_s: float) -> None:
        """End the thread after the task in progress. Stop waiting for it after ``timeout_s``."""
        self._tasks.put(None)
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                self._results.put(self._carry_out(task))
            except BaseException as exc:  # noqa: BLE001  the runner handles it
                self._results.put(exc)

    def _carry_out(self, task: StoreTask) -> Callable[[ConsumerCore], None]:
        match task:
            case ResolveOffsets(partitions):
                topic_ids = _topic_ids(self._wait_for_kafka(self._kafka.request_topics()))
                next_offsets = self._store.next_offsets(topic_ids, partitions)
                # Not of the others: a partition without a leader would delay those that have one.
                if new := partitions - next_offsets.keys():
                    earliest = self._wait_for_kafka(lambda: self._kafka.earliest(new))
                    next_offsets |= self._store.start_partitions(topic_ids, earliest)
                return lambda core: core.on_offsets_resolved(topic_ids, next_offsets)
            case CheckTopics():
                topics = self._wait_for_kafka(self._kafka.request_topics())
                stored = self._read_stored_offsets(topics)
                return lambda core: core.on_topics_checked(_topic_ids(topics), stored)
            case CommitBatch(batch):
                stored = self._write(batch)
                return lambda core: core.on_batch_committed(stored)

    def _wait_for_kafka(self, response: Callable[[], T]) -> T:
        self.awaited = AwaitedServer.KAFKA
        try:
            return response()
        finally:
            self.awaited = AwaitedServer.POSTGRES

    def _write(self, batch: Batch) -> Mapping[TopicPartition, int]:
        """Write a batch. Return the stored offsets of all partitions, if it was time to read them."""
        wait_for_topics = self._request_topics()
        topics: Mapping[str, TopicInfo] = {}

        def check(result: BatchResult) -> None:
            nonlocal topics
            if self._breaker.would_trip(_rejected(batch, result)):
                raise self._breaker.error(result.rejects)
            topics = wait_for_topics()
            for topic, topic_id in batch.topic_ids.items():
                if (current_id := topics[topic].topic_id) != topic_id:
                    raise recreated_error(topic, current_id, topic_id)

        try:
            result = self._store.write(batch, check)
        except FenceLost as exc:
            raise self._with_missing_offsets(batch, exc) from exc
        self._breaker.record(_rejected(batch, result))
        self.outcomes = self.outcomes + result.outcomes
        for reject in result.rejects:
            _log_reject(reject)
        with never_fatal("metrics"):
            self._count(batch, result)
        if time.monotonic() >= self._read_stored_at_s:
            # The batch is committed. If the store is unavailable now, the next task reports it.
            with contextlib.suppress(OrderlibError):
                return self._read_stored_offsets(topics)
        return {}

    def _with_missing_offsets(self, batch: Batch, lost: FenceLost) -> FenceLost:
        """Begin a partition again whose offset is not stored: it was lost with the last transactions of a primary."""
        missing = {p for p in batch.ranges if p in lost.partitions and p not in lost.next_offsets}
        if not missing:
            return lost
        earliest = self._wait_for_kafka(lambda: self._kafka.earliest(missing))
        started = self._store.start_partitions(batch.topic_ids, earliest)
        return FenceLost(lost.partitions, {**lost.next_offsets, **started})

    def _request_topics(self) -> Callable[[], Mapping[str, TopicInfo]]:
        """Request the topic ids, and return a function that waits for them inside the batch's transaction.

        If the last response was late, wait here, before the transaction begins.
        """
        if self._kafka_is_slow:
            began_s = time.monotonic()
            topics = self._wait_for_kafka(self._kafka.request_topics())
            self._kafka_is_slow = time.monotonic() - began_s >= _KAFKA_IN_TRANSACTION_S
            return lambda: topics
        response = self._kafka.request_topics(_KAFKA_IN_TRANSACTION_S)

        def wait() -> Mapping[str, TopicInfo]:
            try:
                return self._wait_for_kafka(response)
            except BrokerUnavailable:
                self._kafka_is_slow = True
                raise

        return wait

    def _read_stored_offsets(self, topics: Mapping[str, TopicInfo]) -> Mapping[TopicPartition, int]:
        """Read the next offset of each partition. One without a stored offset will begin at its earliest offset."""
        partitions = {TopicPartition(topic, number) for topic, info in topics.items() for number in info.partitions}
        stored = self._store.next_offsets(_topic_ids(topics), partitions)
        self.stored_offsets = {**self._earliest(partitions - stored.keys()), **stored}
        self._read_stored_at_s = time.monotonic() + _STORED_OFFSETS_S
        self._advise()
        return self.stored_offsets

    def _earliest(self, partitions: AbstractSet[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Return the earliest offsets, or nothing if a partition has no leader: the others do not wait for it again."""
        if not partitions or time.monotonic() < self._ask_earliest_at_s:
            return {}
        try:
            return self._wait_for_kafka(lambda: self._kafka.earliest(partitions))
        except BrokerUnavailable:
            self._ask_earliest_at_s = time.monotonic() + _NO_LEADER_S
            return {}

    def _advise(self) -> None:
        """Log a line of advice, once, if the indexes have outgrown PostgreSQL's memory."""
        if (now_s := time.monotonic()) < self._advise_at_s:
            return
        advice = self._store.index_advice()
        self._advise_at_s = now_s + _ADVICE_S if advice is None else math.inf
        if advice is not None:
            event("indexes_outgrew_memory", logging.WARNING, advice=advice)

    def _count(self, batch: Batch, result: BatchResult) -> None:
        for outcome, count in result.outcomes.items():
            self._metrics.records.labels(outcome).inc(count)
        self._metrics.count_rejects(Counter(reject.code for reject in result.rejects))
        self._metrics.unknown_fields.inc(result.with_unknown_fields)
        self._metrics.batch_records.observe(len(batch.classified))
        for step, seconds in result.seconds.items():
            self._metrics.batch_seconds.labels(step).observe(seconds)
        now = dt.datetime.now(dt.UTC)
        self._metrics.end_to_end.observe((now - record.time).total_seconds() for record, _ in batch.classified)


@attrs.define
class ConsumerRunner:
    """Runs until a stop request, the end of the topic (with ``--exit-at-end``), or an error that a person must correct.

    It logs the reason. The exit status has the same reason: 0 for a stop request or the end, 2 for a configuration
    error of a fetch before the first record, for example a missing ACL, else 1.
    """

    _core: ConsumerCore
    _kafka: KafkaClient
    _worker: StoreClient
    _health: Health
    _metrics: ConsumerMetrics
    _clock: Callable[[], float]
    _stop_event: StopEvent
    _log: Callable[..., None] = event
    #: Also stop for an error of Kafka that repeats, because the consumer would never reach the end.
    _exit_at_end: bool = False
    #: The stop event was set before any error.
    _stop_requested: bool = attrs.field(default=False, init=False)
    _stop_by_s: float | None = attrs.field(default=None, init=False)
    _lag_monitor: LagMonitor = attrs.field(init=False)
    _summary: Summary = attrs.field(init=False)
    #: The last fetch returned as many messages as it may, so there are probably more.
    _more_ready: bool = attrs.field(default=False, init=False)
    #: Not committed to Kafka yet.
    _kafka_offsets: dict[TopicPartition, int] = attrs.field(factory=dict, init=False)
    _commit_to_kafka_at_s: float = attrs.field(default=0.0, init=False)
    _fetched: bool = attrs.field(default=False, init=False)
    _configuration_failed: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self._lag_monitor = LagMonitor(self._kafka, self._metrics.lag, self._clock, self._log)
        self._summary = Summary(self._clock, self._log)

    def run(self) -> int:
        """Run until the end, and return the exit status."""
        while (status := self.run_once()) is None:
            pass
        return status

    def run_once(self) -> int | None:
        """Run one turn of the loop. Return the exit status if it was the last one."""
        try:
            self._health.heartbeat()
            self._check_stop_event()
            self._take_result(self._wait_for_store_s)
            # Before the next fetch: a seek must take effect before other records of its partition arrive.
            self._execute_commands()
            if not self._core.stopped:
                self._poll_kafka()
            self._core.classify(self._clock())
            self._core.on_tick(self._clock(), self._worker.awaited)
            self._execute_commands()
            self._commit_to_kafka()
            with never_fatal("lag"):
                self._update_lag()
        except OrderlibError as exc:
            # Also if it is transient: a command was not carried out, or the client dropped the records of the fetch
            # that failed. To continue would skip them; a restart continues at the stored offsets.
            self._core.on_fatal(exc)
        except Exception as exc:  # noqa: BLE001  a bug: the state is unknown
            return self._on_unexpected_error(exc)
        if self._core.stopped:
            return self._end()
        if self._stop_by_s is not None and self._clock() >= self._stop_by_s:
            self._log("batch_aborted", logging.WARNING, waited_seconds=STOP_BATCH_S)
            self._worker.abort()
            return self._end()
        return None

    def _end(self) -> int:
        with never_fatal("summary"):
            self._summary.end(self._worker.outcomes, self._remaining)
        error = self._core.error
        if error is not None:
            self._log("stopped", logging.ERROR, reason=str(error))
        elif not self._stop_requested:
            self._log("end_reached")
        if self._stop_requested or error is None:
            return EXIT_DONE
        return EXIT_CONFIGURATION if self._configuration_failed else EXIT_FAILED

    def _on_unexpected_error(self, exc: Exception) -> int:
        """Log where the error happened. Its message is left out, because it may contain data of a record."""
        frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(exc.__traceback__)]
        self._log("unexpected_error", logging.ERROR, error=type(exc).__name__, frames=frames)
        self._core.on_fatal(OrderlibError(f"unexpected {type(exc).__name__}"))
        return self._end()

    def _check_stop_event(self) -> None:
        if self._stop_event.is_set() and not self._core.stopping:
            self._stop_requested = True
            self._log("stopping")
            self._core.on_stop()
        if self._core.stopping and self._stop_by_s is None:
            self._health.not_ready_reason = "stopping"
            self._stop_by_s = self._clock() + STOP_BATCH_S

    def _take_result(self, timeout_s: float) -> None:
        result = self._worker.take_result(timeout_s)
        if isinstance(result, OrderlibError):
            self._metrics.retries.labels(type(result).__name__).inc()
            if isinstance(result, TransactionConflict | FenceLost):
                name = "fence_lost" if isinstance(result, FenceLost) else "transaction_conflict"
                self._log(name, logging.WARNING, reason=str(result))
            self._core.on_failed(result, self._clock())
        elif isinstance(result, BaseException):
            raise result
        elif result is not None:
            result(self._core)

    def _execute_commands(self) -> None:
        for command in self._core.take_commands():
            match command:
                case ResolveOffsets() | CommitBatch() | CheckTopics():
                    self._worker.submit(command)
                case Assign(next_offsets):
                    self._kafka.assign(next_offsets)
                    # The member that had them before may have left without its last commit to Kafka.
                    self._kafka_offsets.update(next_offsets)
                    self._lag_monitor.on_assigned(next_offsets)
                    self._log(
                        "partitions_assigned", next_offsets={str(p): offset for p, offset in next_offsets.items()}
                    )
                case Seek(partition, next_offset):
                    self._kafka.seek(partition, next_offset)
                    self._log(
                        "stored_offset_changed",
                        logging.WARNING,
                        topic=partition.topic,
                        partition=partition.partition,
                        next_offset=next_offset,
                    )
                case CommitKafkaOffsets(next_offsets):
                    self._kafka_offsets.update(next_offsets)
                    self._lag_monitor.on_stored(next_offsets)
                case Pause(reason, wait_s):
                    self._kafka.pause()
                    stalled_by_kafka = not wait_s and isinstance(reason, BrokerUnavailable)
                    cause = self._kafka.unavailable_message if stalled_by_kafka else str(reason)
                    self._health.not_ready_reason = cause
                    self._log("retrying", logging.WARNING, reason=cause, seconds=round(wait_s, 2))
                case Resume():
                    self._kafka.resume()
                    self._log("resumed")
        if not self._core.stopping and not self._core.in_outage:
            self._health.not_ready_reason = (
                self._kafka.unavailable_message if self._kafka.unavailable else self._lag_monitor.stalled_reason()
            )

    @property
    def _wait_for_store_s(self) -> float:
        """Return how long to wait for the store: while it works, no record can be committed before its result."""
        if not self._core.busy or self._core.in_outage or self._core.has_more:
            return 0
        if self._core.wants_records:
            return 0 if self._more_ready else _COLLECT_S
        return _POLL_S

    def _poll_kafka(self) -> None:
        """Take the records that are ready. Wait for the next one if there is nothing else to do."""
        topic_ids = self._core.topic_ids
        if self._core.wants_records:
            limit = self._core.fetch_limit
            fetched = self._kafka.fetch(topic_ids, limit, _POLL_S if self._core.waits_only_for_records else 0)
            self._more_ready = len(fetched) >= limit
        elif self._core.in_outage:
            fetched = self._kafka.poll(topic_ids, _POLL_PAUSED_S)
        elif self._core.has_more:
            fetched = self._kafka.poll(topic_ids, 0)
        else:
            return
        self._fetched = self._fetched or any(isinstance(item, Record) for item in fetched)
        self._core.on_fetched([item for item in fetched if not isinstance(item, FetchFailed)])
        for item in fetched:
            if isinstance(item, FetchFailed):
                self._on_fetch_failed(item)

    def _update_lag(self) -> None:
        in_outage = self._core.in_outage or self._kafka.unavailable
        assigned = self._core.assigned
        self._lag_monitor.update(assigned, self._worker.stored_offsets, in_outage=in_outage)
        self._core.on_lag(self._lag_monitor.lag(assigned))
        self._summary.update(self._worker.outcomes, self._remaining, idle=self._core.waits_only_for_records)

    def _remaining(self) -> int | None:
        return self._lag_monitor.remaining(self._core.assigned)

    def _commit_to_kafka(self) -> None:
        """Commit offsets to Kafka, if it is time or if the consumer stops."""
        now_s = self._clock()
        if self._kafka_offsets and (now_s >= self._commit_to_kafka_at_s or self._core.stopped):
            # The other partitions are of other members now.
            own = {p: self._kafka_offsets[p] for p in self._kafka_offsets.keys() & self._core.assigned}
            self._kafka_offsets.clear()
            self._commit_to_kafka_at_s = now_s + _KAFKA_COMMIT_S
            if own:
                self._kafka.commit(own)

    def _on_fetch_failed(self, failed: FetchFailed) -> None:
        """Continue if the error is transient, because the client retries by itself; else stop."""
        error = failed.error
        if not isinstance(error, TransientError):
            if self._core.error is None:
                # A missing ACL causes an error at the first request that needs it.
                self._configuration_failed = isinstance(error, ConfigurationError) and not self._fetched
            self._core.on_fatal(error)
            return
        self._metrics.retries.labels(type(error).__name__).inc()
        self._lag_monitor.on_error(failed)
        if self._exit_at_end and (repeated := self._lag_monitor.error()) is not None:
            self._core.on_fatal(repeated)


def _topic_ids(topics: Mapping[str, TopicInfo]) -> dict[str, str]:
    return {topic: info.topic_id for topic, info in topics.items()}


def _rejected(batch: Batch, result: BatchResult) -> Iterator[bool]:
    """Return whether each record of the batch was rejected."""
    # By identity, because hashing 2,000 positions would keep the transaction open longer.
    rejected = {id(reject.record) for reject in result.rejects}
    return (id(record) in rejected for record, _ in batch.classified)


def _log_reject(reject: Reject) -> None:
    position = reject.record.position
    event(
        "rejected",
        logging.WARNING,
        topic=reject.record.topic,
        partition=position.partition,
        offset=position.offset,
        code=reject.code,
        fault=str(reject.faults[0]),
        faults=reject.total_faults,
    )
