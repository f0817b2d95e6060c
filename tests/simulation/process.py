"""One consumer process: the real core and the real runner, with a simulated Kafka and store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from random import Random
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from orderlib.entry_point import EXIT_CONFIGURATION, EXIT_DONE, EXIT_FAILED, StopEvent
from orderlib.errors import (
    ConfigurationError,
    DatabaseUnavailable,
    FenceLost,
    OrderlibError,
    TransientError,
)
from orderlib.ingestion.consumer_core import (
    AwaitedServer,
    CheckTopics,
    CommitBatch,
    ConsumerCore,
    ResolveOffsets,
    StoreTask,
    recreated_error,
)
from orderlib.ingestion.records import TopicPartition
from orderlib.repository import Outcome
from services.consumer.health import Health
from services.consumer.metrics import ConsumerMetrics
from services.consumer.runner import ConsumerRunner
from tests.simulation.invariants import InvariantViolation
from tests.simulation.kafka import PARTITIONS, TOPIC
from tests.simulation.kafka_client import SimulatedKafka
from tests.simulation.store import Bug, Operation, ReportEvent, Step, Steps

if TYPE_CHECKING:
    from tests.simulation.simulator import Simulator


class MistakeError(Exception):
    """A bug in the program."""


class SilentRunner(ConsumerRunner):
    """A planted bug: it stops without a log line."""

    def _end(self) -> int:
        return EXIT_DONE


#: Shared, because they are slow to create and never read here.
_METRICS = ConsumerMetrics()


class Process:
    """A consumer. The simulator decides when its loop turns and when its store task advances.

    It is the ``StoreClient`` of its runner.
    """

    awaited = AwaitedServer.POSTGRES
    #: No partition is stalled in a simulation, so the lag of other members does not matter.
    stored_offsets: Mapping[TopicPartition, int] = MappingProxyType({})
    #: Not counted here.
    outcomes: ClassVar[Counter[Outcome]] = Counter()

    def __init__(
        self, simulator: Simulator, name: str, rng: Random, until: Mapping[TopicPartition, int] | None
    ) -> None:
        self._simulator = simulator
        self.name = name
        self._rng = rng
        self.until = until
        self.core = ConsumerCore(simulator.classify, rng, until)
        self.stop_event = StopEvent()
        self.kafka = SimulatedKafka(simulator, self, rng)
        self.kafka.join(self.core)
        runner = SilentRunner if simulator.bug is Bug.SILENT_STOP else ConsumerRunner
        health = Health(self._clock)
        self._runner = runner(self.core, self.kafka, self, health, _METRICS, self._clock, self.stop_event, self._log)
        #: Names and reasons of its log events.
        self._logged: list[tuple[str, str]] = []
        #: The fatal errors that it received, in order.
        self._fatal: list[str] = []
        #: It was asked to stop before any fatal error.
        self._stop_came_first = False
        self.operation: Operation | None = None
        self.result: ReportEvent | OrderlibError | MistakeError | None = None
        #: Its loop does not turn, and its store task does not advance.
        self.frozen = False

    def turn(self) -> None:
        """Run one turn of its loop."""
        if self.stop_event.is_set() and not self._fatal and not self.core.stopping:
            self._stop_came_first = True
        status = self._runner.run_once()
        if status is not None:
            self._check_end(status)
            self._simulator.leave(self)

    def _check_end(self, status: int) -> None:
        """Check that exit status and log have the reason of its end."""
        last = self._logged[-1] if self._logged else ("", "")
        by_itself = bool(self._fatal) and not self._stop_came_first
        if status not in ({EXIT_FAILED, EXIT_CONFIGURATION} if by_itself else {EXIT_DONE}):
            raise InvariantViolation(f"{self.name} exits with {status} after {self._fatal}; its last line: {last}")
        if self._fatal:
            if last != ("stopped", self._fatal[0]):
                raise InvariantViolation(f"{self.name} stopped because of {self._fatal}; its last line: {last}")
        elif self._stop_came_first:
            if ("stopping", "") not in self._logged:
                raise InvariantViolation(f"{self.name} was stopped, and did not log it")
        elif last != ("end_reached", ""):
            raise InvariantViolation(f"{self.name} has stopped without a reason; its last line: {last}")
        else:
            self._simulator.on_end_reached(self)

    def _clock(self) -> float:
        return self._simulator.now_s

    def _log(self, name: str, _level: int = 0, **fields: object) -> None:
        self._logged.append((name, str(fields.get("reason", ""))))
        self._simulator.note(self.name, "logs", name, fields)
        if name == "batch_aborted":
            self._simulator.count("batch aborted")
        elif name == "stored_offset_changed":
            self._simulator.count("seek to a stored offset")

    def on_fatal(self, error: OrderlibError | MistakeError) -> None:
        """The process receives a fatal error, and must stop."""
        self._fatal.append("unexpected MistakeError" if isinstance(error, MistakeError) else str(error))
        self._simulator.on_fatal(self, error)

    def advance(self) -> Step | None:
        """Advance the store task by one step. Return its progress, or ``None`` if it has ended."""
        assert self.operation is not None
        try:
            if self._simulator.store.unavailable:
                raise DatabaseUnavailable("down")
            if self._simulator.revoked and self.operation.step is Step.WORKING:
                raise ConfigurationError("permission denied for table items")
            self.operation.step = next(self.operation.steps)
        except StopIteration as done:
            self.finish(done.value)
        except OrderlibError as error:
            self.operation.steps.close()
            self.finish(error)
        else:
            return self.operation.step
        return None

    def finish(self, result: ReportEvent | OrderlibError | MistakeError) -> None:
        """End the store task with this result."""
        self._simulator.note(self.name, "gets", result)
        self.operation, self.result = None, result

    # The store, as its runner sees it.

    def submit(self, task: StoreTask) -> None:
        self._simulator.note(self.name, task)
        if self.stop_event.is_set() and self._stop_came_first:
            raise InvariantViolation(f"{self.name} was stopped and started {task}")
        if self.operation is not None:
            raise InvariantViolation(f"{self.name} has two store tasks at once")
        self.operation = Operation(self._steps_of(task))

    def take_result(self, timeout_s: float) -> ReportEvent | OrderlibError | MistakeError | None:
        if timeout_s:
            filling = "collected while the store works" if self.core.wants_records else "batch full"
            self._simulator.count("waited to stop" if self.core.stopping else filling)
            # While it waits, its store task advances.
            while self.operation is not None and self._rng.random() < 0.5:
                self.advance()
        result, self.result = self.result, None
        if isinstance(result, MistakeError) or (
            isinstance(result, OrderlibError) and not isinstance(result, TransientError | FenceLost)
        ):
            self.on_fatal(result)
        return result

    def abort(self) -> None:
        self._simulator.note(self.name, "abandons its batch")

    # Store tasks, as StoreWorker carries them out.

    def _steps_of(self, task: StoreTask) -> Steps:
        match task:
            case ResolveOffsets(partitions):
                return self._resolve(partitions)
            case CheckTopics():
                return self._check_topic()
            case CommitBatch(batch):
                return self._simulator.store.write(batch, self._request_topic_id())

    def _request_topic_id(self) -> Callable[[], str]:
        response = self.kafka.request_topics()
        return lambda: response()[TOPIC].topic_id

    def _resolve(self, partitions: frozenset[TopicPartition]) -> Steps:
        topic_id = self.kafka.describe()[TOPIC].topic_id
        yield Step.ASKING
        store, topic_ids = self._simulator.store, {TOPIC: topic_id}
        next_offsets = store.next_offsets(topic_ids, partitions)
        if new := partitions - next_offsets.keys():
            next_offsets |= yield from store.start_partitions(topic_ids, self.kafka.earliest(new))

        def report(core: ConsumerCore) -> None:
            self._on_topic_id(topic_id)
            core.on_offsets_resolved({TOPIC: topic_id}, next_offsets)

        return report

    def _check_topic(self) -> Steps:
        topic_id = self.kafka.describe()[TOPIC].topic_id
        yield Step.ASKING
        partitions = {TopicPartition(TOPIC, number) for number in range(PARTITIONS)}
        stored = self._simulator.store.next_offsets({TOPIC: topic_id}, partitions)
        next_offsets = {**self.kafka.earliest(partitions - stored.keys()), **stored}

        def report(core: ConsumerCore) -> None:
            self._on_topic_id(topic_id)
            core.on_topics_checked({TOPIC: topic_id}, next_offsets)

        return report

    def _on_topic_id(self, topic_id: str) -> None:
        """The process receives the topic id, and must stop if it has changed."""
        known = self.core.topic_ids.get(TOPIC)
        if known is not None and known != topic_id:
            self.on_fatal(recreated_error(TOPIC, topic_id, known))
