"""Every error code of librdkafka has an entry in the table of actions."""

from __future__ import annotations

import re

import pytest
from confluent_kafka import KafkaError, KafkaException

from orderlib.errors import BrokerUnavailable, ConfigurationError, OrderlibError, TransientError, UnreadableRecord
from services.kafka_errors import (
    _NAMES,
    ACTIONS,
    KafkaErrorAction,
    classify_kafka_error,
    translate_kafka_error,
    translate_kafka_errors,
)

#: Every code that the client library knows, by name.
CODES = {name: getattr(KafkaError, name) for name in dir(KafkaError) if re.fullmatch(r"_?[A-Z][A-Z_]*", name)}


def test_every_code_has_exactly_one_entry() -> None:
    assert len(CODES) > 180
    assert {name for name, code in CODES.items() if code not in ACTIONS} == set()
    assert sum(map(len, _NAMES.values())) == len(ACTIONS)


def test_an_error_is_translated_according_to_the_table_and_names_its_code() -> None:
    kinds = {
        KafkaErrorAction.CONFIGURATION: ConfigurationError,
        KafkaErrorAction.UNREADABLE: UnreadableRecord,
        KafkaErrorAction.OUTAGE: BrokerUnavailable,
        KafkaErrorAction.NONE: BrokerUnavailable,
        KafkaErrorAction.STOP: OrderlibError,
    }
    for name, code in CODES.items():
        error = translate_kafka_error(KafkaError(code, "what happened"))
        assert type(error) is kinds[ACTIONS[code]], name
        assert "what happened" in str(error)
        assert name in str(error)


@pytest.mark.parametrize(("retriable", "action"), [(True, KafkaErrorAction.OUTAGE), (False, KafkaErrorAction.STOP)])
def test_an_unknown_code_stops_the_program_unless_it_is_retriable(*, retriable: bool, action: KafkaErrorAction) -> None:
    error = KafkaError(999, "from the future", retriable=retriable)
    assert classify_kafka_error(error) is action
    assert isinstance(translate_kafka_error(error), TransientError) == retriable
    assert "999" in str(translate_kafka_error(error))


def test_a_fatal_error_stops_the_program_for_any_code() -> None:
    error = KafkaError(CODES["_TIMED_OUT"], "the client is unusable", fatal=True)
    assert classify_kafka_error(error) is KafkaErrorAction.STOP


def test_the_original_error_is_the_cause() -> None:
    original = KafkaException(KafkaError(CODES["TOPIC_AUTHORIZATION_FAILED"]))
    with pytest.raises(ConfigurationError) as error, translate_kafka_errors():
        raise original
    assert error.value.__cause__ is original


def test_an_error_is_one_line() -> None:
    assert str(translate_kafka_error(KafkaError(CODES["_INVALID_ARG"], "outside the\nallowed range\n"))) == (
        "Kafka: outside the allowed range (_INVALID_ARG)"
    )
