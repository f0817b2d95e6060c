"""The loop: carries events from Kafka and the store to ``Consumption``, and carries out what it says.

Two threads. This one listens for signals and polls Kafka, always soon; the store's thread does whatever can block.
"""

from __future__ import annotations

import datetime as dt
import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Mapping

from prometheus_client import Gauge

from orderlib.consumption import (
    Assign,
    Breaker,
    Consumption,
    Job,
    Locate,
    Pause,
    Report,
    Resume,
    Seek,
    Stop,
    Survey,
    TopicRemade,
    Write,
)
from orderlib.errors import Collision, OrderError, TryAgain
from orderlib.ingest import Batch, Record, Reject
from orderlib.postgres.ledger import ConsumerLedger, Written
from orderlib.program import EXIT_DONE, EXIT_FAILED, event
from services.consumer.health import Health, Metrics
from services.consumer.topic import EndReached, Topic

#: How long one wait for Kafka or the store lasts, so that the other is not left waiting.
_TURN_S = 0.02
_TURN_PAUSED_S = 0.1

#: How often the log ends are asked for.
_LAG_S = 1.0

#: After a signal, the batch in hand may take so long; then its socket is shut. Then leaving the group may.
STOP_BATCH_S = 5.0
STOP_CLOSE_S = 3.0


class StoreThread:
    """Carries out jobs, one at a time; ``results`` gets what tells the core."""

    def __init__(self, ledger: ConsumerLedger, topic: Topic, breaker: Breaker, metrics: Metrics) -> None:
        self._ledger = ledger
        self._topic = topic
        self._breaker = breaker
        self._metrics = metrics
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.results: queue.SimpleQueue[Callable[[Consumption], None] | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="store", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Carry out a job."""
        self._jobs.put(job)

    def close(self, timeout_s: float) -> None:
        """End after the job in hand, or leave it behind."""
        self._jobs.put(None)
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self.results.put(self._carry_out(job))
            except BaseException as exc:  # noqa: BLE001  the loop raises it, or tells the core
                self.results.put(exc)

    def _carry_out(self, job: Job) -> Callable[[Consumption], None]:
        match job:
            case Locate(partitions):
                topic_id = self._topic.ask_topic_id()()
                begin = self._ledger.begin(self._topic.name, topic_id, self._topic.earliest(partitions))
                return lambda core: core.on_located(topic_id, begin)
            case Survey(partitions):
                topic_id = self._topic.ask_topic_id()()
                stored = self._ledger.next_offsets(topic_id, partitions)
                return lambda core: core.on_surveyed(topic_id, stored)
            case Write(batch):
                self._write(batch)
                return lambda core: core.on_written()

    def _write(self, batch: Batch) -> None:
        topic_id = self._topic.ask_topic_id()
        remember: list[Callable[[], None]] = []

        def check(written: Written) -> None:
            # By identity: to hash two thousand sources would keep the database waiting.
            refused = {id(reject.record) for reject in written.rejects}
            remember.append(self._breaker.check(id(record) in refused for record, _ in batch.judged))
            if (now := topic_id()) != batch.topic_id:
                raise TopicRemade(f"topic {batch.topic} was made again: its id is {now}, it was {batch.topic_id}")

        written = self._ledger.write(batch, check)
        for step in remember:
            step()
        self._count(batch, written)

    def _count(self, batch: Batch, written: Written) -> None:
        for outcome, count in written.outcomes.items():
            self._metrics.records.labels(outcome).inc(count)
        self._metrics.count_rejects(Counter(reject.code for reject in written.rejects))
        self._metrics.batch_records.observe(len(batch.judged))
        for step, seconds in written.seconds.items():
            self._metrics.batch_seconds.labels(step).observe(seconds)
        now = dt.datetime.now(dt.UTC)
        self._metrics.end_to_end.observe((now - record.time).total_seconds() for record, _ in batch.judged)
        for reject in written.rejects:
            _log_reject(reject)


class Lag:
    """How far the store is behind the log's end, by partition; asked now and then, never waited for."""

    def __init__(self, topic: Topic, gauge: Gauge, clock: Callable[[], float]) -> None:
        self._topic = topic
        self._gauge = gauge
        self._clock = clock
        self._next_offsets: dict[int, int] = {}
        self._shown: set[int] = set()
        self._ask_at_s = clock()
        self._answer: Callable[[], Mapping[int, int] | None] | None = None

    def at(self, next_offsets: Mapping[int, int]) -> None:
        """The store is there in these partitions."""
        self._next_offsets.update(next_offsets)

    def turn(self, assigned: frozenset[int]) -> None:
        """Show what is known, and ask again when it is time."""
        for partition in self._shown - assigned:
            self._gauge.remove(str(partition))
        self._shown &= assigned
        if self._answer is not None:
            self._show(self._answer(), assigned)
        elif assigned and self._clock() >= self._ask_at_s:
            self._ask_at_s = self._clock() + _LAG_S
            self._answer = self._topic.ask_ends(assigned)

    def _show(self, ends: Mapping[int, int] | None, assigned: frozenset[int]) -> None:
        if ends is None:
            return
        self._answer = None
        for partition in ends.keys() & assigned:
            self._gauge.labels(str(partition)).set(max(0, ends[partition] - self._next_offsets[partition]))
            self._shown.add(partition)


class Loop:
    """Runs until told to stop, or until nothing can go on."""

    def __init__(
        self,
        core: Consumption,
        topic: Topic,
        store: StoreThread,
        ledger: ConsumerLedger,
        health: Health,
        metrics: Metrics,
        clock: Callable[[], float],
        told_to_stop: threading.Event,
    ) -> None:
        self._core = core
        self._topic = topic
        self._store = store
        self._ledger = ledger
        self._health = health
        self._metrics = metrics
        self._clock = clock
        self._told_to_stop = told_to_stop
        self._lag = Lag(topic, metrics.lag, clock)
        self._stop_by_s: float | None = None
        self._status: int | None = None

    def run(self) -> int:
        """The exit status."""
        while self._status is None and not self._core.stopped:
            self._health.turn()
            self._heed_stop()
            self._take_results()
            self._core.on_tick(self._clock())
            self._act()
            self._lag.turn(self._core.assigned)
            self._listen()
        return EXIT_DONE if self._status is None else self._status

    def _heed_stop(self) -> None:
        if not self._told_to_stop.is_set():
            return
        now_s = self._clock()
        if self._stop_by_s is None:
            event("stopping")
            self._health.not_ready = "stopping"
            self._stop_by_s = now_s + STOP_BATCH_S
            self._core.on_stop()
        elif now_s >= self._stop_by_s:
            event("batch_abandoned", logging.WARNING, waited_seconds=STOP_BATCH_S)
            self._ledger.interrupt()
            self._status = EXIT_DONE

    def _take_results(self, timeout_s: float = 0.0) -> None:
        try:
            result = self._store.results.get(timeout=timeout_s) if timeout_s else self._store.results.get_nowait()
        except queue.Empty:
            return
        if isinstance(result, OrderError):
            self._metrics.retries.labels(type(result).__name__).inc()
            if isinstance(result, Collision):
                event("collision", logging.WARNING, reason=str(result))
            self._core.on_failed(result, self._clock())
        elif isinstance(result, BaseException):
            raise result
        else:
            result(self._core)

    def _act(self) -> None:
        for action in self._core.take_actions():
            match action:
                case Locate() | Write() | Survey():
                    self._store.submit(action)
                case Assign(next_offsets):
                    self._topic.assign(next_offsets)
                    self._lag.at(next_offsets)
                    event("partitions_assigned", next_offsets=next_offsets)
                case Seek(partition, next_offset):
                    self._topic.seek(partition, next_offset)
                    self._lag.at({partition: next_offset})
                    event("fence_lost", logging.WARNING, partition=partition, next_offset=next_offset)
                case Report(next_offsets):
                    self._topic.report(next_offsets)
                    self._lag.at(next_offsets)
                case Pause(reason, wait_s):
                    self._topic.pause()
                    self._health.not_ready = str(reason)
                    event("waiting", logging.WARNING, reason=str(reason), seconds=round(wait_s, 2))
                case Resume():
                    self._topic.resume()
                    event("resumed")
                case Stop(error):
                    self._status = EXIT_DONE if error is None else EXIT_FAILED
                    if error is not None:
                        event("stopped", logging.ERROR, reason=str(error))
        if self._stop_by_s is None and not self._core.in_outage:
            self._health.not_ready = "Kafka does not answer" if self._topic.down else None

    def _listen(self) -> None:
        """Wait a little for whoever speaks next."""
        if self._core.stopped or self._status is not None:
            return
        if self._core.wants_records:
            fetched = self._topic.fetch(self._core.topic_id, _TURN_S)
        elif self._core.in_outage:
            fetched = self._topic.poll(self._core.topic_id, _TURN_PAUSED_S)
        else:
            self._take_results(_TURN_S)
            return
        now_s = self._clock()
        self._core.on_records([one for one in fetched if isinstance(one, Record)], now_s)
        for one in fetched:
            if isinstance(one, EndReached):
                self._core.on_end(one.partition, one.next_offset, now_s)
            elif isinstance(one, TryAgain):
                event("kafka_trouble", logging.WARNING, reason=str(one))
            elif isinstance(one, OrderError):
                self._status = EXIT_FAILED
                event("stopped", logging.ERROR, reason=str(one))


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
