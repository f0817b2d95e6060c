"""``topics``: the topic that orders are published to."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, NewTopic, ResourceType

from orderlib.config import KafkaSettings, max_record_bytes
from orderlib.errors import BrokerUnreachable
from orderlib.program import EXIT_DONE
from services.admin.output import positive
from services.admin.schema import Commands
from services.kafka import ANSWER_S, Cluster

#: Keys, headers and framing need room beside the largest value.
_ROOM_BYTES = 1024 * 1024

#: Partitions bound how many consumers can share the work.
_PARTITIONS = 6


def add_commands(commands: Commands) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "topics",
        help="make the topic of orders",
        description="Make the topic ORDERS_TOPIC, and set its max.message.bytes above ORDERS_MAX_RECORD_BYTES. A topic "
        "that exists keeps its partitions and records.",
    )
    parser.add_argument(
        "--partitions", metavar="N", type=positive, default=_PARTITIONS, help="of a new topic (%(default)s)"
    )
    parser.add_argument(
        "--replication-factor", metavar="N", type=positive, default=-1, help="of a new topic (the cluster's default)"
    )
    parser.set_defaults(command=_topics)


def _topics(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    settings = KafkaSettings.from_mapping(environ)
    largest = max_record_bytes(environ) + _ROOM_BYTES
    cluster = Cluster(settings)
    topic = NewTopic(
        settings.topic,
        num_partitions=options.partitions,
        replication_factor=options.replication_factor,
        config={"max.message.bytes": str(largest)},
    )
    made, partitions = _make(cluster, topic), options.partitions
    if not made:
        partitions = len(cluster.describe(settings.topic).partitions)
        entry = ConfigEntry("max.message.bytes", str(largest), incremental_operation=AlterConfigOpType.SET)
        resource = ConfigResource(ResourceType.TOPIC, settings.topic, incremental_configs=[entry])
        cluster.answer(cluster.admin.incremental_alter_configs([resource], request_timeout=ANSWER_S)[resource])
    what = "made" if made else "exists"
    print(f"topic {settings.topic} {what}: {partitions} partitions, records of at most {largest:,} bytes")
    return EXIT_DONE


def _make(cluster: Cluster, topic: NewTopic) -> bool:
    """Whether the topic was made now; another may have been quicker."""
    question = cluster.admin.create_topics([topic], operation_timeout=ANSWER_S, request_timeout=ANSWER_S)[topic.topic]
    try:
        cluster.answer(question)
    except BrokerUnreachable as exc:
        cause = exc.__cause__
        if isinstance(cause, KafkaException) and cause.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS:
            return False
        raise
    return True
