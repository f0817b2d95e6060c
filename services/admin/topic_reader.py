"""Read a topic outside of any consumer group: its earliest offsets, its log ends, its records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import ConfigResource, OffsetSpec, ResourceType

from orderlib.commands import APPLICATION_NAME
from orderlib.errors import ConfigurationError
from orderlib.ingestion.records import Record
from services.kafka import CONSUMER_DEFAULTS, CONSUMER_PROPERTIES, REQUEST_TIMEOUT_S, SILENT_LOGGER, Cluster, record_of
from services.kafka_errors import (
    NO_GROUP_ACL,
    NO_TOPIC_ACL,
    PARTITION_EOF,
    translate_kafka_error,
    translate_kafka_errors,
)
from services.settings import KafkaSettings

#: What librdkafka may fetch ahead: in KiB in total, in bytes for each partition and for each request. A larger record
#: is fetched alone. These limits bound memory if records are large.
_QUEUE_KIB = 4 * 1024
_PARTITION_FETCH_BYTES = 512 * 1024
_REQUEST_FETCH_BYTES = 2 * 1024 * 1024

#: At most this many records are taken from that queue at a time.
_MAX_MESSAGES = 500
_POLL_S = 0.1


class TopicReader:
    """A topic to read.

    Raises ConfigurationError if the topic does not exist, and BrokerUnavailable if Kafka does not answer.
    """

    def __init__(self, settings: KafkaSettings) -> None:
        self.topic = settings.topic
        self._settings = settings
        self.cluster = Cluster(settings)
        found = self.cluster.describe(self.topic)
        self.partitions = found.partitions
        self.topic_id = found.topic_id

    def earliest(self) -> dict[int, int]:
        """Return the earliest offset that each partition still has."""
        return self.cluster.earliest(self.topic, self.partitions)

    def ends(self) -> dict[int, int]:
        """Return the log end of each partition."""
        return self.cluster.ends(self.topic, self.partitions)

    def is_compacted(self) -> bool | None:
        """Return whether Kafka compacts the topic, so that any record before the log end may be missing.

        Return ``None`` without the ACL to describe the topic's configuration.
        """
        resource = ConfigResource(ResourceType.TOPIC, self.topic)
        try:
            found = self.cluster.wait_for(
                self.cluster.admin.describe_configs([resource], request_timeout=REQUEST_TIMEOUT_S)[resource]
            )
        except ConfigurationError as exc:
            cause = exc.__cause__
            if isinstance(cause, KafkaException) and cause.args[0].code() == NO_TOPIC_ACL:
                return None
            raise
        return "compact" in str(found["cleanup.policy"].value)

    def at_time(self, timestamp_ms: int) -> dict[int, int]:
        """Return the first offset of each partition at or after this time, or its log end if there is none."""
        ends = self.ends()
        found = self.cluster.offsets(self.topic, self.partitions, OffsetSpec.for_timestamp(timestamp_ms))
        return {partition: offset if offset >= 0 else ends[partition] for partition, offset in found.items()}

    def records(self, start_offsets: Mapping[int, int], end_offsets: Mapping[int, int]) -> Iterator[Record]:
        """Yield the committed records from the start offsets up to, not including, the end offsets.

        Ignore partitions that the topic does not have, and those without a start or an end.
        """
        open_until = {
            partition: min(end_offsets[partition], end)
            for partition, end in self.ends().items()
            if start_offsets.get(partition, end) < min(end_offsets.get(partition, 0), end)
        }
        if not open_until:
            return
        consumer = Consumer(
            {
                "queued.max.messages.kbytes": _QUEUE_KIB,
                "fetch.message.max.bytes": _PARTITION_FETCH_BYTES,
                "fetch.max.bytes": _REQUEST_FETCH_BYTES,
                **CONSUMER_DEFAULTS,
                **self._settings.client_properties(),
                **CONSUMER_PROPERTIES,
                "group.id": APPLICATION_NAME,  # required, but not joined: the partitions are assigned by ``assign``
                # All records exist already. librdkafka reports the end of a partition after an empty response.
                "fetch.wait.max.ms": 10,
                "error_cb": self.cluster.on_error,
            },
            logger=SILENT_LOGGER,
        )
        try:
            consumer.assign(
                [TopicPartition(self.topic, partition, start_offsets[partition]) for partition in open_until]
            )
            yield from self._fetch(consumer, open_until)
        finally:
            consumer.close()

    def _fetch(self, consumer: Consumer, open_until: dict[int, int]) -> Iterator[Record]:
        # Counted, not measured: while this process was stopped, Kafka was not silent.
        polls_without_answer = 0
        while open_until:
            with translate_kafka_errors():
                # Wait for one message, then take those that are fetched already: waiting for more would exceed the
                # limit of the queue.
                messages = consumer.consume(1, _POLL_S)
                messages += consumer.consume(_MAX_MESSAGES, 0) if messages else []
            polls_without_answer = 0 if messages else polls_without_answer + 1
            if polls_without_answer * _POLL_S > REQUEST_TIMEOUT_S:
                raise self.cluster.unavailable_error()
            for message in messages:
                partition, offset, error = message.partition(), message.offset(), message.error()
                if error is not None and error.code() == NO_GROUP_ACL:
                    continue  # librdkafka asks for the coordinator of the group, which is not needed here
                if error is not None and error.code() != PARTITION_EOF:
                    raise translate_kafka_error(error, message)
                if partition not in open_until or offset is None:
                    continue
                if error is None and offset < open_until[partition]:
                    yield record_of(message, {self.topic: self.topic_id})
                if offset + (error is None) >= open_until[partition]:
                    del open_until[partition]
