"""Kafka for all programs: requests to a cluster, the causes of failed requests, and records."""

from __future__ import annotations

import ctypes
import logging
import math
import operator
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar, cast

import attrs
from confluent_kafka import (
    OFFSET_INVALID,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    TopicCollection,
    TopicPartition,
    Uuid,
)
from confluent_kafka.admin import AdminClient, ListOffsetsResultInfo, OffsetSpec, TopicDescription

from orderlib.errors import BrokerUnavailable, ConfigurationError, OrderlibError
from orderlib.ingestion.records import Headers, Record, record_time
from orderlib.repository import RecordPosition
from services.kafka_errors import (
    CONNECTION_ERRORS,
    NO_TOPIC,
    SSL_ERROR,
    TIMED_OUT,
    KafkaErrorAction,
    classify_kafka_error,
    translate_kafka_error,
    translate_kafka_errors,
)
from services.kafka_listener import certificate_problem, expected_protocol
from services.settings import KafkaSettings

T = TypeVar("T")

#: The timeout of a request to the cluster.
REQUEST_TIMEOUT_S = 10.0

#: A wrong setting is the cause if it prevents connections for this long.
_PERSISTS_S = 4.0
#: How often the settings are checked after that, and the timeout of a new client: a busy broker may not answer in time.
_CHECK_SETTINGS_EVERY_S = 2.0
_NEW_CLIENT_S = 2.0

#: How often a request that waits looks for other brokers, and the timeout of that.
_FIND_BROKERS_EVERY_S = 1.0
_FIND_BROKERS_S = 0.5

#: A broker may not know a new topic for this time.
_NEW_TOPIC_S = 2.0

#: How often librdkafka's errors are polled while a request waits.
_POLL_S = 0.1

#: The id that a broker without topic ids reports for every topic.
NO_TOPIC_ID = "A" * 22

#: Properties of every client that sends requests, which settings may change. While a request waits for a broker that
#: refuses connections, librdkafka would connect again at once, and use a whole core. Connected to all brokers, it
#: waits between its attempts.
ADMIN_DEFAULTS: Mapping[str, Any] = {"enable.sparse.connections": False, "reconnect.backoff.max.ms": 1_000}

#: Properties of every consumer, which settings may change. A full queue is emptied soon, and librdkafka's default would
#: wait for a second.
CONSUMER_DEFAULTS: Mapping[str, Any] = {"fetch.queue.backoff.ms": 2}
#: Properties of every consumer that promises depend on.
CONSUMER_PROPERTIES: Mapping[str, Any] = {
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "enable.partition.eof": True,
    "isolation.level": "read_committed",
    # An offset that Kafka no longer has must stop the program, and never skip records.
    "auto.offset.reset": "error",
}

#: For a client's ``logger``: its lines repeat the errors that the programs log, in another format.
SILENT_LOGGER = logging.getLogger("librdkafka")
SILENT_LOGGER.addHandler(logging.NullHandler())
SILENT_LOGGER.propagate = False


@attrs.frozen(kw_only=True)
class TopicInfo:
    """A topic as Kafka describes it."""

    #: As Kafka's own tools print it.
    topic_id: str
    partitions: frozenset[int]


class _NoTopic(ConfigurationError):
    """Kafka has no topic of this name."""


class Cluster:
    """Requests to a Kafka cluster.

    Every method, and every callable that one returns, may raise BrokerUnavailable with the addresses and the cause, or
    ConfigurationError if a setting, an ACL or the topic is wrong.
    """

    def __init__(self, settings: KafkaSettings) -> None:
        self.addresses = settings.bootstrap_servers
        self._settings = settings
        #: The last error of a connection since the last answer.
        self._last_error: KafkaError | None = None
        #: When an error first showed a wrong setting since the last answer, by the monotonic clock.
        self._setting_error_since_s: float | None = None
        self.admin = self._new_client(self.on_error)
        #: Replaced clients, whose requests may still wait.
        self._replaced: deque[AdminClient] = deque(maxlen=3)

    def _new_client(self, on_error: Callable[[KafkaError], object]) -> AdminClient:
        properties: dict[str, Any] = {**ADMIN_DEFAULTS, **self._settings.client_properties(), "error_cb": on_error}
        with translate_kafka_errors():
            return AdminClient(properties, logger=SILENT_LOGGER)

    def on_error(self, error: KafkaError) -> None:
        """Remember the error of a connection. For ``error_cb`` of every client of this cluster."""
        if error.code() not in CONNECTION_ERRORS:
            return
        self._last_error = error
        if _shows_wrong_setting(error) and self._setting_error_since_s is None:
            self._setting_error_since_s = time.monotonic()

    def wait_for(self, future: Future[T], timeout_s: float = REQUEST_TIMEOUT_S) -> T:
        """Wait for the result of a request.

        If the timeout is too short to distinguish a wrong setting from an outage, both raise BrokerUnavailable.
        A longer timeout allows extra connections to find the cause. They end at the timeout, too.
        """
        began_s = time.monotonic()
        until_s = began_s + timeout_s
        find_brokers_at_s, check_settings_at_s, checked_client = _FIND_BROKERS_EVERY_S, _PERSISTS_S, False
        while True:
            self.admin.poll(0)
            try:
                result = future.result(min(_POLL_S, timeout_s))
            except TimeoutError:
                waited_s = time.monotonic() - began_s
                if waited_s >= timeout_s:
                    raise self._no_answer(timeout_s) from None
                if waited_s >= find_brokers_at_s:
                    find_brokers_at_s = waited_s + _FIND_BROKERS_EVERY_S
                    self._find_brokers_again(until_s)
                if waited_s >= check_settings_at_s:
                    check_settings_at_s = waited_s + _CHECK_SETTINGS_EVERY_S
                    self._check_protocol(until_s)
                    self._check_settings(until_s)
                    if not checked_client and self._replace_client(until_s):
                        raise self._no_answer(round(waited_s, 1)) from None
                    checked_client = True
            except KafkaException as exc:
                if exc.args[0].code() in CONNECTION_ERRORS:
                    raise self._unanswered(timeout_s, until_s) from exc
                raise translate_kafka_error(exc.args[0]) from exc
            else:
                self._last_error = self._setting_error_since_s = None
                return result

    def _unanswered(self, timeout_s: float, until_s: float) -> OrderlibError:
        return self.unavailable_error(until_s) if timeout_s >= _PERSISTS_S else self._no_answer(timeout_s)

    def _find_brokers_again(self, until_s: float) -> None:
        """Ask any broker for the present ones.

        librdkafka sends a request for a description to the controller that it knows. If that broker is lost, it looks
        for another one only after minutes, although the others answer. They name the lost broker, too, until the
        cluster has noticed its loss.
        """
        _gets_answer(self.admin, _FIND_BROKERS_S, until_s)

    def _replace_client(self, until_s: float) -> bool:
        """Replace the client if it finds no broker although a new one does. Return whether it was replaced.

        "Errors" in DESIGN.md describes how a client forgets its brokers.
        """
        if _gets_answer(self.admin, _FIND_BROKERS_S, until_s):
            return False
        client = self._new_client(self.on_error)
        if not _gets_answer(client, _NEW_CLIENT_S, until_s):
            return False
        self._replaced.append(self.admin)
        self.admin = client
        return True

    def unavailable_error(self, until_s: float = math.inf) -> OrderlibError:
        """Return the error for a request without an answer, with the cause that librdkafka reported.

        The search for the cause ends at ``until_s`` by the monotonic clock.
        """
        self.admin.poll(0)
        return self._wrong_setting(until_s) or self._no_answer(REQUEST_TIMEOUT_S)

    def _no_answer(self, waited_s: float) -> BrokerUnavailable:
        return BrokerUnavailable(
            f"Kafka at {self.addresses} did not answer{self.last_error or f' within {waited_s:g} s'}"
        )

    @property
    def last_error(self) -> str:
        """The last error of a connection since the last answer, after a colon; empty if there was none."""
        # Read once: the answer of another thread's request removes it.
        error = self._last_error
        return f": {error.str()}" if error else ""

    def describe(self, topic: str) -> TopicInfo:
        """Describe a topic. Raises ConfigurationError, naming the command, if it does not exist."""

        def request(timeout_s: float) -> TopicInfo:
            return self.request_topic(topic, timeout_s)()

        return _repeat(request)

    def request_topic(self, topic: str, timeout_s: float = REQUEST_TIMEOUT_S) -> Callable[[], TopicInfo]:
        """Send the request of ``describe`` now, and return a callable that waits for its result."""
        future = self.request_description(topic)

        def wait() -> TopicInfo:
            try:
                description = self.wait_for(future, timeout_s)
            except ConfigurationError as exc:
                cause = exc.__cause__
                if isinstance(cause, KafkaException) and cause.args[0].code() in NO_TOPIC:
                    raise _NoTopic(f"Kafka has no topic {topic!r}: run `python -m services.admin topics`") from exc
                raise
            topic_id = _topic_id(description)
            if topic_id == NO_TOPIC_ID:
                raise ConfigurationError(
                    f"Kafka at {self.addresses} has no topic ids: it is too old, or api.version.request is off. A "
                    "recreated topic could not be distinguished from the old one, and its records would be skipped"
                )
            partitions = frozenset(partition.id for partition in description.partitions)
            return TopicInfo(topic_id=topic_id, partitions=partitions)

        return wait

    def request_description(self, topic: str) -> Future[TopicDescription]:
        """Send the request for a description. It never creates the topic."""
        return self.admin.describe_topics(TopicCollection([topic]), request_timeout=REQUEST_TIMEOUT_S)[topic]

    def earliest(self, topic: str, partitions: Iterable[int]) -> dict[int, int]:
        """Return the earliest offset that each partition still holds."""
        return self.offsets(topic, partitions, OffsetSpec.earliest())

    def ends(self, topic: str, partitions: Iterable[int]) -> dict[int, int]:
        """Return the log end of each partition: its last stable offset."""
        return self.offsets(topic, partitions, OffsetSpec.latest())

    def offsets(self, topic: str, partitions: Iterable[int], spec: OffsetSpec) -> dict[int, int]:
        """Return an offset of each partition; -1 if no record has it."""

        def request(timeout_s: float) -> dict[int, int]:
            futures = self._request_offsets(topic, partitions, spec)
            return {partition: self.wait_for(future, timeout_s).offset for partition, future in futures.items()}

        return _repeat(request)

    def request_ends(self, topic: str, partitions: Iterable[int]) -> Callable[[], dict[int, int] | None]:
        """Request the log ends. The result returns ``None`` until all requests have ended, then the known ends."""
        futures = self._request_offsets(topic, partitions, OffsetSpec.latest())

        def ends() -> dict[int, int] | None:
            if not all(future.done() for future in futures.values()):
                return None
            return {p: future.result().offset for p, future in futures.items() if future.exception() is None}

        return ends

    def _request_offsets(
        self, topic: str, partitions: Iterable[int], spec: OffsetSpec
    ) -> dict[int, Future[ListOffsetsResultInfo]]:
        specs = {TopicPartition(topic, partition): spec for partition in partitions}
        if not specs:
            return {}
        futures = self.admin.list_offsets(
            specs, isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=REQUEST_TIMEOUT_S
        )
        return {found.partition: _answered(future) for found, future in futures.items()}

    def _check_settings(self, until_s: float) -> None:
        """Raise ConfigurationError if a wrong setting has prevented connections for a while."""
        if error := self._wrong_setting(until_s, _PERSISTS_S):
            raise error

    def _wrong_setting(self, until_s: float, min_duration_s: float = 0.0) -> ConfigurationError | None:
        """Return the error for a wrong setting, if one was reported since the last answer and still has effect.

        ``min_duration_s``: only if it was reported at least this long ago.

        Only a new client can tell. librdkafka reports equal errors of a broker once in 30 s, so an error of the other
        clients may be over.
        """
        # Read once: the answer of another thread's request removes it.
        since_s = self._setting_error_since_s
        if since_s is None or time.monotonic() - since_s < min_duration_s:
            return None
        errors: list[KafkaError] = []
        client = self._new_client(errors.append)
        until_s = min(until_s, time.monotonic() + _NEW_CLIENT_S)
        while time.monotonic() < until_s:
            if _gets_answer(client, _POLL_S, until_s):
                return None
            client.poll(0)
            if error := next(filter(_shows_wrong_setting, errors), None):
                return self._configuration_error(error)
        return None

    def _configuration_error(self, error: KafkaError) -> ConfigurationError:
        ca_location = self._settings.properties.get("ssl.ca.location")
        problems = filter(None, (certificate_problem(address, ca_location) for address in self._addresses()))
        problem = next(problems, None) if error.code() == SSL_ERROR else None
        cause = f"{problem}: " if problem else ""
        return ConfigurationError(f"Kafka at {self.addresses}: {cause}{error.str()} ({error.name()})")

    def _addresses(self) -> list[str]:
        return [address.strip() for address in self.addresses.split(",")]

    def _check_protocol(self, until_s: float) -> None:
        """Raise ConfigurationError if a broker expects another security.protocol; librdkafka reports an outage."""
        configured = self._settings.properties.get("security.protocol", "plaintext").upper()
        for address in self._addresses():
            expected = expected_protocol(address, until_s - time.monotonic())
            if expected is not None and expected != configured:
                raise ConfigurationError(
                    f"Kafka at {address} expects security.protocol {expected}, and not {configured}: set "
                    "ORDERS_KAFKA_SECURITY_PROTOCOL"
                )


def _gets_answer(client: AdminClient, timeout_s: float, until_s: float) -> bool:
    """Return whether any broker answers this client in time: within the timeout, and before ``until_s``."""
    timeout_s = min(timeout_s, until_s - time.monotonic())
    if timeout_s <= 0:
        return False
    try:
        client.list_topics(timeout=timeout_s)
    except KafkaException:
        return False
    return True


def _answered(future: Future[ListOffsetsResultInfo]) -> Future[ListOffsetsResultInfo]:
    """Return a future that fails if the leader of the partition did not answer.

    librdkafka (2.16) asks each leader, and drops the error of a request that failed. Its result has no error, and an
    offset that none has.
    """
    answered: Future[ListOffsetsResultInfo] = Future()

    def copy(done: Future[ListOffsetsResultInfo]) -> None:
        if (error := done.exception()) is not None:
            answered.set_exception(error)
        elif done.result().offset == OFFSET_INVALID:
            answered.set_exception(KafkaException(KafkaError(TIMED_OUT)))
        else:
            answered.set_result(done.result())

    future.add_done_callback(copy)
    return answered


def _shows_wrong_setting(error: KafkaError) -> bool:
    """Return whether a connection failed because of a wrong setting."""
    return error.code() in CONNECTION_ERRORS and classify_kafka_error(error) is KafkaErrorAction.CONFIGURATION


def _repeat(request: Callable[[float], T]) -> T:
    """Return the result of a request; repeat it while brokers refuse it in a state that ends by itself.

    Examples are a partition without a leader, and a topic that was just created. ``request`` receives its timeout; all
    repetitions have one in common.
    """
    began_s = time.monotonic()
    while True:
        try:
            remaining_s = REQUEST_TIMEOUT_S - (time.monotonic() - began_s)
            return request(max(_POLL_S, round(remaining_s, 1)))
        except (BrokerUnavailable, _NoTopic) as exc:
            limit_s = _NEW_TOPIC_S if isinstance(exc, _NoTopic) else REQUEST_TIMEOUT_S
            if time.monotonic() - began_s >= limit_s:
                raise
        time.sleep(_POLL_S)


def _topic_id(description: TopicDescription) -> str:
    """Return the topic id as text, and free what the client library leaks.

    confluent-kafka (2.16) keeps one reference too many to the Uuid of each description, 96 bytes a call. Comparing
    with the test object below shows whether the installed release does.
    """
    topic_id = str(description.topic_id).replace("/", "_").replace("+", "-")
    if _references(description) > _references(_ReferenceUuid()):
        _forget_reference(description.topic_id)
    return topic_id


class _ReferenceUuid:
    def __init__(self) -> None:
        self.topic_id = Uuid(0, 1)


def _references(holder: TopicDescription | _ReferenceUuid) -> int:
    return sys.getrefcount(holder.topic_id)


_forget_reference = ctypes.pythonapi.Py_DecRef
_forget_reference.argtypes = [ctypes.py_object]
_forget_reference.restype = None


#: The binding's ``headers`` returns a value although it has set an error, for a name that is not UTF-8. A specialized
#: call of Python 3.13 does not notice, and the error appears anywhere later; a call from C always checks.
_headers_of = operator.methodcaller("headers")


def record_of(message: Message, topic_ids: Mapping[str, str]) -> Record:
    """Convert a delivered message to a record. ``topic_ids`` has the id of its topic."""
    headers: Headers | None
    try:
        headers = cast("Headers", tuple(_headers_of(message) or ()))
    except Exception:  # noqa: BLE001 - its class depends on the versions of Python and of the binding
        headers = None
    _, timestamp_ms = message.timestamp()
    topic = not_none(message.topic())
    return Record(
        position=RecordPosition(
            topic_id=topic_ids[topic], partition=not_none(message.partition()), offset=not_none(message.offset())
        ),
        time=record_time(timestamp_ms),
        topic=topic,
        key=message.key(),
        value=message.value(),
        headers=headers,
    )


def not_none(value: T | None) -> T:
    """Return a value that librdkafka sets on every delivered message."""
    assert value is not None
    return value
