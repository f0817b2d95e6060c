"""One consumer process: the real core and the real loop; Kafka and the store around them are simulated."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from random import Random
from types import MappingProxyType
from typing import TYPE_CHECKING

from orderlib.errors import (
    BrokerUnavailable,
    ConfigurationError,
    DatabaseUnavailable,
    FenceLost,
    OrderlibError,
    TopicRecreated,
    TransientError,
)
from orderlib.ingestion.consumer_core import CheckTopic, CommitBatch, ConsumerCore, PartitionEof, ResolveOffsets, Server
from services.consumer.health import Health, Metrics
from services.consumer.kafka_consumer import FetchFailed, PollResult
from services.consumer.runner import ConsumerRunner
from services.program import EXIT_DONE, EXIT_FAILED, EXIT_SETUP
from tests.simulation.invariants import InvariantViolation
from tests.simulation.kafka import TOPIC, fetched, judged, shuffled
from tests.simulation.store import Bug, Job, Step, Steps, Told

if TYPE_CHECKING:
    from tests.simulation.simulator import Simulator


class MistakeError(Exception):
    """A mistake in the program."""


class SilentLoop(ConsumerRunner):
    """A planted mistake: it leaves without a word."""

    def _end(self) -> int:
        return EXIT_DONE


#: Nobody reads them here, and they are slow to make.
_METRICS = Metrics()


class Process:
    """Turns when the world says so; its job in the store goes on when the world says so, and while the loop waits.

    To its loop it is both Kafka and the store.
    """

    down = False
    awaited = Server.POSTGRES
    unreachable = "Kafka does not answer"
    #: No partition starves here, so nothing is shown of the others.
    stored_offsets: Mapping[int, int] = MappingProxyType({})

    def __init__(self, world: Simulator, name: str, rng: Random, until: Mapping[int, int] | None) -> None:
        self.world = world
        self.name = name
        self._rng = rng
        self.until = until
        self.core = ConsumerCore(TOPIC, judged, rng, until)
        self.stop_event = threading.Event()
        loop = SilentLoop if world.bug is Bug.SILENT_STOP else ConsumerRunner
        self._loop = loop(self.core, self, self, Health(self._clock), _METRICS, self._clock, self.stop_event, self._log)
        #: Names and reasons of what it logged.
        self._logged: list[tuple[str, str]] = []
        #: What it was told that no retry can help, in order.
        self._fatal: list[str] = []
        self._told_first = False
        self.job: Job | None = None
        self.result: Told | OrderlibError | MistakeError | None = None
        #: What the group has to say, not heard yet.
        self.inbox: list[tuple[str, int]] = []
        #: The partitions it believes to have.
        self.mine: set[int] = set()
        self.positions: dict[int, int] = {}
        #: At which end it said so last.
        self.ends_seen: dict[int, int] = {}
        self.paused = False
        #: Out of the group without knowing it.
        self.deaf = False
        #: Neither turns nor works.
        self.frozen = False

    def turn(self) -> None:
        """One turn of its loop; the world hears if it was the last."""
        if self.stop_event.is_set() and not self._fatal and not self.core.stopping:
            self._told_first = True
        status = self._loop.run_once()
        if status is not None:
            self._check_end(status)
            self.world.leave(self)

    def _check_end(self, status: int) -> None:
        """Exit status and log must tell how it ended."""
        last = self._logged[-1] if self._logged else ("", "")
        by_itself = bool(self._fatal) and not self._told_first
        if status not in ({EXIT_FAILED, EXIT_SETUP} if by_itself else {EXIT_DONE}):
            raise InvariantViolation(f"{self.name} exits with {status} after {self._fatal}; its last line: {last}")
        if self._fatal:
            if last != ("stopped", self._fatal[0]):
                raise InvariantViolation(f"{self.name} stopped because of {self._fatal}; its last line: {last}")
        elif self._told_first:
            if ("stopping", "") not in self._logged:
                raise InvariantViolation(f"{self.name} was told to stop, and did not log it")
        elif last != ("end_reached", ""):
            raise InvariantViolation(f"{self.name} has left without a reason; its last line: {last}")
        else:
            self.world.on_end_reached(self)

    def _clock(self) -> float:
        return self.world.now_s

    def _log(self, name: str, _level: int = 0, **fields: object) -> None:
        self._logged.append((name, str(fields.get("reason", ""))))
        self.world.note(self.name, "logs", name, fields)
        if name == "batch_abandoned":
            self.world.fault("batch abandoned")
        elif name == "fence_lost":
            self.world.fault("seek after a lost fence")

    def _hears_fatal(self, error: OrderlibError | MistakeError) -> None:
        """It is about to hear of this, and must stop."""
        self._fatal.append("unforeseen MistakeError" if isinstance(error, MistakeError) else str(error))
        self.world.on_fatal(self, error)

    def advance(self) -> Step | None:
        """Take the job in the store one step further; where it is then, ``None`` if it has ended."""
        assert self.job is not None
        try:
            if self.world.store.down:
                raise DatabaseUnavailable("down")
            if self.world.revoked and self.job.step is Step.WORKING:
                raise ConfigurationError("permission denied for table items")
            self.job.step = next(self.job.steps)
        except StopIteration as done:
            self.finish(done.value)
        except OrderlibError as error:
            self.job.steps.close()
            self.finish(error)
        else:
            return self.job.step
        return None

    def finish(self, result: Told | OrderlibError | MistakeError) -> None:
        """The job has ended so."""
        self.world.note(self.name, "hears", result)
        self.job, self.result = None, result

    # The store, as its loop sees it.

    def submit(self, job: CommitBatch | ResolveOffsets | CheckTopic) -> None:
        self.world.note(self.name, job)
        if self.stop_event.is_set() and self._told_first:
            raise InvariantViolation(f"{self.name} was told to stop and began {job}")
        if self.job is not None:
            raise InvariantViolation(f"{self.name} has two jobs at once")
        self.job = Job(self._steps_of(job))

    def take_result(self, timeout_s: float) -> Told | OrderlibError | MistakeError | None:
        if timeout_s:
            self.world.fault("waited to stop" if self.core.stopping else "batch full")
            # While it waits, its job goes on.
            while self.job is not None and self._rng.random() < 0.5:
                self.advance()
        result, self.result = self.result, None
        if isinstance(result, MistakeError) or (
            isinstance(result, OrderlibError) and not isinstance(result, TransientError | FenceLost)
        ):
            self._hears_fatal(result)
        return result

    def abort(self) -> None:
        self.world.note(self.name, "abandons its batch")

    # Kafka, as its loop sees it.

    def assign(self, next_offsets: Mapping[int, int]) -> None:
        if not next_offsets.keys() <= self.mine - self.positions.keys():
            raise InvariantViolation(f"{self.name} has {self.mine}, and assigns {next_offsets}")
        self.positions.update(next_offsets)

    def seek(self, partition: int, next_offset: int) -> None:
        if partition not in self.positions:
            raise InvariantViolation(f"{self.name} does not have {partition} to seek in")
        self.positions[partition] = next_offset
        self.ends_seen.pop(partition, None)

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def report(self, next_offsets: Mapping[int, int]) -> None:
        pass

    def ask_ends(self, partitions: Iterable[int]) -> Callable[[], Mapping[int, int] | None]:
        asked = tuple(partitions)
        return lambda: {p: end for p, end in self.world.life.ends().items() if p in asked}

    def fetch(self, topic_id: str | None, limit: int, _timeout_s: float) -> list[PollResult]:
        if self.paused:
            raise InvariantViolation(f"{self.name} wants records and does not fetch them")
        if self.inbox and self._rng.random() < 0.5:
            self._hear()
        found = self._fetch(topic_id, limit)
        self._hear()
        if self.world.refusing:
            self.world.refusing = False
            error = ConfigurationError("Kafka: topic authorization failed")
            self._hears_fatal(error)
            found.append(FetchFailed(None, error))
        return found

    def poll(self, _topic_id: str | None, _timeout_s: float) -> list[PollResult]:
        self._hear()
        return []

    def _hear(self) -> None:
        """Whatever the group said, as callbacks from within a poll."""
        if self.deaf:
            return
        while self.inbox:
            what, partition = self.inbox.pop(0)
            if what == "given":
                self.mine.add(partition)
                self.core.on_partitions_assigned([partition])
            elif partition in self.mine:
                self.mine.discard(partition)
                self.positions.pop(partition, None)
                self.ends_seen.pop(partition, None)
                self.core.on_partitions_revoked([partition])
                self.world.group.released(self, partition)

    def _fetch(self, topic_id: str | None, limit: int) -> list[PollResult]:
        """A few records of some partitions, and the ends that were reached."""
        found: list[PollResult] = []
        world, positions, chance = self.world, self.positions, self._rng.random
        if world.kafka_down or topic_id is None:
            return found
        for partition in shuffled(self._rng, list(positions)):
            position, log = positions[partition], world.life.logs[partition]
            end = len(log)
            if position > end:
                error = OrderlibError("Kafka does not hold this offset")
                self._hears_fatal(error)
                found.append(FetchFailed(partition, error))
                return found
            stop = end if world.healing else min(end, position + int(chance() * 8))
            for offset in range(position, stop):
                entry = log[offset]
                if entry is None:
                    continue
                if len(found) >= limit:
                    stop = offset
                    break
                found.append(fetched(topic_id, partition, offset, entry))
            if stop > position:
                # The client's position is behind a record; a gap is passed with what follows it.
                while stop < end and stop > position and log[stop - 1] is None:
                    stop -= 1
                positions[partition] = stop
            if stop == end and self.ends_seen.get(partition) != end:
                self.ends_seen[partition] = end
                found.append(PartitionEof(partition, end))
        return found

    # Jobs, as StoreWorker carries them out.

    def _steps_of(self, job: ResolveOffsets | CommitBatch | CheckTopic) -> Steps:
        match job:
            case ResolveOffsets(partitions):
                return self._locate(partitions)
            case CheckTopic(partitions):
                return self._survey(partitions)
            case CommitBatch(batch):
                return self.world.store.write(batch, self._ask_topic_id())

    def _ask_topic_id(self) -> Callable[[], str]:
        """Kafka answers at once, or just before it must."""
        if self._rng.random() < 0.5:
            return self._topic_id
        try:
            early = self._topic_id()
        except BrokerUnavailable:
            return self._topic_id
        return lambda: early

    def _topic_id(self) -> str:
        if self.world.kafka_down:
            raise BrokerUnavailable("down")
        return self.world.life.topic_id

    def _locate(self, partitions: frozenset[int]) -> Steps:
        topic_id = self._topic_id()
        yield Step.ASKING
        earliest = {partition: self.world.life.earliest[partition] for partition in partitions}
        next_offsets = yield from self.world.store.start_partitions(topic_id, earliest)

        def tell(core: ConsumerCore) -> None:
            self._on_topic_id(topic_id)
            core.on_offsets_resolved(topic_id, next_offsets)

        return tell

    def _survey(self, partitions: frozenset[int]) -> Steps:
        topic_id = self._topic_id()
        yield Step.ASKING
        next_offsets = self.world.store.next_offsets(topic_id, partitions)

        def tell(core: ConsumerCore) -> None:
            self._on_topic_id(topic_id)
            core.on_topic_checked(topic_id, next_offsets)

        return tell

    def _on_topic_id(self, topic_id: str) -> None:
        """It hears the topic's id from Kafka, and must stop if that is another."""
        known = self.core.topic_id
        if known not in {None, topic_id}:
            self._hears_fatal(TopicRecreated(f"topic {TOPIC} was recreated: its id is {topic_id}, it was {known}"))
