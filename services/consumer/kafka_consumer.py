"""``KafkaClient`` with librdkafka: the consumer's only module that uses confluent_kafka."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, Message
from confluent_kafka import TopicPartition as KafkaPartition
from confluent_kafka.admin import TopicDescription

from orderlib.errors import BrokerUnavailable, OrderlibError
from orderlib.ingestion.consumer_core import PartitionEof
from orderlib.ingestion.records import TopicPartition
from services.consumer.kafka_client import FetchFailed, GroupListener, KafkaClient, PollResult
from services.kafka import (
    CONSUMER_DEFAULTS,
    CONSUMER_PROPERTIES,
    REQUEST_TIMEOUT_S,
    SILENT_LOGGER,
    Cluster,
    TopicInfo,
    not_none,
    record_of,
)
from services.kafka_errors import (
    ALL_BROKERS_DOWN,
    OFFSET_LOST,
    PARTITION_EOF,
    KafkaErrorAction,
    classify_kafka_error,
    translate_kafka_error,
    translate_kafka_errors,
)
from services.program import event
from services.settings import ConsumerSettings

#: The properties of a member of a group in the classic protocol.
_CLASSIC_GROUP = {
    "partition.assignment.strategy": "cooperative-sticky",
    # The group assigns the partitions of a killed member to the others after this time.
    "session.timeout.ms": 10_000,
    # The response to a heartbeat announces a rebalance. Moving a partition takes two rebalances.
    "heartbeat.interval.ms": 1_000,
}
#: librdkafka fetches at most this number of KiB ahead.
_QUEUE_KIB = 2 * 1024
#: One request of librdkafka fetches at most this number of bytes of a partition.
_FETCH_BYTES = 256 * 1024
#: librdkafka reports its brokers this often. Without any in this number of reports, it has forgotten them.
_REPORT_MS = 5_000
_EMPTY_REPORTS = 2
#: The timeout of a request for the earliest offset and the log end, before the consumer stops.
_WATERMARKS_S = 1.0


class _Broker(msgspec.Struct):
    source: str


class _Statistics(msgspec.Struct):
    """The part of librdkafka's statistics (STATISTICS.md) that shows whether it knows a broker."""

    brokers: dict[str, _Broker]

    @property
    def knows_broker(self) -> bool:
        """Return whether there is a broker to connect to. A logical one, such as the coordinator, has no address."""
        return any(broker.source != "logical" for broker in self.brokers.values())


class KafkaConsumer(KafkaClient):
    """A consumer of librdkafka. The constructor raises ConfigurationError for a property that librdkafka refuses."""

    def __init__(self, settings: ConsumerSettings) -> None:
        self._topics = [settings.kafka.topic]
        self._assigned: set[TopicPartition] = set()
        self._unavailable = threading.Event()
        self._cluster = Cluster(settings.kafka)
        #: Errors that librdkafka reported outside of the messages, and that must stop the consumer.
        self._fatal: list[OrderlibError] = []
        self._properties = _properties(settings)
        self._listener: GroupListener | None = None
        #: The partitions that the group has assigned, also those whose offsets are not known yet.
        self._owned: set[TopicPartition] = set()
        self._empty_reports = 0
        self._clients = 0
        self._consumer = self._new_consumer()

    def _new_consumer(self) -> Consumer:
        self._clients += 1
        callbacks = {"error_cb": self._if_current(self._on_error), "stats_cb": self._if_current(self._on_statistics)}
        with translate_kafka_errors():
            return Consumer({**self._properties, **callbacks}, logger=SILENT_LOGGER)

    def _if_current(self, callback: Callable[..., None]) -> Callable[..., None]:
        """Return a callback without effect once its client is replaced: that one is closed in another thread."""
        number = self._clients

        def call(*args: object) -> None:
            if number == self._clients:
                callback(*args)

        return call

    @property
    def unavailable(self) -> bool:
        """Return whether no broker can be reached, as far as librdkafka has reported."""
        return self._unavailable.is_set()

    @property
    def unavailable_message(self) -> str:
        """Return the message that Kafka is unavailable."""
        return f"Kafka at {self._cluster.addresses} is unavailable{self._cluster.last_error}"

    # Requests to the cluster.

    def describe(self) -> dict[str, TopicInfo]:
        """Return the id and the partitions of each topic."""
        return {topic: self._cluster.describe(topic) for topic in self._topics}

    def request_topics(self, timeout_s: float = REQUEST_TIMEOUT_S) -> Callable[[], dict[str, TopicInfo]]:
        """Request the id and the partitions of each topic. The returned function waits for them."""
        responses = {topic: self._cluster.request_topic(topic, timeout_s) for topic in self._topics}
        return lambda: {topic: response() for topic, response in responses.items()}

    def earliest(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        """Return the earliest offset that Kafka still has of each partition."""
        return _merge({topic: self._cluster.earliest(topic, numbers) for topic, numbers in _by_topic(partitions)})

    def ends(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        """Return the log end of each partition: its last stable offset."""
        return _merge({topic: self._cluster.ends(topic, numbers) for topic, numbers in _by_topic(partitions)})

    def request_ends(self, partitions: Iterable[TopicPartition]) -> Callable[[], dict[TopicPartition, int] | None]:
        """Request the log ends. The returned function never waits, and returns ``None`` until they are known."""
        responses = {topic: self._cluster.request_ends(topic, numbers) for topic, numbers in _by_topic(partitions)}

        def ends() -> dict[TopicPartition, int] | None:
            known_ends: dict[str, dict[int, int]] = {}
            for topic, response in responses.items():
                if (found := response()) is None:
                    return None
                known_ends[topic] = found
            return _merge(known_ends)

        return ends

    # Membership.

    def join(self, listener: GroupListener) -> None:
        """Join the group. ``fetch`` and ``poll`` call the listener."""
        self._listener = listener
        self._subscribe()

    def _subscribe(self) -> None:
        on_revoke = self._if_current(self._on_revoke)
        self._consumer.subscribe(
            self._topics, on_assign=self._if_current(self._on_assign), on_revoke=on_revoke, on_lost=on_revoke
        )

    def fetch(self, topic_ids: Mapping[str, str], limit: int, timeout_s: float) -> list[PollResult]:
        """Return the records and other events that are ready, at most ``limit`` messages. Wait for the first one."""
        # consume() with a timeout would wait until there are as many as the limit.
        with translate_kafka_errors():
            first = self._consumer.poll(timeout_s)
            messages = [] if first is None else [first]
            if messages and limit > 1:
                messages += self._consumer.consume(limit - 1, 0)
        if self._empty_reports >= _EMPTY_REPORTS:
            self._replace_client()
        return [*self._take_fatal(), *(self._convert(message, topic_ids) for message in messages)]

    def poll(self, topic_ids: Mapping[str, str], timeout_s: float) -> list[PollResult]:
        """Return at most one message, and stay in the group."""
        return self.fetch(topic_ids, 1, timeout_s)

    def assign(self, next_offsets: Mapping[TopicPartition, int]) -> None:
        """Start to fetch these assigned partitions, each from its offset."""
        with translate_kafka_errors():
            # librdkafka keeps a partition paused that was revoked while paused.
            self._consumer.resume(_without_offsets(next_offsets))
            self._consumer.incremental_assign(_with_offsets(next_offsets))
        self._assigned.update(next_offsets)

    def seek(self, partition: TopicPartition, next_offset: int) -> None:
        """Fetch this partition from this offset."""
        with translate_kafka_errors():
            self._consumer.seek(KafkaPartition(*partition, next_offset))

    def pause(self) -> None:
        """Stop fetching until ``resume``."""
        with translate_kafka_errors():
            self._consumer.pause(_without_offsets(self._assigned))

    def resume(self) -> None:
        """Fetch all assigned partitions again."""
        with translate_kafka_errors():
            self._consumer.resume(_without_offsets(self._assigned))

    def commit(self, next_offsets: Mapping[TopicPartition, int]) -> None:
        """Commit offsets to Kafka for lag tools, and do not wait."""
        with contextlib.suppress(KafkaException):
            self._consumer.commit(offsets=_with_offsets(next_offsets), asynchronous=True)

    def close(self, timeout_s: float) -> bool:
        """Leave the group. Return whether that succeeded in time."""
        closing = threading.Thread(target=self._consumer.close, daemon=True)
        closing.start()
        closing.join(timeout_s)
        return not closing.is_alive()

    def _replace_client(self) -> None:
        """Join the group with a new client, because librdkafka has forgotten every broker ("Errors" in DESIGN.md)."""
        event("kafka_client_replaced", logging.WARNING, reason="librdkafka has forgotten every broker")
        # It may wait for brokers.
        threading.Thread(target=self._consumer.close, daemon=True).start()
        lost, self._owned, self._assigned, self._empty_reports = self._owned, set(), set(), 0
        self._consumer = self._new_consumer()
        if self._listener is not None:
            self._listener.on_partitions_revoked(lost)
            self._subscribe()

    # Callbacks of librdkafka.

    def _on_assign(self, consumer: Consumer, partitions: list[KafkaPartition]) -> None:
        # Without this call the binding would assign the partitions now. Their next offsets are not known yet.
        consumer.incremental_assign([])
        assigned = {TopicPartition(one.topic, one.partition) for one in partitions}
        self._owned |= assigned
        assert self._listener is not None
        self._listener.on_partitions_assigned(assigned)

    def _on_revoke(self, consumer: Consumer, partitions: list[KafkaPartition]) -> None:
        revoked = {TopicPartition(one.topic, one.partition) for one in partitions}
        consumer.incremental_unassign(_without_offsets(revoked & self._assigned))
        self._owned -= revoked
        self._assigned -= revoked
        assert self._listener is not None
        self._listener.on_partitions_revoked(revoked)

    def _on_statistics(self, report: str) -> None:
        knows_broker = msgspec.json.decode(report, type=_Statistics).knows_broker
        self._empty_reports = 0 if knows_broker else self._empty_reports + 1

    def _on_error(self, error: KafkaError) -> None:
        self._cluster.on_error(error)
        if error.code() == ALL_BROKERS_DOWN:
            if not self._unavailable.is_set():
                self._unavailable.set()
                event("kafka_unavailable", logging.WARNING, reason=self.unavailable_message)
                self._request_until_available()
        elif classify_kafka_error(error) is KafkaErrorAction.STOP:
            self._fatal.append(translate_kafka_error(error))

    def _take_fatal(self) -> list[PollResult]:
        fatal, self._fatal = self._fatal, []
        return [FetchFailed(None, error) for error in fatal]

    def _request_until_available(self) -> None:
        """Repeat a request until Kafka responds, because without records nothing else shows that it is back."""
        self._cluster.request_description(self._topics[0]).add_done_callback(self._on_response)

    def _on_response(self, future: Future[TopicDescription]) -> None:
        error = future.exception()
        if isinstance(error, KafkaException) and isinstance(translate_kafka_error(error.args[0]), BrokerUnavailable):
            if self._unavailable.is_set():
                self._request_until_available()
        else:
            self._on_available()

    def _convert(self, message: Message, topic_ids: Mapping[str, str]) -> PollResult:
        error = message.error()
        if error is None:
            self._on_available()
            return record_of(message, topic_ids)
        if error.code() == PARTITION_EOF:
            self._on_available()
            partition = TopicPartition(not_none(message.topic()), not_none(message.partition()))
            return PartitionEof(partition=partition, next_offset=not_none(message.offset()))
        # An error of the whole group has no topic, and has partition 0.
        topic = message.topic()
        failed = None if topic is None else TopicPartition(topic, not_none(message.partition()))
        if error.code() == OFFSET_LOST:
            return FetchFailed(failed, self._offset_lost_error(message, error))
        return FetchFailed(failed, translate_kafka_error(error, message))

    def _offset_lost_error(self, message: Message, error: KafkaError) -> OrderlibError:
        """Return the error for a next offset that Kafka does not have, with the offsets that it has."""
        topic, number, offset = not_none(message.topic()), not_none(message.partition()), message.offset()
        partition = TopicPartition(topic, number)
        earliest = end = None
        with contextlib.suppress(KafkaException):
            earliest, end = self._consumer.get_watermark_offsets(KafkaPartition(topic, number), _WATERMARKS_S)
        known = f"next offset {offset}, Kafka's earliest {earliest}, its log end {end}"
        reset = f"stop all consumers and run `python -m services.admin offsets reset --to-earliest --partition {number}"
        if offset is None or earliest is None or end is None or earliest <= offset <= end:
            return OrderlibError(
                f"Kafka does not hold the next record of {partition} ({known}): {error.str()}; "
                "see `python -m services.admin lag`"
            )
        if offset < earliest:
            return OrderlibError(
                f"Kafka no longer holds the next record of {partition} ({known}): records were lost before they were "
                f"stored; to continue without them, {reset} --execute`"
            )
        return OrderlibError(
            f"Kafka's log of {partition} ends before the next offset ({known}): Kafka has lost records that were "
            f"handled, or is an older copy; to continue with the records that it has, {reset} --execute`"
        )

    def _on_available(self) -> None:
        if self._unavailable.is_set():
            self._unavailable.clear()
            event("kafka_available")


def _properties(settings: ConsumerSettings) -> dict[str, Any]:
    """Return the properties of librdkafka, without callbacks that need the client."""
    properties = settings.kafka.client_properties()
    return {
        # In the new protocol (KIP-848) the group decides all that, and librdkafka refuses the properties.
        **({} if properties.get("group.protocol") == "consumer" else _CLASSIC_GROUP),
        "queued.max.messages.kbytes": _QUEUE_KIB,
        "fetch.message.max.bytes": _FETCH_BYTES,
        "fetch.wait.max.ms": 100,
        # librdkafka notices a deleted topic or a new partition after this time. The default is 5 minutes.
        "topic.metadata.refresh.interval.ms": 10_000,
        **CONSUMER_DEFAULTS,
        **properties,
        **CONSUMER_PROPERTIES,
        "statistics.interval.ms": _REPORT_MS,
        "group.id": settings.group,
        "on_commit": _on_committed,
    }


def _by_topic(partitions: Iterable[TopicPartition]) -> Iterable[tuple[str, list[int]]]:
    numbers: defaultdict[str, list[int]] = defaultdict(list)
    for topic, number in partitions:
        numbers[topic].append(number)
    return numbers.items()


def _merge(offsets: Mapping[str, Mapping[int, int]]) -> dict[TopicPartition, int]:
    return {TopicPartition(topic, number): offset for topic, of in offsets.items() for number, offset in of.items()}


def _with_offsets(next_offsets: Mapping[TopicPartition, int]) -> list[KafkaPartition]:
    return [KafkaPartition(*partition, next_offset) for partition, next_offset in next_offsets.items()]


def _without_offsets(partitions: Iterable[TopicPartition]) -> list[KafkaPartition]:
    return [KafkaPartition(*partition) for partition in partitions]


def _on_committed(error: KafkaError | None, _partitions: list[KafkaPartition]) -> None:
    if error is not None:
        event("kafka_commit_failed", logging.INFO, reason=error.name())
