"""Batches of records of one partition, and the store that writes them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from contextlib import contextmanager

from orderlib.ingestion.records import Batch, OffsetRange, Record, Tombstones, TopicPartition, classify_record
from orderlib.postgres.consumer_store import BatchResult, ConsumerStore
from orderlib.postgres.rows import pack_rows
from orderlib.repository import RecordPosition
from tests.support.databases import Database

PARTITION = TopicPartition("orders", 0)


@contextmanager
def consumer_store(database: Database) -> Iterator[ConsumerStore]:
    """Yield the store of a consumer that begins at offset 0."""
    store = ConsumerStore(database.writer_url, "tests", lambda: 0.0)
    store.claim_database()
    store.start_partitions({"orders": "topic"}, {PARTITION: 0})
    yield store
    store.close()


def batch(
    offset: int, *contents: tuple[bytes | None, bytes | None], tombstones: Tombstones = Tombstones.REJECT
) -> Batch:
    """Return a batch of records with these keys and values."""
    records = [
        Record(
            position=RecordPosition(topic_id="topic", partition=0, offset=offset + index),
            time=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
            topic="orders",
            key=key,
            value=value,
        )
        for index, (key, value) in enumerate(contents)
    ]
    return Batch(
        topic_ids={"orders": "topic"},
        ranges={PARTITION: OffsetRange(expected_offset=offset, next_offset=offset + len(records))},
        classified=tuple((record, classify_record(record, 10_000, pack_rows, tombstones)) for record in records),
    )


def ignore(_result: BatchResult) -> None:
    pass
