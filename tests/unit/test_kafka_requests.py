"""Requests to Kafka that get no answer."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import pytest
from confluent_kafka import OFFSET_INVALID, KafkaError, KafkaException, Uuid

from orderlib.errors import BrokerUnavailable, ConfigurationError
from services import kafka
from services.admin import topic_reader
from services.admin.topic_reader import TopicReader
from services.kafka import Cluster, TopicInfo
from services.kafka_listener import certificate_problem, expected_protocol
from services.settings import KafkaSettings

#: Those of a cluster that nothing connects to.
SETTINGS = KafkaSettings.from_mapping({"ORDERS_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"})


def failed(code: int) -> Future[Any]:
    """Return the future of a request that a broker has refused."""
    future: Future[Any] = Future()
    future.set_exception(KafkaException(KafkaError(code)))
    return future


def done(result: object) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future


def test_a_listener_that_was_too_busy_to_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([None, "SASL_SSL"])
    monkeypatch.setattr(kafka, "expected_protocol", lambda *_: next(answers))
    monkeypatch.setattr(kafka, "_PERSISTS_S", 0)
    monkeypatch.setattr(kafka, "_CHECK_SETTINGS_EVERY_S", 0)
    cluster = Cluster(SETTINGS)
    unanswered: Future[None] = Future()
    with pytest.raises(ConfigurationError, match=r"expects security\.protocol SASL_SSL"):
        cluster.wait_for(unanswered)


@pytest.mark.parametrize(
    ("of_new_client", "error"),
    [
        ("_SSL", ConfigurationError),
        # The broker has presented another certificate for a moment, and is stopped now.
        ("_TRANSPORT", BrokerUnavailable),
        (None, BrokerUnavailable),
    ],
)
def test_a_wrong_setting_is_the_cause_if_a_new_client_fails_because_of_it(
    monkeypatch: pytest.MonkeyPatch, of_new_client: str | None, error: type[Exception]
) -> None:
    """librdkafka does not repeat an error in the clients that have reported it."""
    monkeypatch.setattr(kafka, "_PERSISTS_S", 0.2)
    monkeypatch.setattr(kafka, "_CHECK_SETTINGS_EVERY_S", 0.2)
    monkeypatch.setattr(kafka, "_NEW_CLIENT_S", 0.2)
    cluster = Cluster(SETTINGS)
    cluster.on_error(connection_error("_SSL"))

    class NewClient:
        def __init__(self, properties: dict[str, Any], **_: object) -> None:
            self._on_error = properties["error_cb"]

        def list_topics(self, **_: object) -> None:
            raise KafkaException(connection_error("_TRANSPORT"))

        def poll(self, _: float) -> None:
            if of_new_client:
                self._on_error(connection_error(of_new_client))

    monkeypatch.setattr(kafka, "AdminClient", NewClient)
    unanswered: Future[None] = Future()
    with pytest.raises(error):
        cluster.wait_for(unanswered, timeout_s=0.6)


def test_the_search_for_the_cause_ends_with_the_timeout_of_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0

    def spend(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    class SilentClient:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def list_topics(self, timeout: float) -> None:
            spend(timeout)
            raise KafkaException(connection_error("_TRANSPORT"))

        def poll(self, _: float) -> None:
            spend(0.1)

    monkeypatch.setattr(kafka, "time", SimpleNamespace(monotonic=lambda: now_s))
    monkeypatch.setattr(kafka, "AdminClient", SilentClient)
    monkeypatch.setattr(kafka, "expected_protocol", lambda _, timeout_s: spend(min(timeout_s, 2)))
    monkeypatch.setattr(kafka, "_POLL_S", 0.01)
    for timeout_s in (kafka.REQUEST_TIMEOUT_S, 8.5, 7.0):
        cluster = Cluster(SETTINGS)
        cluster.on_error(connection_error("_SSL"))
        began_s = now_s
        with pytest.raises(BrokerUnavailable):
            cluster.wait_for(Future[None](), timeout_s)
        assert now_s - began_s < timeout_s + 0.3
    # librdkafka ends the request at its own timeout.
    cluster = Cluster(SETTINGS)
    cluster.on_error(connection_error("_SSL"))
    began_s = now_s
    assert isinstance(cluster.unavailable_error(now_s), BrokerUnavailable)
    assert now_s - began_s < 0.3


def test_the_repetitions_of_a_request_have_one_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    given: list[float] = []

    def fail(timeout_s: float) -> None:
        nonlocal now_s
        given.append(timeout_s)
        now_s += 3.5
        raise BrokerUnavailable("no leader")

    monkeypatch.setattr(kafka, "time", SimpleNamespace(monotonic=lambda: now_s, sleep=lambda _: None))
    with pytest.raises(BrokerUnavailable, match="no leader"):
        kafka._repeat(fail)
    assert given == [10.0, 6.5, 3.0]


def connection_error(name: str) -> KafkaError:
    return KafkaError(getattr(KafkaError, name), "ssl://a:1/bootstrap: the connection failed")


def test_an_answer_ends_the_suspicion_of_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(SETTINGS)
    cluster.on_error(connection_error("_SSL"))
    assert cluster.wait_for(done("the answer")) == "the answer"
    monkeypatch.setattr(kafka, "AdminClient", None)
    assert isinstance(cluster.unavailable_error(), BrokerUnavailable)


def test_a_new_topic_that_a_broker_does_not_know_yet_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(SETTINGS)
    topic = SimpleNamespace(topic_id=Uuid(0, 1), partitions=[SimpleNamespace(id=0)])
    answers = iter([failed(KafkaError.UNKNOWN_TOPIC_OR_PART), done(topic)])
    monkeypatch.setattr(cluster, "request_description", lambda _: next(answers))
    assert cluster.describe("orders").partitions == {0}


def test_log_ends_are_asked_for_again_while_a_partition_has_no_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(SETTINGS)
    answers = iter([failed(KafkaError._NOENT), done(SimpleNamespace(offset=7))])
    monkeypatch.setattr(cluster.admin, "list_offsets", lambda places, **_: dict.fromkeys(places, next(answers)))
    assert cluster.ends("orders", [0]) == {0: 7}


def test_log_ends_fail_if_a_partition_gets_no_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(SETTINGS)
    no_leader = failed(KafkaError._NOENT)
    monkeypatch.setattr(cluster.admin, "list_offsets", lambda places, **_: dict.fromkeys(places, no_leader))
    monkeypatch.setattr(kafka, "REQUEST_TIMEOUT_S", 0.2)
    with pytest.raises(BrokerUnavailable, match="_NOENT"):
        cluster.ends("orders", [0])


def test_a_leader_without_an_answer_has_no_log_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """librdkafka reports an offset that no record has, and no error."""
    cluster = Cluster(SETTINGS)
    ends = {0: OFFSET_INVALID, 1: 7, 2: -1}
    monkeypatch.setattr(
        cluster.admin,
        "list_offsets",
        lambda places, **_: {place: done(SimpleNamespace(offset=ends[place.partition])) for place in places},
    )
    monkeypatch.setattr(kafka, "REQUEST_TIMEOUT_S", 0.2)
    assert cluster.request_ends("orders", [0, 1])() == {1: 7}
    with pytest.raises(BrokerUnavailable, match="did not answer"):
        cluster.ends("orders", [0, 1])
    # No record has the time of the request.
    assert cluster.ends("orders", [1, 2]) == {1: 7, 2: -1}


@pytest.mark.parametrize(
    ("address", "host_and_port"),
    [
        ("host", ("host", 9092)),
        ("host:9093", ("host", 9093)),
        ("SASL_SSL://host:9093", ("host", 9093)),
        ("SSL://host", ("host", 9092)),
        ("[::1]", ("::1", 9092)),
        ("SSL://[::1]", ("::1", 9092)),
        ("SSL://[::1]:9093", ("::1", 9093)),
    ],
)
def test_every_address_that_librdkafka_accepts_is_probed(
    monkeypatch: pytest.MonkeyPatch, address: str, host_and_port: tuple[str, int]
) -> None:
    probed: list[tuple[str, int]] = []

    def refuse(place: tuple[str, int], **_: object) -> None:
        probed.append(place)
        raise ConnectionRefusedError

    monkeypatch.setattr("services.kafka_listener.socket.create_connection", refuse)
    assert expected_protocol(address) is None
    assert set(probed) == {host_and_port}


@pytest.mark.parametrize("host", ["a..b", "a" * 70])
def test_a_host_name_that_cannot_exist_has_no_listener(host: str) -> None:
    assert expected_protocol(f"{host}:9092") is None
    assert certificate_problem(f"{host}:9092", None) is None


def test_a_partition_that_the_topic_does_not_have_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest may name it: a recreated topic can have fewer partitions."""
    monkeypatch.setattr(Cluster, "describe", lambda *_: TopicInfo(topic_id="id", partitions=frozenset({0})))
    monkeypatch.setattr(Cluster, "ends", lambda *_: {0: 0})
    reader = TopicReader(SETTINGS)
    assert list(reader.records({0: 0, 9: 5}, {0: 0})) == []


def test_the_time_in_which_a_reader_was_stopped_is_no_silence_of_kafka(monkeypatch: pytest.MonkeyPatch) -> None:
    class Message:
        def __init__(self, offset: int) -> None:
            self._offset = offset

        def partition(self) -> int:
            return 0

        def offset(self) -> int:
            return self._offset

        def error(self) -> None:
            return None

    now_s = 0.0
    answers: list[list[Message]] = [[Message(0)], [], [], [Message(1)], []]

    def consume(*_: object) -> list[Message]:
        nonlocal now_s
        now_s += 60
        return answers.pop(0) if answers else []

    monkeypatch.setattr(Cluster, "describe", lambda *_: TopicInfo(topic_id="id", partitions=frozenset({0})))
    monkeypatch.setattr(topic_reader, "record_of", lambda message, _: message.offset())
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    reader = TopicReader(SETTINGS)
    records: Iterator[Any] = reader._fetch(cast("Any", SimpleNamespace(consume=consume)), {0: 3})
    assert [next(records), next(records)] == [0, 1]
    with pytest.raises(BrokerUnavailable):
        next(records)


def test_only_without_the_acl_it_is_unknown_whether_a_topic_is_compacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cluster, "describe", lambda *_: TopicInfo(topic_id="id", partitions=frozenset({0})))
    reader = TopicReader(SETTINGS)

    def fail(code: int) -> None:
        answer = failed(code)
        monkeypatch.setattr(reader.cluster.admin, "describe_configs", lambda resources, **_: {resources[0]: answer})

    fail(KafkaError.TOPIC_AUTHORIZATION_FAILED)
    assert reader.is_compacted() is None
    fail(KafkaError.UNKNOWN_TOPIC_OR_PART)
    with pytest.raises(ConfigurationError):
        reader.is_compacted()
