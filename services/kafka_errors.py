"""What each of Kafka's error codes means for our programs. The only module that uses librdkafka's private names."""

# ruff: noqa: SLF001  librdkafka's own codes have no public spelling

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import Enum

from confluent_kafka import KafkaError, KafkaException, Message

from orderlib.errors import BrokerUnavailable, ConfigurationError, OrderlibError


class UnreadableRecord(BrokerUnavailable):
    """librdkafka cannot read a record batch: its partition waits, the others go on. An operator must act."""


class ErrorAction(Enum):
    """What a program does about an error."""

    #: No error: an event, or the end of something that we ended ourselves.
    NONE = "none"
    #: Wait, then try again.
    OUTAGE = "outage"
    #: A setting, a right or the topic is wrong. Waiting does not help.
    SETUP = "setup"
    #: One record batch cannot be read. The partition waits for an operator.
    UNREADABLE = "unreadable"
    #: Stop and name the code: the client is unusable, or the error must not happen with the requests that we send.
    STOP = "stop"


PARTITION_EOF = KafkaError._PARTITION_EOF
ALL_BROKERS_DOWN = KafkaError._ALL_BROKERS_DOWN
NO_GROUP_RIGHT = KafkaError.GROUP_AUTHORIZATION_FAILED
OFFSET_LOST = KafkaError._AUTO_OFFSET_RESET
SSL_ERROR = KafkaError._SSL
NO_TOPIC = frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC})
#: Reported for a connection. They name the cause of an outage, or the setting that is wrong.
CONNECTION = frozenset(
    {KafkaError._AUTHENTICATION, KafkaError._SSL, KafkaError._TRANSPORT, KafkaError._RESOLVE, KafkaError._TIMED_OUT}
)

_CODES: dict[ErrorAction, tuple[int, ...]] = {
    ErrorAction.NONE: (
        KafkaError.NO_ERROR,
        KafkaError._ASSIGN_PARTITIONS,
        KafkaError._NOOP,
        KafkaError._PARTITION_EOF,
        KafkaError._REVOKE_PARTITIONS,
    ),
    ErrorAction.OUTAGE: (
        # The broker is starting, stopping, electing, overloaded or unreachable.
        KafkaError.BROKER_NOT_AVAILABLE,
        KafkaError.CONCURRENT_TRANSACTIONS,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.ELIGIBLE_LEADERS_NOT_AVAILABLE,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.FETCH_SESSION_ID_NOT_FOUND,
        KafkaError.INVALID_FETCH_SESSION_EPOCH,
        KafkaError.KAFKA_STORAGE_ERROR,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.LISTENER_NOT_FOUND,
        KafkaError.LOG_DIR_NOT_FOUND,
        KafkaError.NETWORK_EXCEPTION,
        KafkaError.NOT_CONTROLLER,
        KafkaError.NOT_COORDINATOR,
        KafkaError.NOT_ENOUGH_REPLICAS,
        KafkaError.NOT_ENOUGH_REPLICAS_AFTER_APPEND,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.OFFSET_NOT_AVAILABLE,
        KafkaError.OPERATION_NOT_ATTEMPTED,
        KafkaError.PREFERRED_LEADER_NOT_AVAILABLE,
        KafkaError.REASSIGNMENT_IN_PROGRESS,
        KafkaError.REBOOTSTRAP_REQUIRED,
        KafkaError.REPLICA_NOT_AVAILABLE,
        KafkaError.REQUEST_TIMED_OUT,
        KafkaError.STALE_BROKER_EPOCH,
        KafkaError.STALE_CTRL_EPOCH,
        KafkaError.THROTTLING_QUOTA_EXCEEDED,
        KafkaError.UNKNOWN,
        KafkaError.UNKNOWN_CONTROLLER_ID,
        KafkaError.UNKNOWN_LEADER_EPOCH,
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._DESTROY_BROKER,
        KafkaError._INTR,
        KafkaError._IN_PROGRESS,
        KafkaError._ISR_INSUFF,
        KafkaError._MSG_TIMED_OUT,
        KafkaError._NODE_UPDATE,
        KafkaError._OUTDATED,
        KafkaError._PREV_IN_PROGRESS,
        KafkaError._PURGE_INFLIGHT,
        KafkaError._PURGE_QUEUE,
        KafkaError._QUEUE_FULL,
        KafkaError._RESOLVE,
        KafkaError._RETRY,
        KafkaError._TIMED_OUT,
        KafkaError._TIMED_OUT_QUEUE,
        KafkaError._TRANSPORT,
        KafkaError._UNKNOWN_BROKER,
        KafkaError._WAIT_CACHE,
        KafkaError._WAIT_COORD,
        # The group is rebalancing, or another member prevents us from joining. The client tries again.
        KafkaError.GROUP_MAX_SIZE_REACHED,
        KafkaError.ILLEGAL_GENERATION,
        KafkaError.INCONSISTENT_GROUP_PROTOCOL,
        KafkaError.MEMBER_ID_REQUIRED,
        KafkaError.REBALANCE_IN_PROGRESS,
        KafkaError.STALE_MEMBER_EPOCH,
        KafkaError.FENCED_MEMBER_EPOCH,
        KafkaError.UNKNOWN_MEMBER_ID,
        KafkaError.UNRELEASED_INSTANCE_ID,
        KafkaError.UNSTABLE_OFFSET_COMMIT,
        KafkaError.NON_EMPTY_GROUP,
        KafkaError._ASSIGNMENT_LOST,
        KafkaError._MAX_POLL_EXCEEDED,
        KafkaError._NO_OFFSET,
        # Metadata of a topic that was just made or deleted is not the same on all brokers yet.
        KafkaError.INCONSISTENT_TOPIC_ID,
        KafkaError.UNKNOWN_TOPIC_ID,
        KafkaError.TOPIC_ALREADY_EXISTS,
    ),
    ErrorAction.SETUP: (
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.DELEGATION_TOKEN_AUTHORIZATION_FAILED,
        KafkaError.DELEGATION_TOKEN_AUTH_DISABLED,
        KafkaError.DELEGATION_TOKEN_EXPIRED,
        KafkaError.DELEGATION_TOKEN_NOT_FOUND,
        KafkaError.DELEGATION_TOKEN_OWNER_MISMATCH,
        KafkaError.DELEGATION_TOKEN_REQUEST_NOT_ALLOWED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.ILLEGAL_SASL_STATE,
        KafkaError.INVALID_CONFIG,
        KafkaError.INVALID_GROUP_ID,
        KafkaError.INVALID_PARTITIONS,
        KafkaError.INVALID_REPLICATION_FACTOR,
        KafkaError.INVALID_REPLICA_ASSIGNMENT,
        KafkaError.INVALID_SESSION_TIMEOUT,
        KafkaError.POLICY_VIOLATION,
        KafkaError.SASL_AUTHENTICATION_FAILED,
        KafkaError.SECURITY_DISABLED,
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.TOPIC_DELETION_DISABLED,
        KafkaError.TOPIC_EXCEPTION,
        KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError.UNSUPPORTED_ASSIGNOR,
        KafkaError.UNSUPPORTED_SASL_MECHANISM,
        KafkaError.UNSUPPORTED_VERSION,
        KafkaError._AUTHENTICATION,
        KafkaError._FS,
        KafkaError._INVALID_ARG,
        KafkaError._NOT_CONFIGURED,
        KafkaError._SSL,
        KafkaError._UNKNOWN_GROUP,
        KafkaError._UNKNOWN_PARTITION,
        KafkaError._UNKNOWN_PROTOCOL,
        KafkaError._UNKNOWN_TOPIC,
        KafkaError._UNSUPPORTED_FEATURE,
    ),
    ErrorAction.UNREADABLE: (
        KafkaError.INVALID_MSG,
        KafkaError.INVALID_MSG_SIZE,
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.UNSUPPORTED_COMPRESSION_TYPE,
        KafkaError.UNSUPPORTED_FOR_MESSAGE_FORMAT,
        KafkaError._BAD_COMPRESSION,
        KafkaError._BAD_MSG,
        KafkaError._NOT_IMPLEMENTED,
        KafkaError._PARTIAL,
        KafkaError._UNDERFLOW,
    ),
    ErrorAction.STOP: (
        # The next record is gone, or the client can do nothing more.
        KafkaError.OFFSET_OUT_OF_RANGE,
        KafkaError._AUTO_OFFSET_RESET,
        KafkaError._LOG_TRUNCATION,
        KafkaError.FENCED_INSTANCE_ID,
        KafkaError.INVALID_PRODUCER_EPOCH,
        KafkaError.INVALID_PRODUCER_ID_MAPPING,
        KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER,
        KafkaError.PRODUCER_FENCED,
        KafkaError.UNKNOWN_PRODUCER_ID,
        KafkaError._CRIT_SYS_RESOURCE,
        KafkaError._DESTROY,
        KafkaError._FATAL,
        KafkaError._FENCED,
        KafkaError._GAPLESS_GUARANTEE,
        KafkaError._INCONSISTENT,
        # One record was refused by the broker.
        KafkaError.INVALID_RECORD,
        KafkaError.INVALID_TIMESTAMP,
        KafkaError.RECORD_LIST_TOO_LARGE,
        # Answers to requests that we never send, or that we would have to send wrongly.
        KafkaError.DUPLICATE_RESOURCE,
        KafkaError.DUPLICATE_SEQUENCE_NUMBER,
        KafkaError.DUPLICATE_VOTER,
        KafkaError.ELECTION_NOT_NEEDED,
        KafkaError.FEATURE_UPDATE_FAILED,
        KafkaError.FENCED_STATE_EPOCH,
        KafkaError.GROUP_ID_NOT_FOUND,
        KafkaError.GROUP_SUBSCRIBED_TO_TOPIC,
        KafkaError.INCONSISTENT_VOTER_SET,
        KafkaError.INVALID_COMMIT_OFFSET_SIZE,
        KafkaError.INVALID_PRINCIPAL_TYPE,
        KafkaError.INVALID_RECORD_STATE,
        KafkaError.INVALID_REGISTRATION,
        KafkaError.INVALID_REGULAR_EXPRESSION,
        KafkaError.INVALID_REQUEST,
        KafkaError.INVALID_REQUIRED_ACKS,
        KafkaError.INVALID_SHARE_SESSION_EPOCH,
        KafkaError.INVALID_TRANSACTION_TIMEOUT,
        KafkaError.INVALID_TXN_STATE,
        KafkaError.INVALID_UPDATE_VERSION,
        KafkaError.INVALID_VOTER_KEY,
        KafkaError.MISMATCHED_ENDPOINT_TYPE,
        KafkaError.NO_REASSIGNMENT_IN_PROGRESS,
        KafkaError.OFFSET_METADATA_TOO_LARGE,
        KafkaError.PRINCIPAL_DESERIALIZATION_FAILURE,
        KafkaError.RESOURCE_NOT_FOUND,
        KafkaError.SHARE_SESSION_LIMIT_REACHED,
        KafkaError.SHARE_SESSION_NOT_FOUND,
        KafkaError.STREAMS_INVALID_TOPOLOGY,
        KafkaError.STREAMS_INVALID_TOPOLOGY_EPOCH,
        KafkaError.STREAMS_TOPOLOGY_FENCED,
        KafkaError.TELEMETRY_TOO_LARGE,
        KafkaError.TRANSACTION_ABORTABLE,
        KafkaError.TRANSACTION_COORDINATOR_FENCED,
        KafkaError.UNACCEPTABLE_CREDENTIAL,
        KafkaError.UNKNOWN_SUBSCRIPTION_ID,
        KafkaError.UNSUPPORTED_ENDPOINT_TYPE,
        KafkaError.VOTER_NOT_FOUND,
        # Wrong use of the client: a fault in our code.
        KafkaError._APPLICATION,
        KafkaError._CONFLICT,
        KafkaError._EXISTING_SUBSCRIPTION,
        KafkaError._FAIL,
        KafkaError._INVALID_DIFFERENT_RECORD,
        KafkaError._INVALID_TYPE,
        KafkaError._KEY_DESERIALIZATION,
        KafkaError._KEY_SERIALIZATION,
        KafkaError._NOENT,
        KafkaError._READ_ONLY,
        KafkaError._STATE,
        KafkaError._VALUE_DESERIALIZATION,
        KafkaError._VALUE_SERIALIZATION,
    ),
}

#: Every error code of librdkafka, and what a program does about it.
ACTIONS: dict[int, ErrorAction] = {code: action for action, codes in _CODES.items() for code in codes}


def action_of(error: KafkaError) -> ErrorAction:
    """What to do about an error. A code that the table lacks is an outage only if librdkafka calls it retriable."""
    unforeseen = ErrorAction.OUTAGE if error.retriable() else ErrorAction.STOP
    action = ACTIONS.get(error.code(), unforeseen)
    return ErrorAction.STOP if error.fatal() and action is not ErrorAction.SETUP else action


def translate(error: KafkaError, message: Message | None = None) -> OrderlibError:
    """Return our error for one of librdkafka's, by the table. ``message`` is the one that carried it, if any did."""
    text = f"Kafka: {error.str()} ({error.name()})"
    topic = message.topic() if message else None
    if message is not None and topic is not None:
        text = f"{topic}[{message.partition()}] at offset {message.offset()}: {text}"
    match action_of(error):
        case ErrorAction.SETUP:
            return ConfigurationError(text)
        case ErrorAction.UNREADABLE:
            return UnreadableRecord(text)
        case ErrorAction.OUTAGE | ErrorAction.NONE:
            return BrokerUnavailable(text)
        case ErrorAction.STOP:
            return OrderlibError(text)


@contextlib.contextmanager
def translated_errors() -> Iterator[None]:
    """Raise our error, ``from`` librdkafka's."""
    try:
        yield
    except KafkaException as exc:
        raise translate(exc.args[0]) from exc
