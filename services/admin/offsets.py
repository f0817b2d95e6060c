"""``lag`` and ``offsets show | reset | set-group``: the stored offsets."""

from __future__ import annotations

import argparse
import datetime as dt
import sys
from collections.abc import Iterable, Mapping

from confluent_kafka import ConsumerGroupState

from orderlib.commands import APPLICATION_NAME, Commands
from orderlib.entry_point import EXIT_DONE, EXIT_FAILED
from orderlib.errors import ConfigurationError
from orderlib.ingestion.records import StoredOffset
from orderlib.postgres.connections import open_connection
from orderlib.postgres.operations import (
    as_owner,
    consumer_group,
    index_advice,
    reset_offsets,
    set_consumer_group,
    stored_offsets,
)
from services.admin.database import open_database, warn_of_superuser
from services.admin.output import (
    add_json_option,
    add_yes_option,
    confirm,
    count_of,
    print_table,
    rfc3339_time,
    utf8_text,
)
from services.admin.topic_reader import TopicReader
from services.kafka import REQUEST_TIMEOUT_S
from services.settings import KafkaSettings, database_url, without_outer_space

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)

_STOPPED = {ConsumerGroupState.EMPTY, ConsumerGroupState.DEAD}


def add_commands(commands: Commands) -> None:
    """Add these commands to the parser."""
    lag = commands.add_parser(
        "lag",
        help="show how many records the consumer has not handled yet",
        description="Print the lag of each partition: log end minus next offset (ORDERS_READER_URL).",
    )
    add_json_option(lag)
    lag.set_defaults(command=_lag)

    parser = commands.add_parser(
        "offsets", help="show or move the stored offsets", description="Show or move the offsets stored in PostgreSQL."
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    showing = actions.add_parser("show", help="list all stored offsets (ORDERS_READER_URL)")
    add_json_option(showing)
    showing.set_defaults(command=_show)
    resetting = actions.add_parser(
        "reset",
        help="move the offsets of a stopped group (ORDERS_MIGRATOR_URL)",
        description="Move the stored offsets of the current topic. Without --execute it only shows the change. Moving "
        "back replays records. This is idempotent for an order whose records are all in one partition, which their key "
        "ensures. But an order that was saved from Python, or that has records in several partitions, may go back to "
        "an older version. Forgotten orders stay deleted. Moving forward skips records permanently: they are never "
        "stored.",
    )
    to = resetting.add_mutually_exclusive_group(required=True)
    to.add_argument("--to-earliest", action="store_true", help="to the earliest record that Kafka still has")
    to.add_argument("--to-latest", action="store_true", help="to the log end")
    to.add_argument(
        "--to-time", metavar="TIME", type=rfc3339_time, help="to the first record at or after this RFC 3339 time"
    )
    to.add_argument("--to-offset", metavar="N", type=int, help="to this offset; needs --partition")
    resetting.add_argument("--partition", type=int, help="only this partition")
    resetting.add_argument("--execute", action="store_true", help="change the offsets")
    add_yes_option(resetting)
    add_json_option(resetting)
    resetting.set_defaults(command=_reset)
    naming = actions.add_parser(
        "set-group",
        help="rename the consumer group that owns the stored offsets (ORDERS_MIGRATOR_URL)",
        description="A database belongs to one consumer group: the first that started. This command renames that "
        "group and keeps every offset, so no record is skipped or handled twice. Use it to rename the group, or after "
        "a consumer started with a wrong ORDERS_CONSUMER_GROUP. Stop the consumers of both groups first. Without "
        "--execute it only shows the change.",
    )
    naming.add_argument("group", metavar="GROUP", type=utf8_text, help="the new ORDERS_CONSUMER_GROUP")
    naming.add_argument("--execute", action="store_true", help="rename the group")
    add_yes_option(naming)
    add_json_option(naming)
    naming.set_defaults(command=_set_group)


def _timestamp_ms(moment: dt.datetime) -> int:
    """Return the first millisecond of Kafka's clock at this time or later.

    Times before 1970 become 0, because no record is older, and Kafka reads negative timestamps as names of offsets:
    -1 is the log end.
    """
    return max(0, -((_EPOCH - moment) // dt.timedelta(milliseconds=1)))


def _lag(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    with open_database(environ, "ORDERS_READER_URL") as connection:
        stored, advice = stored_offsets(connection), index_advice(connection)
    topic_reader = TopicReader(KafkaSettings.from_mapping(environ))
    offsets = {offset.partition: offset for offset in stored if offset.topic_id == topic_reader.topic_id}
    earliest, ends = topic_reader.earliest(), topic_reader.ends()
    rows, problems = [], []
    for partition in sorted(topic_reader.partitions):
        known = offsets.get(partition)
        next_offset = known.next_offset if known else earliest[partition]
        rows.append(
            {
                "topic": topic_reader.topic,
                "partition": partition,
                "next_offset": next_offset,
                "log_end": ends[partition],
                "lag": ends[partition] - next_offset,
                "updated_at": known.updated_at if known else None,
            }
        )
        if known and (problem := _offset_problem(next_offset, earliest[partition], ends[partition])):
            problems.append(f"warning: {topic_reader.topic}[{partition}]: {problem}")
    print_table(rows, as_json=options.json)
    for problem in problems:
        print(problem, file=sys.stderr)
    if advice is not None:
        print(f"advice: {advice}", file=sys.stderr)
    return EXIT_DONE


def _offset_problem(next_offset: int, earliest: int, end: int) -> str | None:
    """Return why the consumer cannot continue at an offset that Kafka does not have; ``None`` if it has it."""
    if next_offset < earliest:
        return (
            f"up to {count_of(earliest - next_offset, 'record')} before Kafka's earliest offset {earliest} were never "
            "handled and are gone"
        )
    if next_offset > end:
        return f"the stored next_offset {next_offset} is after Kafka's log end {end}: Kafka has lost records"
    return None


def _show(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    with open_database(environ, "ORDERS_READER_URL") as connection:
        stored = stored_offsets(connection)
    rows = [
        {
            "group": offset.group,
            "topic": offset.topic,
            "topic_id": offset.topic_id,
            "partition": offset.partition,
            "next_offset": offset.next_offset,
            "updated_at": offset.updated_at,
        }
        for offset in stored
    ]
    print_table(rows, as_json=options.json)
    return EXIT_DONE


def _reset(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    if options.to_offset is not None and options.partition is None:
        raise ConfigurationError("--to-offset needs --partition")
    url = database_url(environ, "ORDERS_MIGRATOR_URL")
    topic_reader = TopicReader(KafkaSettings.from_mapping(environ))
    with open_connection(url, application_name=APPLICATION_NAME) as connection:
        with as_owner(connection):
            stored = stored_offsets(connection)
        mine = {
            offset.partition: offset
            for offset in stored
            if offset.topic_id == topic_reader.topic_id and options.partition in {None, offset.partition}
        }
        if not mine:
            raise _no_offsets_error(topic_reader, options.partition, stored)
        wanted = {
            partition: offset
            for partition, offset in _target_offsets(options, topic_reader).items()
            if partition in mine
        }
        rows = [
            {
                "partition": partition,
                "next_offset": mine[partition].next_offset,
                "new_next_offset": offset,
                "replayed": max(0, mine[partition].next_offset - offset),
                "skipped": max(0, offset - mine[partition].next_offset),
            }
            for partition, offset in sorted(wanted.items())
        ]
        print_table(rows, as_json=options.json)
        if any(row["replayed"] for row in rows):
            print(
                "warning: orders that were saved from Python or have records in several partitions may go back to "
                "older versions",
                file=sys.stderr,
            )
        if not options.execute:
            print("nothing was changed; add --execute to change it", file=sys.stderr)
            return EXIT_DONE
        group = next(iter(mine.values())).group
        if not confirm(f"move the offsets of group {group!r}", yes=options.yes):
            return EXIT_FAILED
        _require_stopped(topic_reader, group)
        reset_offsets(connection, group, topic_reader.topic_id, wanted)
        print("moved the offsets", file=sys.stderr)
    return EXIT_DONE


def _no_offsets_error(
    topic_reader: TopicReader, partition: int | None, stored: Iterable[StoredOffset]
) -> ConfigurationError:
    topic, topic_id = topic_reader.topic, topic_reader.topic_id
    ids = {offset.topic_id for offset in stored if offset.topic == topic}
    if ids and topic_id not in ids:
        return ConfigurationError(
            f"no offsets of topic {topic} with id {topic_id} are stored; those of id {', '.join(sorted(ids))} belong "
            "to an earlier topic of that name"
        )
    which = "" if partition is None else f"[{partition}]"
    return ConfigurationError(f"no offsets of topic {topic}{which} are stored")


def _set_group(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    url = database_url(environ, "ORDERS_MIGRATOR_URL")
    without_outer_space("GROUP", options.group)
    topic_reader = TopicReader(KafkaSettings.from_mapping(environ))
    with open_connection(url, application_name=APPLICATION_NAME) as connection:
        warn_of_superuser(connection, "ORDERS_MIGRATOR_URL")
        with as_owner(connection):
            group = consumer_group(connection)
        print_table([{"group": group, "new_group": options.group}], as_json=options.json)
        if group == options.group:
            print("nothing to change", file=sys.stderr)
            return EXIT_DONE
        if not options.execute:
            print("nothing was changed; add --execute to change it", file=sys.stderr)
            return EXIT_DONE
        if not confirm(
            f"rename consumer group {group!r} to {options.group!r}"
            if group
            else f"set the consumer group of this database to {options.group!r}",
            yes=options.yes,
        ):
            return EXIT_FAILED
        for name in {group, options.group} - {None}:
            _require_stopped(topic_reader, name)
        set_consumer_group(connection, options.group)
        print(f"the database now belongs to consumer group {options.group!r}", file=sys.stderr)
    return EXIT_DONE


def _target_offsets(options: argparse.Namespace, topic_reader: TopicReader) -> dict[int, int]:
    if options.to_earliest:
        return topic_reader.earliest()
    if options.to_latest:
        return topic_reader.ends()
    if options.to_time is not None:
        return topic_reader.at_time(_timestamp_ms(options.to_time))
    earliest, ends = topic_reader.earliest(), topic_reader.ends()
    if options.partition not in ends:
        raise ConfigurationError(f"topic {topic_reader.topic!r} has no partition {options.partition}")
    if not earliest[options.partition] <= options.to_offset <= ends[options.partition]:
        raise ConfigurationError(
            f"--to-offset must be from {earliest[options.partition]} to {ends[options.partition]}: Kafka has no others"
        )
    return {options.partition: options.to_offset}


def _require_stopped(topic_reader: TopicReader, group: str) -> None:
    future = topic_reader.cluster.admin.describe_consumer_groups([group], request_timeout=REQUEST_TIMEOUT_S)[group]
    found = topic_reader.cluster.wait_for(future)
    if found.state not in _STOPPED:
        raise ConfigurationError(f"group {group!r} has {len(found.members)} running consumers; stop them first")
