"""Requests to Kafka that get no answer."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from orderlib.errors import ConfigurationError
from services import kafka
from services.kafka import Cluster
from services.settings import KafkaSettings


def test_a_listener_that_was_too_busy_to_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([None, "SASL_SSL"])
    monkeypatch.setattr(kafka, "expected_protocol", lambda _: next(answers))
    monkeypatch.setattr(kafka, "_PERSISTS_S", 0)
    monkeypatch.setattr(kafka, "_CHECK_PROTOCOL_EVERY_S", 0)
    cluster = Cluster(KafkaSettings.from_mapping({"ORDERS_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"}))
    unanswered: Future[None] = Future()
    with pytest.raises(ConfigurationError, match=r"expects security\.protocol SASL_SSL"):
        cluster.wait_for(unanswered)
