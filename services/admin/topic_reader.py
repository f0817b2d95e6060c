"""The topic, read outside of any group: where it begins and ends, and its records."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import ConfigResource, OffsetSpec, ResourceType

from orderlib.errors import ConfigurationError
from orderlib.ingestion.records import Record
from services.kafka import REQUEST_TIMEOUT_S, SILENT, Cluster, record_of
from services.kafka_errors import NO_GROUP_RIGHT, PARTITION_EOF, translate, translated_errors
from services.settings import KafkaSettings

#: Records taken from librdkafka at once; it waits for so many until the turn is over.
_AT_ONCE = 500
_TURN_S = 0.1


class TopicReader:
    """A topic to look at. Raises ConfigurationError if there is none, BrokerUnavailable if Kafka does not answer."""

    def __init__(self, settings: KafkaSettings) -> None:
        self.topic = settings.topic
        self._settings = settings
        self.cluster = Cluster(settings)
        found = self.cluster.describe(self.topic)
        self.partitions = found.partitions
        self.topic_id = found.topic_id

    def earliest(self) -> dict[int, int]:
        """The earliest offset that each partition still holds."""
        return self.cluster.earliest(self.topic, self.partitions)

    def ends(self) -> dict[int, int]:
        """The log end of each partition."""
        return self.cluster.ends(self.topic, self.partitions)

    def is_compacted(self) -> bool:
        """Return whether Kafka compacts the topic: any record before the log end may be missing then.

        Without the right to describe the topic's configuration, assume that it does not.
        """
        resource = ConfigResource(ResourceType.TOPIC, self.topic)
        try:
            found = self.cluster.wait_for(
                self.cluster.admin.describe_configs([resource], request_timeout=REQUEST_TIMEOUT_S)[resource]
            )
        except ConfigurationError:
            return False
        return "compact" in str(found["cleanup.policy"].value)

    def at_time(self, timestamp_ms: int) -> dict[int, int]:
        """The first offset of each partition at this time or later; its log end where there is none."""
        ends = self.ends()
        found = self.cluster.offsets(self.topic, self.partitions, OffsetSpec.for_timestamp(timestamp_ms))
        return {partition: offset if offset >= 0 else ends[partition] for partition, offset in found.items()}

    def records(self, first: Mapping[int, int], until: Mapping[int, int]) -> Iterator[Record]:
        """The committed records from the first offsets up to, not including, the others."""
        ends = self.ends()
        open_until = {
            partition: min(until[partition], ends[partition])
            for partition, offset in first.items()
            if offset < min(until.get(partition, 0), ends[partition])
        }
        if not open_until:
            return
        consumer = Consumer(
            {
                **self._settings.client_properties(),
                "group.id": "orderlib-admin",  # never joined: partitions are assigned by hand
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                # All records to read are there already; the end of a partition is reported after an empty answer.
                "fetch.wait.max.ms": 10,
                "isolation.level": "read_committed",
                "auto.offset.reset": "error",
                "error_cb": self.cluster.on_error,
            },
            logger=SILENT,
        )
        try:
            consumer.assign([TopicPartition(self.topic, partition, first[partition]) for partition in open_until])
            yield from self._fetch(consumer, open_until)
        finally:
            consumer.close()

    def _fetch(self, consumer: Consumer, open_until: dict[int, int]) -> Iterator[Record]:
        answered_at_s = time.monotonic()
        while open_until:
            with translated_errors():
                messages = consumer.consume(_AT_ONCE, _TURN_S)
            if messages:
                answered_at_s = time.monotonic()
            elif time.monotonic() - answered_at_s > REQUEST_TIMEOUT_S:
                raise self.cluster.unreachable()
            for message in messages:
                partition, offset, error = message.partition(), message.offset(), message.error()
                if error is not None and error.code() == NO_GROUP_RIGHT:
                    continue  # librdkafka looks for the group's coordinator, which nothing here needs
                if error is not None and error.code() != PARTITION_EOF:
                    raise translate(error, message)
                if partition not in open_until or offset is None:
                    continue
                if error is None and offset < open_until[partition]:
                    yield record_of(message, {self.topic: self.topic_id})
                if offset + (error is None) >= open_until[partition]:
                    del open_until[partition]
