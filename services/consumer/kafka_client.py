"""Kafka as the consumer sees it: the Protocol of the client, and what a poll returns.

``KafkaConsumer`` implements it with librdkafka. ``tests.simulation`` implements it without a broker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import attrs

from orderlib.errors import OrderlibError
from orderlib.ingestion.consumer_core import PartitionEof
from orderlib.ingestion.records import Record, TopicPartition
from services.kafka import REQUEST_TIMEOUT_S, TopicInfo


@attrs.frozen
class FetchFailed:
    """An error of a fetch or of the group. The client retries by itself until it is closed."""

    #: ``None`` if the error does not belong to one partition.
    partition: TopicPartition | None
    error: OrderlibError


PollResult = Record | PartitionEof | FetchFailed


class GroupListener(Protocol):
    """Receives the changes of this member's assignment."""

    def on_partitions_assigned(self, partitions: Iterable[TopicPartition]) -> None:
        """The group assigned these partitions, in addition to those assigned before."""

    def on_partitions_revoked(self, partitions: Iterable[TopicPartition]) -> None:
        """The group revoked these partitions, or they were lost. Another member may already have them."""


class KafkaClient(Protocol):
    """One member of a consumer group.

    The requests to the cluster may run in any thread. All other methods must run in one thread. Every method may raise
    ConfigurationError because a setting, an ACL or the topic is wrong.
    """

    @property
    def unavailable(self) -> bool:
        """Return whether no broker can be reached, as far as the client knows."""

    @property
    def unavailable_message(self) -> str:
        """Return the message that Kafka is unavailable. It has the addresses and the last error of a connection."""

    # Requests to the cluster.

    def describe(self) -> Mapping[str, TopicInfo]:
        """Return the id and the partitions of each topic to which the consumer subscribes.

        Raise BrokerUnavailable if there is no response in time, or ConfigurationError if a topic does not exist.
        """

    def request_topics(self, timeout_s: float = REQUEST_TIMEOUT_S) -> Callable[[], Mapping[str, TopicInfo]]:
        """Send the request of ``describe``, and return a function that waits for its result.

        The function raises BrokerUnavailable if there is no response within ``timeout_s``.
        """

    def earliest(self, partitions: Iterable[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Return the earliest offset that Kafka still has of each partition.

        Raise BrokerUnavailable if there is no response in time.
        """

    def ends(self, partitions: Iterable[TopicPartition]) -> Mapping[TopicPartition, int]:
        """Return the log end of each partition: its last stable offset.

        Raise BrokerUnavailable if there is no response in time.
        """

    def request_ends(self, partitions: Iterable[TopicPartition]) -> Callable[[], Mapping[TopicPartition, int] | None]:
        """Send the request of ``ends`` and do not wait.

        The returned function never waits. It returns ``None`` until the response has arrived, and then the log ends
        that are known. A partition whose request failed is missing.
        """

    # Membership.

    def join(self, listener: GroupListener) -> None:
        """Join the group and subscribe to the topics.

        The listener is called only from inside ``fetch`` and ``poll``, before they return. An assigned partition is not
        fetched before ``assign``. A revoked partition is no longer fetched when the listener is called; records of it
        may still be in the result of that call.
        """

    def fetch(self, topic_ids: Mapping[str, str], limit: int, timeout_s: float) -> Sequence[PollResult]:
        """Return the records and other events that are ready, at most ``limit`` messages, in the order of a partition.

        Wait for the first one for at most ``timeout_s``, and for no other. ``topic_ids`` has the topic ids for the
        positions of the records. Records of aborted transactions are left out. At the end of a partition there is one
        PartitionEof, with the offset after any gap. For an offset that Kafka no longer has there is a FetchFailed that
        is not transient: records are never skipped.
        """

    def poll(self, topic_ids: Mapping[str, str], timeout_s: float) -> Sequence[PollResult]:
        """Return at most one message, like ``fetch``.

        While all partitions are paused, call this or ``fetch`` regularly: otherwise the group removes this member.
        """

    def assign(self, next_offsets: Mapping[TopicPartition, int]) -> None:
        """Start to fetch these assigned partitions, each from its offset. They are not paused, even if others are."""

    def seek(self, partition: TopicPartition, next_offset: int) -> None:
        """Fetch this partition from this offset. Records that ``fetch`` returned before are not affected."""

    def pause(self) -> None:
        """Stop fetching all partitions that are now assigned. They stay assigned, with their offsets."""

    def resume(self) -> None:
        """Fetch all assigned partitions again, each from its offset."""

    def commit(self, next_offsets: Mapping[TopicPartition, int]) -> None:
        """Commit these offsets to Kafka for lag tools. Never wait, and never raise: a failure is only logged."""

    def close(self, timeout_s: float) -> bool:
        """Leave the group. Return whether that succeeded in time. The client cannot be used after this call."""
