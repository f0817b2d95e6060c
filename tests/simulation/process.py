"""One consumer process: the core, and around it what ``services.consumer`` does with threads and librdkafka."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import TYPE_CHECKING

from orderlib.consumption import Assign, Consumption, Locate, Pause, Resume, Seek, Stop, Survey, Write
from orderlib.errors import BrokenSetup, BrokerUnreachable, OrderError, StoreUnreachable
from orderlib.ingest import Record
from tests.simulation.kafka import TOPIC, fetched, judged, shuffled
from tests.simulation.promises import PromiseBrokenError
from tests.simulation.store import Job, Step, Steps, Told

if TYPE_CHECKING:
    from tests.simulation.world import World

#: As ``services.consumer.loop``: after a signal the batch in hand may take so long.
STOP_BATCH_S = 5.0


class Process:
    """Turns when the world says so; its job in the store goes on when the world says so."""

    def __init__(self, world: World, name: str, rng: Random, until: Mapping[int, int] | None) -> None:
        self.world = world
        self.name = name
        self._rng = rng
        self.until = until
        self.core = Consumption(TOPIC, judged, rng, until)
        self.job: Job | None = None
        self.result: Told | OrderError | None = None
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
        self.told_at_s: float | None = None
        self._stopping = False
        self._stopped: Stop | None = None

    def turn(self) -> None:
        """As ``Loop.run``, once."""
        world, core = self.world, self.core
        now_s = world.now_s
        if self.told_at_s is not None:
            if not self._stopping:
                self._stopping = True
                core.on_stop()
            elif now_s >= self.told_at_s + STOP_BATCH_S:
                world.note(self.name, "abandons its batch")
                world.leave(self)
                return
        if self.result is not None:
            result, self.result = self.result, None
            if isinstance(result, OrderError):
                core.on_failed(result, now_s)
            else:
                result(core)
        core.on_tick(now_s)
        self._act()
        if self._stopped is None and not core.stopped:
            self._listen(now_s)
        if self._stopped is not None or core.stopped:
            world.leave(self)

    def advance(self) -> Step | None:
        """Take the job in the store one step further; where it is then, ``None`` if it has ended."""
        assert self.job is not None
        try:
            if self.world.store.down:
                raise StoreUnreachable("down")
            self.job.step = next(self.job.steps)
        except StopIteration as done:
            self.finish(done.value)
        except OrderError as error:
            self.job.steps.close()
            self.finish(error)
        else:
            return self.job.step
        return None

    def finish(self, result: Told | OrderError) -> None:
        """The job has ended so."""
        self.world.note(self.name, "hears", result)
        self.job, self.result = None, result

    def _act(self) -> None:
        for action in self.core.take_actions():
            self.world.note(self.name, action)
            match action:
                case Write() | Locate() | Survey():
                    if self._stopping:
                        raise PromiseBrokenError(f"{self.name} was told to stop and began {action}")
                    if self.job is not None:
                        raise PromiseBrokenError(f"{self.name} has two jobs at once")
                    self.job = Job(self._steps_of(action))
                case Assign(next_offsets):
                    if not next_offsets.keys() <= self.mine - self.positions.keys():
                        raise PromiseBrokenError(f"{self.name} has {self.mine}, and assigns {next_offsets}")
                    self.positions.update(next_offsets)
                case Seek(partition, next_offset):
                    if partition not in self.positions:
                        raise PromiseBrokenError(f"{self.name} does not have {partition} to seek in")
                    self.world.fault("seek after a lost fence")
                    self.positions[partition] = next_offset
                    self.ends_seen.pop(partition, None)
                case Pause(reason, wait_s):
                    if not wait_s and self.job is None:
                        raise PromiseBrokenError(f"{self.name} awaits no answer, and pauses: {reason}")
                    self.paused = True
                case Resume():
                    self.paused = False
                case Stop():
                    self._stopped = action
                    self.world.on_stopped_itself(self, action.error)
                case _:
                    pass

    def _listen(self, now_s: float) -> None:
        core = self.core
        if core.wants_records:
            if self.paused:
                raise PromiseBrokenError(f"{self.name} wants records and does not fetch them")
            if self.inbox and self._rng.random() < 0.5:
                self._hear()
            records, ends = self._fetch()
            self._hear()
            if records:
                core.on_records(records, now_s)
            for partition, end in ends:
                core.on_end(partition, end, now_s)
        elif core.in_outage:
            self._hear()
        else:
            self.world.fault("batch full")

    def _hear(self) -> None:
        """Whatever the group said, as callbacks from within a poll."""
        if self.deaf:
            return
        while self.inbox:
            what, partition = self.inbox.pop(0)
            if what == "given":
                self.mine.add(partition)
                self.core.on_given([partition])
            elif partition in self.mine:
                self.mine.discard(partition)
                self.positions.pop(partition, None)
                self.ends_seen.pop(partition, None)
                self.core.on_taken([partition])
                self.world.group.released(self, partition)

    def _fetch(self) -> tuple[list[Record], list[tuple[int, int]]]:
        """A few records of some partitions, and the ends that were reached."""
        records: list[Record] = []
        ends: list[tuple[int, int]] = []
        world, positions, chance = self.world, self.positions, self._rng.random
        topic_id = self.core.topic_id
        if world.kafka_down or topic_id is None:
            return records, ends
        for partition in shuffled(self._rng, list(positions)):
            position, log = positions[partition], world.life.logs[partition]
            end = len(log)
            if position > end:
                self._stopped = Stop(BrokenSetup("Kafka does not hold this offset"))
                world.on_stopped_itself(self, self._stopped.error)
                return records, ends
            stop = end if world.healing else min(end, position + int(chance() * 8))
            for offset in range(position, stop):
                entry = log[offset]
                if entry is not None:
                    records.append(fetched(topic_id, partition, offset, entry))
            if stop > position:
                # The client's position is behind a record; a gap is passed with what follows it.
                while stop < end and stop > position and log[stop - 1] is None:
                    stop -= 1
                positions[partition] = stop
            if stop == end and self.ends_seen.get(partition) != end:
                self.ends_seen[partition] = end
                ends.append((partition, end))
        return records, ends

    # Jobs, as StoreThread carries them out.

    def _steps_of(self, job: Locate | Write | Survey) -> Steps:
        match job:
            case Locate(partitions):
                return self._locate(partitions)
            case Survey(partitions):
                return self._survey(partitions)
            case Write(batch):
                return self.world.store.write(batch, self._ask_topic_id())

    def _ask_topic_id(self) -> Callable[[], str]:
        """Kafka answers at once, or just before it must."""
        if self._rng.random() < 0.5:
            return self._topic_id
        try:
            early = self._topic_id()
        except BrokerUnreachable:
            return self._topic_id
        return lambda: early

    def _topic_id(self) -> str:
        if self.world.kafka_down:
            raise BrokerUnreachable("down")
        return self.world.life.topic_id

    def _locate(self, partitions: frozenset[int]) -> Steps:
        topic_id = self._topic_id()
        yield Step.ASKING
        earliest = {partition: self.world.life.earliest[partition] for partition in partitions}
        next_offsets = yield from self.world.store.begin(topic_id, earliest)
        return lambda core: core.on_located(topic_id, next_offsets)

    def _survey(self, partitions: frozenset[int]) -> Steps:
        topic_id = self._topic_id()
        yield Step.ASKING
        next_offsets = self.world.store.next_offsets(topic_id, partitions)
        return lambda core: core.on_surveyed(topic_id, next_offsets)
