"""The table of Kafka's error codes: what a program does about each.

librdkafka marks its own errors, which no broker sends, with a leading underscore.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import Enum

from confluent_kafka import KafkaError, KafkaException, Message

from orderlib.errors import BrokerUnavailable, ConfigurationError, OrderlibError, UnreadableRecord


class KafkaErrorAction(Enum):
    """What a program does about an error."""

    #: No error: an event, or the result of an action of the program.
    NONE = "none"
    #: Wait, then try again.
    OUTAGE = "outage"
    #: A setting, an ACL or the topic is wrong. Waiting does not help.
    CONFIGURATION = "configuration"
    #: One record batch cannot be read. The partition waits for an operator.
    UNREADABLE = "unreadable"
    #: Stop and name the code: the client is unusable, or the program's requests must not cause this error.
    STOP = "stop"


def _code(name: str) -> int:
    code: int = getattr(KafkaError, name)
    return code


PARTITION_EOF = _code("_PARTITION_EOF")
ALL_BROKERS_DOWN = _code("_ALL_BROKERS_DOWN")
NO_GROUP_ACL = _code("GROUP_AUTHORIZATION_FAILED")
NO_TOPIC_ACL = _code("TOPIC_AUTHORIZATION_FAILED")
OFFSET_LOST = _code("_AUTO_OFFSET_RESET")
QUEUE_FULL = _code("_QUEUE_FULL")
SSL_ERROR = _code("_SSL")
TIMED_OUT = _code("_TIMED_OUT")
NO_TOPIC = frozenset({_code("UNKNOWN_TOPIC_OR_PART"), _code("_UNKNOWN_TOPIC")})
#: Reported for a connection. They name the cause of an outage, or the setting that is wrong.
CONNECTION_ERRORS = frozenset({_code("_AUTHENTICATION"), SSL_ERROR, _code("_TRANSPORT"), _code("_RESOLVE"), TIMED_OUT})

_NAMES: dict[KafkaErrorAction, tuple[str, ...]] = {
    KafkaErrorAction.NONE: (
        "NO_ERROR",
        "_ASSIGN_PARTITIONS",
        "_NOOP",
        "_PARTITION_EOF",
        "_REVOKE_PARTITIONS",
    ),
    KafkaErrorAction.OUTAGE: (
        # The broker is starting, stopping, electing, overloaded or lost.
        "BROKER_NOT_AVAILABLE",
        "CONCURRENT_TRANSACTIONS",
        "COORDINATOR_LOAD_IN_PROGRESS",
        "COORDINATOR_NOT_AVAILABLE",
        "ELIGIBLE_LEADERS_NOT_AVAILABLE",
        "FENCED_LEADER_EPOCH",
        "FETCH_SESSION_ID_NOT_FOUND",
        "INVALID_FETCH_SESSION_EPOCH",
        "KAFKA_STORAGE_ERROR",
        "LEADER_NOT_AVAILABLE",
        "LISTENER_NOT_FOUND",
        "LOG_DIR_NOT_FOUND",
        "NETWORK_EXCEPTION",
        "NOT_CONTROLLER",
        "NOT_COORDINATOR",
        "NOT_ENOUGH_REPLICAS",
        "NOT_ENOUGH_REPLICAS_AFTER_APPEND",
        "NOT_LEADER_FOR_PARTITION",
        "OFFSET_NOT_AVAILABLE",
        "OPERATION_NOT_ATTEMPTED",
        "PREFERRED_LEADER_NOT_AVAILABLE",
        "REASSIGNMENT_IN_PROGRESS",
        "REBOOTSTRAP_REQUIRED",
        "REPLICA_NOT_AVAILABLE",
        "REQUEST_TIMED_OUT",
        "STALE_BROKER_EPOCH",
        "STALE_CTRL_EPOCH",
        "THROTTLING_QUOTA_EXCEEDED",
        "UNKNOWN",
        "UNKNOWN_CONTROLLER_ID",
        "UNKNOWN_LEADER_EPOCH",
        "_ALL_BROKERS_DOWN",
        "_DESTROY_BROKER",
        "_INTR",
        "_IN_PROGRESS",
        "_ISR_INSUFF",
        "_MSG_TIMED_OUT",
        # A request for offsets finds no leader of a partition.
        "_NOENT",
        "_NODE_UPDATE",
        "_OUTDATED",
        "_PREV_IN_PROGRESS",
        "_PURGE_INFLIGHT",
        "_PURGE_QUEUE",
        "_QUEUE_FULL",
        "_RESOLVE",
        "_RETRY",
        "_TIMED_OUT",
        "_TIMED_OUT_QUEUE",
        "_TRANSPORT",
        "_UNKNOWN_BROKER",
        "_WAIT_CACHE",
        "_WAIT_COORD",
        # The group is rebalancing, or another member prevents this one from joining. The client retries.
        "GROUP_MAX_SIZE_REACHED",
        "ILLEGAL_GENERATION",
        "INCONSISTENT_GROUP_PROTOCOL",
        "MEMBER_ID_REQUIRED",
        "REBALANCE_IN_PROGRESS",
        "STALE_MEMBER_EPOCH",
        "FENCED_MEMBER_EPOCH",
        "UNKNOWN_MEMBER_ID",
        "UNRELEASED_INSTANCE_ID",
        "UNSTABLE_OFFSET_COMMIT",
        "NON_EMPTY_GROUP",
        "_ASSIGNMENT_LOST",
        "_MAX_POLL_EXCEEDED",
        "_NO_OFFSET",
        # The brokers do not have the same metadata yet of a topic that was just created or deleted.
        "INCONSISTENT_TOPIC_ID",
        "UNKNOWN_TOPIC_ID",
        "TOPIC_ALREADY_EXISTS",
    ),
    KafkaErrorAction.CONFIGURATION: (
        "CLUSTER_AUTHORIZATION_FAILED",
        "DELEGATION_TOKEN_AUTHORIZATION_FAILED",
        "DELEGATION_TOKEN_AUTH_DISABLED",
        "DELEGATION_TOKEN_EXPIRED",
        "DELEGATION_TOKEN_NOT_FOUND",
        "DELEGATION_TOKEN_OWNER_MISMATCH",
        "DELEGATION_TOKEN_REQUEST_NOT_ALLOWED",
        "GROUP_AUTHORIZATION_FAILED",
        "ILLEGAL_SASL_STATE",
        "INVALID_CONFIG",
        "INVALID_GROUP_ID",
        "INVALID_PARTITIONS",
        "INVALID_REPLICATION_FACTOR",
        "INVALID_REPLICA_ASSIGNMENT",
        "INVALID_SESSION_TIMEOUT",
        "POLICY_VIOLATION",
        "SASL_AUTHENTICATION_FAILED",
        "SECURITY_DISABLED",
        "TOPIC_AUTHORIZATION_FAILED",
        "TOPIC_DELETION_DISABLED",
        "TOPIC_EXCEPTION",
        "TRANSACTIONAL_ID_AUTHORIZATION_FAILED",
        "UNKNOWN_TOPIC_OR_PART",
        "UNSUPPORTED_ASSIGNOR",
        "UNSUPPORTED_SASL_MECHANISM",
        "UNSUPPORTED_VERSION",
        "_AUTHENTICATION",
        "_FS",
        "_INVALID_ARG",
        "_NOT_CONFIGURED",
        "_SSL",
        "_UNKNOWN_GROUP",
        "_UNKNOWN_PARTITION",
        "_UNKNOWN_PROTOCOL",
        "_UNKNOWN_TOPIC",
        "_UNSUPPORTED_FEATURE",
    ),
    KafkaErrorAction.UNREADABLE: (
        "INVALID_MSG",
        "INVALID_MSG_SIZE",
        "MSG_SIZE_TOO_LARGE",
        "UNSUPPORTED_COMPRESSION_TYPE",
        "UNSUPPORTED_FOR_MESSAGE_FORMAT",
        "_BAD_COMPRESSION",
        "_BAD_MSG",
        "_NOT_IMPLEMENTED",
        "_PARTIAL",
        "_UNDERFLOW",
    ),
    KafkaErrorAction.STOP: (
        # The next record is gone, or the client can do nothing more.
        "OFFSET_OUT_OF_RANGE",
        "_AUTO_OFFSET_RESET",
        "_LOG_TRUNCATION",
        "FENCED_INSTANCE_ID",
        "INVALID_PRODUCER_EPOCH",
        "INVALID_PRODUCER_ID_MAPPING",
        "OUT_OF_ORDER_SEQUENCE_NUMBER",
        "PRODUCER_FENCED",
        "UNKNOWN_PRODUCER_ID",
        "_CRIT_SYS_RESOURCE",
        "_DESTROY",
        "_FATAL",
        "_FENCED",
        "_GAPLESS_GUARANTEE",
        "_INCONSISTENT",
        # One record was refused by the broker.
        "INVALID_RECORD",
        "INVALID_TIMESTAMP",
        "RECORD_LIST_TOO_LARGE",
        # Answers to requests that the programs never send, or only by mistake.
        "DUPLICATE_RESOURCE",
        "DUPLICATE_SEQUENCE_NUMBER",
        "DUPLICATE_VOTER",
        "ELECTION_NOT_NEEDED",
        "FEATURE_UPDATE_FAILED",
        "FENCED_STATE_EPOCH",
        "GROUP_ID_NOT_FOUND",
        "GROUP_SUBSCRIBED_TO_TOPIC",
        "INCONSISTENT_VOTER_SET",
        "INVALID_COMMIT_OFFSET_SIZE",
        "INVALID_PRINCIPAL_TYPE",
        "INVALID_RECORD_STATE",
        "INVALID_REGISTRATION",
        "INVALID_REGULAR_EXPRESSION",
        "INVALID_REQUEST",
        "INVALID_REQUIRED_ACKS",
        "INVALID_SHARE_SESSION_EPOCH",
        "INVALID_TRANSACTION_TIMEOUT",
        "INVALID_TXN_STATE",
        "INVALID_UPDATE_VERSION",
        "INVALID_VOTER_KEY",
        "MISMATCHED_ENDPOINT_TYPE",
        "NO_REASSIGNMENT_IN_PROGRESS",
        "OFFSET_METADATA_TOO_LARGE",
        "PRINCIPAL_DESERIALIZATION_FAILURE",
        "RESOURCE_NOT_FOUND",
        "SHARE_SESSION_LIMIT_REACHED",
        "SHARE_SESSION_NOT_FOUND",
        "STREAMS_INVALID_TOPOLOGY",
        "STREAMS_INVALID_TOPOLOGY_EPOCH",
        "STREAMS_TOPOLOGY_FENCED",
        "TELEMETRY_TOO_LARGE",
        "TRANSACTION_ABORTABLE",
        "TRANSACTION_COORDINATOR_FENCED",
        "UNACCEPTABLE_CREDENTIAL",
        "UNKNOWN_SUBSCRIPTION_ID",
        "UNSUPPORTED_ENDPOINT_TYPE",
        "VOTER_NOT_FOUND",
        # Wrong use of the client: a bug in the programs.
        "_APPLICATION",
        "_CONFLICT",
        "_EXISTING_SUBSCRIPTION",
        "_FAIL",
        "_INVALID_DIFFERENT_RECORD",
        "_INVALID_TYPE",
        "_KEY_DESERIALIZATION",
        "_KEY_SERIALIZATION",
        "_READ_ONLY",
        "_STATE",
        "_VALUE_DESERIALIZATION",
        "_VALUE_SERIALIZATION",
    ),
}

#: Every error code of librdkafka, and what a program does about it.
ACTIONS: dict[int, KafkaErrorAction] = {_code(name): action for action, names in _NAMES.items() for name in names}


def classify_kafka_error(error: KafkaError) -> KafkaErrorAction:
    """Return what to do about an error. A code outside the table is an outage if it is retriable; otherwise stop."""
    unforeseen = KafkaErrorAction.OUTAGE if error.retriable() else KafkaErrorAction.STOP
    action = ACTIONS.get(error.code(), unforeseen)
    return KafkaErrorAction.STOP if error.fatal() and action is not KafkaErrorAction.CONFIGURATION else action


def translate_kafka_error(error: KafkaError, message: Message | None = None) -> OrderlibError:
    """Return orderlib's error for one of librdkafka. ``message`` is the message that carried it, if any."""
    # Some of its texts end with a line break.
    text = f"Kafka: {' '.join(error.str().split())} ({error.name()})"
    topic = message.topic() if message else None
    if message is not None and topic is not None:
        text = f"{topic}[{message.partition()}] at offset {message.offset()}: {text}"
    match classify_kafka_error(error):
        case KafkaErrorAction.CONFIGURATION:
            return ConfigurationError(text)
        case KafkaErrorAction.UNREADABLE:
            return UnreadableRecord(text)
        case KafkaErrorAction.OUTAGE | KafkaErrorAction.NONE:
            return BrokerUnavailable(text)
        case KafkaErrorAction.STOP:
            return OrderlibError(text)


@contextlib.contextmanager
def translate_kafka_errors() -> Iterator[None]:
    """Translate errors of librdkafka into those of orderlib; the original is the cause."""
    try:
        yield
    except KafkaException as exc:
        raise translate_kafka_error(exc.args[0]) from exc
