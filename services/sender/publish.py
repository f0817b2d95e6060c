"""Publish values as records: keys, acknowledgements, the manifest."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable

import msgspec
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from orderlib.codecs import read_order_uid
from services.kafka import SILENT_LOGGER, Cluster, not_none
from services.kafka_errors import QUEUE_FULL, translate_kafka_errors
from services.manifest_line import ManifestLine
from services.program import event
from services.sender.manifest import Manifest
from services.settings import KafkaSettings

#: Larger than the limit of nearly every broker, so that the broker refuses a value and not the client.
_MAX_VALUE_BYTES = 64 * 1024 * 1024

#: Limits of unacknowledged records, so that a slow broker costs time and not memory. The largest value fits.
_MAX_QUEUED_KIB = 2 * _MAX_VALUE_BYTES // 1024
_MAX_QUEUED_RECORDS = 20_000

#: How long to wait if the queue is full.
_QUEUE_FULL_S = 0.1


class Publisher:
    """Publishes values to the topic of orders, each keyed by its order_uid as Java clients would.

    Every sent value is either acknowledged by all in-sync replicas or counted as failed. ``manifest`` gets a JSON line
    for each acknowledged record, immediately.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        manifest: Manifest | None,
        on_acknowledged: Callable[[int, int | None], None] | None = None,
    ) -> None:
        """``on_acknowledged`` gets the partition and the offset of each acknowledged record.

        The offset is ``None`` if a broker was lost after it had stored the record and before it acknowledged it:
        the next leader confirms the record, and not its offset.
        """
        self._topic = settings.topic
        self._on_acknowledged = on_acknowledged
        self._manifest = manifest
        self._cluster = Cluster(settings)
        self.sent = 0
        self.acknowledged = 0
        self.failed = 0
        #: The error of the first record that failed.
        self.first_failure: KafkaError | None = None
        with translate_kafka_errors():
            self._producer = Producer(
                {
                    "message.max.bytes": _MAX_VALUE_BYTES,
                    "message.timeout.ms": 60_000,
                    "queue.buffering.max.kbytes": _MAX_QUEUED_KIB,
                    "queue.buffering.max.messages": _MAX_QUEUED_RECORDS,
                    # A broker whose machine failed does not close its connections; this timeout detects it.
                    "socket.timeout.ms": 10_000,
                    **settings.client_properties(),
                    "acks": "all",
                    "enable.idempotence": True,
                    "partitioner": "murmur2_random",
                    "error_cb": self._cluster.on_error,
                },
                logger=SILENT_LOGGER,
            )

    @property
    def unacknowledged(self) -> int:
        """The number of sent records that are neither acknowledged nor failed yet."""
        return self.sent - self.acknowledged - self.failed

    def check_topic(self) -> str:
        """Return the id of the topic.

        Raises ConfigurationError, or BrokerUnavailable if Kafka does not answer in 10 s.
        """
        return self._cluster.describe(self._topic).topic_id

    def send(self, value: bytes) -> bool:
        """Publish a value. Return ``False``, after a short wait, if the queue is full and the value was not sent."""
        order_uid = read_order_uid(value)
        key = None if order_uid is None else order_uid.encode()
        try:
            self._producer.produce(self._topic, value, key, on_delivery=self._on_delivery)
        except BufferError:
            if self.unacknowledged:
                self.wait(_QUEUE_FULL_S)
                return False
            reason = "the value is larger than the empty queue: set ORDERS_KAFKA_QUEUE_BUFFERING_MAX_KBYTES"
            self._fail(KafkaError(QUEUE_FULL, reason))
        except KafkaException as exc:
            self._fail(exc.args[0])
        self.sent += 1
        self.wait(0)
        return True

    def wait(self, timeout_s: float) -> None:
        """Handle the acknowledgements received, and wait up to ``timeout_s`` for the first.

        Raises ConfigurationError if an ACL is missing, or if the manifest cannot be written.
        """
        try:
            with translate_kafka_errors():
                self._producer.poll(timeout_s)
        finally:
            if self._manifest is not None:
                self._manifest.write()

    def purge(self) -> None:
        """Count every unacknowledged record as failed."""
        self._producer.purge()
        self.wait(0)

    def _on_delivery(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self._fail(error)
            return
        self.acknowledged += 1
        if self._on_acknowledged is not None:
            self._on_acknowledged(not_none(message.partition()), message.offset())
        if self._manifest is not None:
            self._manifest.add(_manifest_line(message))

    def _fail(self, error: KafkaError) -> None:
        self.failed += 1
        if self.first_failure is None:
            self.first_failure = error
            event("delivery_failed", logging.WARNING, reason=error.str(), code=error.name())


def _manifest_line(message: Message) -> bytes:
    key = message.key()
    line = ManifestLine(
        topic=not_none(message.topic()),
        partition=not_none(message.partition()),
        offset=message.offset(),
        order_uid=None if key is None else key.decode(),
        sha256=hashlib.sha256(not_none(message.value())).hexdigest(),
    )
    return msgspec.json.encode(line) + b"\n"
