"""The simulated Kafka as one consumer sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from random import Random
from typing import TYPE_CHECKING

from orderlib.errors import BrokerUnavailable, ConfigurationError, OrderlibError
from orderlib.ingestion.consumer_core import MAX_RECORDS, PartitionEof
from orderlib.ingestion.records import TopicPartition
from services.consumer.kafka_client import FetchFailed, GroupListener, KafkaClient, PollResult
from services.kafka import TopicInfo
from tests.simulation.invariants import InvariantViolation
from tests.simulation.kafka import PARTITIONS, TOPIC, fetched

if TYPE_CHECKING:
    from tests.simulation.process import Process
    from tests.simulation.simulator import Simulator


class SimulatedKafka(KafkaClient):
    """The Kafka client of one simulated consumer."""

    unavailable = False
    unavailable_message = "Kafka is unavailable"

    def __init__(self, simulator: Simulator, process: Process, rng: Random) -> None:
        self._simulator = simulator
        self._process = process
        self._rng = rng
        self._listener: GroupListener | None = None
        #: Changes of the assignment that the member has not received yet.
        self.inbox: list[tuple[str, int]] = []
        #: The partitions that the member believes to have.
        self.assigned: set[TopicPartition] = set()
        #: The offset of the next record to fetch, by partition.
        self._next_offsets: dict[TopicPartition, int] = {}
        #: The log end that the last PartitionEof reported, by partition.
        self._eof_offsets: dict[TopicPartition, int] = {}
        self.paused = False
        #: The group has removed this member, and the member does not know it.
        self.is_zombie = False

    # Requests to the cluster.

    def describe(self) -> dict[str, TopicInfo]:
        if self._simulator.kafka_unavailable:
            raise BrokerUnavailable("down")
        return {TOPIC: TopicInfo(topic_id=self._simulator.topic.topic_id, partitions=frozenset(range(PARTITIONS)))}

    def request_topics(self, timeout_s: float = 0.0) -> Callable[[], dict[str, TopicInfo]]:
        """Kafka answers at once, or when the caller begins to wait."""
        if self._rng.random() < 0.5:
            return self.describe
        try:
            early = self.describe()
        except BrokerUnavailable:
            return self.describe
        return lambda: early

    def earliest(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        return {partition: self._simulator.topic.earliest[partition.partition] for partition in sorted(partitions)}

    def ends(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        ends = self._simulator.topic.ends()
        return {partition: ends[partition] for partition in sorted(partitions)}

    def request_ends(self, partitions: Iterable[TopicPartition]) -> Callable[[], Mapping[TopicPartition, int] | None]:
        """The lag only decides how long a batch may fill, so a wrong one must be harmless."""
        ends = self.ends(partitions)
        if not self._simulator.healing and self._rng.random() < 0.2:
            self._simulator.count("wrong lag")
            ends = {partition: end + MAX_RECORDS + 1 for partition, end in ends.items()}
        return lambda: ends

    # Membership.

    def join(self, listener: GroupListener) -> None:
        self._listener = listener

    def fetch(self, topic_ids: Mapping[str, str], limit: int, timeout_s: float) -> list[PollResult]:
        if self.paused:
            raise InvariantViolation(f"{self._process.name} fetches although it is paused")
        if self.inbox and self._rng.random() < 0.5:
            self._receive()
        found = self._fetch(topic_ids, limit)
        self._receive()
        if self._simulator.refusing:
            self._simulator.refusing = False
            error = ConfigurationError("Kafka: topic authorization failed")
            self._process.on_fatal(error)
            found.append(FetchFailed(None, error))
        return found

    def poll(self, topic_ids: Mapping[str, str], timeout_s: float) -> list[PollResult]:
        self._receive()
        return []

    def assign(self, next_offsets: Mapping[TopicPartition, int]) -> None:
        if not next_offsets.keys() <= self.assigned - self._next_offsets.keys():
            raise InvariantViolation(f"{self._process.name} has {self.assigned}, and assigns {next_offsets}")
        self._next_offsets.update(next_offsets)

    def seek(self, partition: TopicPartition, next_offset: int) -> None:
        if partition not in self._next_offsets:
            raise InvariantViolation(f"{self._process.name} seeks in {partition}, which it does not have")
        self._next_offsets[partition] = next_offset
        self._eof_offsets.pop(partition, None)

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def commit(self, next_offsets: Mapping[TopicPartition, int]) -> None:
        pass

    def close(self, timeout_s: float) -> bool:
        return True

    def _receive(self) -> None:
        """Receive the changes of the assignment, as the callbacks of a poll do."""
        if self.is_zombie:
            return
        assert self._listener is not None
        while self.inbox:
            change, number = self.inbox.pop(0)
            partition = TopicPartition(TOPIC, number)
            if change == "assigned":
                self.assigned.add(partition)
                self._listener.on_partitions_assigned([partition])
            elif partition in self.assigned:
                self.assigned.discard(partition)
                self._next_offsets.pop(partition, None)
                self._eof_offsets.pop(partition, None)
                self._listener.on_partitions_revoked([partition])
                self._simulator.group.released(self._process, number)

    def _fetch(self, topic_ids: Mapping[str, str], limit: int) -> list[PollResult]:
        """Return a few records of some partitions, and the partition ends that were reached."""
        found: list[PollResult] = []
        simulator, next_offsets, chance = self._simulator, self._next_offsets, self._rng.random
        if simulator.kafka_unavailable or not topic_ids:
            return found
        for partition in shuffled(self._rng, list(next_offsets)):
            next_offset, log = next_offsets[partition], simulator.topic.logs[partition.partition]
            end = len(log)
            if next_offset > end:
                error = OrderlibError("Kafka does not hold this offset")
                self._process.on_fatal(error)
                found.append(FetchFailed(partition, error))
                return found
            stop = end if simulator.healing else min(end, next_offset + int(chance() * 8))
            for offset in range(next_offset, stop):
                entry = log[offset]
                if entry is None:
                    continue
                if len(found) >= limit:
                    stop = offset
                    break
                found.append(fetched(topic_ids[TOPIC], partition.partition, offset, entry))
            if stop > next_offset:
                # The client's position is directly after a record. It passes a gap together with the next record.
                while stop < end and stop > next_offset and log[stop - 1] is None:
                    stop -= 1
                next_offsets[partition] = stop
            if stop == end and self._eof_offsets.get(partition) != end:
                self._eof_offsets[partition] = end
                found.append(PartitionEof(partition, end))
        return found


def shuffled(rng: Random, partitions: list[TopicPartition]) -> list[TopicPartition]:
    """Return the partitions in random order, because Kafka promises no order between partitions."""
    if len(partitions) > 1:
        start = int(rng.random() * len(partitions))
        return partitions[start:] + partitions[:start]
    return partitions
