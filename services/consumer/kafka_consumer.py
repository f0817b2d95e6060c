"""The topic as librdkafka shows it: the consumer's only room that knows confluent_kafka."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Protocol

import attrs
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import TopicDescription

from orderlib.errors import BrokerUnavailable, OrderlibError
from orderlib.ingestion.consumer_core import PartitionEof
from orderlib.ingestion.records import Record
from services.kafka import REQUEST_TIMEOUT_S, SILENT, Cluster, TopicInfo, known, record_of
from services.kafka_errors import (
    ALL_BROKERS_DOWN,
    OFFSET_LOST,
    PARTITION_EOF,
    ErrorAction,
    action_of,
    translate,
    translated_errors,
)
from services.program import event
from services.settings import ConsumerSettings

#: What librdkafka may fetch ahead, in KiB, and at most per partition and request, in bytes.
_QUEUE_KIB = 2 * 1024
_FETCH_BYTES = 256 * 1024


@attrs.frozen
class FetchFailed:
    """An error that librdkafka reported while fetching or in the group. It tries again by itself, unless we stop."""

    #: ``None`` if the error is not of one partition.
    partition: int | None
    error: OrderlibError


PollResult = Record | PartitionEof | FetchFailed


class Member(Protocol):
    """Who wants to know which partitions the group gives and takes."""

    def on_partitions_assigned(self, partitions: Iterable[int]) -> None:
        """These are ours now."""

    def on_partitions_revoked(self, partitions: Iterable[int]) -> None:
        """These are not ours any more."""


class KafkaConsumer:
    """One topic, read by one member of a consumer group.

    Raises ConfigurationError for a property that librdkafka refuses.
    What the group gives and takes is told from within ``fetch`` and ``poll``. Assigning is left to ``assign``, when the
    store has said where to begin.
    """

    def __init__(self, settings: ConsumerSettings) -> None:
        self.name = settings.kafka.topic
        self._assigned: set[int] = set()
        self._down = threading.Event()
        self._cluster = Cluster(settings.kafka)
        #: Errors that librdkafka reported beside the messages, and that must stop us.
        self._fatal: list[OrderlibError] = []
        with translated_errors():
            self._consumer = Consumer(
                {
                    "partition.assignment.strategy": "cooperative-sticky",
                    # The partitions of one that was killed go to the others after this.
                    "session.timeout.ms": 10_000,
                    # Members hear of a rebalance in a heartbeat, and partitions that move take two rebalances.
                    "heartbeat.interval.ms": 1_000,
                    "queued.max.messages.kbytes": _QUEUE_KIB,
                    "fetch.message.max.bytes": _FETCH_BYTES,
                    "fetch.wait.max.ms": 100,
                    # A full queue is soon emptied; the default would wait for a second.
                    "fetch.queue.backoff.ms": 2,
                    # How soon a deleted topic and a new partition are noticed; by default it takes five minutes.
                    "topic.metadata.refresh.interval.ms": 10_000,
                    **settings.kafka.client_properties(),
                    "group.id": settings.group,
                    "enable.auto.commit": False,
                    "enable.auto.offset.store": False,
                    "enable.partition.eof": True,
                    "isolation.level": "read_committed",
                    # An offset that Kafka no longer holds must stop us, never skip records.
                    "auto.offset.reset": "error",
                    "on_commit": _on_reported,
                    "error_cb": self._on_error,
                },
                logger=SILENT,
            )

    @property
    def down(self) -> bool:
        """Whether no broker could be reached at last notice."""
        return self._down.is_set()

    # Questions to the cluster. They raise BrokerUnavailable or ConfigurationError.

    @property
    def unreachable(self) -> str:
        """What to say when Kafka does not answer."""
        return f"Kafka at {self._cluster.addresses} does not answer{self._cluster.last_error}"

    def describe(self) -> TopicInfo:
        """The topic's id and partitions. Raises ConfigurationError if there is no such topic."""
        return self._cluster.describe(self.name)

    def ask(self, timeout_s: float = REQUEST_TIMEOUT_S) -> Callable[[], TopicInfo]:
        """Ask for the topic's id and partitions; the result waits for the answer."""
        return self._cluster.request_topic(self.name, timeout_s)

    def earliest(self, partitions: Iterable[int]) -> dict[int, int]:
        """The earliest offset that each partition still holds."""
        return self._cluster.earliest(self.name, partitions)

    def ends(self, partitions: Iterable[int]) -> dict[int, int]:
        """The log end of each partition: its last stable offset."""
        return self._cluster.ends(self.name, partitions)

    def ask_ends(self, partitions: Iterable[int]) -> Callable[[], dict[int, int] | None]:
        """Ask for log ends; the result gives what is known of them, or ``None`` until there is an answer."""
        return self._cluster.request_ends(self.name, partitions)

    # The life of a member.

    def join(self, member: Member) -> None:
        """Join the group; ``member`` is told what it gives and takes."""

        def given(consumer: Consumer, places: list[TopicPartition]) -> None:
            # An empty call keeps the binding from assigning them at once: the store has not said where to begin.
            consumer.incremental_assign([])
            member.on_partitions_assigned([place.partition for place in places])

        def taken(consumer: Consumer, places: list[TopicPartition]) -> None:
            gone = {place.partition for place in places}
            consumer.incremental_unassign(self._places(gone & self._assigned))
            self._assigned -= gone
            member.on_partitions_revoked(gone)

        self._consumer.subscribe([self.name], on_assign=given, on_revoke=taken, on_lost=taken)

    def fetch(self, topic_id: str | None, limit: int, timeout_s: float) -> list[PollResult]:
        """Fetch at most ``limit`` records and other events of the client."""
        with translated_errors():
            messages = self._consumer.consume(limit, timeout_s)
        return [*self._take_fatal(), *(self._fetched(message, topic_id) for message in messages)]

    def poll(self, topic_id: str | None, timeout_s: float) -> list[PollResult]:
        """Stay in the group while paused."""
        message = self._consumer.poll(timeout_s)
        return [*self._take_fatal(), *([] if message is None else [self._fetched(message, topic_id)])]

    def assign(self, next_offsets: Mapping[int, int]) -> None:
        """Fetch these partitions, which the group gave us, from these offsets on."""
        with translated_errors():
            # One that was taken while paused would still be.
            self._consumer.resume(self._places(next_offsets))
            self._consumer.incremental_assign(
                [TopicPartition(self.name, partition, offset) for partition, offset in next_offsets.items()]
            )
        self._assigned.update(next_offsets)

    def seek(self, partition: int, next_offset: int) -> None:
        """Go on from another offset."""
        with translated_errors():
            self._consumer.seek(TopicPartition(self.name, partition, next_offset))

    def pause(self) -> None:
        """Fetch nothing, until ``resume``."""
        with translated_errors():
            self._consumer.pause(self._places(self._assigned))

    def resume(self) -> None:
        """Fetch again."""
        with translated_errors():
            self._consumer.resume(self._places(self._assigned))

    def report(self, next_offsets: Mapping[int, int]) -> None:
        """Commit offsets to Kafka, which nobody waits for: only lag tools read them."""
        places = [TopicPartition(self.name, partition, offset) for partition, offset in next_offsets.items()]
        with contextlib.suppress(KafkaException):
            self._consumer.commit(offsets=places, asynchronous=True)

    def close(self, timeout_s: float) -> bool:
        """Leave the group; whether that was done in time."""
        closing = threading.Thread(target=self._consumer.close, daemon=True)
        closing.start()
        closing.join(timeout_s)
        return not closing.is_alive()

    # Callbacks of librdkafka.

    def _on_error(self, error: KafkaError) -> None:
        self._cluster.on_error(error)
        if error.code() == ALL_BROKERS_DOWN:
            if not self._down.is_set():
                self._down.set()
                event("kafka_unreachable", logging.WARNING, reason=self.unreachable)
                self._ask_whether_up()
        elif action_of(error) is ErrorAction.STOP:
            self._fatal.append(translate(error))

    def _take_fatal(self) -> list[PollResult]:
        fatal, self._fatal = self._fatal, []
        return [FetchFailed(None, error) for error in fatal]

    def _ask_whether_up(self) -> None:
        """Without records, or without partitions, nothing else would tell that Kafka is back."""
        self._cluster.request_description(self.name).add_done_callback(self._on_answer)

    def _on_answer(self, question: Future[TopicDescription]) -> None:
        error = question.exception()
        if isinstance(error, KafkaException) and isinstance(translate(error.args[0]), BrokerUnavailable):
            if self._down.is_set():
                self._ask_whether_up()
        else:
            self._up()

    def _fetched(self, message: Message, topic_id: str | None) -> PollResult:
        error = message.error()
        if error is None:
            self._up()
            return record_of(message, topic_id or "")
        if error.code() == PARTITION_EOF:
            self._up()
            return PartitionEof(partition=known(message.partition()), next_offset=known(message.offset()))
        # An error of the whole group comes without a topic, and with partition 0.
        partition = message.partition() if message.topic() is not None else None
        if error.code() == OFFSET_LOST:
            lost = OrderlibError(
                f"Kafka no longer holds the next record of {self.name}[{message.partition()}] ({error.str()}): records "
                "were lost before they were stored; see `python -m services.admin offsets`"
            )
            return FetchFailed(partition, lost)
        return FetchFailed(partition, translate(error, message))

    def _up(self) -> None:
        if self._down.is_set():
            self._down.clear()
            event("kafka_reachable")

    def _places(self, partitions: Iterable[int]) -> list[TopicPartition]:
        return [TopicPartition(self.name, partition) for partition in partitions]


def _on_reported(error: KafkaError | None, _places: list[TopicPartition]) -> None:
    if error is not None:
        event("offsets_not_reported", logging.INFO, reason=error.name())
