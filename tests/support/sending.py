"""A producer for tests. It keeps the acknowledged records, and which of them are valid orders."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, Message, Producer, TopicPartition

from orderlib.testing import SAMPLE
from services.kafka import SILENT_LOGGER, not_none
from services.kafka_errors import PARTITION_EOF

Headers = list[tuple[str, str | bytes | None]]


@attrs.frozen(kw_only=True)
class Acknowledged:
    """An acknowledged record."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    #: Whether it is a valid order.
    good: bool


def order(order_uid: str, version: int = 1) -> bytes:
    """Return a valid order; versions differ in every part, and in the number of items."""
    content: dict[str, Any] = json.loads(SAMPLE)
    content["order_uid"] = order_uid
    content["track_number"] = f"TRACK{version}"
    content["delivery"]["city"] = f"City {version}"
    content["payment"]["amount"] = version
    [item] = content["items"][:1]
    content["items"] = [{**item, "chrt_id": version * 10 + line} for line in range(1 + version % 3)]
    return json.dumps(content).encode()


#: For ``partition``: the partition of the key.
ANY = -1


class Sender:
    """Publish to one topic."""

    def __init__(self, bootstrap_servers: str, topic: str, **properties: Any) -> None:
        self.topic = topic
        self.flush_within_s = 30.0
        self._bootstrap_servers = bootstrap_servers
        self._manifest: list[Acknowledged] = []
        #: Acknowledged records whose offset Kafka did not report.
        self._without_offset: list[Acknowledged] = []
        self._producer = Producer(
            {
                "bootstrap.servers": bootstrap_servers,
                "partitioner": "murmur2_random",
                "enable.idempotence": True,
                "linger.ms": 5,
                "message.max.bytes": 16 * 1024 * 1024,
                **{name.replace("_", "."): value for name, value in properties.items()},
            },
            logger=SILENT_LOGGER,
        )

    @property
    def manifest(self) -> list[Acknowledged]:
        """Return the acknowledged records with their positions."""
        if self._without_offset:
            self._find_offsets()
        return self._manifest

    def send_orders(self, order_uids: Iterable[str], version: int = 1) -> None:
        """Publish a version of each order, with its order_uid as key, and wait until all are acknowledged."""
        for order_uid in order_uids:
            self._produce(order(order_uid, version), key=order_uid.encode(), headers=[], good=True)
        self.flush()

    def send_good(self, value: bytes, *, key: bytes | None, partition: int = ANY) -> None:
        """Publish one valid order, and wait until it is acknowledged."""
        self._produce(value, key=key, headers=[], good=True, partition=partition)
        self.flush()

    def send_bad(self, value: bytes | None, *, key: bytes | None = b"bad", headers: Headers | None = None) -> None:
        """Publish one record that is not a valid order, and wait until it is acknowledged."""
        self._produce(value, key=key, headers=headers or [], good=False)
        self.flush()

    def produce_bad(self, value: bytes) -> None:
        """Publish like ``send_bad``, but do not wait."""
        self._produce(value, key=b"bad", headers=[], good=False)

    def flush(self) -> None:
        """Wait until everything is acknowledged."""
        assert self._producer.flush(self.flush_within_s) == 0, "Kafka did not acknowledge everything"

    @property
    def producer(self) -> Producer:
        return self._producer

    def _produce(
        self, value: bytes | None, *, key: bytes | None, headers: Headers, good: bool, partition: int = ANY
    ) -> None:
        def acknowledged(error: KafkaError | None, message: Message) -> None:
            assert error is None, error
            partition, offset = not_none(message.partition()), message.offset()
            record = Acknowledged(
                partition=partition,
                offset=-1 if offset is None else offset,
                key=key,
                value=value,
                headers=headers,
                good=good,
            )
            # If a broker was lost between storing and acknowledging, the next leader confirms without an offset.
            (self._without_offset if offset is None else self._manifest).append(record)

        while True:
            try:
                self._producer.produce(
                    self.topic, value, key, headers=headers, on_delivery=acknowledged, partition=partition
                )
            except BufferError:
                self._producer.poll(0.1)
            else:
                self._producer.poll(0)
                return

    def _find_offsets(self) -> None:
        """Find each record without an offset in its partition, at an offset that no other known record has."""
        found = {(record.partition, record.offset) for record in self._manifest}
        consumer = Consumer(
            {
                "bootstrap.servers": self._bootstrap_servers,
                "group.id": "tests",
                "auto.offset.reset": "error",
                "enable.partition.eof": True,
            },
            logger=SILENT_LOGGER,
        )
        partitions = {record.partition for record in self._without_offset}
        consumer.assign([TopicPartition(self.topic, partition, OFFSET_BEGINNING) for partition in partitions])
        try:
            while self._without_offset and partitions:
                message = consumer.poll(self.flush_within_s)
                assert message is not None, "Kafka does not answer"
                partition, offset, error = not_none(message.partition()), not_none(message.offset()), message.error()
                if error is not None:
                    assert error.code() == PARTITION_EOF, error
                    partitions.discard(partition)
                elif (partition, offset) not in found:
                    self._place(message, partition, offset)
        finally:
            consumer.close()
        assert not self._without_offset, "acknowledged, but not in the topic"

    def _place(self, message: Message, partition: int, offset: int) -> None:
        for record in self._without_offset:
            if (record.partition, record.key, record.value) == (partition, message.key(), message.value()):
                self._without_offset.remove(record)
                self._manifest.append(attrs.evolve(record, offset=offset))
                return


def uids(prefix: str, count: int) -> list[str]:
    """Return order_uids."""
    return [f"{prefix}-{number}" for number in range(count)]


@contextmanager
def repeating(send: Callable[[int], None], within_s: float) -> Iterator[None]:
    """Call ``send`` with 1, 2, … in a thread until the end of the block. Its last call must end within this time."""
    done = threading.Event()
    failures: list[BaseException] = []

    def repeat() -> None:
        count = 0
        try:
            while not done.is_set():
                count += 1
                send(count)
        except BaseException as exc:  # noqa: BLE001 - raised at the end
            failures.append(exc)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(within_s)
    assert not failures, failures
    assert not thread.is_alive()
