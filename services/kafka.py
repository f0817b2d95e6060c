"""What every program of ours that speaks to Kafka does alike: its errors, its bounds, its silence."""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Protocol, TypeVar, cast

from confluent_kafka import IsolationLevel, KafkaError, KafkaException, Message, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, ClusterMetadata, ListOffsetsResultInfo, OffsetSpec

from orderlib.errors import BrokenSetup, BrokerUnreachable, OrderError
from orderlib.ingest import Headers, Record, RecordPosition, record_time

T = TypeVar("T")

#: A question to the cluster is given up after this.
ANSWER_S = 10.0

#: Errors that no waiting heals. librdkafka's local codes are spelled with an underscore.
_BROKEN = frozenset(
    {
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_TOPIC,  # noqa: SLF001
        KafkaError._UNKNOWN_PARTITION,  # noqa: SLF001
        KafkaError._AUTHENTICATION,  # noqa: SLF001
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.SASL_AUTHENTICATION_FAILED,
        KafkaError.UNSUPPORTED_SASL_MECHANISM,
        KafkaError.INVALID_GROUP_ID,
        KafkaError.TOPIC_EXCEPTION,
        KafkaError.INVALID_REPLICATION_FACTOR,
        KafkaError.INVALID_PARTITIONS,
        KafkaError.INVALID_CONFIG,
    }
)
_NO_TOPIC = frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC})  # noqa: SLF001

#: For a client's ``logger``: its lines tell nothing that its errors do not, and are not of our format.
SILENT = logging.getLogger("librdkafka")
SILENT.addHandler(logging.NullHandler())
SILENT.propagate = False


def translate(error: KafkaError) -> OrderError:
    """Our error for one of librdkafka's: a broken set-up where waiting cannot help, else an outage."""
    kind = BrokenSetup if error.code() in _BROKEN or error.fatal() else BrokerUnreachable
    return kind(f"Kafka: {error.str()} ({error.name()})")


@contextlib.contextmanager
def translated_errors() -> Iterator[None]:
    """Raise our error, ``from`` librdkafka's. A property that librdkafka does not take is a broken set-up."""
    try:
        yield
    except KafkaException as exc:
        error = exc.args[0]
        if error.code() == KafkaError._INVALID_ARG:  # noqa: SLF001
            raise BrokenSetup(f"Kafka: {error.str()}") from exc
        raise translate(error) from exc


def answer(question: Future[T]) -> T:
    """Wait for the answer to a question; at most ``ANSWER_S``. Raises BrokerUnreachable or BrokenSetup."""
    try:
        with translated_errors():
            return question.result(ANSWER_S)
    except TimeoutError as exc:
        raise BrokerUnreachable(f"Kafka did not answer in {ANSWER_S:g} s") from exc


class _Client(Protocol):
    def list_topics(self, topic: str, timeout: float) -> ClusterMetadata: ...


def partitions_of(client: _Client, topic: str) -> frozenset[int]:
    """The topic's partitions. Raises BrokenSetup, naming the command, if there is no such topic."""
    with translated_errors():
        found = client.list_topics(topic, timeout=ANSWER_S).topics[topic]
    if found.error is None:
        return frozenset(found.partitions)
    if found.error.code() in _NO_TOPIC:
        raise BrokenSetup(f"Kafka has no topic {topic!r}: run `python -m services.admin topics`")
    raise translate(found.error)


def ask_topic_id(admin: AdminClient, topic: str) -> Callable[[], str]:
    """Ask for Kafka's id of a topic; the result waits for the answer, spelled as Kafka's own tools print it."""
    question = admin.describe_topics(TopicCollection([topic]), request_timeout=ANSWER_S)[topic]
    return lambda: str(answer(question).topic_id).replace("/", "_").replace("+", "-")


def offsets_of(admin: AdminClient, topic: str, partitions: Iterable[int], spec: OffsetSpec) -> dict[int, int]:
    """An offset of each partition: its earliest, its log end (the last stable offset), that of a time; -1 for none."""
    questions = ask_offsets(admin, topic, partitions, spec)
    return {partition: answer(question).offset for partition, question in questions.items()}


def ask_offsets(
    admin: AdminClient, topic: str, partitions: Iterable[int], spec: OffsetSpec
) -> dict[int, Future[ListOffsetsResultInfo]]:
    """As ``offsets_of``, without waiting for the answers."""
    questions = admin.list_offsets(
        {TopicPartition(topic, partition): spec for partition in partitions},
        isolation_level=IsolationLevel.READ_COMMITTED,
        request_timeout=ANSWER_S,
    )
    return {place.partition: question for place, question in questions.items()}


#: The binding's ``headers`` returns a value although it has set an error, for a name that is not UTF-8. A specialized
#: call of Python 3.13 does not notice, and the error appears anywhere later; a call from C always checks.
_headers_of = operator.methodcaller("headers")


def record_of(message: Message, topic_id: str) -> Record:
    """A delivered message as a record."""
    headers: Headers | None
    try:
        headers = cast("Headers", tuple(_headers_of(message) or ()))
    except Exception:  # noqa: BLE001  which class depends on the versions of Python and of the binding
        headers = None
    _, timestamp_ms = message.timestamp()
    return Record(
        source=RecordPosition(topic_id=topic_id, partition=known(message.partition()), offset=known(message.offset())),
        time=record_time(timestamp_ms),
        topic=known(message.topic()),
        key=message.key(),
        value=message.value(),
        headers=headers,
    )


def known(value: T | None) -> T:
    """What librdkafka always sets on a message that it delivers."""
    assert value is not None
    return value
