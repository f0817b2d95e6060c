"""Publishing values as records: keys, acknowledgements, the manifest."""

from __future__ import annotations

import hashlib
import logging
import typing

import msgspec
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from orderlib.models import Order
from services.kafka import SILENT, Cluster, known
from services.kafka_errors import translated_errors
from services.program import event
from services.sender.manifest import Manifest
from services.settings import KafkaSettings

#: The client takes larger values than any broker is likely to: refusing is the broker's part.
_MAX_VALUE_BYTES = 64 * 1024 * 1024

#: What may be unacknowledged at once, so that a slow broker costs time and not memory; room for the largest value.
_MAX_QUEUED_KIB = 2 * _MAX_VALUE_BYTES // 1024
_MAX_QUEUED_RECORDS = 20_000

#: How long to wait for room.
_ROOM_S = 0.1

#: Of an order's fields the one that records are keyed by, under the contract's rule.
_ORDER_UID = typing.get_type_hints(Order, include_extras=True)["order_uid"]
_keyed = msgspec.json.Decoder(msgspec.defstruct("_Keyed", [("order_uid", _ORDER_UID)]))


def order_uid_of(value: bytes) -> str | None:
    """The order_uid in the JSON of an order, however bad the rest is; ``None`` where there is no valid one to read."""
    try:
        (order_uid,) = msgspec.structs.astuple(_keyed.decode(value))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return str(order_uid)


class Publisher:
    """Publishes values to the topic of orders, each keyed by its order_uid as Java clients would.

    Every value sent is in the end acknowledged by all in-sync replicas, or counted as failed. ``manifest`` gets a JSON
    line for each acknowledged record, flushed as they come.
    """

    def __init__(self, settings: KafkaSettings, manifest: Manifest | None) -> None:
        self._topic = settings.topic
        self._manifest = manifest
        self._lines: list[bytes] = []
        self._cluster = Cluster(settings)
        self.sent = 0
        self.acknowledged = 0
        self.failed = 0
        #: Why the first of the failed was not acknowledged.
        self.first_failure: KafkaError | None = None
        with translated_errors():
            self._producer = Producer(
                {
                    "message.max.bytes": _MAX_VALUE_BYTES,
                    "message.timeout.ms": 60_000,
                    "queue.buffering.max.kbytes": _MAX_QUEUED_KIB,
                    "queue.buffering.max.messages": _MAX_QUEUED_RECORDS,
                    # A broker whose machine is gone says nothing; this long we believe in it.
                    "socket.timeout.ms": 10_000,
                    **settings.client_properties(),
                    "acks": "all",
                    "enable.idempotence": True,
                    "partitioner": "murmur2_random",
                    "error_cb": self._cluster.on_error,
                },
                logger=SILENT,
            )

    @property
    def unacknowledged(self) -> int:
        """How many of the sent are neither acknowledged nor failed yet."""
        return self.sent - self.acknowledged - self.failed

    def check_topic(self) -> None:
        """Return if the topic is there.

        Raises ConfigurationError, or BrokerUnavailable if Kafka does not answer in 10 s.
        """
        self._cluster.describe(self._topic)

    def send(self, value: bytes) -> bool:
        """Publish a value; ``False`` if there was no room for it, after waiting a little: then it was not sent."""
        order_uid = order_uid_of(value)
        key = None if order_uid is None else order_uid.encode()
        try:
            self._producer.produce(self._topic, value, key, on_delivery=self._on_delivery)
        except BufferError:
            self.wait(_ROOM_S)
            return False
        except KafkaException as exc:
            self._fail(exc.args[0])
        self.sent += 1
        self.wait(0)
        return True

    def wait(self, timeout_s: float) -> None:
        """Take the acknowledgements there are, waiting so long for the first.

        Raises ConfigurationError if a right is missing, or if the manifest cannot be written.
        """
        with translated_errors():
            self._producer.poll(timeout_s)
        if self._manifest is not None and self._lines:
            written = b"".join(self._lines)
            self._lines.clear()
            self._manifest.write(written)

    def give_up(self) -> None:
        """Count as failed what is still unacknowledged."""
        self._producer.purge()
        self.wait(0)

    def _on_delivery(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self._fail(error)
            return
        self.acknowledged += 1
        if self._manifest is not None:
            self._lines.append(_manifest_line(message))

    def _fail(self, error: KafkaError) -> None:
        self.failed += 1
        if self.first_failure is None:
            self.first_failure = error
            event("not_acknowledged", logging.WARNING, reason=error.str(), code=error.name())


def _manifest_line(message: Message) -> bytes:
    key = message.key()
    line = {
        "topic": message.topic(),
        "partition": message.partition(),
        "offset": message.offset(),
        "order_uid": None if key is None else key.decode(),
        "sha256": hashlib.sha256(known(message.value())).hexdigest(),
    }
    return msgspec.json.encode(line) + b"\n"
