"""``KafkaClient`` with librdkafka: the consumer's only module that uses confluent_kafka."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import TopicDescription

from orderlib.errors import BrokerUnavailable, OrderlibError
from orderlib.ingestion.consumer_core import PartitionEof
from services.consumer.kafka_client import FetchFailed, GroupListener, KafkaClient, PollResult
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

#: librdkafka fetches at most this number of KiB ahead.
_QUEUE_KIB = 2 * 1024
#: One request of librdkafka fetches at most this number of bytes of a partition.
_FETCH_BYTES = 256 * 1024


class KafkaConsumer(KafkaClient):
    """A consumer of librdkafka. The constructor raises ConfigurationError for a property that librdkafka refuses."""

    def __init__(self, settings: ConsumerSettings) -> None:
        self._topic = settings.kafka.topic
        self._assigned: set[int] = set()
        self._down = threading.Event()
        self._cluster = Cluster(settings.kafka)
        #: Errors that librdkafka reported outside of the messages, and that must stop the consumer.
        self._fatal: list[OrderlibError] = []
        with translated_errors():
            self._consumer = Consumer(
                {
                    "partition.assignment.strategy": "cooperative-sticky",
                    # The group assigns the partitions of a killed member to the others after this time.
                    "session.timeout.ms": 10_000,
                    # The response to a heartbeat announces a rebalance. Moving a partition takes two rebalances.
                    "heartbeat.interval.ms": 1_000,
                    "queued.max.messages.kbytes": _QUEUE_KIB,
                    "fetch.message.max.bytes": _FETCH_BYTES,
                    "fetch.wait.max.ms": 100,
                    # The consumer empties a full queue soon, and the default would wait for a second.
                    "fetch.queue.backoff.ms": 2,
                    # librdkafka notices a deleted topic or a new partition after this time. The default is 5 minutes.
                    "topic.metadata.refresh.interval.ms": 10_000,
                    **settings.kafka.client_properties(),
                    "group.id": settings.group,
                    "enable.auto.commit": False,
                    "enable.auto.offset.store": False,
                    "enable.partition.eof": True,
                    "isolation.level": "read_committed",
                    # An offset that Kafka no longer has must stop the consumer, and never skip records.
                    "auto.offset.reset": "error",
                    "on_commit": _on_committed,
                    "error_cb": self._on_error,
                },
                logger=SILENT,
            )

    @property
    def topic(self) -> str:
        """Return the name of the topic."""
        return self._topic

    @property
    def down(self) -> bool:
        """Return whether no broker can be reached, as far as librdkafka has reported."""
        return self._down.is_set()

    @property
    def unreachable(self) -> str:
        """Return a message for the case that Kafka does not respond."""
        return f"Kafka at {self._cluster.addresses} does not answer{self._cluster.last_error}"

    # Requests to the cluster.

    def describe(self) -> TopicInfo:
        """Return the topic's id and partitions."""
        return self._cluster.describe(self._topic)

    def request_topic(self, timeout_s: float = REQUEST_TIMEOUT_S) -> Callable[[], TopicInfo]:
        """Request the topic's id and partitions. The returned function waits for them."""
        return self._cluster.request_topic(self._topic, timeout_s)

    def earliest(self, partitions: Iterable[int]) -> dict[int, int]:
        """Return the earliest offset that Kafka still has of each partition."""
        return self._cluster.earliest(self._topic, partitions)

    def ends(self, partitions: Iterable[int]) -> dict[int, int]:
        """Return the log end of each partition: its last stable offset."""
        return self._cluster.ends(self._topic, partitions)

    def request_ends(self, partitions: Iterable[int]) -> Callable[[], dict[int, int] | None]:
        """Request the log ends. The returned function never waits, and returns ``None`` until they are known."""
        return self._cluster.request_ends(self._topic, partitions)

    # Membership.

    def join(self, listener: GroupListener) -> None:
        """Join the group. ``fetch`` and ``poll`` call the listener."""

        def on_assign(consumer: Consumer, places: list[TopicPartition]) -> None:
            # Without this call the binding would assign the partitions now. Their next offsets are not known yet.
            consumer.incremental_assign([])
            listener.on_partitions_assigned([place.partition for place in places])

        def on_revoke(consumer: Consumer, places: list[TopicPartition]) -> None:
            revoked = {place.partition for place in places}
            consumer.incremental_unassign(self._places(revoked & self._assigned))
            self._assigned -= revoked
            listener.on_partitions_revoked(revoked)

        self._consumer.subscribe([self._topic], on_assign=on_assign, on_revoke=on_revoke, on_lost=on_revoke)

    def fetch(self, topic_id: str | None, limit: int, timeout_s: float) -> list[PollResult]:
        """Return the next records and other events, at most ``limit`` messages."""
        with translated_errors():
            messages = self._consumer.consume(limit, timeout_s)
        return [*self._take_fatal(), *(self._convert(message, topic_id) for message in messages)]

    def poll(self, topic_id: str | None, timeout_s: float) -> list[PollResult]:
        """Return at most one message, and stay in the group."""
        message = self._consumer.poll(timeout_s)
        return [*self._take_fatal(), *([] if message is None else [self._convert(message, topic_id)])]

    def assign(self, next_offsets: Mapping[int, int]) -> None:
        """Start to fetch these assigned partitions, each from its offset."""
        with translated_errors():
            # librdkafka keeps a partition paused that was revoked while paused.
            self._consumer.resume(self._places(next_offsets))
            self._consumer.incremental_assign(
                [TopicPartition(self._topic, partition, offset) for partition, offset in next_offsets.items()]
            )
        self._assigned.update(next_offsets)

    def seek(self, partition: int, next_offset: int) -> None:
        """Fetch this partition from this offset."""
        with translated_errors():
            self._consumer.seek(TopicPartition(self._topic, partition, next_offset))

    def pause(self) -> None:
        """Stop fetching until ``resume``."""
        with translated_errors():
            self._consumer.pause(self._places(self._assigned))

    def resume(self) -> None:
        """Fetch all assigned partitions again."""
        with translated_errors():
            self._consumer.resume(self._places(self._assigned))

    def commit(self, next_offsets: Mapping[int, int]) -> None:
        """Commit offsets to Kafka for lag tools, and do not wait."""
        places = [TopicPartition(self._topic, partition, offset) for partition, offset in next_offsets.items()]
        with contextlib.suppress(KafkaException):
            self._consumer.commit(offsets=places, asynchronous=True)

    def close(self, timeout_s: float) -> bool:
        """Leave the group. Return whether that succeeded in time."""
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
                self._request_until_up()
        elif action_of(error) is ErrorAction.STOP:
            self._fatal.append(translate(error))

    def _take_fatal(self) -> list[PollResult]:
        fatal, self._fatal = self._fatal, []
        return [FetchFailed(None, error) for error in fatal]

    def _request_until_up(self) -> None:
        """Repeat a request until Kafka responds, because without records nothing else shows that it is back."""
        self._cluster.request_description(self._topic).add_done_callback(self._on_response)

    def _on_response(self, future: Future[TopicDescription]) -> None:
        error = future.exception()
        if isinstance(error, KafkaException) and isinstance(translate(error.args[0]), BrokerUnavailable):
            if self._down.is_set():
                self._request_until_up()
        else:
            self._on_reachable()

    def _convert(self, message: Message, topic_id: str | None) -> PollResult:
        error = message.error()
        if error is None:
            self._on_reachable()
            return record_of(message, topic_id or "")
        if error.code() == PARTITION_EOF:
            self._on_reachable()
            return PartitionEof(partition=known(message.partition()), next_offset=known(message.offset()))
        # An error of the whole group comes without a topic, and with partition 0.
        partition = message.partition() if message.topic() is not None else None
        if error.code() == OFFSET_LOST:
            lost = OrderlibError(
                f"Kafka no longer holds the next record of {self._topic}[{message.partition()}] ({error.str()}): "
                "records were lost before they were stored; see `python -m services.admin offsets`"
            )
            return FetchFailed(partition, lost)
        return FetchFailed(partition, translate(error, message))

    def _on_reachable(self) -> None:
        if self._down.is_set():
            self._down.clear()
            event("kafka_reachable")

    def _places(self, partitions: Iterable[int]) -> list[TopicPartition]:
        return [TopicPartition(self._topic, partition) for partition in partitions]


def _on_committed(error: KafkaError | None, _places: list[TopicPartition]) -> None:
    if error is not None:
        event("kafka_commit_failed", logging.INFO, reason=error.name())
