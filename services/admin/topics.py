"""``topics``: create the topic that orders are sent to."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, NewTopic, ResourceType

from orderlib.commands import Commands
from orderlib.entry_point import EXIT_DONE
from orderlib.errors import BrokerUnavailable, OrderlibError
from services.admin.output import count_of, integer_up_to
from services.kafka import REQUEST_TIMEOUT_S, Cluster
from services.settings import KafkaSettings, max_record_bytes

#: The space that the key, the headers and the framing of a record need beside the largest value.
_OVERHEAD_BYTES = 1024 * 1024

#: The limits of librdkafka.
_MAX_PARTITIONS = 100_000
_MAX_REPLICATION_FACTOR = 10_000

#: At most this many consumers can share the work.
_PARTITIONS = 6


def add_commands(commands: Commands) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "topics",
        help="create the topic, or raise its max.message.bytes",
        description="Create the topic ORDERS_TOPIC, and raise its max.message.bytes above ORDERS_MAX_RECORD_BYTES. "
        "An existing topic keeps its partitions, its records and a greater max.message.bytes.",
    )
    parser.add_argument(
        "--partitions",
        metavar="N",
        type=integer_up_to(_MAX_PARTITIONS),
        default=_PARTITIONS,
        help="number of partitions of a new topic (%(default)s)",
    )
    parser.add_argument(
        "--replication-factor",
        metavar="N",
        type=integer_up_to(_MAX_REPLICATION_FACTOR),
        default=-1,
        help="replication factor of a new topic (default: the cluster's)",
    )
    parser.set_defaults(command=_topics)


def _topics(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    settings = KafkaSettings.from_mapping(environ)
    largest = max_record_bytes(environ) + _OVERHEAD_BYTES
    cluster = Cluster(settings)
    topic = NewTopic(
        settings.topic,
        num_partitions=options.partitions,
        replication_factor=options.replication_factor,
    )
    is_new, partitions = _create(cluster, topic), options.partitions
    if not is_new:
        partitions = len(cluster.describe(settings.topic).partitions)
    before = _max_message_bytes(cluster, settings.topic, is_new=is_new)
    if before < largest:
        entry = ConfigEntry("max.message.bytes", str(largest), incremental_operation=AlterConfigOpType.SET)
        resource = ConfigResource(ResourceType.TOPIC, settings.topic, incremental_configs=[entry])
        cluster.wait_for(
            cluster.admin.incremental_alter_configs([resource], request_timeout=REQUEST_TIMEOUT_S)[resource]
        )
    what = f"created topic {settings.topic}" if is_new else f"topic {settings.topic} exists"
    limit = f"raised from {before:,} to {largest:,}" if before < largest else f"{before:,}, unchanged"
    print(f"{what}: {count_of(partitions, 'partition')}, max.message.bytes {limit}")
    return EXIT_DONE


def _max_message_bytes(cluster: Cluster, topic: str, *, is_new: bool) -> int:
    """Return the value in effect, whether it is set on the topic or inherited from the broker."""
    resource = ConfigResource(ResourceType.TOPIC, topic)
    deadline_s = time.monotonic() + REQUEST_TIMEOUT_S
    while True:
        try:
            found = cluster.wait_for(
                cluster.admin.describe_configs([resource], request_timeout=REQUEST_TIMEOUT_S)[resource]
            )
        except OrderlibError:
            # The broker that was asked may not know a new topic yet.
            if not is_new or time.monotonic() > deadline_s:
                raise
            time.sleep(0.1)
        else:
            return int(found["max.message.bytes"].value)


def _create(cluster: Cluster, topic: NewTopic) -> bool:
    """Return whether this call created the topic. Another program may have created it first."""
    future = cluster.admin.create_topics(
        [topic], operation_timeout=REQUEST_TIMEOUT_S, request_timeout=REQUEST_TIMEOUT_S
    )[topic.topic]
    try:
        cluster.wait_for(future)
    except BrokerUnavailable as exc:
        cause = exc.__cause__
        if isinstance(cause, KafkaException) and cause.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS:
            return False
        raise
    return True
